"""Rotated convolutions: `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .exchange import call_with
from .ops.paths import rotated_weight
from .ops.sides import Side, with_identity_check
from .rotated_module import RotatedModule
from .weights.plain import is_plain


class Convolution(RotatedModule):
    """POET around a convolution: the same convolution with the weight `R W P`.

    `W` is the kernel as a matrix (out channels, in channels / groups * kernel size). `P` rotates the entries of a
    patch of the input, the same way in every group. `R` rotates output channels, within their group. Strides, padding
    and dilation stay those of the layer, which is called with another weight.
    """

    def _rotated_forward(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        R, P = self.sides(adapters)
        weight = self.base_layer.weight.detach()
        if weight.is_meta and not x.is_meta:
            raise ValueError(
                f"{self.module_name!r} is a convolution whose weight is offloaded, so that it cannot be rotated. Keep "
                "it on a device (device_map), or add it to exclude_modules."
            )
        identity = self._is_at_identity(adapters, [*R, *P])
        dtype = x.dtype
        autocasts = torch.is_autocast_enabled(x.device.type)
        if not autocasts:
            x = self._cast_input_dtype(x, weight.dtype)

        def forward(x: Tensor) -> Tensor:
            return self._convolve(x, weight, R, P, identity, *args, **kwargs)

        memory_efficient = any(self.poet_config[name].memory_efficient for name in adapters)
        if memory_efficient and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False)
        else:
            y = forward(x)
        if identity:
            y = with_identity_check(y, (*R, *P))
        return y if autocasts else y.to(dtype)

    def _convolve(
        self, x: Tensor, weight: Tensor, R: list[Side], P: list[Side], identity: bool, *args: Any, **kwargs: Any
    ) -> Tensor:
        rotated = rotated_weight(self.weight_layout.as_matrix(weight), R, P, identity)
        rotated = rotated.view(weight.shape)
        if is_plain(self.base_layer):
            return self.base_layer._conv_forward(x, rotated, self.base_layer.bias)
        return call_with(self.base_layer, "weight", rotated, (x, *args), kwargs)
