"""Rotated attention of torch: `nn.MultiheadAttention`, which reads its weights and calls no layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import POETConfig
from .experts import ParamWrapper
from .linear import ReadLinear
from .obstacles import Obstacle
from .weights.plain import READ_LINEAR, ParameterWeight


_IN_PROJ, _OUT_PROJ = "in_proj_weight", "out_proj"


class MultiheadAttention(ParamWrapper):
    """POET around an `nn.MultiheadAttention`: `in_proj_weight` (3 E, E) and `out_proj.weight` (E, E) are rotated.

    Queries, keys and values are one matrix. `out_proj` becomes a rotated layer inside the attention, unless
    `exclude_modules` has its name. Whoever reads a weight of the attention gets the rotated one, as torch's encoder
    layers do in evaluation, which then do not call it.
    """

    weight_type = ParameterWeight
    setting = "target_modules"
    mixes_samples = "its weights are read for all samples together"

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: POETConfig, module_name: str) -> None:
        self.attention_name = module_name
        name = f"{module_name}.{_IN_PROJ}"
        super().__init__(base_layer, adapter_name, config, name, _IN_PROJ)

    def update_layer(self, adapter_name: str, config: POETConfig) -> None:
        super().update_layer(adapter_name, config)
        name = f"{self.attention_name}.{_OUT_PROJ}"
        if name not in rotated_parts(self.attention_name, self.base_layer, config):
            return
        if isinstance(self.out_proj, ReadLinear):
            self.out_proj.update_layer(adapter_name, config)
        else:
            self.base_layer.out_proj = ReadLinear(self.out_proj, adapter_name, config, name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def in_proj_weight(self) -> Tensor:
        return self.weight_in_use()

    def _rotated_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        memory_efficient = any(self.poet_config[name].memory_efficient for name in adapters)
        if memory_efficient and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(super()._rotated_forward, adapters, *args, use_reentrant=False, **kwargs)
        return super()._rotated_forward(adapters, *args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The attention itself, with its own last layer; PEFT calls it."""
        attention = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        if isinstance(attention.out_proj, ReadLinear):
            if merge:
                attention.out_proj.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            attention.out_proj = attention.out_proj.get_base_layer()
        return attention


def weights_of(attention: nn.MultiheadAttention) -> dict[str, ParameterWeight]:
    """The weights of an attention that are rotated, by their names in it."""
    last = attention.out_proj
    last = last.get_base_layer() if isinstance(last, ReadLinear) else last
    return {_IN_PROJ: ParameterWeight(attention, _IN_PROJ), _OUT_PROJ: ParameterWeight(last, "weight")}


def rotated_parts(name: str, attention: nn.MultiheadAttention, config: POETConfig) -> dict[str, ParameterWeight]:
    """The weights of the attention `name` that a configuration rotates, by the names of their rotated layers."""
    parts = {f"{name}.{part}": weight for part, weight in weights_of(attention).items()}
    if isinstance(check_target_module_exists(config, f"{name}.{_OUT_PROJ}"), _ExcludedModule):
        del parts[f"{name}.{_OUT_PROJ}"]
    return parts


def obstacle_to(attention: nn.MultiheadAttention) -> Obstacle | None:
    """What is in the way of rotating an attention; None where it can be rotated."""
    if not attention._qkv_same_embed_dim:
        return Obstacle(
            "its queries, keys and values have weights of their own (kdim, vdim)",
            "Name these in target_parameters (q_proj_weight, k_proj_weight, v_proj_weight)",
        )
    weights = weights_of(attention).values()
    last = type(attention.out_proj)
    if last not in (READ_LINEAR, ReadLinear):
        return Obstacle(f"its out_proj is of type {last.__name__}")
    if any(weight.name not in weight.layer._parameters for weight in weights):
        return Obstacle("a weight of it is computed from other tensors, as by a parametrization", "Remove that first")
    if attention.embed_dim == 1:
        return Obstacle("it has one feature, and nothing to rotate")
    return None


def reach_attention(model: nn.Module, config: POETConfig) -> None:
    """Let "all-linear" reach the attention of torch as well: put its names into `config.target_modules`.

    A warning names what cannot be rotated; not what `exclude_modules` has.

    Args:
        config: with `target_modules` as PEFT wrote "all-linear" out.
    """
    left_out: dict[Obstacle, list[str]] = {}
    reached = []
    for name, module in model.named_modules():
        is_rotated = isinstance(module, MultiheadAttention)
        if not (is_rotated or isinstance(module, nn.MultiheadAttention)) or not name:
            continue
        if isinstance(check_target_module_exists(config, name), _ExcludedModule):
            continue
        obstacle = None if is_rotated else obstacle_to(module)
        if obstacle is None:
            reached.append(name)
        else:
            left_out.setdefault(obstacle, []).append(name)
    config.target_modules = {*config.target_modules, *reached} - {f"{name}.{_OUT_PROJ}" for name in reached}
    for obstacle, names in left_out.items():
        warnings.warn(obstacle.warning("all-linear", names))
