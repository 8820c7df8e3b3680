"""Calling a module with another tensor in place of one of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def call_with(module: nn.Module, name: str, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a module gives for these arguments with `tensor` as its parameter `name`; differentiable by the tensor."""
    path, _, last = name.rpartition(".")
    holder = module.get_submodule(path)
    if last not in holder.__dict__:
        return torch.func.functional_call(module, {name: tensor}, args, kwargs)
    # FSDP1 puts a view of its flat parameter before it.
    view, holder.__dict__[last] = holder.__dict__[last], tensor
    try:
        return module(*args, **kwargs)
    finally:
        holder.__dict__[last] = view
