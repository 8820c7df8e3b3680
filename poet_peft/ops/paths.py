"""Ways to compute a rotated linear layer, and the choice between them by cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import RotationTensors


def poet_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    R: Sequence[RotationTensors],
    P: Sequence[RotationTensors],
) -> Tensor:
    """`reference.poet_linear` by the cheaper of two ways.

    - input-centric: rotate the activations. 6 N (m + n) b flops on top of a frozen linear layer's 4 N m n.
    - weight-centric: rotate the weight, then one plain product. 12 m n b + 2 N m n flops on top.

    Args:
        x: (..., in), in the dtype of the weight, or in any under autocast.
        weight: (out, in).
    """
    num_tokens = x.numel() // max(x.shape[-1], 1)
    trains = torch.is_grad_enabled()
    if _prefers_weight(num_tokens, weight.shape, R, P, trains):
        return weight_centric(x, weight, bias, R, P)
    return reference.poet_linear(x, weight, bias, R, P)


def weight_centric(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    R: Sequence[RotationTensors],
    P: Sequence[RotationTensors],
) -> Tensor:
    """`reference.poet_linear` through the effective weight, which is computed in fp32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    effective = reference.effective_weight(weight.to(dtype), R, P).to(weight.dtype)
    # In the memory layout of the weight, so that the product rounds as the base layer's does.
    effective = effective.contiguous() if weight.is_contiguous() else effective.mT.contiguous().mT
    return F.linear(x, effective, bias)


def _prefers_weight(
    num_tokens: int,
    shape: torch.Size,
    R: Sequence[RotationTensors],
    P: Sequence[RotationTensors],
    trains: bool,
) -> bool:
    out_features, in_features = shape
    cost_R = sum(_flops_per_vector(rotation) for rotation in R)
    cost_P = sum(_flops_per_vector(rotation) for rotation in P)
    passes = 3 if trains else 1
    by_input = passes * num_tokens * (cost_R + cost_P)
    by_weight = passes * (in_features * cost_R + out_features * cost_P)
    if trains:
        by_weight += 2 * num_tokens * out_features * in_features
    return by_weight < by_input


def _flops_per_vector(rotation: RotationTensors) -> int:
    return 2 * sum(offset.numel() for offset in rotation[1])
