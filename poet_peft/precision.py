"""Weights that folds do not wear down: fp32 digits beside a 16-bit weight. And tensors that are sharded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


LOW_PRECISION = {torch.bfloat16, torch.float16}

# Significant bits, and the smallest exponent that a unit in the last place can have.
_PRECISION = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}
_STEPS = 2**16


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round fp32 values to a 16-bit dtype, and keep what the rounding cut off.

    Returns:
        The rounded values, and the rest as int16, in units of 2^-16 of the rounded value's last place: together 24
        significant bits in bf16 and 27 in fp16, at two bytes more a weight.
    """
    rounded = value.to(dtype)
    rest = (value - rounded.float()) / _last_place(rounded) * _STEPS
    return rounded, rest.round().clamp(-(2**15), 2**15 - 1).to(torch.int16)


def join(rounded: Tensor, rest: Tensor) -> Tensor:
    """The fp32 values that `split` was given, to fp32's precision."""
    return rounded.float() + rest.float() * (_last_place(rounded) / _STEPS)


def _last_place(x: Tensor) -> Tensor:
    significant_bits, smallest_exponent = _PRECISION[x.dtype]
    value = x.float()
    exponent = (torch.frexp(value).exponent - significant_bits).clamp_min(smallest_exponent)
    return torch.ldexp(torch.ones_like(value), exponent.masked_fill(value == 0, smallest_exponent))


def at_least_fp32(x: Tensor) -> Tensor:
    """The arithmetic of folds and merges: fp32, or fp64 where the tensor is."""
    return x if x.dtype == torch.float64 else x.float()


def full(x: Tensor) -> Tensor:
    """The whole tensor of one that may be sharded over processes. Every process must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def write(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into one that may be sharded over processes, in place."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        # Writing to what full_tensor() returned would be lost: only the local shard is the parameter.
        value = distribute_tensor(value.to(target.dtype), target.device_mesh, target.placements)
        target.to_local().copy_(value.to_local())
    else:
        target.copy_(value)
