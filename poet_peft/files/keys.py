"""The keys of an adapter file: which tensors belong into it, and what they are called in the model."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.tuners_utils import (
    _get_tuner_state_dict_key_prefixes,
    _is_key_under_prefixes,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import POETConfig
from ..layer import POETLayer
from ..weights.quantized import quantized_keys


_CONTAINERS = "poet_R|poet_P|poet_state|poet_residual"


def base_key(layer_name: str, layer: POETLayer, part: str | None = None) -> str:
    """The key of a rotated layer's base weight, or of one of its parts, as state dicts have it."""
    path = layer.path_to_weight.removesuffix(layer.weight_name)
    return f"{_state_dict_name(layer_name)}.{path}{part or layer.weight_name}"


def base_keys(layer_name: str, layer: POETLayer) -> dict[str, Tensor]:
    """The tensors of a layer's base weight, by their keys."""
    return {base_key(layer_name, layer, part): tensor for part, tensor in layer.base_weight.parts().items()}


def _state_dict_name(module_name: str) -> str:
    """The name of a module in a state dict, which leaves out the wrapper that FSDP puts around a model."""
    return module_name.removeprefix("_fsdp_wrapped_module.")


def without_adapter_name(key: str, adapter_name: str) -> str:
    """A key as files have it. Only behind our own containers: an adapter may be called "weight", or like a module."""
    name = re.escape(adapter_name)
    return re.sub(rf"((?:^|\.)(?:{_CONTAINERS}))\.{name}(?=$|\.(?:weight|index)$)", r"\1", key)


def rest_keys(model: nn.Module, state_dict: dict[str, Any]) -> set[str]:
    """Keys of everything outside the rotated weights and the adapters: what `train_rest` trains and saves.

    All names of a shared parameter, since transformers' own loader fills each by itself.
    """
    excluded = _get_tuner_state_dict_key_prefixes(model) | quantized_keys(model)
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            excluded.add(_state_dict_name(name))
        elif isinstance(module, POETLayer):
            excluded.add(base_key(name, module))
    return {key for key in state_dict if not _is_key_under_prefixes(key, excluded)}


def keys_that_peft_saves(model: nn.Module, config: POETConfig, state_dict: dict[str, Any]) -> set[str]:
    """Keys of the base model that PEFT itself may put into a file: biases, resized embeddings, modules_to_save."""
    owners = {name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    if not config.train_rest:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        owners |= {
            name for name, module in model.named_modules() if module is head or isinstance(module, nn.Embedding)
        }
    return {
        key
        for key in state_dict
        if _is_key_under_prefixes(key, owners)
        or (config.bias == "all" and key.endswith(".bias"))
        or (config.bias == "poet_only" and key.endswith(".base_layer.bias"))
    }
