"""A rotated linear layer by rotating the activations: 6 N (m + n) b flops on top of a frozen layer's 4 N m n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .basis import block_basis, block_slices, num_rotated
from .reference import RotationTensors


def input_centric(
    x: Tensor, weight: Tensor, bias: Tensor | None, R: Sequence[RotationTensors], P: Sequence[RotationTensors]
) -> Tensor:
    """`reference.poet_linear` by rotating the activations, with gathers alone."""
    for rotation in reversed(P):
        x = rotate(x, rotation)
    y = F.linear(x, weight)
    for rotation in R:
        y = rotate(y, rotation)
    return y if bias is None else y + bias.to(y.dtype)


class _Gather(torch.autograd.Function):
    """`index_select` by a permutation of the last dimension, whose gradient is one too instead of a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(-1, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(-1, inverse), None, None


def rotate(x: Tensor, rotation: RotationTensors) -> Tensor:
    """`reference.rotate` by gathers alone."""
    index, offsets = rotation
    basis = block_basis(index, x.shape[-1])
    gathered = _Gather.apply(x, basis.order, basis.inverse)
    parts = []
    for offset, part in block_slices(offsets):
        blocks = gathered[..., part].unflatten(-1, offset.shape[:2])
        change = torch.einsum("...nj,nij->...ni", blocks, offset.to(x.dtype))
        parts.append((blocks + change.to(x.dtype)).flatten(-2))
    parts.append(gathered[..., num_rotated(offsets) :])
    with torch.autocast(device_type=x.device.type, enabled=False):  # cat refuses fp16 under bf16 autocast
        rotated = torch.cat(parts, dim=-1)
    return _Gather.apply(rotated, basis.inverse, basis.order)
