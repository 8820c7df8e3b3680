"""How far singular values drift over thousands of folds, one after every step of `RotationMuon`.

    python -m benchmarks.drift           # writes results/drift.json, about two minutes
    python -m benchmarks.drift --quick   # seconds, into benchmark-output/

One weight of 688 x 256 with blocks of 256 takes random gradients at a constant angle, so that every plane turns at
every step by all of it. Drift is the largest relative change of a singular value.
"""

import time

import torch
from peft import get_peft_model

from benchmarks.harness import flags
from benchmarks.harness.quality_run import drift
from benchmarks.harness.results import ResultFile, start
from poet_peft import POETConfig, RotationMuon, initialize_base_weights, poet_param_groups


SHAPE, BLOCK_SIZE, ANGLE = (688, 256), 256, 0.04
WEIGHTS = {
    "fp32": (torch.float32, True),
    "bf16, with residual": (torch.bfloat16, True),
    "bf16, without": (torch.bfloat16, False),
}


def one_layer(dtype, compensated, seed):
    """A model of one linear layer, to be folded after every step, and the layer."""
    model = torch.nn.Sequential(torch.nn.Linear(*reversed(SHAPE), bias=False))
    initialize_base_weights(model, "normalized", seed=seed)
    settings = {"merge_interval": 1, "reinit_interval": 0, "compensated_folds": compensated}
    config = POETConfig(target_modules=["0"], block_size=BLOCK_SIZE, seed=seed, **settings)
    model = get_peft_model(model.to(dtype), config)
    return model, model.base_model.model[0]


def singular_values(layer):
    return torch.linalg.svdvals(layer.base_weight.read_exact(layer.residual_of("default")).double())


def measure(name, num_steps, measured_at, seed):
    """The drift after each number of steps of `measured_at`."""
    model, layer = one_layer(*WEIGHTS[name], seed)
    optimizer = RotationMuon(poet_param_groups(model, lr=0.0, angle=ANGLE))
    generator = torch.Generator().manual_seed(seed)
    before, measured, begin = singular_values(layer), {}, time.process_time()
    for step in range(1, num_steps + 1):
        for rotation in layer.rotations("default"):
            gradient = torch.randn(rotation.weight.shape, generator=generator)
            rotation.weight.grad = gradient.to(rotation.weight.dtype)
        optimizer.step()
        if step in measured_at:
            measured[str(step)] = drift([before], [singular_values(layer)])["relative"]
    return {"weights": name, "drift": measured, "cpu_seconds": time.process_time() - begin}


def main():
    def add_flags(parser):
        parser.add_argument("--steps", type=flags.integers, default=[100, 300, 1000, 3000], help="when to measure")

    args = flags.parse(__doc__, add_flags, quick={"steps": [2, 4]}, budget=120.0)
    file = ResultFile(args, "drift", "drift", start(args))
    file.content |= {"shape": SHAPE, "block_size": BLOCK_SIZE, "angle": ANGLE}
    for name in WEIGHTS:
        cell = measure(name, max(args.steps), args.steps, args.seed)
        file.add(cell)
        print(f"{name}: " + ", ".join(f"{value:.1e} after {steps}" for steps, value in cell["drift"].items()))


if __name__ == "__main__":
    main()
