"""A rotated linear layer through its effective weight, with a backward of its own.

Everything happens in the basis in which the blocks are consecutive, so features are gathered a few times and never
scattered. With `A` the weight in that basis, `B = A P` and `E = R B` (blocks only), and `D = gy^T x` the dense weight
gradient in the same basis:

    dL/dG_R = D B^T,    dL/dG_P = A^T (G_R^T D),    blocks only,

which is exact for any `G`, orthogonal or not. Activations are not rotated; of them only `x` is kept, and beside it
`R W P`, or nothing if memory is short. Costs 2 N m n flops on top of a frozen linear layer's 4 N m n, and about
12 m n b for the weight, whatever N is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .basis import BlockBasis, block_basis, block_slices, num_rotated
from .reference import RotationTensors


def weight_centric(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    R: Sequence[RotationTensors],
    P: Sequence[RotationTensors],
    memory_efficient: bool = False,
) -> Tensor:
    """`reference.poet_linear` for one adapter: at most one rotation a side, and at least one in all.

    Not differentiable with respect to the weight, and only once with respect to the rest.

    Args:
        memory_efficient: rebuild the effective weight in the backward instead of keeping it from the forward.
    """
    basis_R = block_basis(R[0][0], weight.shape[0]) if R else None
    basis_P = block_basis(P[0][0], weight.shape[1]) if P else None
    offsets_R, offsets_P = (R[0][1] if R else []), (P[0][1] if P else [])
    return _RotatedLinear.apply(
        x, weight, bias, basis_R, basis_P, memory_efficient, len(offsets_R), *offsets_R, *offsets_P
    )


class _RotatedLinear(torch.autograd.Function):
    """Inputs: x, weight, bias, the two bases, memory_efficient, the number of R's offsets, all offsets."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        basis_R: BlockBasis | None,
        basis_P: BlockBasis | None,
        memory_efficient: bool,
        num_R: int,
        *offsets: Tensor,
    ) -> Tensor:
        effective = _effective_weight(weight, basis_R, basis_P, offsets[:num_R], offsets[num_R:])
        ctx.save_for_backward(x, weight, None if memory_efficient else effective, *offsets)
        ctx.basis_R, ctx.basis_P, ctx.num_R = basis_R, basis_P, num_R
        ctx.has_bias = bias is not None
        return F.linear(x, effective, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, effective, *offsets = ctx.saved_tensors
        R, P = offsets[: ctx.num_R], offsets[ctx.num_R :]
        grad_x = None
        if ctx.needs_input_grad[0]:
            if effective is None:
                effective = _effective_weight(weight, ctx.basis_R, ctx.basis_P, R, P)
            grad_x = (grad_y @ effective.to(grad_y.dtype)).to(x.dtype)
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        grad_bias = grad_y.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        grads = [None] * len(offsets)
        if any(ctx.needs_input_grad[-len(offsets) :]):
            D = grad_y.mT @ x.reshape(-1, x.shape[-1]).to(grad_y.dtype)
            grads = _grad_offsets(D.to(offsets[0].dtype), weight, ctx.basis_R, ctx.basis_P, R, P)
        return grad_x, None, grad_bias, None, None, None, None, *grads


def _to_basis(matrix: Tensor, basis_R: BlockBasis | None, basis_P: BlockBasis | None) -> Tensor:
    if basis_R is not None:
        matrix = matrix.index_select(0, basis_R.order)
    return matrix if basis_P is None else matrix.index_select(1, basis_P.order)


def _effective_weight(
    weight: Tensor,
    basis_R: BlockBasis | None,
    basis_P: BlockBasis | None,
    R: Sequence[Tensor],
    P: Sequence[Tensor],
) -> Tensor:
    dtype = (*R, *P)[0].dtype
    with torch.autocast(device_type=weight.device.type, enabled=False):
        matrix = _rotate_columns(_to_basis(weight, basis_R, basis_P).to(dtype), P)
        matrix = _rotate_rows(matrix, R).to(weight.dtype)
    if basis_P is not None:
        matrix = matrix.index_select(1, basis_P.inverse)
    return matrix if basis_R is None else matrix.index_select(0, basis_R.inverse)


def _grad_offsets(
    D: Tensor,
    weight: Tensor,
    basis_R: BlockBasis | None,
    basis_P: BlockBasis | None,
    R: Sequence[Tensor],
    P: Sequence[Tensor],
) -> list[Tensor]:
    A = _to_basis(weight, basis_R, basis_P).to(D.dtype)
    D = _to_basis(D, basis_R, basis_P)
    grads = []
    B = _rotate_columns(A, P)
    for offset, rows in block_slices(R):
        shape = offset.shape[:2]
        grads.append(D[rows].unflatten(0, shape) @ B[rows].unflatten(0, shape).mT)
    D = _rotate_rows(D, R, transpose=True)
    for offset, columns in block_slices(P):
        shape = offset.shape[:2]
        A_blocks = A[:, columns].unflatten(1, shape).permute(1, 2, 0)
        grads.append(A_blocks @ D[:, columns].unflatten(1, shape).transpose(0, 1))
    return grads


def _rotate_rows(matrix: Tensor, offsets: Sequence[Tensor], transpose: bool = False) -> Tensor:
    """`G X` of a matrix (rows, columns) whose first rows are the blocks' features."""
    parts = []
    for offset, part in block_slices(offsets):
        rows = matrix[part].unflatten(0, offset.shape[:2])
        parts.append(torch.baddbmm(rows, offset.mT if transpose else offset, rows).flatten(0, 1))
    return torch.cat([*parts, matrix[num_rotated(offsets) :]])


def _rotate_columns(matrix: Tensor, offsets: Sequence[Tensor]) -> Tensor:
    """`X G` of a matrix (rows, columns) whose first columns are the blocks' features."""
    parts = []
    for offset, part in block_slices(offsets):
        columns = matrix[:, part].unflatten(1, offset.shape[:2]).transpose(0, 1)
        parts.append(torch.baddbmm(columns, columns, offset).transpose(0, 1).flatten(1))
    return torch.cat([*parts, matrix[:, num_rotated(offsets) :]], dim=1)
