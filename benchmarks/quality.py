"""The pretraining comparison: every method with learning rates bracketed on both sides, at equal data and schedule.

    python -m benchmarks.quality --plan tune                    # one process, one thread; begin a second one beside it
    python -m benchmarks.quality --plan tune --only muon
    python -m benchmarks.quality --plan final
    python -m benchmarks.quality --plan final --again           # what is there once more, into again/ beside it
    python -m benchmarks.quality --list                         # what is measured, best first

A run is kept in `results/quality/SIZE/DATA/`, a file each, and is not made again. Processes share the runs of a plan:
each takes those that no other is at. What was cut off begins anew.
"""

import argparse
import json
import math
from dataclasses import replace
from itertools import zip_longest

from benchmarks.harness.coordinate_search import Choice, Rate, Unmeasured, search
from benchmarks.harness.poet_variants import SPECTRA
from benchmarks.harness.quality_methods import SIZES
from benchmarks.harness.quality_run import Run, measure
from benchmarks.harness.run_files import claimed, read_result, write_result
from benchmarks.harness.token_cache import read_tokens
from benchmarks.report.quality_runs import AGAIN, RESULTS


# Queries and keys larger, what the MLP adds to the residual stream smaller.
SIZES_BY_LAYER = {"q_proj|k_proj": 3.0, "down_proj": 0.5}
# Where each search begins: the best known before, at the same size, data and steps.
STARTS = {
    "adamw": Run("adamw", lr=2e-2, matrix_lr=1e-3, weight_decay=0.1, base_init="usual"),
    "muon": Run("muon", lr=2e-2, matrix_lr=2e-2, base_init="usual"),
    "poet-ortho": Run(
        "poet-ortho",
        lr=2e-2,
        matrix_lr=4e-2,
        options={
            "config.base_init_scale": 0.35,
            "config.base_init_scale_pattern": SIZES_BY_LAYER,
            "optimizer.momentum": 0.9,
            "optimizer.decorrelation": 0.25,
        },
    ),
    "galore": Run("galore", lr=2e-2, matrix_lr=5e-3, weight_decay=0.0, base_init="usual"),
    "lora": Run("lora", lr=2e-2, matrix_lr=2e-3, base_init="usual", options={"config.r": 64, "config.lora_alpha": 64}),
    "poet-paper": Run("poet-paper", lr=1e-2, matrix_lr=1e-3, options={"config.merge_interval": 200}),
    "frozen": Run("frozen", lr=8e-2),
}
RATES = [Rate("matrix_lr"), Rate("lr")]
CHOICES = [
    Choice(({"weight_decay": 0.0}, {"weight_decay": 0.01}, {"weight_decay": 0.1})),
    Choice(({"warmup": 0.05},)),
    Choice(({"betas": (0.9, 0.95)}, {"betas": (0.9, 0.999)})),
]
MODEL_INIT = Choice(({"base_init": "usual"}, {"base_init": "normalized"}))


def with_options(options):
    return {"options": lambda run: {**run.options, **options}}


def with_option(name, value):
    return with_options({name: value})


def without_option(name):
    return {"options": lambda run: {key: value for key, value in run.options.items() if key != name}}


BY_LAYER = Choice((with_option("init.scale_pattern", SIZES_BY_LAYER),))
ORTHO = [
    Choice(tuple(with_option("config.base_init_scale", scale) for scale in (0.25, 0.5))),
    Choice((with_option("optimizer.momentum", 0.95), with_option("optimizer.nesterov", False))),
]
COORDINATES = {
    "frozen": [Rate("lr")],
    "adamw": [*RATES, *CHOICES, MODEL_INIT, BY_LAYER],
    "muon": [*RATES, Choice((with_option("optimizer.momentum", 0.9),)), *CHOICES, MODEL_INIT, BY_LAYER],
    "poet-ortho": [*RATES, *ORTHO, *CHOICES],
}
# Each part of the recipe left out or changed, and what might improve it, at the best settings of it.
PARTS = {
    "blocks of 128": with_option("config.block_size", 128),
    "3 Newton-Schulz steps": with_option("optimizer.num_newton_schulz_steps", 3),
    "blocks of 128, 3 Newton-Schulz steps": with_options(
        {"config.block_size": 128, "optimizer.num_newton_schulz_steps": 3}
    ),
    "the angle by the learning rate": {"matrix_lr": None},
    "both sides at once": with_option("optimizer.alternate", False),
    "without look-ahead": with_option("optimizer.nesterov", False),
    "AdamW for the rotations": {"method": "poet-ortho-adamw"},
    "blocks of 64": with_option("config.block_size", 64),
    "one block a side": with_option("config.block_size", 1024),
    "initial weights of one size": without_option("config.base_init_scale_pattern"),
    "half the angle for queries and keys": with_option("variant.angles", {"q_proj|k_proj": 0.5}),
    "angles by a power of the schedule": with_option("variant.angle_power", 1.5),
    "sides not decorrelated": without_option("optimizer.decorrelation"),
    "sides decorrelated by 0.5": with_option("optimizer.decorrelation", 0.5),
    "a gain for each output": with_option("variant.gains", "output"),
    "a gain for each layer": with_option("variant.gains", "layer"),
    "weights that grow as Muon's do": with_option("variant.growth", 0.1),
    **{f"initial weights {name}": with_option("variant.spectra", name) for name in SPECTRA},
}
# What four times as many steps changed: weights that start larger, and turn by smaller angles.
IN_LONG_RUNS = {
    "poet-ortho": {
        "matrix_lr": 2e-2,
        **with_options(
            {
                "config.base_init_scale": 0.7,
                "config.base_init_scale_pattern": {"q_proj|k_proj": 1.5, "down_proj": 0.5},
            }
        ),
    }
}
SEEDS = (42, 43, 44)
FINAL_STEPS = 1600


