"""The fold after every optimizer step: only the sides that moved, all blocks of one size at once, nothing measured.

One step turns a rotation by a small angle, and a fold of it costs about as much as the step of an optimizer. What
`fold` does beside it, looking at random inputs, orthogonality and spectrum, would cost far more: that is done in the
first step and in every hundredth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .errors import POETFoldError
from .layer import POETLayer
from .maths.blocks import SideName, block_slices, blocks_at_once
from .maths.orthogonal import OrthogonalMap, skew, small_rotation_delta
from .probing import turn_probes
from .rotation import Rotation
from .weights.residual import at_least_fp32
from .weights.sharded import full


_Part = TypeVar("_Part")

MEASURED_EVERY = 100

_BLOWN_UP = 1e6
# Entries of the blocks that are held at once: all of a small model, some layers of a large one.
_MOST_HELD = 2**25
# Bound of how far from orthogonal a block may be: three roundings of the fp32 weight that it is folded into at worst,
# and far less of it on average.
_SMALL = 4e-6


class FoldItem(NamedTuple):
    """One adapter of one layer that is to be folded, and whether it is reinitialised as well."""

    layer: POETLayer
    adapter: str
    reinitialize: bool

    @property
    def rotations(self) -> list[Rotation]:
        return self.layer.rotations(self.adapter)


def is_quick(item: FoldItem) -> bool:
    """Whether this fold of one adapter of one layer needs no measures."""
    layer, adapter, reinitialize = item
    if not layer.poet_config[adapter].folds_every_step or reinitialize:
        return False
    num_steps = layer.state(adapter).num_steps
    if num_steps <= 1 or num_steps % MEASURED_EVERY == 0:
        return False
    weight = layer.base_weight
    return not weight.is_quantized and weight.range_dtype != torch.float16


def fold_moved_sides(items: Sequence[FoldItem]) -> None:
    """Fold these adapters of layers, without a report.

    Raises:
        POETFoldError: a rotation is NaN, infinite or has grown without bound; no weight was changed.
    """
    moved = _moved([rotation for item in items for rotation in item.rotations])
    num_entries = [sum(r.partition.num_entries for r in item.rotations if r in moved) for item in items]
    for part in _batches(items, num_entries, _MOST_HELD):
        deltas = _fold_deltas({r: moved[r] for item in part for r in item.rotations if r in moved})
        for layer, adapter, _ in part:
            sides = [rotation for rotation in layer.rotations(adapter) if rotation in deltas]
            if sides:
                residual = layer.residual_of(adapter)
                layer.base_weight.change(_rotation_of(sides, deltas), residual)
            turn_probes(layer, adapter, deltas.get)
            layer.advance(adapter, num_folds=1)
            for rotation in sides:
                rotation.reset()


def _moved(rotations: Sequence[Rotation]) -> dict[Rotation, Tensor]:
    """The parameters of those that are not the identity; the device is waited for once."""
    uppers = {rotation: full(rotation.weight).detach() for rotation in rotations}
    by_device: dict[torch.device, list[Rotation]] = {}
    for rotation, upper in uppers.items():
        by_device.setdefault(upper.device, []).append(rotation)
    moved = set()
    for group in by_device.values():
        largest = torch._foreach_max([uppers[rotation].abs() for rotation in group])
        for rotation, value in zip(group, torch.stack(largest).tolist(), strict=True):
            if not value < _BLOWN_UP:
                raise POETFoldError(
                    f"the rotation {rotation.side} of {rotation.module_name!r} is NaN or infinite, or has grown "
                    "without bound. No weight was changed. Go back to the last checkpoint and lower the learning "
                    "rate of the rotations."
                )
            if value > 0:
                moved.add(rotation)
    return {rotation: upper for rotation, upper in uppers.items() if rotation in moved}


def _fold_deltas(moved: dict[Rotation, Tensor]) -> dict[Rotation, list[Tensor]]:
    """`G - I` of the blocks to fold, computed in batches of blocks of one size."""
    parts: dict[tuple[int, OrthogonalMap, torch.device, torch.dtype], list[tuple[Rotation, Tensor]]] = {}
    for rotation, upper in moved.items():
        upper = at_least_fp32(upper)
        for triangles, size in rotation.partition.split(upper):
            key = (size, rotation.orthogonal_map, upper.device, upper.dtype)
            parts.setdefault(key, []).append((rotation, triangles))
    deltas: dict[Rotation, list[Tensor]] = {rotation: [] for rotation in moved}
    for (size, orthogonal_map, device, _), all_blocks in parts.items():
        num_blocks = [len(triangles) for _, triangles in all_blocks]
        for batch in _batches(all_blocks, num_blocks, blocks_at_once(size, device)):
            Q = skew(torch.cat([triangles for _, triangles in batch]), size)
            delta = _fold_delta(Q, orthogonal_map)
            for (rotation, _), blocks in zip(batch, delta.split([len(part) for _, part in batch]), strict=True):
                deltas[rotation].append(blocks)
    return deltas


def _fold_delta(Q: Tensor, orthogonal_map: OrthogonalMap) -> Tensor:
    if orthogonal_map.is_orthogonal and Q.dtype != torch.float64:
        delta = small_rotation_delta(Q, _SMALL)
        if delta is not None:
            return delta
    return orthogonal_map.fold_delta(Q, orthogonal_map.delta(Q))


def _batches(parts: Sequence[_Part], sizes: Sequence[int], most: int) -> Iterator[list[_Part]]:
    """The parts in order, each batch of sizes that add up to at most `most`, or of one part."""
    batch: list[_Part] = []
    total = 0
    for part, size in zip(parts, sizes, strict=True):
        if batch and total + size > most:
            yield batch
            batch, total = [], 0
        batch.append(part)
        total += size
    if batch:
        yield batch


def _rotation_of(rotations: Sequence[Rotation], deltas: dict[Rotation, list[Tensor]]) -> Callable[[Tensor], None]:
    def change(matrix: Tensor) -> None:
        for rotation in rotations:
            index = None if rotation.partition.is_one_block else rotation.index
            rotate_in_place(matrix, rotation.side, index, deltas[rotation])

    return change


def rotate_in_place(matrix: Tensor, side: SideName, index: Tensor | None, deltas: Sequence[Tensor]) -> None:
    """`matrix <- R matrix`, or `matrix P`, of a matrix (out, in), or of a stack of them (num_experts, out, in).

    Args:
        index: rotated features in block order; None for one block of all features.
        deltas: `G - I` of the consecutive blocks of `index`.
    """
    if matrix.dim() == 3:
        stack = matrix if side == "R" else matrix.mT
        rows = stack.flatten(0, 1)
        rotate_in_place(rows, "R", index, deltas if side == "R" else [delta.mT for delta in deltas])
        stack.copy_(rows.view(stack.shape))  # onto itself where the rows were a view
        return
    if index is None:
        delta = deltas[0].squeeze(0).to(matrix.dtype)
        matrix += delta @ matrix if side == "R" else matrix @ delta
        return
    for delta, part in block_slices(deltas):
        features = index[part].long()
        delta = delta.to(matrix.dtype)
        if side == "R":
            blocks = matrix.index_select(0, features).unflatten(0, delta.shape[:2])
            matrix.index_copy_(0, features, torch.baddbmm(blocks, delta, blocks).flatten(0, 1))
        else:
            blocks = matrix.index_select(1, features).unflatten(1, delta.shape[:2]).transpose(0, 1)
            matrix.index_copy_(1, features, torch.baddbmm(blocks, blocks, delta).transpose(0, 1).flatten(1))
