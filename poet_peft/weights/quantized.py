"""Quantized base weights: what they are made of, how they are read, and how they are quantized anew in place.

A quantized weight is more than the tensor of its bytes. A file holds all its parts, under these keys behind the name
of the layer, and writing the same parts into a layer of the same format gives the same weight bit for bit:

| format | parts |
|---|---|
| bitsandbytes 4-bit | `weight` (packed), `weight.absmax`, `weight.quant_map`, `weight.shape` |
| with double quantization | also `weight.nested_absmax`, `weight.nested_offset`, `weight.nested_quant_map` |
| bitsandbytes 8-bit | `weight` (int8), `weight.SCB` |
| torchao | `weight.` and the names of the tensor subclass's own tensors, such as `weight.qdata`, `weight.scale` |
| HQQ | `weight.W_q`, and `weight.` and the names of the tensors in the layer's `meta`, such as `weight.scale` |
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from .base import BaseWeight
from .residual import at_least_fp32
from .sharded import write


# Parts that say how the others are to be read. Nothing but the same values can be loaded into a layer.
CONSTANT_PARTS = ("weight.shape", "weight.quant_map", "weight.nested_quant_map")


class QuantizedWeight(BaseWeight):
    """How one library keeps a quantized weight (out, in)."""

    is_quantized = True

    def read(self) -> Tensor:
        """The weight (out, in) in fp32, dequantized."""
        raise NotImplementedError

    def quantize(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parts that `matrix` (out, in) has in the layer's format. The layer stays as it is."""
        raise NotImplementedError

    @property
    def range_dtype(self) -> torch.dtype:
        return torch.float32

    def write(self, matrix: Tensor, residual: Tensor | None = None) -> None:
        self.write_parts(self.quantize(matrix))

    def write_parts(self, parts: dict[str, Tensor]) -> None:
        for name, part in self.parts().items():
            overwrite(part, parts[name])

    def check_can_requantize(self, name: str) -> None:
        """Refuse a layer whose weight does not come out in its own format when it is quantized anew.

        Raises:
            ValueError: names the module and the parts that differ.
        """
        old, new = self.parts(), self.quantize(self.read())
        different = sorted(
            part
            for part in old.keys() | new.keys()
            if part not in old or part not in new or _kind(old[part]) != _kind(new[part])
        )
        if different:
            raise ValueError(
                f"{name!r} cannot be quantized anew as it was: its parts {', '.join(different)} would come out in "
                "another dtype or shape. Use merge_interval=0, or add it to exclude_modules."
            )


