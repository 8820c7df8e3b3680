"""What measuring a model costs beside training it, in CPU time of the process.

    python -m benchmarks.diagnostics    # writes results/diagnostics-cpu.json; about five minutes on one core

Llamas with random weights and tokens. A step is forward, backward and the optimizer's step. `diagnose` follows a
backward, as in `POETCallback`, so that the rotations have been used in this step. Medians.
"""

import argparse
import json
import statistics
import time

import torch

from benchmarks.harness.llama import PRESETS, LlamaContender
from benchmarks.harness.results import start
from benchmarks.report.diagnostics import RESULT
from poet_peft.diagnostics import diagnose


# Model, method, sequences of 256 tokens in a step: pretraining, and a batch as small as fine-tuning has it.
CELLS = [
    ("20m", "poet-64", 8),
    ("20m", "poet-256", 8),
    ("20m", "poet-256", 1),
    ("60m", "poet-64", 8),
    ("60m", "poet-256", 8),
    ("60m", "poet-256", 1),
    ("60m", "poet-ortho-256", 8),
]
SEQ_LENGTH, VOCAB_SIZE = 256, 2048
SETTINGS = {"device": "cpu", "dtype": "float32", "seed": 0, "vocab_size": VOCAB_SIZE, "seq_length": SEQ_LENGTH}


def cpu_seconds(call, rounds):
    """Of each round, after one that warms up."""
    call()
    times = []
    for _ in range(rounds):
        before = time.process_time()
        call()
        times.append(time.process_time() - before)
    return times


def measure(preset, method, batch_size, rounds):
    contender = LlamaContender(method, PRESETS[preset], True, argparse.Namespace(batch_size=batch_size, **SETTINGS))

    def step():
        contender.loss().backward()
        contender.finish_step()

    steps = cpu_seconds(step, rounds)
    contender.loss().backward()
    quick = cpu_seconds(lambda: diagnose(contender.model, optimizer=contender.optimizer), rounds)
    before = time.process_time()
    diagnose(contender.model, exact=True, optimizer=contender.optimizer)
    exact = time.process_time() - before
    return {
        "model": preset,
        "method": method,
        "tokens": batch_size * SEQ_LENGTH,
        "parameters": sum(parameter.numel() for parameter in contender.model.parameters()),
        "rounds": rounds,
        "step_seconds": statistics.median(steps),
        "diagnose_seconds": statistics.median(quick),
        "exact_seconds": exact,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=RESULT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=json.loads, default=CELLS, help="model, method and batch size, as JSON")
    args = parser.parse_args()
    machine = start(argparse.Namespace(threads=1, device="cpu", dtype="float32"))
    torch.manual_seed(0)
    rows = []
    for cell in args.cells:
        rows.append(measure(*cell, args.rounds))
        print(json.dumps(rows[-1]), flush=True)
        result = {"command": "diagnostics", "machine": machine, "settings": SETTINGS, "rows": rows}
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
