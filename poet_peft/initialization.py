"""Initial weights of the layers of a model, as `POETConfig.base_init` draws them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from .attention import rotated_parts
from .config import POETConfig
from .left_out import settle_targets
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

    Those of an `nn.MultiheadAttention` are among them. For a baseline that starts from the same weights as POET.

    Args:
        scheme, scale, scale_pattern: as `base_init`, `base_init_scale` and `base_init_scale_pattern`.
        module_names: names of the layers. None = those that `target_modules="all-linear"` rotates.

    Returns:
        The names of the layers whose weights were drawn.

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
    if module_names is None:
        module_names = [name for name, _ in settle_targets(model, config, config.target_modules)]
    names = sorted(module_names)
    for name in names:
        draw_base_weights(name, model.get_submodule(name), config)
    return names


def draw_base_weights(name: str, layer: nn.Module, config: POETConfig) -> None:
    """Draw the weights of the layer `name` that a configuration rotates; none on the meta device."""
    is_attention = isinstance(layer, nn.MultiheadAttention)
    parts = rotated_parts(name, layer, config) if is_attention else {name: PlainWeight(layer)}
    for part, weight in parts.items():
        if not weight.parameter.is_meta:
            shape = weight.as_matrix(weight.parameter).shape
            drawn = draw_weight(*shape, config.base_init, seed=config.seed, module_name=part)
            weight.write(config.base_init_scale_of(part) * drawn)
