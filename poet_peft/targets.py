"""What is refused, and what is warned of, about the layers that a configuration targets."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .attention import obstacle_to, rotated_parts, weights_of
from .config import POETConfig
from .maths.blocks import partition_side
from .obstacles import without_indexes
from .other_linear import returns_something_else
from .uncalled import reader_of
from .weights import base_weight_of
from .weights.plain import CONVOLUTIONS, READ_LINEAR, RotatedSide, rotated_sides
from .weights.quantized import QuantizedWeight
from .weights.sharded import WITHOUT_TENSOR_PARALLELISM, gathered_in_forward, split_in_forward


RETURNS_ELSE = "which returns something else than `W x + bias`"


def check_supported(name: str, layer: nn.Module, **quantization_kwargs: Any) -> None:
    """Refuse a layer that cannot be rotated.

    Raises:
        TypeError: its kind; names the module, its type and the way out.
        ValueError: a setting of it.
    """
    backend = resolve_quantization_backend(layer, **quantization_kwargs)
    if backend is None and returns_something_else(layer):
        raise TypeError(
            f"POET cannot rotate {name!r} of type {type(layer).__name__}, {RETURNS_ELSE}, so that there is no output "
            "to rotate. Take it out of target_modules, or add it to exclude_modules."
        )
    if isinstance(layer, nn.Linear | Conv1D) and not isinstance(layer, READ_LINEAR):
        return
    if isinstance(layer, nn.MultiheadAttention):
        if obstacle := obstacle_to(layer):
            raise TypeError(obstacle.refusal(f"{name!r} of type {type(layer).__name__}", "target_modules"))
        return
    if isinstance(layer, CONVOLUTIONS) and backend is None:
        return _check_convolution(name, layer)
    if isinstance(layer, nn.Embedding) and backend is None:
        return _check_embedding(name, layer)
    # TransformerEngine's layers normalise their input first, which a rotation of it would change.
    if backend is not None and backend.layer_type == "linear" and backend.backend_name != "te":
        return
    reason = ""
    if isinstance(layer, READ_LINEAR):
        reason = " It is rotated with its torch.nn.MultiheadAttention, by the name of that."
    raise TypeError(
        f"POET cannot rotate {name!r} of type {type(layer).__name__}: only torch.nn.Linear (also quantized), "
        "transformers' Conv1D, torch.nn.Conv1d, Conv2d, Conv3d, Embedding and MultiheadAttention are "
        f"supported.{reason} Take it out of target_modules, or add it to exclude_modules."
    )


def _check_convolution(name: str, layer: nn.Module) -> None:
    if nn.parameter.is_lazy(layer.weight):
        raise ValueError(f"{name!r} has no weight before its first call. Run the model once before get_peft_model().")
    if "weight" not in layer._parameters:
        raise ValueError(
            f"the weight of {name!r} ({type(layer).__name__}) is computed from other tensors, as by a parametrization "
            "or weight norm, so there is none that could be rotated. Remove that first "
            "(torch.nn.utils.parametrize.remove_parametrizations), or add it to exclude_modules."
        )


def _check_embedding(name: str, layer: nn.Embedding) -> None:
    for setting, value, why in (
        ("max_norm", layer.max_norm, "changes the weight while it is read"),
        ("scale_grad_by_freq", layer.scale_grad_by_freq or None, "does not reach the gradient of a rotation"),
    ):
        if value is not None:
            raise ValueError(
                f"POET cannot rotate {name!r}: {setting}={value} {why}. Set {name}.{setting} to "
                f"{None if setting == 'max_norm' else False} first, or add it to exclude_modules."
            )


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def check_targets(
    model: nn.Module, config: POETConfig, targets: list[tuple[str, nn.Module]], **quantization_kwargs: Any
) -> None:
    """Check all targeted layers before the model is touched.

    Args:
        targets: names and modules of the targeted layers.
        quantization_kwargs: what PEFT needs to recognise a quantized layer.

    Raises:
        TypeError: a layer is of a kind that cannot be rotated.
        ValueError: a layer shares its weight, is not called by the module that holds it, is quantized and would be
            folded, or is smaller than a fully stochastic block.
    """
    owners = parameter_names(model)
    clipped = []
    for name, module in targets:
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        _check_not_stacked(name, module, layer)
        check_supported(name, layer, **quantization_kwargs)
        _check_not_shared(name, layer, owners)
        _check_base_can_change(name, layer, config, **quantization_kwargs)
        clipped += _check_block_size(name, layer, config)
    _check_called(model, [name for name, _ in targets])
    if clipped:
        sides = "; ".join(without_indexes(clipped))
        warnings.warn(f"The block size is larger than the side and was clipped to it: {sides}.")
    if config.base_init is not None and not config.is_from_file:
        _warn_if_pretrained(model, config)


def chosen_by_peft(target_modules: set[str] | str | None) -> bool:
    """Whether `target_modules`, as the user wrote it, leaves the choice of layers to PEFT."""
    return target_modules is None or is_all_linear(target_modules)


def is_all_linear(target_modules: set[str] | str | None) -> bool:
    """Whether `target_modules`, as the user wrote it, is PEFT's word for all linear layers."""
    return isinstance(target_modules, str) and target_modules.lower() == "all-linear"


