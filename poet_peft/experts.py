"""Rotated parameters: the stacked weights of experts, which no linear layer holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .config import POETConfig
from .exchange import call_with
from .ops.sides import Side, with_identity_check
from .rotated_module import RotatedModule
from .weights.layout import WeightLayout
from .weights.plain import ParameterWeight, RotatedSide


# Experts of (num_experts, in, out) whose class does not say so.
_TRANSPOSED = {"Llama4TextExperts"}


class StackedWeight(ParameterWeight):
    """A parameter (num_experts, out, in), or (num_experts, in, out) where the module says so; or one matrix.

    As a matrix it is the stack (num_experts, out, in), in which every expert is rotated by itself: see
    `reference.effective_weight`.
    """

    @property
    def layout(self) -> WeightLayout:
        is_transposed = getattr(self.layer, "is_transposed", False) or type(self.layer).__name__ in _TRANSPOSED
        return WeightLayout.TRANSPOSED_STACK if is_transposed else WeightLayout.STACK


# PEFT recognises by this name that a parameter's wrapper may have another one's around it.
class ParamWrapper(RotatedModule):
    """POET around one parameter of a module: the module is called with `R_e W_e P_e` for each expert e.

    The module's own forward runs, in whatever implementation of the experts, on the rotated parameter. Its biases are
    not rotated. Wrappers of several parameters of a module are nested.
    """

    weight_type: type[ParameterWeight] = StackedWeight
    setting = "target_parameters"  # that names what is rotated
    mixes_samples = "gets the tokens of all samples together"

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: POETConfig, module_name: str, parameter_name: str
    ) -> None:
        self.weight_name = self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, config, module_name)

    @property
    def base_weight(self) -> ParameterWeight:
        return self.weight_type(self.get_base_layer(), self.weight_name)

    @property
    def weight_layout(self) -> WeightLayout:
        return self.base_weight.layout

    def weight_features(self) -> tuple[int, int]:
        """Of each expert."""
        *_, out_features, in_features = self.base_weight.as_matrix(self.base_parameter).shape
        return out_features, in_features

    def weight_sides(self) -> list[RotatedSide]:
        return self.base_weight.sides()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        parameter = getattr(base_layer, self.weight_name)
        return parameter.device, parameter.dtype

    def _rotated_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        R, P = self.sides(adapters)
        weight = self.base_weight
        if weight.parameter.is_meta and not any(isinstance(x, torch.Tensor) and x.is_meta for x in args):
            raise ValueError(
                f"{self.module_name!r} is offloaded, so that it cannot be rotated. Keep its module on a device "
                f"(device_map), or leave it out of {self.setting}."
            )
        identity = self._is_at_identity(adapters, [*R, *P])
        name = self.path_to_weight.removeprefix("base_layer.")
        y = call_with(self.base_layer, name, self._rotated_parameter(R, P, identity), args, kwargs)
        return _with_identity_check(y, (*R, *P)) if identity else y

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module itself, without the wrappers around its parameters; PEFT calls it."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer


def _with_identity_check(outputs: Any, sides: Sequence[Side]) -> Any:
    """`sides.with_identity_check` of what a module returns: experts a tensor, routers several."""
    if not isinstance(outputs, tuple):
        return with_identity_check(outputs, sides)
    return (with_identity_check(outputs[0], sides), *outputs[1:])
