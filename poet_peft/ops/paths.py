"""The choice between the ways to compute a rotated linear layer, by cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .input_centric import input_centric
from .reference import RotationTensors
from .weight_centric import weight_centric


# What moving an entry through a rotation costs on top of its 2 b flops, in flops. Measured on a CPU in fp32.
_COST_OF_MOVING = 400


def poet_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    R: Sequence[RotationTensors],
    P: Sequence[RotationTensors],
    memory_efficient: bool = False,
) -> Tensor:
    """`reference.poet_linear` by the cheaper of two ways; by the reference itself for more than one adapter.

    Args:
        x: (..., in), in the dtype of the weight, or in any under autocast.
        weight: (out, in), frozen.
        memory_efficient: keep no second copy of the weight between forward and backward.
    """
    if len(R) > 1 or len(P) > 1:
        return reference.poet_linear(x, weight, bias, R, P)
    if _prefers_weight(x, weight, R, P):
        return weight_centric(x, weight, bias, R, P, memory_efficient)
    return input_centric(x, weight, bias, R, P)


def _prefers_weight(x: Tensor, weight: Tensor, R: Sequence[RotationTensors], P: Sequence[RotationTensors]) -> bool:
    out_features, in_features = weight.shape
    num_tokens = x.numel() // in_features
    cost_R = sum(_cost_per_vector(rotation) for rotation in R)
    cost_P = sum(_cost_per_vector(rotation) for rotation in P)
    passes = 3 if torch.is_grad_enabled() else 1
    by_input = passes * num_tokens * (cost_R + cost_P)
    by_weight = passes * (in_features * cost_R + out_features * cost_P)
    if torch.is_grad_enabled():
        by_weight += 2 * num_tokens * out_features * in_features
    return by_weight < by_input


def _cost_per_vector(rotation: RotationTensors) -> int:
    return sum(offset.shape[0] * offset.shape[1] * (2 * offset.shape[1] + _COST_OF_MOVING) for offset in rotation[1])
