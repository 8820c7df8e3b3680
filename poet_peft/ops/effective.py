"""A rotated linear layer through its effective weight `R W P`, with a backward of its own.

The forward and the gradient by the input are those of a frozen linear layer, 4 N m n flops. No activation is rotated.
The gradient by the blocks `G` of the rotations comes from one of two rules, both in the order of features in which
blocks are consecutive:

- tangent: outer products of activations, blocks only, `C_R = sum gy^T y` and `C_P = sum gx^T x`. Then
  `dL/dG_R = C_R G_R^-T` and `dL/dG_P = G_P^-T C_P`. Costs 2 N b (m + n) flops, and keeps `y` (without the bias).
- weight-centric: the gradient `D = gy^T x` by the whole weight. With `A` the weight, `B = A P`:
  `dL/dG_R = D B^T` and `dL/dG_P = A^T (G_R^T D)`. Costs 2 N m n + 6 m n b flops, and keeps only `x`. Exact for any
  `G`, also for one that is far from orthogonal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..block_map import BlockMap
from .basis import block_slices
from .prepared import (
    Prepared,
    PreparedSide,
    RotationParameters,
    prepare,
    prepare_sides,
    rotate_columns,
    rotate_rows,
    to_basis,
)


# Gathered tokens of a chunk stay in a core's cache between gather and product.
_CHUNK = 512


def effective_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    R: RotationParameters | None,
    P: RotationParameters | None,
    *,
    tangent: bool,
    memory_efficient: bool = False,
    prepared: Prepared | None = None,
) -> Tensor:
    """`reference.poet_linear` for one adapter: at most one rotation a side, and at least one in all.

    Not differentiable with respect to the weight, and only once with respect to the rest.

    Args:
        tangent: use the tangent rule if the blocks are near enough to orthogonal, else the weight-centric one.
        memory_efficient: keep no second copy of the weight between forward and backward, but build it twice.
        prepared: `prepare(weight, R, P, with_inverses=tangent)`, if it is at hand.
    """
    index_R, upper_R, map_R = R or (None, None, None)
    index_P, upper_P, map_P = P or (None, None, None)
    return _EffectiveLinear.apply(
        x, weight, bias, upper_R, upper_P, index_R, index_P, map_R, map_P, tangent, memory_efficient, prepared
    )


class _EffectiveLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        upper_R: Tensor | None,
        upper_P: Tensor | None,
        index_R: Tensor | None,
        index_P: Tensor | None,
        map_R: BlockMap | None,
        map_P: BlockMap | None,
        tangent: bool,
        memory_efficient: bool,
        prepared: Prepared | None,
    ) -> Tensor:
        kept_outside = prepared is not None
        if prepared is None:
            R, P = _parameters(index_R, upper_R, map_R), _parameters(index_P, upper_P, map_P)
            prepared = prepare(weight, R, P, with_inverses=tangent)
        y = F.linear(x, prepared.weight)
        ctx.tangent = tangent and prepared.has_inverses and any(ctx.needs_input_grad[3:5])
        effective = None if kept_outside or memory_efficient else prepared.weight
        ctx.save_for_backward(x, weight, upper_R, upper_P, index_R, index_P, effective, y if ctx.tangent else None)
        ctx.prepared = prepared if kept_outside else None
        ctx.map_R, ctx.map_P = map_R, map_P
        return y if bias is None else y + bias.to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(device_type=grad_y.device.type, enabled=False):
            return _backward(ctx, grad_y)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, upper_R, upper_P, index_R, index_P, effective, y = _saved_tensors(ctx)
    prepared = ctx.prepared
    if prepared is None:
        R, P = _parameters(index_R, upper_R, ctx.map_R), _parameters(index_P, upper_P, ctx.map_P)
        if effective is None:
            prepared = prepare(weight, R, P, with_inverses=ctx.tangent)
        else:
            prepared = Prepared(*prepare_sides(weight, R, P, ctx.tangent), effective)

    needs_x, _, needs_bias, needs_R, needs_P = ctx.needs_input_grad[:5]
    grad_x = grad_bias = grad_R = grad_P = None
    if needs_x or (ctx.tangent and needs_P):
        grad_x = grad_y @ prepared.weight.to(grad_y.dtype)
    tokens_y, tokens_x = _flat(grad_y), _flat(x).to(grad_y.dtype)
    if needs_bias:
        grad_bias = tokens_y.sum(0)
    if ctx.tangent:
        blocks_R = _tangent_R(tokens_y, _flat(y), prepared.R) if needs_R else None
        blocks_P = _tangent_P(_flat(grad_x), tokens_x, prepared.P) if needs_P else None
    elif needs_R or needs_P:
        blocks_R, blocks_P = _weight_centric(tokens_y.mT @ tokens_x, weight, prepared)
    if needs_R:
        grad_R = ctx.map_R.pull_back(prepared.R.blocks, prepared.R.offsets, blocks_R).to(upper_R.dtype)
    if needs_P:
        grad_P = ctx.map_P.pull_back(prepared.P.blocks, prepared.P.offsets, blocks_P).to(upper_P.dtype)
    return grad_x.to(x.dtype) if needs_x else None, None, grad_bias, grad_R, grad_P, *[None] * 7


def _saved_tensors(ctx: Any) -> tuple[Tensor | None, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if ctx.tangent and "inplace operation" in str(error):
            raise RuntimeError(
                "a tensor that a rotated layer needs in its backward was written to in place, such as its output by "
                "ReLU(inplace=True). Write to a copy, or pass POETConfig(memory_efficient=True), which does not need "
                "the output."
            ) from error
        raise


def _parameters(index: Tensor | None, upper: Tensor | None, block_map: BlockMap | None) -> RotationParameters | None:
    return None if block_map is None else RotationParameters(index, upper, block_map)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _tangent_R(grad_y: Tensor, y: Tensor, R: PreparedSide) -> list[Tensor]:
    sums = block_outer_products(grad_y, y, R)
    return [torch.baddbmm(C, C, inverse) for C, inverse in zip(sums, R.inverses, strict=True)]


def _tangent_P(grad_x: Tensor, x: Tensor, P: PreparedSide) -> list[Tensor]:
    sums = block_outer_products(grad_x, x, P)
    return [torch.baddbmm(C, inverse, C) for C, inverse in zip(sums, P.inverses, strict=True)]


def block_outer_products(a: Tensor, b: Tensor, side: PreparedSide) -> list[Tensor]:
    """`sum_t a_t b_t^T` over tokens, of each block's features: (num_tokens, dim) twice -> the shapes of the blocks.

    In the dtype of the blocks.
    """
    slices = block_slices(side.offsets)
    sums = [torch.zeros_like(offset) for offset in side.offsets]
    order = side.basis.order[: slices[-1][1].stop]
    chunk = _CHUNK if a.device.type == "cpu" else max(a.shape[0], 1)
    for tokens_a, tokens_b in zip(a.split(chunk), b.split(chunk), strict=True):
        gathered_a, gathered_b = tokens_a.index_select(1, order), tokens_b.index_select(1, order)
        for i, (offset, part) in enumerate(slices):
            left = gathered_a[:, part].unflatten(1, offset.shape[:2]).permute(1, 2, 0)
            right = gathered_b[:, part].unflatten(1, offset.shape[:2]).transpose(0, 1)
            if left.dtype == sums[i].dtype:
                sums[i].baddbmm_(left, right)
            else:
                sums[i] += torch.bmm(left, right)
    return sums


def _weight_centric(D: Tensor, weight: Tensor, prepared: Prepared) -> tuple[list[Tensor], list[Tensor]]:
    R, P = prepared.R, prepared.P
    offsets_R, offsets_P = (side.offsets if side else [] for side in (R, P))
    dtype = (*offsets_R, *offsets_P)[0].dtype
    A = to_basis(weight, R, P).to(dtype)
    D = to_basis(D.to(dtype), R, P)
    B = rotate_columns(A, offsets_P)
    grads_R = [
        D[rows].unflatten(0, offset.shape[:2]) @ B[rows].unflatten(0, offset.shape[:2]).mT
        for offset, rows in block_slices(offsets_R)
    ]
    D = rotate_rows(D, offsets_R, transpose=True)
    grads_P = [
        A[:, columns].unflatten(1, offset.shape[:2]).permute(1, 2, 0)
        @ D[:, columns].unflatten(1, offset.shape[:2]).transpose(0, 1)
        for offset, columns in block_slices(offsets_P)
    ]
    return grads_R, grads_P
