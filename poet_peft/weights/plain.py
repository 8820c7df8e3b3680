"""Weights that are one floating-point parameter, of `nn.Linear` or transformers' `Conv1D`; also sharded, or 16-bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .base import BaseWeight
from .residual import LOW_PRECISION, at_least_fp32, join, split
from .sharded import full, write


_NUM_PROBES = 8
_COMPUTES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class PlainWeight(BaseWeight):
    """The parameter `weight` of the layer; a `Conv1D` keeps it transposed."""

    def parts(self) -> dict[str, Tensor]:
        return {"weight": self.layer.weight}

    def write_parts(self, parts: dict[str, Tensor]) -> None:
        write(self.layer.weight, parts["weight"])

    def read(self) -> Tensor:
        return at_least_fp32(weight_as_matrix(self.layer, full(self.layer.weight)))

    def read_exact(self, residual: Tensor | None) -> Tensor:
        weight = full(self.layer.weight)
        if residual is not None and weight.dtype in LOW_PRECISION:
            weight = join(weight, residual)
        return at_least_fp32(weight_as_matrix(self.layer, weight))

    @torch.no_grad()
    def write(self, matrix: Tensor, residual: Tensor | None = None) -> None:
        weight = weight_as_matrix(self.layer, matrix)
        write(self.layer.weight, weight)
        if residual is not None and self.range_dtype in LOW_PRECISION:
            residual.copy_(split(weight, self.range_dtype)[1])

    @torch.no_grad()
    def change(self, change: Callable[[Tensor], None], residual: Tensor | None = None) -> None:
        weight = self.layer.weight
        if isinstance(weight, DTensor) or weight.dtype in LOW_PRECISION:
            super().change(change, residual)
        else:
            change(weight_as_matrix(self.layer))

    @property
    def range_dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    def check_readable(self, name: str) -> None:
        if is_plain(self.layer):
            return
        kind = type(self.layer).__name__
        if "weight" not in self.layer._parameters:
            raise ValueError(
                f"the weight of {name!r} ({kind}) is computed from other tensors, as by a parametrization, so what is "
                "written to it would be lost. Remove the parametrization first "
                "(torch.nn.utils.parametrize.remove_parametrizations), or keep the adapter beside the base, with "
                "merge_interval=0."
            )
        if self.layer.weight.is_meta:  # offloaded: looked at once it is there
            return
        if not _computes_with(self.layer, self.read()):
            raise ValueError(
                f"{name!r} ({kind}) does not compute `W x + bias` with its weight alone: its own forward, or a hook, "
                "changes the result, so its rotations cannot be written into the weight. Keep the adapter beside the "
                "base, with merge_interval=0, or add it to exclude_modules."
            )


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes `W x + bias` and nothing else: no class of its own, no hook, no exchanged forward."""
    return (
        type(layer) in (nn.Linear, Conv1D)
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
    )


@torch.no_grad()
def _computes_with(layer: nn.Module, matrix: Tensor) -> bool:
    """Whether a layer computes `W x + bias` with this matrix (out, in), shown on a few random inputs."""
    dtype = layer.weight.dtype if layer.weight.dtype in _COMPUTES else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_NUM_PROBES, matrix.shape[1], generator=generator).to(layer.weight.device, dtype)
    forward = getattr(layer, "_old_forward", layer)  # below accelerate's hook, which takes the weight away afterwards
    try:
        y = forward(x)
    except Exception:
        return False
    expected = F.linear(x, matrix.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    difference = torch.linalg.vector_norm((y - expected).float())
    return bool(difference <= 64 * torch.finfo(dtype).eps * torch.linalg.vector_norm(expected.float()))


# nn.MultiheadAttention reads the weight of this layer and never calls it: an adapter around it would do nothing.
NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear


def weight_as_matrix(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A weight of the layer, its own by default, as a view (out_features, in_features): a Conv1D's is transposed."""
    weight = layer.weight if weight is None else weight
    return weight.mT if isinstance(layer, Conv1D) else weight


def features(layer: nn.Module) -> tuple[int, int]:
    """`(out_features, in_features)`, also where the weight is packed by quantization."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features
