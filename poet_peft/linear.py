"""Rotated linear layers: `nn.Linear`, also quantized, and transformers' `Conv1D`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops.input_centric import rotate
from .ops.paths import choose_path, poet_linear
from .ops.sides import Side, with_identity_check
from .rotated_module import RotatedModule
from .weights.plain import is_plain


class Linear(RotatedModule):
    """POET around an `nn.Linear` (also quantized) or transformers' `Conv1D`: `y = R W P x + bias`."""

    def _rotated_forward(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        R, P = self.sides(adapters)
        if self.quantization_backend is not None or not is_plain(self.base_layer):
            return self._rotate_around(x, R, P, *args, **kwargs)
        # Frozen by the method, also where a loader of transformers has made a new parameter of it that is not.
        weight, bias = self.weight_layout.as_matrix(self.base_layer.weight).detach(), self.base_layer.bias
        dtype = x.dtype
        autocasts = torch.is_autocast_enabled(x.device.type)
        if not autocasts:
            x = self._cast_input_dtype(x, weight.dtype)
        memory_efficient = any(self.poet_config[name].memory_efficient for name in adapters)
        identity = self._is_at_identity(adapters, [*R, *P])
        path = choose_path(x, weight, R, P, memory_efficient, identity)
        y = poet_linear(x, weight, bias, R, P, path, memory_efficient, identity)
        if identity:
            y = with_identity_check(y, (*R, *P))
        return y if autocasts else y.to(dtype)

    def _rotate_around(self, x: Tensor, R: list[Side], P: list[Side], *args: Any, **kwargs: Any) -> Tensor:
        """The forward around a base layer that computes in its own way: `R (base(P x) - b) + b`."""
        for side in reversed(P):
            x = rotate(x, side)
        y = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        bias = getattr(self.get_base_layer(), "bias", None)
        if bias is not None and bias.is_meta:  # offloaded: only a call brings it back
            bias = self.base_layer(torch.zeros_like(x[..., :1, :]), *args, **kwargs)
        unrotated = rotated = y if bias is None else y - bias.to(y.dtype)
        for side in R:
            rotated = rotate(rotated, side)
        # The change, not the result, is put back under the bias: the identity then changes no bit.
        return rotated if bias is None else y + (rotated - unrotated)


class ReadLinear(Linear):
    """POET around an `nn.Linear` whose weight other modules read, always or at times, instead of calling it.

    They read the rotated weight.
    """

    mixes_samples = "its weight is read for all samples together"

    @property
    def weight(self) -> Tensor:
        return self.weight_in_use()
