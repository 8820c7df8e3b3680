"""`AdapterState`: what an adapter remembers of a layer beside its rotations, saved and loaded with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .maths.orthogonal import Cayley, OrthogonalMap
from .weights.layout import WeightLayout


class AdapterState(NamedTuple):
    """A named view of the int64 tensor `poet_state`.

    Args:
        seed: that index tensors are drawn from.
        num_reinits: reinitialisations so far, which index tensors are drawn for.
        num_folds: folds so far.
        num_steps: optimizer steps so far.
        num_terms: of the Cayley-Neumann series that the adapter is trained with; 0 = the exact Cayley map.
        adaptive_terms: 1 if the series gets more terms where it needs them, else 0.
        block_size_R, block_size_P: of the sides; 0 where a side has no rotation.
        layout: a `WeightLayout`, of the base weight.
    """

    seed: int
    num_reinits: int = 0
    num_folds: int = 0
    num_steps: int = 0
    num_terms: int = 0
    adaptive_terms: int = 0
    block_size_R: int = 0
    block_size_P: int = 0
    layout: int = WeightLayout.MATRIX

    @classmethod
    def at_start(
        cls, seed: int, orthogonal_map: OrthogonalMap, block_sizes: dict[str, int], layout: WeightLayout
    ) -> AdapterState:
        """Of an adapter that was never trained, with the block sizes of its sides by name."""
        fixed = {f"block_size_{side}": size for side, size in block_sizes.items()} | {"layout": int(layout)}
        if isinstance(orthogonal_map, Cayley):
            return cls(seed, **fixed)
        return cls(seed, num_terms=orthogonal_map.num_terms, adaptive_terms=int(orthogonal_map.adaptive), **fixed)

    @classmethod
    def of(cls, tensor: Tensor) -> AdapterState:
        return cls(*tensor.tolist())

    def tensor(self) -> Tensor:
        return torch.tensor(self, dtype=torch.int64)
