"""Where the time of a rotated layer goes, by kind of operation, beside a linear layer trained in full.

python -m benchmarks.breakdown    # writes results/breakdown-cpu.json; under a minute on two CPU cores

For the shapes whose targets are the hardest to meet. Operations are timed by torch's profiler, which slows small ones
down a little; what it does not see as an operation (Python) is left out.
"""

import argparse
import json
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.methods import is_poet
from benchmarks.harness.one_layer import LayerContender
from benchmarks.harness.results import start
from benchmarks.report.breakdown import RESULT


CELLS = [(512, 512, 4096), (512, 512, 2048), (512, 1376, 2048), (512, 512, 256)]
METHODS = "full", "poet-64", "poet-128", "poet-256"
KINDS = {
    "products with the weight": ("aten::mm", "aten::addmm"),
    "products of blocks": ("aten::bmm", "aten::baddbmm", "aten::baddbmm_"),
    "gathers": ("aten::index_select", "aten::index_copy", "aten::index_copy_", "aten::cat"),
}
NUM_WARM_UP, NUM_STEPS = 3, 10


def milliseconds(contender, accumulates):
    """Of one forward and backward, by kind of operation."""
    for _ in range(NUM_WARM_UP):
        contender.micro_batch(accumulates)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(NUM_STEPS):
            contender.micro_batch(accumulates)
    seconds = {event.key: event.self_cpu_time_total / 1e3 / NUM_STEPS for event in profiled.key_averages()}
    kinds = {kind: sum(seconds.pop(name, 0.0) for name in names) for kind, names in KINDS.items()}
    return kinds | {"other": sum(time for name, time in seconds.items() if name.startswith("aten::"))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--cells", type=json.loads, default=CELLS, help="in x out features x tokens, as JSON")
    args = parser.parse_args()
    settings = {"device": "cpu", "dtype": "float32"}
    rows = []
    for in_features, out_features, num_tokens in args.cells:
        for method in METHODS:
            for phase in ("first", "later") if is_poet(method) else ("",):
                contender = LayerContender(
                    method, (in_features, out_features), num_tokens, argparse.Namespace(seed=0, **settings)
                )
                kinds = milliseconds(contender, phase == "later")
                shape = {"in_features": in_features, "out_features": out_features, "tokens": num_tokens}
                rows.append(shape | {"method": method, "phase": phase, "milliseconds": kinds})
    machine = start(argparse.Namespace(threads=0, **settings))
    result = {"command": "breakdown", "machine": machine, "settings": settings, "rows": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
