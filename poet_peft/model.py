"""`POETModel`: injection into a model, and what PEFT does with adapters once they are in it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import nn

from .attention import MultiheadAttention
from .combine import check_combinable, weighted_parameters, write_sum
from .config import POETConfig
from .convolution import Convolution
from .embedding import Embedding
from .experts import ParamWrapper, StackedWeight
from .files.contents import AdapterFile
from .files.keys import rest_keys
from .initialization import draw_base_weights, draw_parameter
from .layer import POETLayer, poet_layers
from .left_out import settle_targets
from .linear import Linear, ReadLinear
from .mixed_batch import named_adapters, num_repeats_of
from .target_parameters import check_target_parameters, reach_experts, warn_of_unreached_weights
from .targets import (
    check_gathered_in_forward,
    check_supported,
    check_targets,
    layer_names,
    warn_of_unmatched_patterns,
)
from .weights.plain import CONVOLUTIONS, rotated_sides
from .weights.sharded import reshard
from .workarounds import clear_leftover_gguf_flags, keep_exact, keep_tied, names_tied_with_embedding


_KINDS = {Convolution: CONVOLUTIONS, Embedding: nn.Embedding, MultiheadAttention: nn.MultiheadAttention}


class POETModel(AdapterFile, BaseTuner):
    """POET (arXiv 2506.08001) around the layers of a model: `y = R W P x + bias`, `W` frozen.

    Linear layers, convolutions, embeddings, and the attention of torch.

    Usually made by `get_peft_model(model, POETConfig(...))`.

    Args:
        model: the model whose layers are rotated, in place.
        config: a `POETConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be loaded next.

    Raises:
        TypeError: a targeted layer is of a kind that cannot be rotated.
        ValueError: a targeted layer shares its weight with another, or the configuration does not fit the model.
    """

    prefix: str = "poet_"
    tuner_layer_cls = POETLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING

    # Injection

    def _prepare_adapter_config(self, config: POETConfig, model_config: dict[str, Any]) -> POETConfig:
        is_known = model_config["model_type"] in self.target_module_mapping
        if config.target_modules is None and config.target_parameters and not is_known:
            return config
        return super()._prepare_adapter_config(config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        keep_exact(model)
        reshard(model.modules())
        config = self.peft_config[adapter_name]
        requested, named = config.target_modules, config.target_parameters
        targets = settle_targets(model, self._prepare_adapter_config(config, self.get_model_config(model)), requested)
        if kwargs.get("state_dict") is None:
            check_gathered_in_forward(model, targets)
            quantization_kwargs = {k: v for k, v in get_quantization_kwargs(self).items() if v is not None}
            check_targets(model, config, targets, **quantization_kwargs)
            reach_experts(model, config, requested)
            parameters = check_target_parameters(model, config)
            warn_of_unreached_weights(model, requested, named)
            warn_of_unmatched_patterns(config, [*layer_names(config, targets), *parameters])
        clear_leftover_gguf_flags(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_new_adapter_config(self, config: POETConfig) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) < 2:
            return
        for name, other in self.peft_config.items():
            if isinstance(other, POETConfig) and other.train_rest:
                raise ValueError(
                    f"the adapter {name!r} has train_rest=True, which changes parameters that every adapter of the "
                    "model depends on: it cannot be combined with others. Train it in a model of its own."
                )
        for name, layer in poet_layers(self.model):
            folded = [adapter for adapter in layer.poet_config if layer.state(adapter).num_folds]
            if folded:
                raise ValueError(
                    f"the adapter {folded[0]!r} has been folded into the weight of {name!r}, so an adapter added now "
                    "would stand on weights that its own file does not hold. To go on from the trained model, "
                    "merge_and_unload() and wrap the result; to load another adapter, load it into a model of its own."
                )
        if config.base_init is not None:
            raise ValueError(
                f"base_init={config.base_init!r} would draw weights anew that the model's other adapters are built "
                "on. Pass base_init=None."
            )

    def _create_and_replace(
        self,
        config: POETConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        parameter_name = optional_kwargs.get("parameter_name")
        if isinstance(target, POETLayer) and parameter_name in (None, target.weight_name):
            if not isinstance(parent, MultiheadAttention):  # which has seen to it
                target.update_layer(adapter_name, config)
            return
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if parameter_name is not None:
            if config.base_init is not None:
                draw_parameter(current_key, StackedWeight(layer, parameter_name), config)
            new_module = ParamWrapper(target, adapter_name, config, current_key, parameter_name)
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)
            return
        quantization_kwargs = get_quantization_kwargs(self)
        check_supported(current_key, layer, **{k: v for k, v in quantization_kwargs.items() if v is not None})
        is_attention = isinstance(layer, nn.MultiheadAttention)
        if not is_attention and not rotated_sides(layer):
            warnings.warn(f"{current_key!r} has one input and one output feature: nothing to rotate, left as it is.")
            return
        if config.base_init is not None:
            draw_base_weights(current_key, layer, config)
        kind = next((kind for kind, layers in _KINDS.items() if isinstance(layer, layers)), Linear)
        if kind is Linear and isinstance(parent, nn.TransformerEncoderLayer):
            kind = ReadLinear
        new_module = kind(target, adapter_name, config, current_key, **({} if is_attention else quantization_kwargs))
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ParamWrapper):
            # PEFT would look for a parameter called "weight".
            setattr(parent, child_name, new_module)
        elif any(parameter.is_meta for parameter in new_module.parameters()):
            # PEFT would move rotations to where the weight is: those of an 8-bit layer in low-memory loading, which
            # have no data yet, and those beside a weight without data, which would lose theirs.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)
        _replace_in_lists(parent, child, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for _, layer in poet_layers(self.model):
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            for rotation in layer.rotations(adapter_name):
                if dtype is not None and dtype.is_floating_point:
                    rotation.to(dtype)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for adapter_name in self.active_adapters:
            config = self.peft_config[adapter_name]
            if config.train_rest:
                self._set_rest_requires_grad(model, not config.inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if any(self.peft_config[name].train_rest for name in self.active_adapters):
            self._set_rest_requires_grad(self.model, not inference_mode)

    @staticmethod
    def _set_rest_requires_grad(model: nn.Module, requires_grad: bool) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in rest_keys(model, parameters):
            if parameters[name].dtype.is_floating_point:
                parameters[name].requires_grad = requires_grad

    # Operations that need care once weights have changed

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        layers = [layer for _, layer in poet_layers(self.model)]
        with named_adapters(self.model, layers, adapter_names, num_repeats_of(kwargs)):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal["linear"] = "linear",
    ) -> None:
        """Add the weighted sum of adapters in the Lie algebra: of the generators `A` of rotations `exp(A)`.

        With weights that add up to 1 it is an average of the adapters, and rotations still. For adapters of the same
        planes: the same layers, variant, block size and seed. Their scales count. The new adapter is not active, does
        not train, and has the map of the first.

        Args:
            adapters: names of the adapters.
            weights: a weight for each; any finite number.
            adapter_name: name of the new adapter.
            combination_type: "linear"; PEFT's others are of low-rank matrices.

        Raises:
            ValueError: names the adapters and the module, what differs, and the way out.
        """
        check_combinable(self.model, self.peft_config, adapters, weights, adapter_name, combination_type)
        parameters = weighted_parameters(self.model, adapters, weights)
        self.peft_config[adapter_name] = replace(self.peft_config[adapters[0]], base_init=None)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        write_sum(adapters, adapter_name, parameters)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return names_tied_with_embedding(super()._get_module_names_tied_with_embedding)

    def disable_adapter_layers(self) -> None:
        for _, layer in poet_layers(self.model):
            layer.check_can_be_disabled()
        super().disable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        for _, layer in poet_layers(self.model):
            layer.check_deletable(adapter_name)
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """Remove the adapter and return the original model.

        Raises:
            POETReferenceError: the original weights are gone, see `POETConfig.keep_initial_weights`.
        """
        layers = [layer for _, layer in poet_layers(self.model)]
        for layer in layers:
            layer.check_original_available("unload")
        for layer in layers:
            if layer.merged:
                layer.unmerge()
            layer.restore_initial_weight()
        return super().unload()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        with keep_tied(self.model):
            return super()._unload_and_optionally_merge(*args, **kwargs)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        reshard(self.model.modules())
        for _, layer in poet_layers(self.model):
            layer.check_mergeable()


def _replace_in_lists(parent: nn.Module, child: nn.Module, new_module: nn.Module) -> None:
    """Where a module also keeps its layers in lists of its own, which it calls them from, as MaskFormer's heads do."""
    for held in vars(parent).values():
        if isinstance(held, list):
            held[:] = [new_module if item is child else item for item in held]
