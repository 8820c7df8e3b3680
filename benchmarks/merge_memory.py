"""What `poet-peft merge` takes at its peak: the resident memory of a process that merges, over what it had before.

    python -m benchmarks.merge_memory    # writes results/merge-memory.json; about three minutes on one core

A Llama of about 100 million parameters with random weights. Each merge has a process of its own, which first merges a
small model, so that everything is imported.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.harness.llama import PRESETS, llama
from benchmarks.harness.results import start
from benchmarks.report.merge_memory import RESULT
from poet_peft import POETConfig
from poet_peft.cli.merging import merge
from poet_peft.pace import peak_memory


BLOCK_SIZE, VOCAB_SIZE = 256, 16_000
# Name, dtype of the base model, merge_interval.
CELLS = [("adapter", "float32", 0), ("adapter", "bfloat16", 0), ("folded", "bfloat16", 400)]


def write_model(folder, preset, vocab_size, dtype, merge_interval):
    """A base model and an adapter for it, in the folders base and adapter."""
    torch.manual_seed(0)
    llama(PRESETS[preset], vocab_size, 64).to(getattr(torch, dtype)).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    config = {"target_modules": "all-linear", "block_size": BLOCK_SIZE, "init_weights": False}
    model = get_peft_model(model, POETConfig(**config, merge_interval=merge_interval))
    model.save_pretrained(folder / "adapter")


def resident():
    """Bytes of this process that are in memory now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def measure(folder):
    """In a process of its own: the bytes that merging took over what was there before."""
    with tempfile.TemporaryDirectory() as small:
        write_model(Path(small), "tiny", 64, "float32", 0)
        merge(Path(small, "adapter"), Path(small, "merged"), base=str(Path(small, "base")))
    before = resident()
    merge(folder / "adapter", folder / "merged", base=str(folder / "base"))
    print(json.dumps({"before": before, "peak": peak_memory() - before}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=RESULT)
    parser.add_argument("--preset", default="130m", choices=PRESETS)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    machine = start(argparse.Namespace(threads=1, device="cpu", dtype="float32"))
    if args.measure:
        measure(args.measure)
        return
    cells = []
    for name, dtype, merge_interval in CELLS:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_model(folder, args.preset, args.vocab_size, dtype, merge_interval)
            command = [sys.executable, "-m", "benchmarks.merge_memory", "--measure", str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            sizes = {part: size_of(folder / part) for part in ("base", "adapter", "merged")}
        measured = json.loads(output.strip().splitlines()[-1])
        cells.append({"adapter": name, "dtype": dtype, "bytes": sizes, **measured})
        print(json.dumps(cells[-1]), flush=True)
    settings = {"preset": args.preset, "vocab_size": args.vocab_size, "block_size": BLOCK_SIZE}
    result = {"command": "merge_memory", "machine": machine, "settings": settings, "cells": cells}
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
