"""Where the time of a pretraining step goes: AdamW, and the recipe "ortho" by its parts.

    python -m benchmarks.step_profile           # writes results/step-profile-cpu.json, about two minutes
    python -m benchmarks.step_profile --quick   # seconds, into benchmark-output/

The model, tokens and loop of `benchmarks/quality.py`. Seconds of processor time on one thread, by Python's profiler,
which adds nothing that counts beside products of matrices.
"""

import cProfile
import pstats
import statistics
import time
from dataclasses import replace

import torch

from benchmarks.harness import flags
from benchmarks.harness.quality_methods import build
from benchmarks.harness.quality_run import MAX_NORM, Run, batches
from benchmarks.harness.results import ResultFile, start
from benchmarks.harness.token_cache import read_tokens


# Settings of the best runs; the angle is that of the first steps, where folds are the most expensive.
ANGLE = 0.04
STEPS = {
    "AdamW": Run("adamw", lr=2e-2, matrix_lr=1e-3, base_init="usual"),
    "b = 256": Run("poet-ortho", lr=2e-2, matrix_lr=ANGLE),
    "b = 256, decorrelated": Run("poet-ortho", lr=2e-2, matrix_lr=ANGLE, options={"optimizer.decorrelation": 0.25}),
    "b = 256, 3 Newton-Schulz steps": Run(
        "poet-ortho", lr=2e-2, matrix_lr=ANGLE, options={"optimizer.num_newton_schulz_steps": 3}
    ),
    "b = 128": Run("poet-ortho", lr=2e-2, matrix_lr=ANGLE, options={"config.block_size": 128}),
}
# Functions whose time, with all they call, is a part of the step, and their caller where others call them too.
PARTS = {
    "gradients of the blocks": {name: "_backward" for name in ("weight_centric", "tangent_R", "tangent_P", "vjp")},
    "Newton-Schulz": {"_orthogonalized": None},
    "decorrelation": {"without_overlap": None},
    "fold": {"fold_moved_sides": None},
}
NUM_WARM_UP = 3


def measure(run, tokens, num_steps):
    """Median seconds of a whole step and mean seconds of its parts."""
    model, optimizers = build(run, tokens)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    profiler, seconds = cProfile.Profile(time.process_time), []
    for number, ids in enumerate(batches(tokens.train, run)):
        if number == NUM_WARM_UP + num_steps:
            break
        if number == NUM_WARM_UP:
            profiler.enable()
        begin = time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.process_time() - begin)
    profiler.disable()
    return {"step": statistics.median(seconds[NUM_WARM_UP:]), "parts": parts_of(profiler, num_steps)}


def parts_of(profiler, num_steps):
    """Seconds of each of `PARTS`, a step."""
    parts = dict.fromkeys(PARTS, 0.0)
    for (_, _, name), (*_, cumulative, callers) in pstats.Stats(profiler).stats.items():
        for part, functions in PARTS.items():
            if name in functions:
                caller = functions[name]
                by_caller = [times[-1] for (_, _, by), times in callers.items() if by == caller]
                parts[part] += (cumulative if caller is None else sum(by_caller)) / num_steps
    return parts


def main():
    def add_flags(parser):
        parser.add_argument("--size", default="4m", help="4m or 15m")
        parser.add_argument("--steps", type=int, default=20)

    args = flags.parse(__doc__, add_flags, quick={"size": "tiny", "steps": 2}, budget=0.0)
    args.threads = 1
    file = ResultFile(args, "step_profile", f"step-profile-{args.device}", start(args))
    tokens = read_tokens("stdlib")
    for name, run in STEPS.items():
        cell = {"name": name, **measure(replace(run, size=args.size), tokens, args.steps)}
        file.add(cell)
        print(f"{name}: {cell['step']:.3f} s, " + ", ".join(f"{k} {v:.3f}" for k, v in cell["parts"].items()))


if __name__ == "__main__":
    main()
