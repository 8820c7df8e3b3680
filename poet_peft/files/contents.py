"""What the file of an adapter holds, as PEFT saves and loads it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from torch import Tensor, nn

from ..config import POETConfig
from ..layer import POETLayer, poet_layers
from .adapter import check_adapter_tensors, load_base_tensors, match_residuals
from .keys import base_key, base_keys, keys_that_peft_saves, rest_keys, without_adapter_name


class AdapterFile:
    """The part of `POETModel` that chooses the tensors of a file, and checks those that come from one."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: POETConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT has dropped what looks like another adapter's, which is too much if that is called "weight", or "model".
        state_dict = {**model.state_dict(), **state_dict}
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        selected = _filter_state_dict_by_key_prefixes(state_dict, prefixes)
        selected.update(cls._get_learnable_bias_state_dict(model, state_dict, config))
        if config.train_rest:
            selected.update({key: state_dict[key] for key in rest_keys(model, state_dict)})
        layers = {name: layer for name, layer in poet_layers(model) if layer.has_adapter(adapter_name)}
        _warn_if_never_stepped(adapter_name, layers.values())
        if config.changes_base_weights:
            for name, layer in layers.items():
                use_layers = layer.merged or layer.base_weight.is_quantized
                for part, tensor in layer.base_parts_to_save.items():
                    key = base_key(name, layer, part)
                    saved = state_dict.get(key)
                    selected[key] = tensor.detach() if use_layers or saved is None else saved
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_adapter_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: POETConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        current = model.state_dict()
        if not any(key.startswith("base_model.model.") for key in current):
            remapped = {key.removeprefix("base_model.model."): tensor for key, tensor in remapped.items()}
        layers = {name: layer for name, layer in poet_layers(model) if layer.has_adapter(adapter_name)}
        remapped = match_residuals(adapter_name, layers, remapped)

        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        adapter = _filter_state_dict_by_key_prefixes(remapped, prefixes)
        expected = _filter_state_dict_by_key_prefixes(current, prefixes)
        base = {key: tensor for key, tensor in remapped.items() if key not in adapter}
        required = set()
        if config.changes_base_weights:
            for name, layer in layers.items():
                required |= base_keys(name, layer).keys()
        if config.train_rest:
            required |= rest_keys(model, current)
        optional = keys_that_peft_saves(model, config, current)

        check_adapter_tensors(adapter_name, layers, adapter, expected)
        return {**adapter, **load_base_tensors(model, config, adapter_name, layers, base, required, optional)}


def _warn_if_never_stepped(adapter_name: str, layers: Iterable[POETLayer]) -> None:
    for layer in layers:
        if not layer.is_periodic(adapter_name) or not layer.poet_config[adapter_name].init_weights:
            continue
        state = layer.state(adapter_name)
        moved = any(bool(rotation.weight.any()) for rotation in layer.rotations(adapter_name))
        if moved and state.num_steps == 0 and state.num_folds == 0:
            warnings.warn(
                f"the rotations of {layer.module_name!r} have moved, but no step of a torch optimizer that holds them "
                f"was seen, so that merge_interval={layer.poet_config[adapter_name].merge_interval} folded nothing. "
                "Train them with a torch.optim.Optimizer, or call merge_and_reinitialize(model) yourself."
            )
            return
