"""Subclasses of linear layers that return something else, as routers that return their choice of experts."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .weights.plain import COMPUTES, features


def returns_something_else(layer: nn.Module) -> bool:
    """Whether a linear layer whose class has a `forward` of its own returns no features to rotate, found by a call.

    What it returns for two random inputs (2, in_features) must be a tensor (2, out_features). Layers whose weight is
    on the meta device, sharded, or of a dtype that nothing is computed in are not called, and count as linear.
    """
    if not isinstance(layer, nn.Linear | Conv1D) or type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return False
    weight = layer.weight
    if weight.is_meta or isinstance(weight, DTensor) or weight.dtype not in COMPUTES:
        return False
    out_features, in_features = features(layer)
    x = torch.randn(2, in_features, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            y = type(layer).forward(layer, x)
        except Exception:  # of whatever kind: it takes other inputs
            return True
    return not isinstance(y, torch.Tensor) or y.shape != (2, out_features)
