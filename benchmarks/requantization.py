"""What folding into a quantized weight costs: the error that each of 20 folds adds, and how it adds up.

    python -m benchmarks.requantization --out benchmarks/results/requantization.json

One 256 x 256 weight is quantized, rotated at random and folded, again and again. Beside it, in fp64, the weight that
the same folds give without requantizing. Errors are Frobenius norms of the difference over the norm of that weight, as
is `moved_after_20`, what the rotations did; `spectral_change_after_20` is over the largest singular value.
"""

import argparse
import json
import platform

import bitsandbytes
import torch
from peft import get_peft_model
from torch import nn

import poet_peft
from poet_peft import POETConfig, merge_and_reinitialize
from poet_peft.ops import reference


SIZE, BLOCK_SIZE, NUM_FOLDS = 256, 64, 20
ANGLES = (0.0, 0.01, 0.03, 0.1, 0.3)
FORMATS = ("nf4", "nf4-double", "int8")


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def quantized_layer(name: str, seed: int) -> nn.Module:
    weight = 0.02 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    if name == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(
            SIZE, SIZE, bias=False, quant_type="nf4", compress_statistics=name == "nf4-double"
        )
    layer.weight.data = weight
    return layer.to("cpu")


@torch.no_grad()
def turn(layer: nn.Module, angle: float, generator: torch.Generator) -> None:
    """Random rotations whose most-turned plane turns by `angle` radians."""
    for rotation in layer.rotations("default"):
        rotation.weight.normal_(generator=generator)
        rotation.weight.mul_(0.01 / rotation.weight.abs().max())
        rotation.weight.mul_(angle / rotation.angle())


@torch.no_grad()
def measure(name: str, angle: float, seed: int) -> dict:
    config = POETConfig(target_modules=["layer"], block_size=BLOCK_SIZE, merge_interval=1, allow_requantize=True)
    model = get_peft_model(Model(quantized_layer(name, seed)), config)
    layer = model.base_model.model.layer
    weight = layer.base_weight.read().double()
    start, generator = weight, torch.Generator().manual_seed(seed)
    added, total = [], []
    for _ in range(NUM_FOLDS):
        turn(layer, angle, generator)
        R, P = ([(side.index, side.deltas()) for side in sides] for sides in layer.sides(["default"]))
        weight = reference.effective_weight(weight, R, P)
        added.append(merge_and_reinitialize(model).requantization_error)
        folded = layer.base_weight.read().double()
        total.append(float((folded - weight).norm() / weight.norm()))
    before, after = torch.linalg.svdvals(start), torch.linalg.svdvals(folded)
    return {
        "format": name,
        "angle": angle,
        "seed": seed,
        "added_by_first_fold": added[0],
        "added_by_last_fold": added[-1],
        "total_after_5": total[4],
        "total_after_20": total[-1],
        "moved_after_20": float((weight - start).norm() / weight.norm()),
        "spectral_change_after_20": float((after - before).abs().max() / before.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    rows = [measure(name, angle, seed) for name in FORMATS for angle in ANGLES for seed in (0, 1)]
    versions = {module.__name__: module.__version__ for module in (torch, bitsandbytes, poet_peft)}
    result = {
        "size": SIZE,
        "block_size": BLOCK_SIZE,
        "num_folds": NUM_FOLDS,
        "versions": {**versions, "python": platform.python_version()},
        "rows": rows,
    }
    keys = [key for key in rows[0] if key not in ("format", "seed")]
    print("| format | " + " | ".join(keys) + " |")
    for name in FORMATS:
        for angle in ANGLES:
            chosen = [row for row in rows if (row["format"], row["angle"]) == (name, angle)]
            means = [sum(row[key] for row in chosen) / len(chosen) for key in keys]
            print(f"| {name} | " + " | ".join(f"{mean:.4g}" for mean in means) + " |")
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