def warn_of_unmatched_names(model: nn.Module, target_modules: set[str] | str | None, experts: Collection[str]) -> None:
    """Warn of names in `target_modules`, as the user wrote it, that match no module, and of what they may have meant.

    Args:
        experts: names of the experts' weights that are not rotated.
    """
    if target_modules is None or isinstance(target_modules, str):
        return
    paths = [name.split(".") for name, _ in model.named_modules()]
    unmatched = sorted(set(target_modules) - {".".join(path[i:]) for path in paths for i in range(len(path))})
    if unmatched:
        hint = f" To rotate the weights of experts, name them in target_parameters: {', '.join(experts)}."
        warnings.warn(
            f"target_modules has names that match no module and were ignored: {unmatched}.{hint if experts else ''}"
        )


def readers_as_text(readers: dict[str, nn.Module]) -> str:
    """Layers by the class of the module that reads their weight."""
    layers: dict[str, list[str]] = {}
    for name, reader in readers.items():
        layers.setdefault(type(reader).__name__, []).append(name)
    return "; ".join(
        f"{reader} computes with the weight of {', '.join(without_indexes(names))} and does not call the layer"
        for reader, names in layers.items()
    )


def _check_called(model: nn.Module, names: list[str]) -> None:
    readers = {name: reader for name in names if (reader := reader_of(model, name))}
    if readers:
        last_names = sorted({name.rpartition(".")[2] for name in readers})
        raise ValueError(
            f"POET cannot rotate what is not called: {readers_as_text(readers)}, so that rotations would not train. "
            f"Take it out of target_modules, or add to exclude_modules: {last_names}."
        )


def _check_not_shared(name: str, layer: nn.Module, owners: dict[int, list[str]]) -> None:
    for weight in rotated_parameters(layer):
        names = [owner.replace(".base_layer.", ".") for owner in owners.get(id(weight), [])]
        if len(names) > 1:
            raise ValueError(
                f"POET cannot rotate {name!r}: its weight is shared by {', '.join(map(repr, names))}, and a rotation "
                f"of one would change the other. Add {name!r} to exclude_modules."
            )


def rotated_parameters(layer: nn.Module) -> list[torch.Tensor | None]:
    """The parameters that rotating a layer would change."""
    if isinstance(layer, nn.MultiheadAttention):
        return [weight.parameter for weight in weights_of(layer).values()]
    return [getattr(layer, "weight", None)]