def path_of(run, again=False):
    """Where a run's result is kept; with `again` that of the same run made once more."""
    folder = RESULTS / run.size / run.data
    return (folder / AGAIN if again else folder) / f"{run.name}.json"


def losses_of(runs):
    """The held-out losses of runs, infinite where they diverged.

    Raises:
        Unmeasured: names the runs without a result.
    """
    results = [read_result(path_of(run)) for run in runs]
    if missing := [run for run, result in zip(runs, results, strict=True) if result is None]:
        raise Unmeasured(missing)
    return [math.inf if result["loss"] is None else result["loss"] for result in results]


def tuned(method, changes):
    """The best run of a method; raises `Unmeasured` where the search has not come so far."""
    return search(replace(STARTS[method], **changes), COORDINATES.get(method, [*RATES, *CHOICES]), losses_of)


def changed(run, part):
    options = part["options"](run) if "options" in part else run.options
    if part.get("method"):
        options = {key: value for key, value in options.items() if not key.startswith("optimizer.")}
    return replace(run, **{**part, "options": options})


def wanted(plan, methods, changes):
    """Runs to make next for each method, in their order."""
    for method in methods:
        try:
            best = tuned(method, changes)
        except Unmeasured as unmeasured:
            yield unmeasured.runs if plan == "tune" else []
            continue
        if plan == "parts":
            yield [changed(best, part) for part in PARTS.values()]
        elif plan == "final":
            best = changed(best, IN_LONG_RUNS.get(method, {}))
            yield [replace(best, seed=seed, steps=FINAL_STEPS) for seed in SEEDS]
        else:
            yield []


def make(plan, methods, changes, gsm8k, again=False):
    """Make all runs of a plan that no other process is at; a search goes on as soon as its runs are there.

    Args:
        again: make those of the plan that are there already, once more.
    """
    tokens = None
    while True:
        columns = list(wanted(plan, methods, changes))
        runs = [run for row in zip_longest(*columns) for run in row if run is not None]
        if again:
            runs = [run for run in runs if path_of(run).is_file()]
        for run in runs:
            path = path_of(run, again)
            with claimed(path) as is_mine:
                if is_mine:
                    tokens = tokens or read_tokens(run.data, gsm8k)
                    result = measure(run, tokens)
                    write_result(path, result)
                    print(f"{run.name}: {result['loss']}, {result['train_cpu_seconds']} CPU seconds", flush=True)
                    break
        else:
            return


def show():
    results = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*/*/*.json"))]
    for result in sorted(results, key=lambda result: result["loss"] or math.inf):
        run = Run(**result["run"])
        loss = "diverged" if result["loss"] is None else f"{result['loss']:.4f} +- {result['loss_se']:.4f}"
        print(f"{run.size} {run.data} {loss} {result['train_cpu_seconds']:6.0f} s  {run.name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=["tune", "parts", "final"], help="learning rates, parts left out, long runs")
    parser.add_argument("--only", nargs="+", choices=STARTS, default=list(STARTS), help="methods")
    parser.add_argument("--size", default="4m", help=" or ".join(SIZES))
    parser.add_argument("--data", default="stdlib", help="stdlib or gsm8k")
    parser.add_argument("--gsm8k", help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--again", action="store_true", help="make runs that are there once more, into again/")
    parser.add_argument("--list", action="store_true", help="print what is measured")
    args = parser.parse_args()
    if args.again and args.plan not in ("parts", "final"):
        parser.error("--again repeats finished runs of a plan: give it with --plan parts or --plan final")
    if args.plan:
        methods = [method for method in args.only if args.plan != "parts" or method == "poet-ortho"]
        make(args.plan, methods, {"size": args.size, "data": args.data}, args.gsm8k, args.again)
    if args.list or not args.plan:
        show()


if __name__ == "__main__":
    main()
