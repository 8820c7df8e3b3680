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

from collections.abc import Sequence

import torch
from torch import Tensor

from ..maths.blocks import SideName, block_slices, num_rotated
from .sides import SideBlocks, joined, rotate_columns, rotate_rows, to_block_order


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
    order = _rotated_features(side)
    chunk = _CHUNK if a.device.type == "cpu" and order is not None else max(a.shape[0], 1)
    for tokens_a, tokens_b in zip(a.split(chunk), b.split(chunk), strict=True):
        gathered_a, gathered_b = (x if order is None else x.index_select(1, order) for x in (tokens_a, tokens_b))
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
        lefts, rights = (_rows(matrix, _rotated_features(R), dtype) for matrix in (D, weight))
        for delta, rows in block_slices(R.deltas):
            left, right = (matrix[rows].unflatten(0, delta.shape[:2]) for matrix in (lefts, rights))
            grads_R.append(left @ right.mT)
    if P is not None:
        lefts, rights = (_columns(matrix, _rotated_features(P), dtype) for matrix in (weight, D))
        for delta, columns in block_slices(P.deltas):
            left, right = (matrix[:, columns].unflatten(1, delta.shape[:2]) for matrix in (lefts, rights))
            grads_P.append(left.permute(1, 2, 0) @ right.transpose(0, 1))
    return grads_R, grads_P


def conjugated(
    weight: Tensor, generators: Sequence[Tensor], side: SideName, blocks: SideBlocks, other: SideBlocks
) -> list[Tensor]:
    """The blocks of `W M W^T` on the side `R`, or of `W^T M W` on `P`, with `M` of the other side.

    Args:
        weight: (out, in), or a stack (num_experts, out, in).
        generators: the blocks of `M`, in the shapes of the other side's.
        side: whose blocks are asked for.
        blocks, other: of both sides, at the identity.
    """
    num_experts = weight.shape[0] if weight.dim() == 3 else 1
    dtype = generators[0].dtype
    # X (num_experts, rotated features of the side, those of the other side), both in block order.
    X = _rows(weight if side == "R" else weight.mT, _rotated_features(blocks), dtype)
    if weight.dim() == 3:
        X = X.unflatten(0, (num_experts, -1))
    X = _columns(X, _rotated_features(other), dtype).unflatten(1, (num_experts, -1)).transpose(0, 1)
    products = [
        (columns @ M.unflatten(0, (num_experts, -1))).transpose(1, 2).flatten(2)
        for M, columns in _split_columns(X, generators)
    ]
    lefts, rights = (_split_columns(x.mT, blocks.deltas) for x in (joined(products, dim=2), X))
    return [(left.mT @ right).flatten(0, 1) for (_, left), (_, right) in zip(lefts, rights, strict=True)]


def _rotated_features(side: SideBlocks) -> Tensor | None:
    return None if side.ordering is None else side.ordering.order[: num_rotated(side.deltas)]


def _split_columns(X: Tensor, blocks: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each batch of equal blocks of a stack, and its columns of `X`: (num_experts, num_blocks, rows, b)."""
    widths = [batch.shape[0] // X.shape[0] * batch.shape[1] for batch in blocks]
    return [
        (batch, part.unflatten(2, (-1, batch.shape[1])).transpose(1, 2))
        for batch, part in zip(blocks, X.split(widths, dim=2), strict=True)
    ]


def _rows(matrix: Tensor, features: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix, or of a stack (num_experts, rows, columns) in which the rows of all experts are counted on.

    All of them without `features`.
    """
    if features is None:
        return matrix.flatten(0, -2).to(dtype)
    if matrix.dim() == 2:
        return matrix.index_select(0, features).to(dtype)
    num_rows = matrix.shape[1]
    return matrix[features // num_rows, features % num_rows].to(dtype)


def _columns(matrix: Tensor, features: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Columns of a matrix, or of a stack (num_experts, rows, columns) as (rows, len(features))."""
    if matrix.dim() == 2 and features is not None:
        return matrix.index_select(1, features).to(dtype)
    return _rows(matrix.mT, features, dtype).mT
