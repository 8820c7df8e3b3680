"""What every micro-batch between two optimizer steps needs of a layer's rotations, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..block_map import BlockMap
from .basis import BlockBasis, block_basis, block_slices, num_rotated


class RotationParameters(NamedTuple):
    """One side's rotation by its parameters.

    Args:
        index: rotated features in block order, int32, shape (num_rotated,).
        upper: strict upper triangles of the blocks' `Q`, flat.
        block_map: how `upper` makes the blocks.
    """

    index: Tensor
    upper: Tensor
    block_map: BlockMap

    def tensors(self) -> tuple[Tensor, list[Tensor]]:
        """The pair that `reference` takes, differentiable with respect to `upper`."""
        return self.index, self.block_map.offsets(self.block_map.skew_blocks(self.upper))


def only(rotations: Sequence[RotationParameters]) -> RotationParameters | None:
    """One adapter's rotation of a side; None where nothing rotates."""
    return rotations[0] if rotations else None


class PreparedSide(NamedTuple):
    """One side's blocks, as lists of batched matrices: `Q`, `G - I`, and `G^-T - I` or None, see `BlockMap`."""

    basis: BlockBasis
    blocks: list[Tensor]
    offsets: list[Tensor]
    inverses: list[Tensor] | None


class Prepared(NamedTuple):
    """A layer's sides (None where nothing rotates) and `R W P`, shape (out, in), in the dtype of the weight."""

    R: PreparedSide | None
    P: PreparedSide | None
    weight: Tensor

    @property
    def has_inverses(self) -> bool:
        return all(side is None or side.inverses is not None for side in (self.R, self.P))


def prepare_sides(
    weight: Tensor, R: RotationParameters | None, P: RotationParameters | None, with_inverses: bool
) -> tuple[PreparedSide | None, PreparedSide | None]:
    """The blocks of both sides of a weight (out, in)."""
    return prepare_side(R, weight.shape[0], with_inverses), prepare_side(P, weight.shape[1], with_inverses)


@torch.no_grad()
def prepare_side(rotation: RotationParameters | None, dim: int, with_inverses: bool) -> PreparedSide | None:
    """The blocks of a rotation of `dim` features."""
    if rotation is None:
        return None
    index, upper, block_map = rotation
    with torch.autocast(device_type=upper.device.type, enabled=False):
        blocks = block_map.skew_blocks(upper)
        offsets = block_map.offsets(blocks)
        inverses = block_map.inverse_offsets(offsets) if with_inverses else None
    return PreparedSide(block_basis(index, dim), blocks, offsets, inverses)


def prepare(
    weight: Tensor, R: RotationParameters | None, P: RotationParameters | None, with_inverses: bool
) -> Prepared:
    """Blocks and `R W P` of a weight (out, in), in the dtype of the blocks until the end, whatever autocast says."""
    sides = prepare_sides(weight, R, P, with_inverses)
    return Prepared(*sides, effective_weight(weight, *sides))


@torch.no_grad()
def effective_weight(weight: Tensor, R: PreparedSide | None, P: PreparedSide | None) -> Tensor:
    """`R W P`, rounded once."""
    with torch.autocast(device_type=weight.device.type, enabled=False):
        matrix = to_basis(weight, R, P)
        if P is not None:
            matrix = rotate_columns(matrix.to(P.offsets[0].dtype), P.offsets)
        if R is not None:
            matrix = rotate_rows(matrix.to(R.offsets[0].dtype), R.offsets)
        matrix = matrix.to(weight.dtype)
    if P is not None:
        matrix = matrix.index_select(1, P.basis.inverse)
    return matrix if R is None else matrix.index_select(0, R.basis.inverse)


def to_basis(matrix: Tensor, R: PreparedSide | None, P: PreparedSide | None) -> Tensor:
    """Rows and columns in the order in which blocks are consecutive."""
    if R is not None:
        matrix = matrix.index_select(0, R.basis.order)
    return matrix if P is None else matrix.index_select(1, P.basis.order)


def rotate_rows(matrix: Tensor, offsets: Sequence[Tensor], transpose: bool = False) -> Tensor:
    """`G X` of a matrix (rows, columns) whose first rows are the blocks' features."""
    parts = []
    for offset, part in block_slices(offsets):
        rows = matrix[part].unflatten(0, offset.shape[:2])
        parts.append(torch.baddbmm(rows, offset.mT if transpose else offset, rows).flatten(0, 1))
    return _joined(parts, matrix[num_rotated(offsets) :], dim=0)


def rotate_columns(matrix: Tensor, offsets: Sequence[Tensor]) -> Tensor:
    """`X G` of a matrix (rows, columns) whose first columns are the blocks' features."""
    parts = []
    for offset, part in block_slices(offsets):
        columns = matrix[:, part].unflatten(1, offset.shape[:2]).transpose(0, 1)
        parts.append(torch.baddbmm(columns, columns, offset).transpose(0, 1).flatten(1))
    return _joined(parts, matrix[:, num_rotated(offsets) :], dim=1)


def _joined(parts: list[Tensor], rest: Tensor, dim: int) -> Tensor:
    parts = [*parts, rest] if rest.numel() or not parts else parts
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
