"""One side's rotation as a module: its skew-symmetric parameters and the features that they rotate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .block_map import BlockMap
from .ops.prepared import RotationParameters
from .orthogonal import cayley_neumann_offset, orthogonality_error, skew_norm, spectrum_bound
from .primitives import BlockPartition, Side, draw_index
from .sharding import full


# A series this long is orthogonal to rounding wherever it is used.
_LONG_SERIES = 15
_UNNOTICED = 1e-6
_BLOWN_UP = 1e6


class FoldError(NamedTuple):
    """How far the blocks of a rotation are from orthogonal: see `orthogonality_error` and `spectrum_bound`."""

    orthogonality: float
    spectrum: float


class Rotation(nn.Module):
    """The orthogonal factor `R` (output side) or `P` (input side) of one layer and adapter.

    Args:
        partition: how the features of the side are cut into blocks.
        side: "R" or "P".
        module_name: name of the rotated layer in the base model; part of what `index` is drawn from.
        orthogonal_map: "cayley_neumann" or "cayley".
        num_neumann_terms: `k` of the Cayley-Neumann series.

    Attributes:
        weight: strict upper triangles of the blocks' `Q`, row-major, one block after the other, shape
            (partition.num_parameters,). Zero is the identity.
        index: rotated features in block order, int32, shape (partition.num_rotated,).
        mesh: the processes that each have a copy of the parameters, beside a base weight that is spread over them;
            None in one process, and where the parameters are sharded with the base weight.
    """

    def __init__(
        self,
        partition: BlockPartition,
        side: Side,
        module_name: str,
        orthogonal_map: str = "cayley_neumann",
        num_neumann_terms: int = 3,
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.side = side
        self.module_name = module_name
        self.block_map = BlockMap(partition, orthogonal_map, num_neumann_terms)
        self.mesh: DeviceMesh | None = None
        self.weight = nn.Parameter(torch.zeros(partition.num_parameters))
        self.register_buffer("index", self.draw_index(seed, epoch))

    def draw_index(self, seed: int, epoch: int) -> Tensor:
        """The index that belongs to a seed and an epoch, on the CPU."""
        return draw_index(self.partition, seed=seed, module_name=self.module_name, side=self.side, epoch=epoch)

    def skew_blocks(self) -> list[Tensor]:
        """The blocks' `Q` in the parameter's dtype, at least fp32: see `BlockMap`."""
        return self.block_map.skew_blocks(full(self.weight))

    def offsets(self) -> list[Tensor]:
        """`G - I` of the blocks, in the shapes and dtype of `skew_blocks`."""
        return self.block_map.offsets(self.skew_blocks())

    def forward(self) -> RotationParameters:
        """What the compute paths need of it. Call the module, for hooks that bring offloaded parameters in to run."""
        return RotationParameters(self.index, full(self.weight), self.block_map)

    @torch.no_grad()
    def is_usable(self) -> bool:
        """Whether `G` is finite and of sane size. An orthogonal matrix has entries of at most 1; a series whose `Q`
        has grown without bound has not."""
        return all(bool((offset.abs() < _BLOWN_UP).all()) for offset in self.offsets())

    @torch.no_grad()
    def angle(self) -> float:
        """The angle of the most-turned plane in radians, `2 atan(theta)`; estimated from below, see `skew_norm`."""
        return 2 * math.atan(max(float(skew_norm(Q).amax()) for Q in self.skew_blocks()))

    @torch.no_grad()
    def offsets_for_fold(self) -> tuple[list[Tensor], FoldError]:
        """`G - I` to fold into the weight, and how far `G` is from orthogonal.

        The series' own `G`, so that the fold changes no output. Where the series is so close to orthogonal that the
        output cannot notice, the orthogonal matrix next to it, so that nothing drifts.
        """
        blocks = self.skew_blocks()
        offsets = self.block_map.offsets(blocks)
        matrices = [offset + torch.eye(offset.shape[-1]).to(offset) for offset in offsets]
        error = FoldError(
            orthogonality=max(float(orthogonality_error(G)) for G in matrices),
            spectrum=max(float(spectrum_bound(G).amax()) for G in matrices),
        )
        block_map = self.block_map
        is_series = block_map.orthogonal_map == "cayley_neumann" and block_map.num_neumann_terms % 2 == 1
        if is_series and error.spectrum < _UNNOTICED:
            offsets = [cayley_neumann_offset(Q, _LONG_SERIES) for Q in blocks]
        return offsets, error

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the identity, in place."""
        self.weight.zero_()

    @torch.no_grad()
    def redraw(self, seed: int, epoch: int) -> None:
        """Take the index of another epoch, in place."""
        self.index.copy_(self.draw_index(seed, epoch))

    def extra_repr(self) -> str:
        p, kind = self.partition, self.block_map.orthogonal_map
        return f"dim={p.dim}, num_rotated={p.num_rotated}, block_size={p.block_size}, map={kind}"
