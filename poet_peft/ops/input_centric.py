"""A rotated linear layer by rotating the activations: 6 N (m + n) b flops on top of a frozen layer's 4 N m n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..maths.blocks import Ordering, block_slices, num_rotated
from .sides import Side, SideBlocks


def input_centric(x: Tensor, weight: Tensor, bias: Tensor | None, R: Sequence[Side], P: Sequence[Side]) -> Tensor:
    """`reference.poet_linear` by rotating the activations, with gathers alone."""
    for side in reversed(P):
        x = rotate(x, side)
    y = F.linear(x, weight)
    for side in R:
        y = rotate(y, side)
    return y if bias is None else y + bias.to(y.dtype)


def rotate(x: Tensor, side: Side) -> Tensor:
    """Rotate the last dimension of activations: (..., dim) -> (..., dim). Differentiable."""
    ordering, deltas = _ordering_and_deltas(side)
    gathered = x if ordering is None else _Gather.apply(x, ordering.order, ordering.back)
    parts = []
    for delta, part in block_slices(deltas):
        blocks = gathered[..., part].unflatten(-1, delta.shape[:2])
        change = torch.einsum("...nj,nij->...ni", blocks, delta.to(x.dtype))
        parts.append((blocks + change.to(x.dtype)).flatten(-2))
    parts.append(gathered[..., num_rotated(deltas) :])
    with torch.autocast(device_type=x.device.type, enabled=False):  # cat refuses fp16 under bf16 autocast
        rotated = torch.cat(parts, dim=-1)
    return rotated if ordering is None else _Gather.apply(rotated, ordering.back, ordering.order)


def _ordering_and_deltas(side: Side) -> tuple[Ordering | None, Sequence[Tensor]]:
    blocks = side.blocks()
    if not (torch.is_grad_enabled() and side.upper.requires_grad):
        return blocks.ordering, blocks.deltas
    if torch.compiler.is_compiling():
        return blocks.ordering, side.deltas()
    return blocks.ordering, _Deltas.apply(side.upper, side, blocks)


class _Deltas(torch.autograd.Function):
    """Blocks that are at hand, with their gradient by the parameters."""

    @staticmethod
    def forward(ctx: Any, upper: Tensor, side: Side, blocks: SideBlocks) -> tuple[Tensor, ...]:
        ctx.orthogonal_map, ctx.blocks, ctx.dtype = side.orthogonal_map, blocks, upper.dtype
        return tuple(delta.detach() for delta in blocks.deltas)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(device_type=grads[0].device.type, enabled=False):
            return ctx.blocks.vjp(ctx.orthogonal_map, grads).to(ctx.dtype), None, None


class _Gather(torch.autograd.Function):
    """`index_select` by a permutation of the last dimension, whose gradient is one too instead of a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(-1, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(-1, back), None, None
