"""The gradients of a rotated layer by the blocks `G` of its rotations `R` and `P`, weight `A` (out, in), by two rules.

Both in the order of features in which blocks are consecutive:

- tangent: outer products of activations, blocks only, `C_R = sum gy^T y` and `C_P = sum gx^T x`. Then
  `dL/dG_R = C_R G_R^-T` and `dL/dG_P = G_P^-T C_P`. Costs 2 N b (m + n) flops, and keeps `y` (without the bias).
- weight-centric: the gradient `D = gy^T x` by the whole weight. With `B = A P`: `dL/dG_R = D B^T` and
  `dL/dG_P = A^T (G_R^T D)`. Costs 2 N m n + 6 m n b flops, and keeps only `x`. Exact for any `G`, also for one that is
  far from orthogonal.

At the identity both rules lose their factors `G`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..maths.blocks import block_slices
from .sides import SideBlocks, rotate_columns, rotate_rows, to_block_order


# Gathered tokens of a chunk stay in a core's cache between gather and product.
_CHUNK = 512


def tangent_R(grad_y: Tensor, y: Tensor, R: SideBlocks) -> list[Tensor]:
    sums = block_outer_products(grad_y, y, R)
    if R.Q is None:
        return sums
    return [torch.baddbmm(C, C, inverse) for C, inverse in zip(sums, R.inverses, strict=True)]


def tangent_P(grad_x: Tensor, x: Tensor, P: SideBlocks) -> list[Tensor]:
    sums = block_outer_products(grad_x, x, P)
    if P.Q is None:
        return sums
    return [torch.baddbmm(C, inverse, C) for C, inverse in zip(sums, P.inverses, strict=True)]


def block_outer_products(a: Tensor, b: Tensor, side: SideBlocks) -> list[Tensor]:
    """`sum_t a_t b_t^T` over tokens, of each block's features: (num_tokens, dim) twice -> the shapes of the blocks.

    In the dtype of the blocks.
    """
    slices = block_slices(side.deltas)
    sums = [torch.zeros_like(delta) for delta in side.deltas]
    order = side.ordering.order[: slices[-1][1].stop]
    chunk = _CHUNK if a.device.type == "cpu" else max(a.shape[0], 1)
    for tokens_a, tokens_b in zip(a.split(chunk), b.split(chunk), strict=True):
        gathered_a, gathered_b = tokens_a.index_select(1, order), tokens_b.index_select(1, order)
        for i, (delta, part) in enumerate(slices):
            left = gathered_a[:, part].unflatten(1, delta.shape[:2]).permute(1, 2, 0)
            right = gathered_b[:, part].unflatten(1, delta.shape[:2]).transpose(0, 1)
            if left.dtype == sums[i].dtype:
                sums[i].baddbmm_(left, right)
            else:
                sums[i] += torch.bmm(left, right)
    return sums


def weight_centric(
    D: Tensor, weight: Tensor, R: SideBlocks | None, P: SideBlocks | None
) -> tuple[list[Tensor], list[Tensor]]:
    if (R or P).Q is None:
        return _weight_centric_at_identity(D, weight, R, P)
    deltas_R, deltas_P = (side.deltas if side else [] for side in (R, P))
    dtype = (*deltas_R, *deltas_P)[0].dtype
    A = to_block_order(weight, R, P).to(dtype)
    D = to_block_order(D.to(dtype), R, P)
    B = rotate_columns(A, deltas_P)
    grads_R = [
        D[rows].unflatten(0, delta.shape[:2]) @ B[rows].unflatten(0, delta.shape[:2]).mT
        for delta, rows in block_slices(deltas_R)
    ]
    D = rotate_rows(D, deltas_R, transpose=True)
    grads_P = [
        A[:, columns].unflatten(1, delta.shape[:2]).permute(1, 2, 0)
        @ D[:, columns].unflatten(1, delta.shape[:2]).transpose(0, 1)
        for delta, columns in block_slices(deltas_P)
    ]
    return grads_R, grads_P


def _weight_centric_at_identity(
    D: Tensor, weight: Tensor, R: SideBlocks | None, P: SideBlocks | None
) -> tuple[list[Tensor], list[Tensor]]:
    dtype = (R or P).deltas[0].dtype
    grads_R, grads_P = [], []
    if R is not None:
        for delta, rows in block_slices(R.deltas):
            features = R.ordering.order[rows]
            left, right = (_rows(matrix, features, dtype).unflatten(0, delta.shape[:2]) for matrix in (D, weight))
            grads_R.append(left @ right.mT)
    if P is not None:
        for delta, columns in block_slices(P.deltas):
            features = P.ordering.order[columns]
            left, right = (_columns(matrix, features, dtype).unflatten(1, delta.shape[:2]) for matrix in (weight, D))
            grads_P.append(left.permute(1, 2, 0) @ right.transpose(0, 1))
    return grads_R, grads_P


def _rows(matrix: Tensor, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix, or of a stack (num_experts, rows, columns) in which the rows of all experts are counted on."""
    if matrix.dim() == 2:
        return matrix.index_select(0, features).to(dtype)
    num_rows = matrix.shape[1]
    return matrix[features // num_rows, features % num_rows].to(dtype)


def _columns(matrix: Tensor, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of a matrix, or of a stack (num_experts, rows, columns) as (rows, len(features))."""
    return matrix.index_select(1, features).to(dtype) if matrix.dim() == 2 else _rows(matrix.mT, features, dtype).mT
