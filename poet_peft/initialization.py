"""Initial weights of the layers of a model, as `POETConfig.base_init` draws them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from .attention import rotated_parts
from .config import POETConfig
from .experts import StackedWeight
from .left_out import settle_targets
from .target_parameters import check_target_parameters, reach_experts
from .weights.initial import draw_weight
from .weights.plain import PlainWeight


def initialize_base_weights(
    model: nn.Module,
    scheme: str,
    *,
    scale: float = 1.0,
    scale_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
    module_names: Iterable[str] | None = None,
) -> list[str]:
    """Draw the weights of a plain model's linear layers anew, in place, as `POETConfig(base_init=scheme)` does.

    Those of an `nn.MultiheadAttention` and of stacked experts are among them. For a baseline that starts from the same
    weights as POET.

    Args:
        scheme, scale, scale_pattern: as `base_init`, `base_init_scale` and `base_init_scale_pattern`.
        module_names: names of the layers. None = those that `target_modules="all-linear"` rotates, and experts.

    Returns:
        The names of the layers, and behind them of the stacks of experts, whose weights were drawn.

    Raises:
        ValueError: an unknown scheme, or a scale that is not positive; no weight was changed.
    """
    config = POETConfig(
        target_modules=INCLUDE_LINEAR_LAYERS_SHORTHAND if module_names is None else sorted(module_names),
        base_init=scheme,
        base_init_scale=scale,
        base_init_scale_pattern=dict(scale_pattern or {}),
        seed=seed,
        train_rest=True,
    )
    stacks = []
    if module_names is None:
        module_names = [name for name, _ in settle_targets(model, config, INCLUDE_LINEAR_LAYERS_SHORTHAND)]
        reach_experts(model, config, INCLUDE_LINEAR_LAYERS_SHORTHAND)
        stacks = check_target_parameters(model, config)
    names = sorted(module_names)
    for name in names:
        draw_base_weights(name, model.get_submodule(name), config)
    for name in stacks:
        module_name, _, parameter_name = name.rpartition(".")
        draw_parameter(name, StackedWeight(model.get_submodule(module_name), parameter_name), config)
    return [*names, *stacks]


def draw_base_weights(name: str, layer: nn.Module, config: POETConfig) -> None:
    """Draw the weights of the layer `name` that a configuration rotates; none on the meta device."""
    is_attention = isinstance(layer, nn.MultiheadAttention)
    parts = rotated_parts(name, layer, config) if is_attention else {name: PlainWeight(layer)}
    for part, weight in parts.items():
        draw_parameter(part, weight, config)


def draw_parameter(name: str, weight: PlainWeight, config: POETConfig) -> None:
    """Draw the weight of a rotated layer, each expert of a stack by itself; nothing on the meta device."""
    if weight.parameter.is_meta:
        return
    *stack, out_features, in_features = weight.as_matrix(weight.parameter).shape
    names = [f"{name}.{expert}" for expert in range(stack[0])] if stack else [name]
    drawn = [
        draw_weight(out_features, in_features, config.base_init, seed=config.seed, module_name=one) for one in names
    ]
    weight.write(config.base_init_scale_of(name) * (torch.stack(drawn) if stack else drawn[0]))
