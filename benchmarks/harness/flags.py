"""Flags that the commands share."""

import argparse

import torch


def integers(text):
    """ "256,1024" -> [256, 1024]"""
    return [int(part) for part in text.split(",")]


def names(text):
    return text.split(",")


def shapes(text):
    """ "512x1376,..." -> [(512, 1376), ...], input by output features."""
    return [tuple(int(size) for size in part.split("x")) for part in text.split(",")]


def parse(description, add_flags, quick, budget):
    """The arguments of a command; with --quick, `quick` replaces the defaults."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=0, help="torch threads on the CPU; 0: torch's own choice")
    parser.add_argument("--budget", type=float, default=budget, help="seconds for the whole command, about")
    parser.add_argument("--min-rounds", type=int, default=3)
    parser.add_argument("--max-rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny grid that shows that the command works")
    parser.add_argument("--output", help="result file; default: benchmarks/results/")
    add_flags(parser)
    is_quick = parser.parse_known_args()[0].quick
    if is_quick:
        parser.set_defaults(budget=0.0, min_rounds=2, max_rounds=2, **quick)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return args
