"""Rotated parameters: the stacked weights of experts, which no linear layer holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import POETConfig
from .layer import POETLayer, RotatedModule
from .maths.blocks import partition_side
from .ops.paths import rotated_weight
from .ops.sides import Side, with_identity_check
from .weights.plain import PlainWeight, RotatedSide


# Experts of (num_experts, in, out) whose class does not say so.
_TRANSPOSED = {"Llama4TextExperts"}


class StackedWeight(PlainWeight):
    """A parameter (num_experts, out, in), or (num_experts, in, out) where the module says so; or one matrix.

    As a matrix it is the stack (num_experts, out, in), in which every expert is rotated by itself: see
    `reference.effective_weight`.
    """

    @property
    def is_transposed(self) -> bool:
        return bool(getattr(self.layer, "is_transposed", False)) or type(self.layer).__name__ in _TRANSPOSED

    def as_matrix(self, weight: Tensor) -> Tensor:
        if weight.dim() == 2:
            return weight[None]
        return weight.mT if self.is_transposed else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        if self.parameter.dim() == 2:
            return matrix[0]
        return matrix.mT if self.is_transposed else matrix

    def check_readable(self, name: str) -> None:
        if self.name not in self.layer._parameters:
            raise ValueError(
                f"{name!r} is computed from other tensors, as by a parametrization, so what is written to it would be "
                "lost. Remove the parametrization first, or keep the adapter beside the base, with merge_interval=0."
            )

    def sides(self) -> list[RotatedSide]:
        """The sides that can be rotated, with each expert as a group."""
        num_experts, out_features, in_features = self.as_matrix(self.parameter).shape
        sides = {"R": out_features, "P": in_features}
        return [RotatedSide(side, num_experts * dim, num_experts) for side, dim in sides.items() if dim > 1]


# PEFT recognises by this name that a parameter's wrapper may have another one's around it.
class ParamWrapper(RotatedModule):
    """POET around one parameter of a module: the module is called with `R_e W_e P_e` for each expert e.

    The module's own forward runs, in whatever implementation of the experts, on the rotated parameter. Its biases are
    not rotated. Wrappers of several parameters of a module are nested.
    """

    takes_samples = False

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: POETConfig, module_name: str, parameter_name: str
    ) -> None:
        self.weight_name = self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, config, module_name)

    @property
    def base_weight(self) -> StackedWeight:
        return StackedWeight(self.get_base_layer(), self.weight_name)

    def weight_features(self) -> tuple[int, int]:
        """Of each expert."""
        _, out_features, in_features = self.base_weight.as_matrix(self.base_parameter).shape
        return out_features, in_features

    def weight_sides(self) -> list[RotatedSide]:
        return self.base_weight.sides()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        parameter = getattr(base_layer, self.weight_name)
        return parameter.device, parameter.dtype

    def _rotated_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        R, P = self.sides(adapters)
        weight = self.base_weight
        if self.weight_name not in weight.layer._parameters:
            raise ValueError(
                f"{self.module_name!r} is no parameter while its module is called, as inside FSDP1, so that it cannot "
                "be called with another. Use fully_shard (FSDP2)."
            )
        identity = self._is_at_identity(adapters, [*R, *P])
        matrix = rotated_weight(weight.as_matrix(weight.parameter.detach()), R, P, identity)
        name = self.path_to_weight.removeprefix("base_layer.")
        rotated = {name: weight.as_weight(matrix).contiguous()}
        y = torch.func.functional_call(self.base_layer, rotated, args, kwargs)
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


def check_target_parameters(model: nn.Module, config: POETConfig) -> None:
    """Check all parameters that `target_parameters` names before the model is touched.

    Raises:
        ValueError: a parameter cannot be rotated; names it, what is in the way, and the way out.
    """
    targets = tuple(config.target_parameters or ())
    if not targets:
        return
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    found = set()
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}".replace(".base_layer", "")
            matched = [target for target in targets if name == target or name.endswith(f".{target}")]
            if matched:
                found.update(matched)
                _check_parameter(name, module, parameter_name, config)
                shared = owners[id(parameter)]
                if len(shared) > 1:
                    raise ValueError(
                        f"POET cannot rotate {name!r}: it is shared by {', '.join(map(repr, shared))}, and a rotation "
                        "of one would change the other. Take it out of target_parameters."
                    )
    missing = sorted(set(targets) - found)
    if missing:
        raise ValueError(
            f"target_parameters has names that match no parameter: {missing}. Name them as "
            "model.named_parameters() does, from the end: 'experts.gate_up_proj'."
        )


def _check_parameter(name: str, module: nn.Module, parameter_name: str, config: POETConfig) -> None:
    parameter = getattr(module, parameter_name)
    out = "Take it out of target_parameters."
    if isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd):
        raise ValueError(
            f"{name!r} is the weight of a layer ({type(module).__name__}), which is rotated by the name of the layer. "
            "Name it in target_modules."
        )
    if isinstance(module, BaseTunerLayer) and not isinstance(module, POETLayer):
        raise ValueError(f"{name!r} belongs to the adapter of another method ({type(module).__name__}). {out}")
    if parameter.dim() not in (2, 3) or min(parameter.shape[-2:]) < 2:
        raise ValueError(
            f"POET cannot rotate {name!r} of shape {tuple(parameter.shape)}: only matrices (out, in) and stacks of "
            f"them (num_experts, out, in) are supported. {out}"
        )
    if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"POET cannot rotate {name!r} of {parameter.dtype}: stacked weights are supported in fp32, bf16 and fp16 "
            f"only. Load the model dequantized, or take it out of target_parameters."
        )
    if config.base_init is not None:
        raise ValueError(
            f"base_init={config.base_init!r} draws the weights of linear layers and convolutions, and {name!r} is a "
            "parameter of a module of its own. Pass base_init=None, or take it out of target_parameters."
        )
    if config.memory_efficient:
        raise ValueError(
            f"memory_efficient=True has no effect on {name!r}: the forward of its module keeps the weight that it is "
            "called with. Pass memory_efficient=False, and use gradient checkpointing of the model."
        )
    for side, dim, groups in StackedWeight(module, parameter_name).sides():
        try:
            partition_side(config.variant, config.block_size_of(name), dim, groups)
        except ValueError as error:
            side = {"R": "output", "P": "input"}[side]
            raise ValueError(
                f"{name!r}: {error} ({side} side). Pass another block_size, or a block_size_pattern for it."
            ) from error
