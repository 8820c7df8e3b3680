"""What `poet-peft diff` says: where, and how far, two adapters turn a model apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import POETCheckpointError
from ..ops.reference import effective_weight
from .angles import turn, turn_between
from .saved import OpenFile, SavedAdapter, SavedSide, open_adapter, open_tensors


def diff(one: Path, other: Path | None = None) -> dict[str, Any]:
    """Compare two adapters of one base model, layer by layer; or one with the base model, which turns nothing.

    Adapters that keep their base weights (`merge_interval=0`, no `base_init`) are compared by their rotations: the
    angles of `R^T S`. Where folds have changed the base weights, rotations since the last fold say little; both files
    then hold the weights, and `weight` is how far `R W P` of the one is from that of the other, relative to the
    latter.

    Returns:
        What JSON can hold. `layers`: one entry per layer and side, angles in radians; the largest distance of weights
        first where there are any, else the largest angle.

    Raises:
        POETCheckpointError: as `inspection.inspect`; or the adapters cannot be compared, or a changed base weight
            cannot be read from the file alone, since it is quantized. With the way out.
    """
    first = open_adapter(one)
    second = None if other is None else open_adapter(other)
    by_weight = first.config.changes_base_weights
    if second is None and by_weight:
        raise POETCheckpointError(
            f"{one} changed the base weights (merge_interval={first.config.merge_interval}, "
            f"base_init={first.config.base_init!r}), so its rotations alone do not say how far it is from its base "
            "model. Pass a second checkpoint of the same run to compare with."
        )
    if second is not None and by_weight != second.config.changes_base_weights:
        raise POETCheckpointError(
            f"{one} and {other} cannot be compared: only one of them changed the base weights, and holds them. Merge "
            "both and compare the models."
        )
    with open_tensors(first.file) as tensors:
        if second is None:
            layers = _against_identity(first, tensors)
        else:
            with open_tensors(second.file) as others:
                layers = _against(first, tensors, second, others)
    layers.sort(key=lambda entry: (entry.get("weight", 0), entry["largest"]), reverse=True)
    return {
        "one": str(one),
        "other": None if other is None else str(other),
        "largest": max(entry["largest"] for entry in layers),
        "rms": (sum(entry["rms"] ** 2 for entry in layers) / len(layers)) ** 0.5,
        "weight": max((entry["weight"] for entry in layers if "weight" in entry), default=None),
        "layers": layers,
    }


def _against_identity(adapter: SavedAdapter, tensors: OpenFile) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "side": side, **turn(adapter.side(tensors, layer, side))._asdict()}
        for layer, saved in adapter.layers.items()
        for side in saved.sides
    ]


def _against(one: SavedAdapter, tensors: OpenFile, other: SavedAdapter, others: OpenFile) -> list[dict[str, Any]]:
    entries = []
    for layer in dict.fromkeys([*one.layers, *other.layers]):
        first, second = (_sides(adapter, opened, layer) for adapter, opened in ((one, tensors), (other, others)))
        more = {}
        if one.config.changes_base_weights:
            weights = [
                _weight(adapter.base_weight(opened, layer), sides)
                for adapter, opened, sides in ((one, tensors, first), (other, others, second))
            ]
            if weights[0].shape != weights[1].shape:
                raise POETCheckpointError(
                    f"the weights of {layer!r} are {tuple(weights[0].shape)} in {one.file} and "
                    f"{tuple(weights[1].shape)} in {other.file}: adapters of two models."
                )
            more["weight"] = float((weights[0] - weights[1]).norm() / weights[1].norm())
        for side in [side for side in ("R", "P") if side in first or side in second]:
            if side in first and side in second:
                angles = turn_between(second[side], first[side])
            else:
                angles = turn((first if side in first else second)[side])
            entries.append({"layer": layer, "side": side, **angles._asdict(), **more})
    return entries


def _sides(adapter: SavedAdapter, tensors: OpenFile, layer: str) -> dict[str, SavedSide]:
    sides = adapter.layers[layer].sides if layer in adapter.layers else []
    return {side: adapter.side(tensors, layer, side) for side in sides}


def _weight(stored: Tensor, sides: dict[str, SavedSide]) -> Tensor:
    """`R W P` of a weight (out, in), or of a stack of them."""
    R, P = ([(side.index, side.deltas)] if (side := sides.get(name)) else [] for name in ("R", "P"))
    return effective_weight(stored.double(), R, P)
