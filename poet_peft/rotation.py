"""One side's rotation as a module: its skew-symmetric parameters and the features that they rotate."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .maths.blocks import BlockPartition, SideName, draw_index
from .maths.orthogonal import CayleyNeumann, OrthogonalMap
from .maths.precision import full_precision
from .maths.spectrum import orthogonality_error, skew_norm, spectrum_bound
from .ops.sides import KeptBlocks, Side
from .weights.sharded import full


_BLOWN_UP = 1e6


class Orthogonality(NamedTuple):
    """How far the blocks of a rotation are from orthogonal: see `orthogonality_error` and `spectrum_bound`."""

    error: float
    spectrum: float


class Rotation(nn.Module):
    """The orthogonal factor `R` (output side) or `P` (input side) of one layer and adapter.

    Calling it gives its `Side`, for a layer to compute with.

    Args:
        partition: how the features of the side are cut into blocks.
        side: "R" or "P".
        module_name: name of the rotated layer in the base model; part of what `index` is drawn from.
        orthogonal_map: from `Q` to the blocks of the rotation.
        seed, num_reinits: what `index` is drawn for.

    Attributes:
        weight: strict upper triangles of the blocks' `Q`, row-major, one block after the other, fp32 by default, shape
            (partition.num_parameters,). Zero is the identity.
        index: rotated features in block order, int32, shape (partition.num_rotated,).
        mesh: the processes that each have a copy of the parameters, beside a base weight that is spread over them;
            None in one process, and where the parameters are sharded with the base weight.
        keeps_blocks: whether blocks are kept between calls, see `KeptBlocks`.
    """

    def __init__(
        self,
        partition: BlockPartition,
        side: SideName,
        module_name: str,
        orthogonal_map: OrthogonalMap | None = None,
        seed: int = 0,
        num_reinits: int = 0,
        keeps_blocks: bool = True,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.side = side
        self.module_name = module_name
        self.orthogonal_map = orthogonal_map or CayleyNeumann()
        self.keeps_blocks = keeps_blocks
        self.mesh: DeviceMesh | None = None
        self.weight = nn.Parameter(torch.zeros(partition.num_parameters))
        self.register_buffer("index", self.draw_index(seed, num_reinits))
        self._kept = KeptBlocks()
        self.register_load_state_dict_pre_hook(_refuse_other_order)

    def forward(self) -> Side:
        # A call, not an attribute, so that hooks which fetch parameters (offloading, FSDP) have their turn.
        kept = self._kept if self.keeps_blocks and not torch.compiler.is_compiling() else None
        return Side(self.index, full(self.weight), self.partition, self.orthogonal_map, kept)

    def draw_index(self, seed: int, num_reinits: int) -> Tensor:
        """The index that belongs to a seed and a number of reinitialisations, on the CPU."""
        return draw_index(
            self.partition, seed=seed, module_name=self.module_name, side=self.side, num_reinits=num_reinits
        )

    def order_problem(self, index: Tensor) -> str | None:
        """What is wrong with a file's index of one block of all features, whose order nothing reads; None if nothing.

        The parameters that belong to it would mean other planes.
        """
        if not self.partition.is_one_block or torch.equal(index.cpu(), self.draw_index(seed=0, num_reinits=0)):
            return None
        return (
            f"has {self.partition.dim} features in an order of its own, and one block of all features has them in "
            "their own order. Before the release of 0.1.0 it had another: merge the adapter with the version that "
            "wrote it."
        )

    @torch.no_grad()
    def is_usable(self) -> bool:
        """Whether `G` is finite and of sane size. An orthogonal matrix has entries of at most 1; a series whose `Q`
        has grown without bound has not."""
        return all(bool((delta.abs() < _BLOWN_UP).all()) for delta in self().blocks().deltas)

    @torch.no_grad()
    def angle(self) -> float:
        """The angle of the most-turned plane in radians, `2 atan(theta)`; estimated from below, see `skew_norm`."""
        return 2 * math.atan(max(float(skew_norm(Q).amax()) for Q in self().blocks().Q))

    @torch.no_grad()
    def orthogonality(self) -> Orthogonality:
        """How far `G` is from orthogonal."""
        matrices = [delta + torch.eye(delta.shape[-1]).to(delta) for delta in self().blocks().deltas]
        with full_precision(self.weight.device.type):
            return Orthogonality(
                error=max(float(orthogonality_error(G)) for G in matrices),
                spectrum=max(float(spectrum_bound(G).amax()) for G in matrices),
            )

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the identity, in place."""
        self.weight.zero_()
        self._kept = KeptBlocks()

    @torch.no_grad()
    def redraw(self, seed: int, num_reinits: int) -> None:
        """Take the index of another reinitialisation, in place."""
        self.index.copy_(self.draw_index(seed, num_reinits))

    def extra_repr(self) -> str:
        p = self.partition
        return f"dim={p.dim}, num_rotated={p.num_rotated}, block_size={p.block_size}, map={self.orthogonal_map}"


def _refuse_other_order(rotation: Rotation, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    index = state_dict.get(f"{prefix}index")
    problem = None if index is None or index.is_meta else rotation.order_problem(index)
    if problem is not None:
        error_messages: list[str] = args[-1]
        error_messages.append(f"{prefix}index {problem}")
