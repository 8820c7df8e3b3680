"""How the features of one side of a weight are cut into rotated blocks, and which features are in which block.

Both of POET's variants are the same object: an index tensor of rotated features, cut into consecutive blocks.

- block-stochastic: the index is a permutation of all features; blocks of `block_size`, and one smaller last block
  where `block_size` does not divide the dimension.
- fully stochastic: the index is a random subset of `block_size` features, one block; the other features stay.

Where a side consists of groups that must not mix, as the output channels of a grouped convolution or the experts of a
stacked weight, this holds for each group.

POET, arXiv 2506.08001, section 3.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .orthogonal import skew


VARIANTS = ("block_stochastic", "fully_stochastic")
Variant = Literal["block_stochastic", "fully_stochastic"]
SideName = Literal["R", "P"]

# Entries of a batch of blocks. Several batches of a CPU stay in the cache of a core; a GPU gains nothing beyond.
_MOST_ENTRIES_OF_A_THREAD = 2**19
_MOST_ENTRIES = 2**23


@dataclass(frozen=True)
class BlockPartition:
    """How the features of one side of a weight are cut into rotated blocks.

    Args:
        dim: number of features of the side.
        num_rotated: how many of them are rotated (all, or `block_size` of each group when fully stochastic).
        block_size: size `b` of a full block.
        groups: consecutive parts of equal size that no block reaches beyond, as of a grouped convolution.
    """

    dim: int
    num_rotated: int
    block_size: int
    groups: int = 1

    @property
    def num_full_blocks(self) -> int:
        return self.num_rotated // self.block_size

    @property
    def remainder(self) -> int:
        """Size of the last block where `block_size` does not divide; 0 where it does."""
        return self.num_rotated % self.block_size

    @property
    def is_one_block(self) -> bool:
        """Whether one block rotates all features. Their order means nothing then, and stays as it is."""
        return self.block_size == self.dim

    @property
    def num_parameters(self) -> int:
        b, r = self.block_size, self.remainder
        return self.num_full_blocks * (b * (b - 1) // 2) + r * (r - 1) // 2

    @property
    def num_entries(self) -> int:
        """Entries of all blocks as matrices."""
        return self.num_full_blocks * self.block_size**2 + self.remainder**2

    def skew_blocks(self, upper: Tensor) -> list[Tensor]:
        """The blocks' `Q` from their strict upper triangles, flat, shape (num_parameters,).

        Returns:
            Batches of equal blocks, in the dtype of `upper` or fp32, whichever is wider: (num_full_blocks, b, b) and,
            with a remainder r, (1, r, r).
        """
        upper = upper if upper.dtype == torch.float64 else upper.float()
        return [skew(part, size) for part, size in self.split(upper)]

    def split(self, upper: Tensor) -> list[tuple[Tensor, int]]:
        """The strict upper triangles by size of block: (num_blocks, b (b - 1) / 2) and `b`, the full blocks first."""
        b, r = self.block_size, self.remainder
        split = self.num_full_blocks * (b * (b - 1) // 2)
        parts = [(upper[:split].view(self.num_full_blocks, -1), b)]
        if r:
            parts.append((upper[split:].view(1, -1), r))
        return parts

    def zero_blocks(self, like: Tensor) -> list[Tensor]:
        """Blocks of zeros in the shapes and dtype of `skew_blocks`, of no memory: every entry is the same one."""
        zero = torch.zeros((), dtype=torch.float64 if like.dtype == torch.float64 else torch.float32).to(like.device)
        b, r = self.block_size, self.remainder
        return [zero.expand(self.num_full_blocks, b, b), *([zero.expand(1, r, r)] if r else [])]


def partition_side(variant: Variant, block_size: int | float, dim: int, groups: int = 1) -> BlockPartition:
    """Cut a side of `dim >= 2` features into blocks.

    Args:
        block_size: an int, at least 2; when fully stochastic also a fraction in (0, 1] of `dim`, or of a group.
        groups: blocks stay within these parts of the side. Block-stochastic blocks then have the largest size up to
            `block_size` that divides a group. Fully stochastic, each group has a block of its own.

    Raises:
        ValueError: fully stochastic with a block larger than the side. (Block-stochastic blocks are clipped to it.)
            Or no block of at least two features divides a group.
    """
    size = dim // groups
    if variant == "block_stochastic":
        b = min(int(block_size), size)
        if groups > 1:
            b = next((b for b in range(b, 1, -1) if size % b == 0), 0)
        if b < 2:
            larger = next(b for b in range(int(block_size), size + 1) if size % b == 0)
            raise ValueError(
                f"no block of 2 to {int(block_size)} features divides a group of {size}, but {larger} does"
            )
        return BlockPartition(dim, dim, b, groups)
    if isinstance(block_size, float):
        block_size = max(2, int(block_size * size))
    if block_size > size:
        part = "side" if groups == 1 else "group"
        raise ValueError(f"block_size={block_size} is larger than a {part} of {size} features")
    return BlockPartition(dim, groups * block_size, block_size, groups)


def draw_index(partition: BlockPartition, *, seed: int, module_name: str, side: SideName, num_reinits: int) -> Tensor:
    """The rotated features of one side in block order, int32, shape (num_rotated,).

    One block of all features has them in their own order, whatever the seed.

    A pure function of its arguments, the same on every process, platform and version: features are sorted by 64-bit
    keys from SHAKE-256 of the arguments' text. No random number generator is read or moved.

    Args:
        num_reinits: number of reinitialisations so far.
    """
    if partition.is_one_block:
        return torch.arange(partition.dim, dtype=torch.int32)
    text = f"poet/{seed}/{module_name}/{side}/{num_reinits}"
    keys = np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * partition.dim), dtype="<u8")
    order = np.argsort(keys, kind="stable")
    # Group by group, and of each the first ones.
    order = order[np.argsort(order // (partition.dim // partition.groups), kind="stable")]
    order = order.reshape(partition.groups, -1)[:, : partition.num_rotated // partition.groups].reshape(-1)
    if partition.num_rotated < partition.dim:
        order = np.sort(order)
    return torch.from_numpy(order.astype(np.int32))


def blocks_at_once(size: int, device: torch.device) -> int:
    """How many blocks of a size are computed in one batch; at least one."""
    most = _MOST_ENTRIES
    if device.type == "cpu":
        most = min(most, torch.get_num_threads() * _MOST_ENTRIES_OF_A_THREAD)
    return max(1, most // size**2)


class Ordering(NamedTuple):
    """An order of a side's features in which the rotated ones come first, block by block, and the way back.

    `x[order]` is in block order, and `x[order][back]` is `x`. Both have shape (dim,).
    """

    order: Tensor
    back: Tensor


def block_ordering(index: Tensor, partition: BlockPartition) -> Ordering | None:
    """The ordering that belongs to the rotated features `index` (num_rotated,) of a side.

    None where features are in it as they are, which spares gathers of weights and activations.
    """
    dim = partition.dim
    if partition.is_one_block:
        return None
    if partition.num_rotated == dim:
        order = index
    else:
        rotated = torch.zeros(dim, dtype=torch.bool, device=index.device).index_fill(0, index.long(), True)
        # A stable sort of False < True keeps the others in their order, without a data-dependent shape.
        rest = torch.argsort(rotated.to(torch.uint8), stable=True)[: dim - index.numel()]
        order = torch.cat([index, rest.to(index.dtype)])
    positions = torch.arange(dim, dtype=index.dtype, device=index.device)
    return Ordering(order, torch.empty_like(order).index_copy(0, order.long(), positions))


def block_slices(blocks: Sequence[Tensor]) -> list[tuple[Tensor, slice]]:
    """Each batch of equal blocks (num_blocks, b, b), and where its features stand in block order."""
    slices = []
    start = 0
    for batch in blocks:
        stop = start + batch.shape[0] * batch.shape[1]
        slices.append((batch, slice(start, stop)))
        start = stop
    return slices


def num_rotated(blocks: Sequence[Tensor]) -> int:
    """How many features the blocks rotate; those behind them in block order stay as they are."""
    return sum(batch.shape[0] * batch.shape[1] for batch in blocks)
