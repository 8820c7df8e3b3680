"""The dial of an adapter: how much of its angle every plane is turned by, after training.

At `scale` 0 a layer is the base layer, at 1 the adapter, in between it is on the geodesic that joins the two. Files
hold the adapter as trained, whatever its scale is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping

import torch

from .maths.geodesic import scaled_map
from .ops.sides import Side
from .rotation import Rotation


class ScaledAdapters:
    """The part of a rotated layer that scales its adapters, under the names that PEFT uses for LoRA.

    Attributes:
        poet_scaling: the scale, by adapter; 1 = as trained.
    """

    @property
    def scaling(self) -> dict[str, float]:
        """The scale of every adapter. What `peft.rescale_adapter_scale` reads, multiplies and sets."""
        return self.poet_scaling

    @scaling.setter
    def scaling(self, scaling: dict[str, float]) -> None:
        for adapter in self._present(list(scaling)):
            self._check_scale(adapter, scaling[adapter])
        self.poet_scaling = dict(scaling)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Turn the planes of an adapter by `scale` times their angles: 0 = the base layer, 1 = as trained.

        A scale above 1 goes beyond the adapter on the same geodesic, one below 0 turns backwards.

        Raises:
            ValueError: not a finite number, or the adapter is merged, or folded into the weight.
        """
        if self.has_adapter(adapter):
            self._exchange_scales({adapter: scale})

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters; raises as `set_scale`."""
        self._exchange_scales({name: self.scaling[name] * scale for name in self._present(self.active_adapters)})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters, or set them to 1 if `scale` is None; raises as `set_scale`."""
        if scale == 0:
            raise ValueError(
                f"the scale of {self.module_name!r} cannot be divided by 0. To go back to the adapter as trained, "
                "call unscale_layer() without a scale."
            )
        active = self._present(self.active_adapters)
        self._exchange_scales({name: 1.0 if scale is None else self.scaling[name] / scale for name in active})

    def _exchange_scales(self, scales: dict[str, float]) -> None:
        for adapter, scale in scales.items():
            if adapter in self.merged_adapters and scale != self.scaling[adapter]:
                raise ValueError(
                    f"the adapter {adapter!r} is merged into the weight of {self.module_name!r}, which "
                    f"scale={scale!r} would not change. Call unmerge_adapter(), set the scale, and merge again."
                )
        self.scaling = {**self.scaling, **scales}

    def _check_scale(self, adapter: str, scale: float) -> None:
        where = f"the adapter {adapter!r} of {self.module_name!r}"
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale={scale!r} of {where} is not a finite number: pass 0 to 1, or a little beyond.")
        folds = self.state(adapter).num_folds
        if folds and scale != 1:
            raise ValueError(
                f"{where} was folded into the weight {folds} times: what was folded stays, and scale={scale:g} would "
                "scale only what was trained since. Train with merge_interval=0 for an adapter that can be scaled."
            )

    def is_scaled(self, adapter: str) -> bool:
        return self.poet_scaling[adapter] != 1

    def _present(self, adapter_names: list[str]) -> list[str]:
        return [name for name in adapter_names if self.has_adapter(name)]

    def _turned(self, adapter_names: list[str]) -> list[str]:
        """Those of the adapters that change this layer: at scale 0 an adapter is the base layer, to the last bit."""
        return [name for name in self._present(adapter_names) if self.poet_scaling[name] != 0]

    def _scaled_sides(self, rotations: MutableMapping[str, Rotation], adapter_names: list[str]) -> Iterator[Side]:
        for name in self._turned(adapter_names):
            if name in rotations:
                rotation = rotations[name]
                side = rotation()
                self._check_trainable(name, rotation)
                yield side._replace(orthogonal_map=scaled_map(side.orthogonal_map, self.poet_scaling[name]))

    def _check_trainable(self, adapter: str, rotation: Rotation) -> None:
        if self.is_scaled(adapter) and rotation.weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"the adapter {adapter!r} of {self.module_name!r} has scale={self.poet_scaling[adapter]:g}, and no "
                "gradient there. Compute under torch.no_grad(), or set the scale back to 1 to train it."
            )
