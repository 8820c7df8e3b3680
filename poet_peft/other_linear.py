"""Subclasses of `nn.Linear` that compute something else than `W x + bias`, as routers that return their choice."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def computes_something_else(layer: nn.Module) -> bool:
    """Whether a layer's own `forward` differs from that of `nn.Linear`, found by calling it once.

    Only classes that override `forward` are called, on two random inputs. One whose weight is not to be had here, on
    the meta device or sharded, counts as a linear layer.
    """
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return False
    weight = layer.weight
    if not weight.is_floating_point() or weight.is_meta or isinstance(weight, DTensor):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, layer.in_features, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = nn.functional.linear(x, weight, layer.bias)
        try:
            y = type(layer).forward(layer, x)
        except Exception:  # of whatever kind: it takes other inputs
            return True
    if not isinstance(y, torch.Tensor) or y.shape != expected.shape:
        return True
    tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    return not torch.allclose(y, expected, rtol=tolerance, atol=tolerance)
