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
from .ops.paths import rotated_weight
from .ops.sides import Side, with_identity_check
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
        self._keep_replicas_equal(adapters)
        return self._rotated_forward(adapters, *args, **kwargs)

    def weight_in_use(self) -> Tensor:
        """What the layer computes with as things stand, like the base parameter: `R W P`, differentiable by the
        rotations, or that parameter itself. For those who read it."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_parameter if self.poet_initial_weight is None else self.poet_initial_weight
        self.check_base_weight_was_loaded()
        adapters = self._active_here()
        if self.merged or not adapters:
            return self.base_parameter
        self._keep_replicas_equal(adapters)
        R, P = self.sides(adapters)
        identity = self._is_at_identity(adapters, [*R, *P])
        rotated = self._rotated_parameter(R, P, identity)
        return with_identity_check(rotated, (*R, *P)) if identity else rotated

    def _rotated_parameter(self, R: list[Side], P: list[Side], identity: bool) -> Tensor:
        weight = self.base_weight
        matrix = rotated_weight(weight.as_matrix(weight.parameter.detach()), R, P, identity)
        return weight.as_weight(matrix).contiguous()

    def _keep_replicas_equal(self, adapters: list[str]) -> None:
        if not torch.is_grad_enabled():
            return
        for rotation in itertools.chain.from_iterable(map(self.rotations, adapters)):
            if rotation.mesh is not None:
                keep_replicas_equal(rotation.weight, rotation.mesh)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, or of a pickle
        register_layer(self)

    def __repr__(self) -> str:
        return "poet." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
