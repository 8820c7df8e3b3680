"""The two stochastic primitives: which features of a side are rotated, in which blocks, and how they are drawn.

Both are the same object: an index tensor of rotated features, cut into consecutive blocks.

- block-stochastic: the index is a permutation of all features; blocks of `block_size`, and one smaller last block
  where `block_size` does not divide the dimension.
- fully stochastic: the index is a random subset of `block_size` features, one block; the other features stay.

POET, arXiv 2506.08001, section 3.2.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor


VARIANTS = ("block_stochastic", "fully_stochastic")
Variant = Literal["block_stochastic", "fully_stochastic"]
Side = Literal["R", "P"]


@dataclass(frozen=True)
class BlockPartition:
    """How the features of one side of a weight are cut into rotated blocks.

    Args:
        dim: number of features of the side.
        num_rotated: how many of them are rotated (all, or `block_size` when fully stochastic).
        block_size: size `b` of a full block.
    """

    dim: int
    num_rotated: int
    block_size: int

    @property
    def num_full_blocks(self) -> int:
        return self.num_rotated // self.block_size

    @property
    def remainder(self) -> int:
        """Size of the last block where `block_size` does not divide; 0 where it does."""
        return self.num_rotated % self.block_size

    @property
    def num_parameters(self) -> int:
        b, r = self.block_size, self.remainder
        return self.num_full_blocks * (b * (b - 1) // 2) + r * (r - 1) // 2


def partition_side(variant: Variant, block_size: int | float, dim: int) -> BlockPartition:
    """Cut a side of `dim >= 2` features into blocks.

    Args:
        block_size: an int, at least 2; when fully stochastic also a fraction of `dim` in (0, 1].

    Raises:
        ValueError: fully stochastic with a block larger than the side. (Block-stochastic blocks are clipped to it.)
    """
    if variant == "block_stochastic":
        return BlockPartition(dim, dim, min(int(block_size), dim))
    if isinstance(block_size, float):
        block_size = max(2, int(block_size * dim))
    if block_size > dim:
        raise ValueError(f"block_size={block_size} is larger than a side of {dim} features")
    return BlockPartition(dim, block_size, block_size)


def draw_index(partition: BlockPartition, *, seed: int, module_name: str, side: Side, epoch: int) -> Tensor:
    """The rotated features of one side in block order, int32, shape (num_rotated,).

    A pure function of its arguments, the same on every process, platform and version: features are sorted by 64-bit
    keys from SHAKE-256 of the arguments' text. No random number generator is read or moved.

    Args:
        epoch: number of reinitialisations so far.
    """
    text = f"poet/{seed}/{module_name}/{side}/{epoch}"
    keys = np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * partition.dim), dtype="<u8")
    order = np.argsort(keys, kind="stable")[: partition.num_rotated]
    if partition.num_rotated < partition.dim:
        order = np.sort(order)
    return torch.from_numpy(order.astype(np.int32))
