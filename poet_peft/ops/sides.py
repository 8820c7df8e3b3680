"""One side's rotation as the compute paths take it, and the blocks that follow from its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..maths.blocks import BlockPartition, Ordering, block_ordering, block_slices, num_rotated
from ..maths.orthogonal import OrthogonalMap, vjp_at_identity
from ..maths.precision import full_precision


class SideBlocks(NamedTuple):
    """What follows from the parameters of a side: lists of batched matrices, see `BlockPartition.skew_blocks`.

    Args:
        ordering: in which blocks are consecutive; None where they are as it is.
        Q: the skew-symmetric blocks; None at the identity, where all of them are zero.
        deltas: `G - I`. At the identity zeros that take no memory.
        inverses: `G^-T - I`; None where they were not asked for, or no cheap inverse is near enough.
    """

    ordering: Ordering | None
    Q: list[Tensor] | None
    deltas: list[Tensor]
    inverses: list[Tensor] | None

    def in_block_order(self, x: Tensor, dim: int) -> Tensor:
        return x if self.ordering is None else x.index_select(dim, self.ordering.order)

    def in_own_order(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of `in_block_order`."""
        return x if self.ordering is None else x.index_select(dim, self.ordering.back)

    def vjp(self, orthogonal_map: OrthogonalMap, grads: Sequence[Tensor]) -> Tensor:
        """The gradient by the flat parameters, (partition.num_parameters,), from `dL/dG` of the blocks."""
        if self.Q is None:
            return joined([vjp_at_identity(grad).flatten() for grad in grads], dim=0)
        blocks = zip(self.Q, self.deltas, grads, strict=True)
        return joined(
            [orthogonal_map.vjp(Q, delta, grad.to(delta.dtype)).flatten() for Q, delta, grad in blocks], dim=0
        )


class Side(NamedTuple):
    """The rotation of one side by its parameters.

    Args:
        index: rotated features in block order, int32, shape (partition.num_rotated,).
        upper: strict upper triangles of the blocks' `Q`, flat, shape (partition.num_parameters,).
        partition: how `upper` is cut into blocks.
        orthogonal_map: from `Q` to `G`.
        kept: where its blocks are kept; None computes them at every call.
    """

    index: Tensor
    upper: Tensor
    partition: BlockPartition
    orthogonal_map: OrthogonalMap
    kept: KeptBlocks | None = None

    def deltas(self) -> list[Tensor]:
        """`G - I` of the blocks, differentiable with respect to `upper`.

        In the dtype of the parameters, fp32 at least, whatever autocast and TF32 say: under bf16 autocast the
        orthogonality error would grow from 2e-7 to 4e-4.
        """
        with full_precision(self.upper.device.type):
            return [self.orthogonal_map.delta(Q) for Q in self.partition.skew_blocks(self.upper)]

    def blocks(self, with_inverses: bool = False) -> SideBlocks:
        """All blocks, without a gradient."""
        if self.kept is None or self.upper.is_meta:
            return self._compute(with_inverses)
        return self.kept.blocks(self, with_inverses)

    def blocks_at_identity(self) -> SideBlocks:
        """All blocks, for a side that is known to be the identity."""
        ordering = block_ordering(self.index, self.partition)
        return SideBlocks(ordering, None, self.partition.zero_blocks(self.upper), None)

    def _compute(self, with_inverses: bool) -> SideBlocks:
        with torch.no_grad(), full_precision(self.upper.device.type):
            Q = self.partition.skew_blocks(self.upper)
            deltas = [self.orthogonal_map.delta(block) for block in Q]
            blocks = SideBlocks(block_ordering(self.index, self.partition), Q, deltas, None)
            return self._with_inverses(blocks) if with_inverses else blocks

    def _with_inverses(self, blocks: SideBlocks) -> SideBlocks:
        inverses = [self.orthogonal_map.inverse_transpose(delta) for delta in blocks.deltas]
        return blocks._replace(inverses=None if any(inverse is None for inverse in inverses) else inverses)


def are_identity(sides: Sequence[Side]) -> bool:
    """Whether every plane of these sides is where it started. Waits for the device, once for all of them."""
    return not bool(torch.stack([side.upper.detach().any() for side in sides]).any())


def with_identity_check(y: Tensor, sides: Iterable[Side]) -> Tensor:
    """`y`, of a compiled graph that takes sides for the identity: running it fails where one is not."""
    if not torch.compiler.is_compiling():
        return y
    return y + sum(_identity_check(side.upper.detach()) for side in sides).to(y.dtype)