class Bitsandbytes4bit(QuantizedWeight):
    def parts(self) -> dict[str, Tensor]:
        return self._parts(self.layer.weight.data, self.layer.weight.quant_state)

    def read(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        # The model's 16-bit dtype would round the scales, and a scale that is rounded at every fold drifts.
        state = copy.copy(self.layer.weight.quant_state)
        state.dtype = torch.float32
        return dequantize_4bit(self.layer.weight.data, state)

    def quantize(self, matrix: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        state = self.layer.weight.quant_state
        packed, new_state = quantize_4bit(
            matrix.float().contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=self.layer.weight.dtype,
        )
        return self._parts(packed, new_state)

    @staticmethod
    def _parts(packed: Tensor, state: Any) -> dict[str, Tensor]:
        parts = {
            "weight": packed,
            "weight.absmax": state.absmax,
            "weight.quant_map": state.code,
            "weight.shape": torch.tensor(state.shape),
        }
        if state.nested:
            parts["weight.nested_absmax"] = state.state2.absmax
            parts["weight.nested_offset"] = state.offset
            parts["weight.nested_quant_map"] = state.state2.code
        return parts


class Bitsandbytes8bit(QuantizedWeight):
    def parts(self) -> dict[str, Tensor]:
        # The first forward moves the scales from the weight to the layer's state.
        scales = self.layer.weight.SCB if self.layer.state.SCB is None else self.layer.state.SCB
        return {"weight": self.layer.weight.data, "weight.SCB": scales}

    def read(self) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        parts = self.parts()
        return int8_vectorwise_dequant(parts["weight"], parts["weight.SCB"])

    def quantize(self, matrix: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        values, scales, _ = int8_vectorwise_quant(matrix.to(torch.float16))
        return {"weight": values, "weight.SCB": scales}

    @property
    def range_dtype(self) -> torch.dtype:
        return torch.float16

    def check_can_requantize(self, name: str) -> None:
        if self.layer.state.has_fp16_weights:
            raise ValueError(
                f"{name!r} keeps its weight in 16 bits and quantizes it in every forward pass "
                "(llm_int8_has_fp16_weight=True). Load the base without it, or use merge_interval=0."
            )
        super().check_can_requantize(name)


class Torchao(QuantizedWeight):
    """Args:
    make_config: gives the configuration that the model was quantized with.
    """

    def __init__(self, layer: nn.Module, make_config: Any) -> None:
        super().__init__(layer)
        self.make_config = make_config

    def parts(self) -> dict[str, Tensor]:
        return _inner_tensors("weight", self.layer.weight)

    def read(self) -> Tensor:
        return at_least_fp32(self.layer.weight.dequantize())

    def quantize(self, matrix: Tensor) -> dict[str, Tensor]:
        from torchao import quantize_

        # torchao quantizes layers, not tensors.
        other = nn.Linear(*matrix.shape[::-1], bias=False, device="meta")
        other.weight = nn.Parameter(matrix.to(self.layer.weight.dtype), requires_grad=False)
        quantize_(other, self.make_config())
        return Torchao(other, self.make_config).parts()

    @property
    def range_dtype(self) -> torch.dtype:
        return self.layer.weight.dtype


class HQQ(QuantizedWeight):
    def parts(self) -> dict[str, Tensor]:
        return {"weight.W_q": self.layer.W_q.data, **_tensors_in("weight", self.layer.meta)}

    def read(self) -> Tensor:
        return at_least_fp32(self.layer.dequantize())

    def quantize(self, matrix: Tensor) -> dict[str, Tensor]:
        settings = copy.deepcopy(self.layer.quant_config)
        with_offload = {**settings, "offload_meta": self.layer.offload_meta}
        # Without a linear layer to take over it is empty: `quantize` fills it.
        other = type(self.layer)(None, with_offload, compute_dtype=self.layer.compute_dtype, device=self.layer.device)
        other.quantize(matrix, **settings)
        return HQQ(other).parts()

    @property
    def range_dtype(self) -> torch.dtype:
        return self.layer.compute_dtype


class UnreadableWeight(BaseWeight):
    """A quantized weight that its library can multiply by, and nothing else."""

    is_quantized = True

    def __init__(self, layer: nn.Module, library: str) -> None:
        super().__init__(layer)
        self.library = library

    def parts(self) -> dict[str, Tensor]:
        return {}

    def check_readable(self, name: str) -> None:
        raise ValueError(
            f"{name!r} is quantized by {self.library}, which cannot take merged weights. Keep the adapter beside the "
            "base, or load it over an unquantized copy of the base and merge there."
        )


@torch.no_grad()
def overwrite(part: Tensor, value: Tensor) -> None:
    """Copy into a tensor that may be sharded, or made in inference mode, as HQQ's are."""
    with torch.inference_mode(part.is_inference()):
        write(part, value)


def quantized_weight(layer: nn.Module, backend: QuantizationBackend) -> QuantizedWeight | None:
    """The weight of a layer that PEFT recognises as quantized; None if it cannot be read."""
    if not backend.supports_merge:
        return None
    if backend.backend_name == "torchao":
        return Torchao(layer, backend.get_apply_tensor_subclass)
    formats = {"bnb 4bit": Bitsandbytes4bit, "bnb 8bit": Bitsandbytes8bit, "hqq": HQQ}
    return formats[backend.backend_name](layer) if backend.backend_name in formats else None


def quantized_keys(model: nn.Module) -> set[str]:
    """Keys of the model's state dict, or their beginnings, that belong to quantized weights, whatever their dtype."""
    keys = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kind = type(parameter)
        if kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao."):
            layer = name.rpartition(".")[0]
            keys |= {name, f"{layer}.SCB", f"{layer}.weight_format"}
        elif name.endswith(".W_q"):
            keys.add(name)
    return keys


def _inner_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor}
    parts: dict[str, Tensor] = {}
    for inner in tensor.__tensor_flatten__()[0]:
        parts.update(_inner_tensors(f"{name}.{inner}", getattr(tensor, inner)))
    return parts


def _tensors_in(name: str, values: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(_tensors_in(f"{name}.{key}", value))
        elif isinstance(value, Tensor):
            found[f"{name}.{key}"] = value
    return found


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape
