"""What the map from parameters to rotations costs: the paper's three terms, and more where the angle needs them.

    python -m benchmarks.series           # writes results/series-cpu.json, about a minute
    python -m benchmarks.series --quick   # seconds, into benchmark-output/

For every block size and angle it times what an optimizer step needs of one side of 1,024 features: the blocks, `G^-T`
for the tangent rule, and the gradient by the parameters. Angles are those of the most-turned plane, in radians.
"""

import math

import torch

from benchmarks.harness import flags
from benchmarks.harness.results import ResultFile, start
from benchmarks.harness.timing import Clock, interleave, summarize
from poet_peft.maths.orthogonal import CayleyNeumann, cayley_delta, skew


MAPS = {"fixed": CayleyNeumann(3, adaptive=False), "adaptive": CayleyNeumann(3)}
ANGLES = [0.001, 0.01, 0.1, 0.5, 1.0, 2.0]
BLOCK_SIZES = [32, 64, 256]
NUM_FEATURES = 1024


def blocks_turning(angle, block_size, generator):
    """Random skew-symmetric blocks that fill the side and turn their most-turned plane by `angle`."""
    num_entries = block_size * (block_size - 1) // 2
    Q = skew(torch.randn(NUM_FEATURES // block_size, num_entries, generator=generator), block_size)
    return Q * (math.tan(angle / 2) / torch.linalg.matrix_norm(Q, 2).max())


def measure(Q, seconds, clock):
    grad = torch.ones_like(Q)

    def task(orthogonal_map):
        def step():
            delta = orthogonal_map.delta(Q)
            orthogonal_map.inverse_transpose(delta)
            orthogonal_map.vjp(Q, delta, grad)

        return lambda: {"": clock.time(step)}

    rounds = interleave({name: task(m) for name, m in MAPS.items()}, seconds)
    exact = cayley_delta(Q.double())
    missed = {name: float((m.delta(Q) - exact).abs().max()) for name, m in MAPS.items()}
    return {"rounds": len(rounds), "timing": summarize(rounds, "fixed"), "missed": missed}


def main():
    args = flags.parse(__doc__, lambda parser: None, quick={}, budget=60.0)
    machine = start(args)
    file = ResultFile(args, "series", f"series-{args.device}", machine)
    clock, generator = Clock(args.device), torch.Generator().manual_seed(0)
    for block_size in BLOCK_SIZES[:1] if args.quick else BLOCK_SIZES:
        for angle in ANGLES[:2] if args.quick else ANGLES:
            Q = blocks_turning(angle, block_size, generator).to(args.device)
            cell = {"block_size": block_size, "angle": angle, **measure(Q, args.budget / 18, clock)}
            file.add(cell)
            ratio = cell["timing"]["adaptive"]["ratio"]["median"]
            print(f"b = {block_size}, {angle} rad: {ratio:.2f} of three fixed terms")


if __name__ == "__main__":
    main()
