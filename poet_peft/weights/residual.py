"""The residual of a 16-bit weight: what rounding it left over, so that folds keep fp32's digits."""

from __future__ import annotations

import torch
from torch import Tensor


LOW_PRECISION = {torch.bfloat16, torch.float16}

# Significant bits, and the smallest exponent that a unit in the last place can have.
_PRECISION = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}
_STEPS = 2**16


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round fp32 values to a 16-bit dtype, and keep what that leaves over.

    Returns:
        The rounded values, and the residual, in units of 2^-16 of the rounded value's last place: together 24
        significant bits in bf16 and 27 in fp16, at two bytes more a weight. The residual is an int16 tensor seen as
        bytes, shape (..., 2 n), since neither gloo nor NCCL can send int16.
    """
    rounded = value.to(dtype)
    residual = (value - rounded.float()) / _last_place(rounded) * _STEPS
    residual = residual.round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
    return rounded, residual.contiguous().view(torch.uint8)


def zero_residual(value: Tensor) -> Tensor:
    """The residual of values that were never rounded, shape (..., 2 n)."""
    return torch.zeros(*value.shape[:-1], 2 * value.shape[-1], dtype=torch.uint8, device=value.device)


def join(rounded: Tensor, residual: Tensor) -> Tensor:
    """The fp32 values that `split` was given, to fp32's precision."""
    return rounded.float() + residual.view(torch.int16).float() * (_last_place(rounded) / _STEPS)


def _last_place(x: Tensor) -> Tensor:
    significant_bits, smallest_exponent = _PRECISION[x.dtype]
    value = x.float()
    exponent = (torch.frexp(value).exponent - significant_bits).clamp_min(smallest_exponent)
    return torch.ldexp(torch.ones_like(value), exponent.masked_fill(value == 0, smallest_exponent))


def at_least_fp32(x: Tensor) -> Tensor:
    """The arithmetic of folds and merges: fp32, or fp64 where the tensor is."""
    return x if x.dtype == torch.float64 else x.float()
