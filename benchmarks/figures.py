"""What training does to the weights: the measures of the POET paper along three runs of a small model.

    python -m benchmarks.figures                 # about 20 CPU minutes, one thread; then python -m benchmarks.tables
    python -m benchmarks.figures --only adamw

AdamW, POET in the paper's recipe and POET in the recipe "ortho", each at the settings that the searches of
`benchmarks.quality` begin from. A run is kept in `results/figures/`, a file each, and is not made again.
"""

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.quality_run import measure
from benchmarks.harness.results import rounded
from benchmarks.harness.run_files import claimed, write_result
from benchmarks.harness.token_cache import read_tokens
from benchmarks.quality import STARTS
from poet_peft.layer import POETLayer, poet_layers
from poet_peft.maths.blocks import draw_index, partition_side
from poet_peft.maths.measures import hyperspherical_energy, stable_rank, svd_entropy
from poet_peft.probing import probe_cosine, start_probing


RESULTS = Path(__file__).parent / "results" / "figures"
METHODS = ("adamw", "poet-paper", "poet-ortho")
EVERY = 20  # steps
VARIANTS = {
    "block-stochastic": ("block_stochastic", 64),
    "fully stochastic, 1/2": ("fully_stochastic", 0.5),
    "fully stochastic, 1/4": ("fully_stochastic", 0.25),
    "fully stochastic, 1/8": ("fully_stochastic", 0.125),
}
NUM_SETS = 100
NUM_VALUES = 17  # singular values that are kept of each spectrum, evenly spaced from the largest to the smallest


class Recorder:
    """Measures of every linear layer but the head, along a run.

    Attributes:
        steps: at which was measured.
        layers: lists over the steps, by name of the layer and of the measure.
    """

    def __init__(self):
        self.steps = []
        self.layers = defaultdict(lambda: defaultdict(list))

    @torch.no_grad()
    def __call__(self, model, step):
        if step == 0:
            start_probing(model)
        if step % EVERY:
            return
        self.steps.append(step)
        for name, layer in linear_layers(model):
            for measure_name, value in measures(layer).items():
                self.layers[name][measure_name].append(rounded(value))


def linear_layers(model):
    """Names without what PEFT puts before them, and modules: rotated layers, or else linear ones but the head."""
    rotated = [(layer.module_name, layer) for _, layer in poet_layers(model)]
    head = model.get_output_embeddings()
    return rotated or [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def measures(layer):
    """Of the weight as the model computes with it."""
    is_rotated = isinstance(layer, POETLayer)
    W = (layer.rotated_weight(["default"]) if is_rotated else layer.weight).double()
    s = torch.linalg.svdvals(W)
    places = torch.linspace(0, len(s) - 1, NUM_VALUES).round().long()
    found = {
        "singular_values": s[places].tolist(),
        "entropy": float(svd_entropy(s)),
        "stable_rank": float(stable_rank(W, s[0])),
        "energy": float(hyperspherical_energy(W)),
    }
    if is_rotated:
        rotations = layer.rotations("default")
        found |= {f"probe_{rotation.side}": probe_cosine(layer, "default", rotation) for rotation in rotations}
    return found


def coverage():
    """How evenly entries of a weight (256, 688) are updated, by variant and number of index sets.

    Returns:
        By name of the variant, `covered`, the part of the entries whose row or column was ever rotated, and `spread`,
        the standard deviation of how often, counted by row and column, over the mean.
    """
    found = {}
    for name, (variant, block_size) in VARIANTS.items():
        partitions = {"R": partition_side(variant, block_size, 256), "P": partition_side(variant, block_size, 688)}
        counts = np.zeros((256, 688))
        found[name] = {"covered": [], "spread": []}
        for number in range(NUM_SETS):
            for side, partition in partitions.items():
                index = draw_index(partition, seed=0, module_name="layer", side=side, num_reinits=number).numpy()
                counts[(index,) if side == "R" else (slice(None), index)] += 1
            found[name]["covered"].append(rounded(float((counts > 0).mean())))
            found[name]["spread"].append(rounded(float(counts.std() / counts.mean())))
    return found


def make(method, changes):
    path = RESULTS / f"{method}.json"
    with claimed(path) as is_mine:
        if is_mine:
            run = replace(STARTS[method], **changes)
            record = Recorder()
            result = measure(run, read_tokens(run.data), record)
            result.pop("losses", None)
            write_result(path, result | {"steps": record.steps, "layers": record.layers})
            print(f"{run.name}: {result['loss']}, {result['train_cpu_seconds']} CPU seconds", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=METHODS, default=METHODS, help="methods; none: coverage only")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_result(RESULTS / "coverage.json", coverage())
    for method in args.only:
        make(method, {})


if __name__ == "__main__":
    main()
