"""What the rotated layers of all kinds have in common as modules: when their own forward runs, and when the base's."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from .config import POETConfig
from .layer import POETLayer, register_layer
from .mixed_batch import mixed_forward
from .weights.sharded import keep_replicas_equal


class RotatedModule(nn.Module, POETLayer):
    """A rotated layer as a module. Each kind has a `_rotated_forward` of its own."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: POETConfig, module_name: str, **kwargs: Any
    ) -> None:
        super().__init__()
        POETLayer.__init__(self, base_layer, module_name, **kwargs)
        self._active_adapter = adapter_name
        self.train(base_layer.training)
        self.update_layer(adapter_name, config)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._original_forward(*args, **kwargs)
        self.check_base_weight_was_loaded()
        if adapter_names is not None:
            return mixed_forward(self, adapter_names, *args, **kwargs)
        adapters = self._active_here()
        if self.merged or not adapters:
            return self.base_layer(*args, **kwargs)
        if torch.is_grad_enabled():
            for rotation in itertools.chain.from_iterable(map(self.rotations, adapters)):
                if rotation.mesh is not None:
                    keep_replicas_equal(rotation.weight, rotation.mesh)
        return self._rotated_forward(adapters, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, or of a pickle
        register_layer(self)

    def __repr__(self) -> str:
        return "poet." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
