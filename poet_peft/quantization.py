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
import warnings
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from .precision import at_least_fp32
from .sharding import write


# Parts that say how the others are to be read. Nothing but the same values can be loaded into a layer.
CONSTANT_PARTS = ("weight.shape", "weight.quant_map", "weight.nested_quant_map")


class QuantizedFormat:
    """How one library keeps a quantized weight (out, in)."""

    def parts(self, layer: nn.Module) -> dict[str, Tensor]:
        """All tensors that the weight is made of, by name. They are the layer's own: writing to them changes it."""
        raise NotImplementedError

    def dequantize(self, layer: nn.Module) -> Tensor:
        """The weight (out, in) in fp32."""
        raise NotImplementedError

    def quantize(self, layer: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
        """The parts that `matrix` (out, in) has in the layer's format. The layer stays as it is."""
        raise NotImplementedError

    def range_dtype(self, layer: nn.Module) -> torch.dtype:
        """The dtype in which the library reads a matrix to quantize it; what overflows it cannot be stored."""
        return torch.float32

    def write(self, layer: nn.Module, parts: dict[str, Tensor]) -> None:
        """Give the layer another weight of the same format, in place."""
        for name, part in self.parts(layer).items():
            overwrite(part, parts[name])

    def check_can_requantize(self, name: str, layer: nn.Module) -> None:
        """Refuse a layer whose weight does not come out in its own format when it is quantized anew.

        Raises:
            ValueError: names the module and the parts that differ.
        """
        old, new = self.parts(layer), self.quantize(layer, self.dequantize(layer))
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


class Bitsandbytes4bit(QuantizedFormat):
    def parts(self, layer: nn.Module) -> dict[str, Tensor]:
        return self._parts(layer.weight.data, layer.weight.quant_state)

    def dequantize(self, layer: nn.Module) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        # The model's 16-bit dtype would round the scales, and a scale that is rounded at every fold drifts.
        state = copy.copy(layer.weight.quant_state)
        state.dtype = torch.float32
        return dequantize_4bit(layer.weight.data, state)

    def quantize(self, layer: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        state = layer.weight.quant_state
        packed, new_state = quantize_4bit(
            matrix.float().contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=layer.weight.dtype,
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


class Bitsandbytes8bit(QuantizedFormat):
    def parts(self, layer: nn.Module) -> dict[str, Tensor]:
        # The first forward moves the scales from the weight to the layer's state.
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return {"weight": layer.weight.data, "weight.SCB": scales}

    def dequantize(self, layer: nn.Module) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        parts = self.parts(layer)
        return int8_vectorwise_dequant(parts["weight"], parts["weight.SCB"])

    def quantize(self, layer: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        values, scales, _ = int8_vectorwise_quant(matrix.to(torch.float16))
        return {"weight": values, "weight.SCB": scales}

    def range_dtype(self, layer: nn.Module) -> torch.dtype:
        return torch.float16

    def check_can_requantize(self, name: str, layer: nn.Module) -> None:
        if layer.state.has_fp16_weights:
            raise ValueError(
                f"{name!r} keeps its weight in 16 bits and quantizes it in every forward pass "
                "(llm_int8_has_fp16_weight=True). Load the base without it, or use merge_interval=0."
            )
        super().check_can_requantize(name, layer)


class Torchao(QuantizedFormat):
    """Args:
    make_config: gives the configuration that the model was quantized with.
    """

    def __init__(self, make_config: Any) -> None:
        self.make_config = make_config

    def parts(self, layer: nn.Module) -> dict[str, Tensor]:
        return _inner_tensors("weight", layer.weight)

    def dequantize(self, layer: nn.Module) -> Tensor:
        return at_least_fp32(layer.weight.dequantize())

    def quantize(self, layer: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
        from torchao import quantize_

        # torchao quantizes layers, not tensors.
        other = nn.Linear(*matrix.shape[::-1], bias=False, device="meta")
        other.weight = nn.Parameter(matrix.to(layer.weight.dtype), requires_grad=False)
        quantize_(other, self.make_config())
        return self.parts(other)

    def range_dtype(self, layer: nn.Module) -> torch.dtype:
        return layer.weight.dtype


class HQQ(QuantizedFormat):
    def parts(self, layer: nn.Module) -> dict[str, Tensor]:
        return {"weight.W_q": layer.W_q.data, **_tensors_in("weight", layer.meta)}

    def dequantize(self, layer: nn.Module) -> Tensor:
        return at_least_fp32(layer.dequantize())

    def quantize(self, layer: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
        settings = copy.deepcopy(layer.quant_config)
        with_offload = {**settings, "offload_meta": layer.offload_meta}
        # Without a linear layer to take over it is empty: `quantize` fills it.
        other = type(layer)(None, with_offload, compute_dtype=layer.compute_dtype, device=layer.device)
        other.quantize(matrix, **settings)
        return self.parts(other)

    def range_dtype(self, layer: nn.Module) -> torch.dtype:
        return layer.compute_dtype


@torch.no_grad()
def overwrite(part: Tensor, value: Tensor) -> None:
    """Copy into a tensor that may be sharded, or made in inference mode, as HQQ's are."""
    with torch.inference_mode(part.is_inference()):
        write(part, value)


def quantized_format(backend: QuantizationBackend | None) -> QuantizedFormat | None:
    """The format behind PEFT's backend of a layer; None if it is not quantized, or its weight cannot be read."""
    if backend is None or not backend.supports_merge:
        return None
    if backend.backend_name == "torchao":
        return Torchao(backend.get_apply_tensor_subclass)
    formats = {"bnb 4bit": Bitsandbytes4bit, "bnb 8bit": Bitsandbytes8bit, "hqq": HQQ}
    return formats[backend.backend_name]() if backend.backend_name in formats else None


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


def keep_exact(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in evaluation, and undo it where it has happened.

    On a CPU with AVX512-BF16, the first forward in evaluation mode repacks a layer for a faster kernel. That rounds
    its scales to bf16, and the kernel has no backward: a training step after it would lose, without an error, the
    gradient of everything below the layer.

    Warns:
        UserWarning: names a layer whose scales have been rounded already.
    """
    repacked = []
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            _unpack(module)
            repacked.append(name)
    if repacked:
        warnings.warn(
            f"bitsandbytes rounded the scales of {len(repacked)} 4-bit layers to bf16 when the model was evaluated, "
            f"{repacked[0]!r} among them, so it is not quite the model that was loaded. To train on the exact one, "
            "load it again and wrap it before its first forward."
        )


def _unpack(layer: nn.Module) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight = layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
    state = weight.quant_state
    if not state.nested:
        # bitsandbytes 0.50 leaves them transposed.
        state.absmax = state.absmax.T.reshape(-1).float()


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
