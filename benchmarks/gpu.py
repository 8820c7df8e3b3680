"""Measures POET's layers on a GPU, and the constants by which it chooses how to compute one, into one JSON file.

    python -m benchmarks.gpu --out results.json                          # CUDA, a few minutes
    python -m benchmarks.gpu --out results.json --device cpu --quick     # the same code on a CPU, tiny, seconds

- `correctness`: the largest relative error of POET layers against the reference in float64, for every path. If one is
  beyond the tolerance, the command fails.
- `costs`: the fields of `poet_peft.ops.paths.PathCosts` for this device: what moving an entry costs beside the flops
  of a full matrix product, in such flops. Each is the median over `pieces`, the operations that were timed.
- `choices`: milliseconds of every path on layers of several shapes, the one that the costs choose, and its time over
  that of the fastest (`regret`).
- `layers`: forward and backward of a linear layer trained in full, frozen, rotated by POET, with PEFT's LoRA and OFT,
  as `layer.py --device cuda --dtype bfloat16` measures and writes them.
- `steps`: time and memory of whole training steps of a Llama as `model.py` measures them, folds after every step too.

To use the costs: `poet_peft.ops.paths.COSTS["cuda"] = PathCosts(**json.load(open("results.json"))["costs"])`.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch

from benchmarks import layer
from benchmarks.harness import flags
from benchmarks.harness.layer_check import PATHS, check_layers, randn
from benchmarks.harness.llama import PRESETS, LlamaContender
from benchmarks.harness.methods import autocast, build_layer
from benchmarks.harness.results import start
from benchmarks.harness.timing import Clock, interleave, quartiles, summarize
from poet_peft.ops import paths


@dataclass(frozen=True)
class Sizes:
    """What is measured: on a GPU, or with `--quick`, where running matters and numbers do not."""

    num_tokens: int
    layers: list[tuple[int, int]]  # (in_features, out_features)
    methods: list[str]
    layer_seconds: float  # of rounds, for all methods on one shape
    pieces: list[tuple[int, int, int]]  # (N, dim, block size)
    choices: list[tuple[int, int, int, int]]  # (N, in_features, out_features, block size)
    model: str  # a key of PRESETS
    vocab_size: int
    batch_size: int
    seq_length: int
    model_methods: list[str]
    rounds: int


FULL = Sizes(
    num_tokens=16384,
    layers=[(4096, 4096), (4096, 11008), (512, 512), (1024, 2816)],
    methods=flags.names(
        "full,frozen,lora-64,oft-32,oft-64,oft-256,poet-64,poet-64-efficient,poet-128,poet-128-efficient,poet-256,"
        "poet-256-efficient,poet-fs-1/2,poet-fs-1/2-efficient"
    ),
    layer_seconds=15.0,
    pieces=[(n, dim, b) for n in (1024, 16384) for dim in (1024, 4096) for b in (32, 64, 128, 256)],
    choices=[
        (n, *shape, b)
        for n in (256, 4096, 16384)
        for shape in ((512, 512), (1024, 2816), (4096, 4096))
        for b in (32, 64, 256)
    ],
    model="130m",
    vocab_size=32000,
    batch_size=32,
    seq_length=256,
    model_methods=flags.names("full,poet-256,poet-ortho-128,poet-ortho-256"),
    rounds=30,
)
QUICK = Sizes(
    num_tokens=64,
    layers=[(48, 32)],
    methods=flags.names("full,frozen,lora-4,oft-8,poet-8,poet-8-efficient,poet-fs-1/2"),
    layer_seconds=0.0,
    pieces=[(64, 48, 8), (64, 96, 16)],
    choices=[(64, 48, 32, 8)],
    model="tiny",
    vocab_size=64,
    batch_size=2,
    seq_length=8,
    model_methods=flags.names("full,poet-16,poet-ortho-16"),
    rounds=2,
)


# Costs


def measure_pieces(device, dtype, sizes):
    """Seconds of the operations that the cost model counts, by shape."""
    rows = []
    for num_tokens, dim, b in sizes.pieces:
        num_blocks = dim // b
        x, y = (randn(num_tokens, dim, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
        weight = randn(dim, dim, device=device, dtype=dtype, seed=3)
        blocks = randn(num_blocks, b, b, device=device, dtype=dtype, seed=4)
        ordering = torch.randperm(dim, generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(device)
        back = ordering.argsort().int()

        def in_blocks(a, axis=1, ordering=ordering, num_blocks=num_blocks, b=b):
            return a.index_select(axis, ordering).unflatten(axis, (num_blocks, b))

        def rotate(a, blocks=blocks, back=back, in_blocks=in_blocks):
            return torch.bmm(in_blocks(a).transpose(0, 1), blocks).transpose(0, 1).flatten(1).index_select(1, back)

        def outer(a, c, in_blocks=in_blocks):
            return torch.bmm(in_blocks(a).permute(1, 2, 0), in_blocks(c).transpose(0, 1))

        operations = {
            "plain": lambda x=x, weight=weight: x @ weight,
            "rotating": lambda x=x, rotate=rotate: rotate(x),
            "rotating_weight": lambda weight=weight, rotate=rotate: rotate(weight),
            "gathering": lambda x=x, y=y, outer=outer: outer(x, y),
            "weight_entry": lambda weight=weight, o=ordering: weight.index_select(0, o).index_select(1, o),
            "block_flop": lambda blocks=blocks: torch.bmm(blocks, blocks),
        }
        clock = Clock(device)
        tasks = {name: lambda call=call, clock=clock: {"": clock.time(call)} for name, call in operations.items()}
        rounds = interleave(tasks, seconds=1.0, min_rounds=sizes.rounds, max_rounds=sizes.rounds)
        seconds = {name: quartiles(r[name] for r in rounds)["median"] for name in operations}
        shape = {"tokens": num_tokens, "dim": dim, "block_size": b}
        rows.append(shape | {"seconds": seconds, "costs": costs_of(num_tokens, dim, b, seconds)})
    return rows


def costs_of(N, dim, b, seconds):
    """`PathCosts` from the seconds of the operations on one shape.

    The unit is the time of a flop of the full product, 2 N dim^2 of them. What a rotation or an outer product takes
    beyond its own flops, 2 b an entry, is the cost of moving its entries.
    """
    flop = seconds["plain"] / (2 * N * dim * dim)
    return {
        "rotating": max(0.0, seconds["rotating"] / (flop * N * dim) - 2 * b),
        "rotating_weight": max(0.0, seconds["rotating_weight"] / (flop * dim * dim) - 2 * b),
        "gathering": max(0.0, seconds["gathering"] / (flop * N * dim) - 2 * b) / 2,
        "weight_entry": seconds["weight_entry"] / (flop * dim * dim),
        "block_flop": seconds["block_flop"] / (flop * 2 * dim * b**2),
    }


def costs(pieces):
    """One number for each field: the median over shapes."""
    names = paths.PathCosts._fields
    return {name: round(statistics.median(row["costs"][name] for row in pieces), 3) for name in names}


def measure_choices(device, dtype, sizes, measured):
    """Milliseconds of every path, and the one that the measured costs choose."""
    rows = []
    costs_before, paths.COSTS[device] = paths.COSTS.get(device), paths.PathCosts(**measured)
    for num_tokens, in_features, out_features, b in sizes.choices:
        rotated = build_layer(f"poet-{b}", in_features, out_features, device, dtype)
        x = randn(num_tokens, in_features, device=device, dtype=dtype).requires_grad_()
        grad = randn(num_tokens, out_features, device=device, dtype=dtype)

        def step(path, rotated=rotated, x=x, grad=grad):
            with paths.compute_path(path), autocast(device, dtype):
                return {"": Clock(device).time(lambda: rotated(x).backward(grad))}

        tasks = {path: lambda path=path, step=step: step(path) for path in PATHS}
        rounds = interleave(tasks, seconds=1.0, min_rounds=min(5, sizes.rounds), max_rounds=sizes.rounds)
        ms = {path: 1e3 * quartiles(r[path] for r in rounds)["median"] for path in PATHS}
        R, P = ([side["default"]()] for side in (rotated.poet_R, rotated.poet_P))
        chosen = paths.choose_path(x, rotated.base_layer.weight, R, P)
        shape = {"tokens": num_tokens, "in_features": in_features, "out_features": out_features, "block_size": b}
        rows.append(shape | {"ms": ms, "chosen": chosen, "regret": ms[chosen] / min(ms.values())})
    del paths.COSTS[device]
    if costs_before is not None:
        paths.COSTS[device] = costs_before
    return rows


# Layers


def settings_of(device, dtype, **others):
    """What the commands for layers and models take from their flags."""
    return argparse.Namespace(device=device, dtype=str(dtype).removeprefix("torch."), seed=0, **others)


def measure_layers(device, dtype, sizes):
    """Every method on every shape, by `layer.py`."""
    settings = settings_of(
        device,
        dtype,
        methods=sizes.methods,
        min_rounds=min(5, sizes.rounds),
        max_rounds=sizes.rounds,
        max_gflop=math.inf,
    )
    cells = []
    for shape in sizes.layers:
        cell = layer.measure(shape, sizes.num_tokens, settings, sizes.layer_seconds, with_memory=True)
        for name, timing in cell["timings"].items():
            peak = cell["memory"][name.partition(" ")[0]]["peak"]
            print(
                f"{shape[0]} -> {shape[1]:<6} {name:28} {1e3 * timing['seconds']['median']:9.3f} ms"
                f" {timing['ratio']['median']:7.2f} of full {peak / 1e6:9.1f} MB",
                flush=True,
            )
        cells.append(cell)
    return cells


# Steps


def measure_steps(device, dtype, sizes):
    """Whole steps of every method, in turn: memory, and seconds over those of training in full."""
    settings = settings_of(
        device,
        dtype,
        vocab_size=sizes.vocab_size,
        batch_size=sizes.batch_size,
        seq_length=sizes.seq_length,
    )
    contenders = {m: LlamaContender(m, PRESETS[sizes.model], True, settings) for m in sizes.model_methods}
    memory = {m: contender.memory() | contender.describe() for m, contender in contenders.items()}
    tasks = {m: lambda contender=contender: contender.run(1) for m, contender in contenders.items()}
    rounds = interleave(tasks, seconds=60.0, min_rounds=min(5, sizes.rounds), max_rounds=sizes.rounds)
    timings = summarize(rounds, baseline="full")
    for m in contenders:
        step = timings[f"{m} step"]
        print(
            f"{sizes.model} {m:16} {1e3 * step['seconds']['median']:9.2f} ms {step['ratio']['median']:7.2f} of full "
            f"{memory[m]['peak'] / 1e6:9.1f} MB",
            flush=True,
        )
    return {"memory": memory, "timings": timings}


def environment(args):
    facts = start(argparse.Namespace(device=args.device, dtype=args.dtype, threads=0))
    facts["fp32_matmul_precision"] = torch.get_float32_matmul_precision()
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(args.device)
        facts |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": driver_version(),
        }
    return facts


def driver_version():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")

    begin = time.perf_counter()
    sizes, dtype = QUICK if args.quick else FULL, getattr(torch, args.dtype)
    results = {"environment": environment(args), "sizes": asdict(sizes), "dtype": args.dtype}
    print(json.dumps(results["environment"], indent=1), flush=True)
    results["correctness"] = check_layers(args.device)
    failures = [check for check in results["correctness"] if not check["ok"]]
    print(f"{len(results['correctness'])} checks against float64, {len(failures)} failed", flush=True)
    for check in failures:
        print(f"FAILED {check['path']} {check['case']}: error {check['error']:.1e}", flush=True)
    results["pieces"] = measure_pieces(args.device, dtype, sizes)
    results["costs"] = costs(results["pieces"])
    print(f"PathCosts(**{results['costs']})", flush=True)
    results["choices"] = measure_choices(args.device, dtype, sizes, results["costs"])
    print(f"largest regret {max(row['regret'] for row in results['choices']):.2f}", flush=True)
    results["layers"] = measure_layers(args.device, dtype, sizes)
    results["steps"] = measure_steps(args.device, dtype, sizes)
    results["seconds"] = round(time.perf_counter() - begin, 1)
    with open(args.out, "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    print(f"written to {args.out} after {results['seconds']} s")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
