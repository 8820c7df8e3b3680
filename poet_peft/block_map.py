"""From the parameters of one side to its orthogonal blocks, and from a gradient by the blocks back to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .orthogonal import (
    cayley_neumann_offset,
    cayley_neumann_pull_back,
    cayley_offset,
    cayley_pull_back,
    inverse_transpose_offset,
    skew,
)
from .precision import at_least_fp32
from .primitives import BlockPartition


# The error of `inverse_transpose_offset` that is taken for none: that of a gradient's own sums in fp32.
_UNNOTICED = 1e-5


@dataclass(frozen=True)
class BlockMap:
    """How the flat parameters of one side make the blocks of its rotation.

    Blocks are lists of batched square matrices: (num_full_blocks, b, b) and, with a remainder r, (1, r, r).

    Args:
        orthogonal_map: "cayley_neumann" or "cayley".
        num_neumann_terms: `k` of the Cayley-Neumann series.
    """

    partition: BlockPartition
    orthogonal_map: str = "cayley_neumann"
    num_neumann_terms: int = 3

    def skew_blocks(self, upper: Tensor) -> list[Tensor]:
        """The blocks' `Q`, at least fp32, from their strict upper triangles (partition.num_parameters,)."""
        upper = at_least_fp32(upper)
        b, r = self.partition.block_size, self.partition.remainder
        num_full = self.partition.num_full_blocks
        split = num_full * (b * (b - 1) // 2)
        blocks = [skew(upper[:split].view(num_full, -1), b)]
        if r:
            blocks.append(skew(upper[split:].view(1, -1), r))
        return blocks

    def offsets(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """`G - I` of `skew_blocks`. Always computed in full precision: under bf16 autocast alone the orthogonality
        error grows from 2e-7 to 4e-4."""
        with torch.autocast(device_type=blocks[0].device.type, enabled=False):
            if self.orthogonal_map == "cayley":
                return [cayley_offset(Q) for Q in blocks]
            return [cayley_neumann_offset(Q, self.num_neumann_terms) for Q in blocks]

    def inverse_offsets(self, offsets: Sequence[Tensor]) -> list[Tensor] | None:
        """`G^-T - I` of the blocks, or None where they are too far from orthogonal for a cheap inverse.

        Waits for the device, to look at how far they are.
        """
        if self.orthogonal_map == "cayley":
            return list(offsets)
        inverses = [inverse_transpose_offset(offset) for offset in offsets]
        if all(bool(error < _UNNOTICED) for _, error in inverses):
            return [inverse for inverse, _ in inverses]
        return None

    def pull_back(self, blocks: Sequence[Tensor], offsets: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        """The gradient by the flat parameters from that by the blocks' `G`, at least fp32.

        Args:
            blocks, offsets: `skew_blocks` and their `offsets`.
            grads: `dL/dG`, in the same shapes.
        """
        parts = []
        for Q, offset, grad in zip(blocks, offsets, grads, strict=True):
            if self.orthogonal_map == "cayley":
                parts.append(cayley_pull_back(offset, grad).flatten())
            else:
                parts.append(cayley_neumann_pull_back(Q, grad, self.num_neumann_terms).flatten())
        return torch.cat(parts)
