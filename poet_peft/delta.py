"""What an adapter adds to the weight of its layer, `R W P - W`: for conversion to LoRA."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .weights.plain import CONVOLUTIONS, is_plain


class DeltaWeight:
    """The part of a rotated layer that converts its adapters, under the names that PEFT uses for it."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`R W P - W` at the adapter's scale, in the layout of the layer's weight, fp32 or wider.

        Of a folded adapter it is the change since before the first fold, with `keep_initial_weights`.

        Raises:
            ValueError: the layer has no such adapter, or the change cannot be told; names the module and the way out.
        """
        if not self.has_adapter(adapter):
            raise ValueError(f"{self.module_name!r} has no adapter {adapter!r}, but {', '.join(self.poet_config)}.")
        if obstacle := self._obstacle_to_delta(adapter):
            raise ValueError(f"{self.module_name!r} has no change of its weight to give: {obstacle}")
        self.check_mergeable()
        with torch.no_grad():
            effective = self.rotated_weight([adapter])
            original = self.poet_initial_weight
            if original is None:
                original = self.base_weight.read_exact(self.residual)
            else:
                original = self.weight_layout.as_matrix(original)
            delta = effective - original.to(effective)
        return self.weight_layout.as_weight(delta, self.base_parameter.shape).contiguous()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can convert the adapter. Warns of the reason where it cannot."""
        obstacle = self._obstacle_to_delta(adapter_name)
        if isinstance(self.get_base_layer(), (*CONVOLUTIONS, nn.Embedding, nn.MultiheadAttention)):
            kind = type(self.get_base_layer()).__name__
            obstacle = f"PEFT converts linear layers, and {self.module_name!r} is a {kind}."
        if obstacle:
            warnings.warn(f"not to be converted to LoRA: {obstacle}")  # the same text for every layer, shown once
        return obstacle is None

    def _obstacle_to_delta(self, adapter: str) -> str | None:
        if not self.has_adapter(adapter):
            return f"not every rotated layer has the adapter {adapter!r}, which PEFT's conversion asks for."
        if self.merged:
            return f"the adapter {', '.join(self.merged_adapters)} is merged. Call unmerge_adapter() first."
        ways_out = "Merge the model instead (merge_and_unload())"
        if self.poet_config[adapter].train_rest:
            return f"the adapter {adapter!r} has train_rest=True, which changed the rest of the model too. {ways_out}."
        if self.state(adapter).num_folds and self.poet_initial_weight is None:
            return (
                f"the adapter {adapter!r} was folded into the weight {self.state(adapter).num_folds} times, and the "
                f"weight from before is gone. {ways_out}, or train with merge_interval=0 or keep_initial_weights=True."
            )
        if self.quantization_backend is None and not is_plain(self.get_base_layer()):
            kind = type(self.get_base_layer()).__name__
            return f"{kind} has a forward or hooks of its own, so its weight does not say what it computes."
        return None
