"""Weights that are one floating-point parameter; also sharded, or 16-bit.

As a matrix (out, in), the weight of a convolution multiplies patches of the input, that of an embedding tokens as unit
vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..maths.blocks import SideName
from .base import BaseWeight
from .layout import WeightLayout
from .residual import LOW_PRECISION, at_least_fp32, join, split
from .sharded import full, write


_NUM_PROBES = 8
COMPUTES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# The last layer of an nn.MultiheadAttention, which reads its weight and never calls it.
READ_LINEAR = nn.modules.linear.NonDynamicallyQuantizableLinear


class PlainWeight(BaseWeight):
    """One parameter of the layer.

    Args:
        name: its name in the layer.
    """

    def __init__(self, layer: nn.Module, name: str = "weight") -> None:
        super().__init__(layer)
        self.name = name

    @property
    def parameter(self) -> Tensor:
        return getattr(self.layer, self.name)

    @property
    def layout(self) -> WeightLayout:
        return layout_of(self.layer)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor in the shape of the parameter as (out, in)."""
        return self.layout.as_matrix(weight)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the shape of the parameter."""
        return self.layout.as_weight(matrix, self.parameter.shape)

    def parts(self) -> dict[str, Tensor]:
        return {self.name: self.parameter}

    def write_parts(self, parts: dict[str, Tensor]) -> None:
        write(self.parameter, parts[self.name])

    def read(self) -> Tensor:
        return at_least_fp32(self.as_matrix(full(self.parameter)))

    def read_exact(self, residual: Tensor | None) -> Tensor:
        weight = full(self.parameter)
        if residual is not None and weight.dtype in LOW_PRECISION:
            weight = join(weight, residual)
        return at_least_fp32(self.as_matrix(weight))

    @torch.no_grad()
    def write(self, matrix: Tensor, residual: Tensor | None = None) -> None:
        weight = self.as_weight(matrix)
        write(self.parameter, weight)
        if residual is not None and self.range_dtype in LOW_PRECISION:
            residual.copy_(split(weight, self.range_dtype)[1])

    @torch.no_grad()
    def change(self, change: Callable[[Tensor], None], residual: Tensor | None = None) -> None:
        weight = self.parameter
        is_view = weight.is_contiguous()  # not where channels come last
        if isinstance(weight, DTensor) or weight.dtype in LOW_PRECISION or not is_view:
            super().change(change, residual)
        else:
            change(self.as_matrix(weight))

    @property
    def range_dtype(self) -> torch.dtype:
        return self.parameter.dtype

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
        if isinstance(self.layer, CONVOLUTIONS):  # the adapter itself runs the layer with another weight
            return
        if not _computes_with(self.layer, self.read()):
            raise ValueError(
                f"{name!r} ({kind}) does not compute {_formula(self.layer)} with its weight alone: its own forward, "
                "or a hook, changes the result, so its rotations cannot be written into the weight. Keep the adapter "
                "beside the base, with merge_interval=0, or add it to exclude_modules."
            )


class ParameterWeight(PlainWeight):
    """A parameter of a module that computes with it in a way of its own; a matrix (out, in) as it is."""

    @property
    def layout(self) -> WeightLayout:
        return WeightLayout.MATRIX

    def check_readable(self, name: str) -> None:
        if self.name not in self.layer._parameters:
            raise ValueError(
                f"{name!r} is computed from other tensors, as by a parametrization, so what is written to it would be "
                "lost. Remove the parametrization first, or keep the adapter beside the base, with merge_interval=0."
            )

    def sides(self) -> list[RotatedSide]:
        """The sides that can be rotated, with each expert of a stack as a group."""
        *stack, out_features, in_features = self.as_matrix(self.parameter).shape
        num_experts = math.prod(stack)
        sides = {"R": out_features, "P": in_features}
        return [RotatedSide(side, num_experts * dim, num_experts) for side, dim in sides.items() if dim > 1]


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer does what its kind does and nothing else: no class of its own, no hook, no exchanged forward."""
    return (
        type(layer) in (nn.Linear, READ_LINEAR, Conv1D, nn.Embedding, *CONVOLUTIONS)
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
    )


def _formula(layer: nn.Module) -> str:
    return "rows of a table" if isinstance(layer, nn.Embedding) else "`W x + bias`"


@torch.no_grad()
def _computes_with(layer: nn.Module, matrix: Tensor) -> bool:
    """Whether a layer computes `W x + bias` with this matrix (out, in), shown on a few random inputs.

    An embedding may multiply by a number as well, which a rotation of the result does not notice.
    """
    dtype = layer.weight.dtype if layer.weight.dtype in COMPUTES else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    forward = getattr(layer, "_old_forward", layer)  # below accelerate's hook, which takes the weight away afterwards
    looks_up = isinstance(layer, nn.Embedding)
    if looks_up:
        x = torch.randint(matrix.shape[1], (_NUM_PROBES,), generator=generator).to(layer.weight.device)
        expected = matrix.mT[x].to(dtype)
    else:
        x = torch.randn(_NUM_PROBES, matrix.shape[1], generator=generator).to(layer.weight.device, dtype)
        expected = F.linear(x, matrix.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
    try:
        y = forward(x)
    except Exception:
        return False
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    y, expected = y.float(), expected.float()
    if looks_up:
        expected = expected * ((y * expected).sum() / expected.square().sum().clamp_min(1e-30))
    difference = torch.linalg.vector_norm(y - expected)
    return bool(difference <= 64 * torch.finfo(dtype).eps * torch.linalg.vector_norm(expected))


def layout_of(layer: nn.Module) -> WeightLayout:
    """How the layer keeps its weight, packed by quantization or not."""
    if isinstance(layer, CONVOLUTIONS):
        return WeightLayout.KERNEL
    return WeightLayout.TRANSPOSED if isinstance(layer, Conv1D | nn.Embedding) else WeightLayout.MATRIX


def features(layer: nn.Module) -> tuple[int, int]:
    """`(out_features, in_features)` of the weight as a matrix, also where it is packed by quantization."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    return int(layer.out_features), int(layer.in_features)  # tensors in some (Inkling)


class RotatedSide(NamedTuple):
    """A side of a weight that can be rotated: "R" or "P", its number of features, and the groups that they stay in."""

    name: SideName
    dim: int
    groups: int = 1


def rotated_sides(layer: nn.Module) -> list[RotatedSide]:
    """The sides of a layer's weight that can be rotated.

    One feature has no plane to turn in. The output channels of a grouped convolution see different inputs, so they
    mix within their group. The vocabulary of an embedding does not mix: a token would become a mixture of others.
    """
    out_features, in_features = features(layer)
    groups = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
    sides = [RotatedSide("R", out_features, groups)] if out_features > groups else []
    if in_features > 1 and not isinstance(layer, nn.Embedding):
        sides.append(RotatedSide("P", in_features))
    return sides
