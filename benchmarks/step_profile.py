"""Where the time of a pretraining step goes: AdamW, and the recipe "ortho" by its parts.

    python -m benchmarks.step_profile           # writes results/step-profile-cpu.json, about two minutes
    python -m benchmarks.step_profile --quick   # seconds, into benchmark-output/

The model, tokens and loop of `benchmarks/quality.py`. Seconds of processor time on one thread; those of the parts by
Python's profiler, in steps of their own.
"""

import cProfile
import pstats
import statistics
import time
from dataclasses import replace

import torch

from benchmarks.harness import flags
from benchmarks.harness.quality_methods import SIZES, build
from benchmarks.harness.quality_run import MAX_NORM, Run, batches
from benchmarks.harness.results import ResultFile, start
from benchmarks.harness.timing import interleave
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


class Contender:
    """A model in training, and a profile of its steps."""

    def __init__(self, run, tokens):
        self.model, self.optimizers = build(run, tokens)
        self.batches = batches(tokens.train, run)
        self.parameters = [
            p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
        ]
        self.profiler = cProfile.Profile(time.process_time)
        for _ in range(NUM_WARM_UP):
            self.step()

    def step(self):
        ids = next(self.batches)
        self.model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def measure(self):
        """Seconds of a step as it is, before one under the profiler, which takes time of its own."""
        begin = time.process_time()
        self.step()
        seconds = time.process_time() - begin
        self.profiler.enable()
        self.step()
        self.profiler.disable()
        return {"": seconds}


def measure(runs, tokens, num_steps):
    """Median seconds of a whole step and mean seconds of its parts, of runs by name."""
    contenders = {name: Contender(run, tokens) for name, run in runs.items()}
    tasks = {name: contender.measure for name, contender in contenders.items()}
    rounds = interleave(tasks, seconds=0.0, min_rounds=num_steps, max_rounds=num_steps, warm_up=False)
    return {
        name: {
            "step": statistics.median(seconds[name] for seconds in rounds),
            "parts": parts_of(contender.profiler, num_steps),
        }
        for name, contender in contenders.items()
    }


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
        parser.add_argument("--size", default="4m", help=" or ".join(SIZES))
        parser.add_argument("--steps", type=int, default=20, help="of each kind: as they are, and profiled")

    args = flags.parse(__doc__, add_flags, quick={"size": "tiny", "steps": 2}, budget=0.0)
    args.threads = 1
    file = ResultFile(args, "step_profile", f"step-profile-{args.device}", start(args))
    tokens = read_tokens("stdlib")
    runs = {name: replace(run, size=args.size) for name, run in STEPS.items()}
    for name, result in measure(runs, tokens, args.steps).items():
        file.add({"name": name, **result})
        print(f"{name}: {result['step']:.3f} s, " + ", ".join(f"{k} {v:.3f}" for k, v in result["parts"].items()))


if __name__ == "__main__":
    main()
