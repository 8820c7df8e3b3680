"""Batches in which every sample has an adapter of its own, by PEFT's argument `adapter_names`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn


if TYPE_CHECKING:
    from .layer import POETLayer


BASE = "__base__"
"""PEFT's name for samples without an adapter."""

_REPEATING = ("num_beams", "num_return_sequences")


@contextlib.contextmanager
def named_adapters(
    model: nn.Module, layers: Sequence[POETLayer], adapter_names: Sequence[str], num_repeats: int = 1
) -> Iterator[None]:
    """Tell every layer which adapter each sample of the batches to come belongs to.

    Args:
        layers: the rotated layers of the model.
        adapter_names: one name for each sample, or "__base__" for the base model.
        num_repeats: as how many samples one of them goes through the model, except through its encoder.

    Raises:
        TypeError: `adapter_names` is no list of names.
        ValueError: training mode, or an adapter that no layer has.
        POETReferenceError: "__base__", and the base model is gone.
    """
    _check(model, layers, adapter_names)
    names = list(adapter_names)
    repeated = [name for name in names for _ in range(num_repeats)]
    encoder = _encoder_of(model)
    inside_encoder = set() if encoder is None else set(encoder.modules())
    rotated, handles = set(layers), []
    try:
        for module in model.modules():
            if module in rotated or isinstance(module, AuxiliaryTrainingWrapper):
                hook = _hook(names if module in inside_encoder else repeated)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(names: list[str]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": names})


def _check(model: nn.Module, layers: Sequence[POETLayer], adapter_names: Sequence[str]) -> None:
    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(
            f"adapter_names must be a list of one name for each sample, got {type(adapter_names).__name__}. For one "
            "adapter for the whole batch, use set_adapter()."
        )
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call model.eval() first.")
    known = {name for layer in layers for name in layer.poet_config}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has "
            f"{', '.join(sorted(known))}, and {BASE!r} for samples without an adapter."
        )
    for layer in layers:
        if layer.mixes_samples and any(layer.has_adapter(name) for name in adapter_names):
            raise ValueError(
                f"Cannot pass `adapter_names`: {layer.module_name!r} is rotated, and {layer.mixes_samples}. Run the "
                "samples of each adapter in a batch of their own, after set_adapter()."
            )
    if BASE in adapter_names:
        for layer in layers:
            layer.check_original_available(f"adapter_names with {BASE!r}")


def num_repeats_of(generate_kwargs: dict[str, Any]) -> int:
    """As how many samples `generate` takes one through the model: beams, or sequences to return."""
    config = generate_kwargs.get("generation_config")
    numbers = [generate_kwargs.get(name) or getattr(config, name, None) or 1 for name in _REPEATING]
    return max(numbers)


def _encoder_of(model: nn.Module) -> nn.Module | None:
    # transformers 5 gives a model without an encoder for its own.
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return None if encoder is model else encoder


def mixed_forward(layer: POETLayer, adapter_names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a batch: the samples of each adapter together, put back in the order of the batch.

    Args:
        adapter_names: of the samples.
        x: the batch, samples first.

    Raises:
        ValueError: not as many names as samples, or a merged adapter; names the module.
    """
    if len(x) != len(adapter_names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively at {layer.module_name!r}: name one for each sample."
        )
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters: "
            f"{', '.join(layer.merged_adapters)} at {layer.module_name!r}. Call unmerge_adapter() first."
        )
    parts, order = [], []
    for name in dict.fromkeys(adapter_names):
        chosen = [i for i, other in enumerate(adapter_names) if other == name]
        adapters = layer._turned([name])
        if adapters:
            parts.append(layer._rotated_forward(adapters, x[chosen], *args, **kwargs))
        else:
            parts.append(layer._original_forward(x[chosen], *args, **kwargs))
        order += chosen
    back = torch.tensor(order, device=parts[0].device).argsort()
    return torch.cat(parts).index_select(0, back)