def check_gathered_in_forward(model: nn.Module, targets: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse targets of which a process never holds a whole weight.

    Args:
        targets: name and module of each targeted layer.

    Raises:
        ValueError: names the module, how its weight is split, and the way out.
    """
    gathered = gathered_in_forward(model)
    for name, module in targets:
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for weight in rotated_parameters(layer):
            if split := split_in_forward(weight, gathered):
                raise ValueError(f"a weight of {name!r} is {split}. {WITHOUT_TENSOR_PARALLELISM}.")


def _check_not_stacked(name: str, module: nn.Module, layer: nn.Module) -> None:
    """What is called with another weight must not have anything in between."""
    carries_another = isinstance(module, BaseTunerLayer) and not hasattr(module, "poet_R")
    if isinstance(layer, (*CONVOLUTIONS, nn.MultiheadAttention)) and carries_another:
        raise ValueError(
            f"{name!r} is a {type(layer).__name__} that carries another adapter ({type(module).__name__}), which POET "
            "cannot rotate around. Merge that one first (merge_and_unload), or add it to exclude_modules."
        )


def _check_base_can_change(name: str, layer: nn.Module, config: POETConfig, **quantization_kwargs: Any) -> None:
    if isinstance(layer, nn.Embedding) and config.base_init is not None:
        raise ValueError(
            f"base_init={config.base_init!r} draws the weights of linear layers and convolutions, and {name!r} is an "
            "embedding. Add it to exclude_modules, or pass base_init=None."
        )
    backend = resolve_quantization_backend(layer, **quantization_kwargs)
    if backend is None or not config.changes_base_weights:
        return
    what = f"{name!r} is quantized ({backend.backend_name})"
    if config.base_init is not None:
        raise ValueError(
            f"{what}: base_init={config.base_init!r} would draw a weight that nothing was quantized from. Pass "
            "base_init=None, or load the base unquantized."
        )
    if not config.allow_requantize:
        raise ValueError(
            f"{what}: merge_interval={config.merge_interval} would quantize its weight anew at every fold, which adds "
            "an error each time. Use merge_interval=0, or accept the error with allow_requantize=True."
        )
    if config.keep_initial_weights:
        raise ValueError(
            f"{what}: keep_initial_weights=True cannot run it with another weight. Use a separate copy of the model "
            "as reference (in TRL: ref_model=...)."
        )
    weight = base_weight_of(layer, backend)
    if not isinstance(weight, QuantizedWeight):
        raise ValueError(
            f"{what}, whose weight cannot be read and quantized anew. Use merge_interval=0, add it to "
            "exclude_modules, or quantize the base with bitsandbytes or torchao."
        )
    if not config.is_from_file:  # what is in a file was quantized anew; in low-memory loading nothing else can be
        weight.check_can_requantize(name)


def _check_block_size(name: str, layer: nn.Module, config: POETConfig) -> list[str]:
    """The sides that a block does not fit, as text. Raises ValueError if that cannot be clipped."""
    if isinstance(layer, nn.MultiheadAttention):
        parts = rotated_parts(name, layer, config)
        return [text for part, weight in parts.items() for text in _check_sides(part, weight.sides(), config)]
    return _check_sides(name, rotated_sides(layer), config)


def _check_sides(name: str, sides: list[RotatedSide], config: POETConfig) -> list[str]:
    block_size = config.block_size_of(name)
    clipped = []
    for letter, dim, groups in sides:
        side = {"R": "output", "P": "input"}[letter]
        try:
            partition = partition_side(config.variant, block_size, dim, groups)
        except ValueError as error:
            raise ValueError(
                f"{name!r}: {error} ({side} side). Pass a fraction, a smaller block_size, or a block_size_pattern "
                "for this layer."
            ) from error
        if isinstance(block_size, int) and partition.block_size < block_size:
            within = f" in {groups} groups" if groups > 1 else ""
            clipped.append(f"{name!r} {side} side{within}, {block_size} to {partition.block_size}")
    return clipped


def layer_names(config: POETConfig, targets: list[tuple[str, nn.Module]]) -> list[str]:
    """Names of the rotated layers of these targets: an attention has several."""
    names = []
    for name, module in targets:
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        names += rotated_parts(name, layer, config) if isinstance(layer, nn.MultiheadAttention) else [name]
    return names


def warn_of_unmatched_patterns(config: POETConfig, names: Collection[str]) -> None:
    """Warn of keys of the settings by layer that match none of these names, of all that is rotated."""
    for setting in ("block_size_pattern", "base_init_scale_pattern"):
        unmatched = [
            pattern
            for pattern in getattr(config, setting)
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        ]
        if unmatched:
            warnings.warn(
                f"{setting} has keys that match no targeted layer and were ignored: {unmatched}. Write names of "
                f"targeted layers, or leave these keys out, as with {setting}={{}}."
            )


def _warn_if_pretrained(model: nn.Module, config: POETConfig) -> None:
    source = getattr(model, "name_or_path", "")
    if source:
        warnings.warn(
            f"base_init={config.base_init!r} throws away the weights of the targeted layers of {source!r} and draws "
            "them at random. For fine-tuning pass base_init=None."
        )
