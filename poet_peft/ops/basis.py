"""The order of features in which the blocks of a rotation are consecutive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BlockBasis(NamedTuple):
    """The order of a side's features in which the rotated ones come first, block by block, and the way back."""

    order: Tensor
    inverse: Tensor


def block_slices(offsets: Sequence[Tensor]) -> list[tuple[Tensor, slice]]:
    """Each batch of equal blocks (num_blocks, b, b), and where its features stand in the basis."""
    slices = []
    start = 0
    for offset in offsets:
        stop = start + offset.shape[0] * offset.shape[1]
        slices.append((offset, slice(start, stop)))
        start = stop
    return slices


def num_rotated(offsets: Sequence[Tensor]) -> int:
    """How many features the blocks rotate; those behind them in the basis stay as they are."""
    return sum(offset.shape[0] * offset.shape[1] for offset in offsets)


def block_basis(index: Tensor, dim: int) -> BlockBasis:
    """The basis that belongs to the rotated features `index` (k,) of a side of `dim` features."""
    if index.numel() == dim:
        order = index
    else:
        rotated = torch.zeros(dim, dtype=torch.bool, device=index.device).index_fill(0, index.long(), True)
        # A stable sort of False < True keeps the others in their order, without a data-dependent shape.
        rest = torch.argsort(rotated.to(torch.uint8), stable=True)[: dim - index.numel()]
        order = torch.cat([index, rest.to(index.dtype)])
    positions = torch.arange(dim, dtype=index.dtype, device=index.device)
    return BlockBasis(order, torch.empty_like(order).index_copy(0, order.long(), positions))