# torch.compile cannot branch on values: it sees one operator, and would drop one whose result nobody needs.
@torch.library.custom_op("poet_peft::identity_check", mutates_args=(), schema="(Tensor upper) -> Tensor")
def _identity_check(upper: Tensor) -> Tensor:
    if bool(upper.any()):
        raise RuntimeError(
            "a compiled model was made for rotations that are folded after every step (merge_interval=1), and meets "
            "one that is not the identity. Call merge_and_reinitialize(model, optimizer) first."
        )
    return upper.new_zeros(())


@_identity_check.register_fake
def _(upper: Tensor) -> Tensor:
    return upper.new_empty(())


class KeptBlocks:
    """The blocks of one rotation, kept for as long as `upper`, `index` and map equal those they were computed from.

    Equal in every entry: they are compared at each use, with copies, so that no way of changing them goes unnoticed.
    Micro-batches of an optimizer step and tokens of a generation share the blocks; nothing that depends on the weight
    is kept. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._values: tuple[Tensor, Tensor, SideBlocks, bool, OrthogonalMap] | None = None

    def blocks(self, side: Side, with_inverses: bool) -> SideBlocks:
        # One local name throughout: another thread may exchange it at any time.
        values = self._values
        if values is not None and _equal_sides(values, side):
            upper, index, blocks, has_inverses, _ = values
            if has_inverses or not with_inverses:
                return blocks
        else:
            self._values = None  # frees the memory before it is needed again
            upper, index, blocks = None, None, None
        # A tensor made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            if blocks is None:
                upper, index = side.upper.detach().clone(), side.index.clone()
                blocks = side._replace(upper=upper, index=index)._compute(with_inverses)
            else:
                blocks = side._with_inverses(blocks)
        self._values = upper, index, blocks, with_inverses, side.orthogonal_map
        return blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptBlocks:
        return KeptBlocks()

    def __reduce__(self) -> tuple[type[KeptBlocks], tuple[()]]:
        return KeptBlocks, ()


def _equal_sides(values: tuple[Any, ...], side: Side) -> bool:
    upper, index, *_, orthogonal_map = values
    return orthogonal_map == side.orthogonal_map and _equal(upper, side.upper) and _equal(index, side.index)


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.device == y.device and x.dtype == y.dtype and torch.equal(x, y)


@torch.no_grad()
def effective_weight(weight: Tensor, R: SideBlocks | None, P: SideBlocks | None) -> Tensor:
    """`R W P` of a weight (out, in), in its dtype: computed in that of the blocks, and rounded once."""
    with torch.autocast(device_type=weight.device.type, enabled=False):
        matrix = to_block_order(weight, R, P)
        if P is not None:
            matrix = rotate_columns(matrix.to(P.deltas[0].dtype), P.deltas)
        if R is not None:
            matrix = rotate_rows(matrix.to(R.deltas[0].dtype), R.deltas)
        matrix = matrix.to(weight.dtype)
    if P is not None:
        matrix = P.in_own_order(matrix, 1)
    return matrix if R is None else R.in_own_order(matrix, 0)


def to_block_order(matrix: Tensor, R: SideBlocks | None, P: SideBlocks | None) -> Tensor:
    """Rows and columns in the order in which blocks are consecutive."""
    if R is not None:
        matrix = R.in_block_order(matrix, 0)
    return matrix if P is None else P.in_block_order(matrix, 1)


def rotate_rows(matrix: Tensor, deltas: Sequence[Tensor], transpose: bool = False) -> Tensor:
    """`G X` of a matrix (rows, columns) whose first rows are the blocks' features."""
    parts = []
    for delta, part in block_slices(deltas):
        rows = matrix[part].unflatten(0, delta.shape[:2])
        parts.append(torch.baddbmm(rows, delta.mT if transpose else delta, rows).flatten(0, 1))
    return _with_rest(parts, matrix[num_rotated(deltas) :], dim=0)


def rotate_columns(matrix: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """`X G` of a matrix (rows, columns) whose first columns are the blocks' features."""
    parts = []
    for delta, part in block_slices(deltas):
        columns = matrix[:, part].unflatten(1, delta.shape[:2]).transpose(0, 1)
        parts.append(torch.baddbmm(columns, columns, delta).transpose(0, 1).flatten(1))
    return _with_rest(parts, matrix[:, num_rotated(deltas) :], dim=1)


def _with_rest(parts: list[Tensor], rest: Tensor, dim: int) -> Tensor:
    return joined([*parts, rest] if rest.numel() or not parts else parts, dim)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts as one tensor; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
