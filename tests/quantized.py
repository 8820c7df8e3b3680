"""A tiny quantized Llama in every format that runs on a CPU, loaded as users load it: through transformers."""

import functools
import tempfile

import bitsandbytes
import pytest
import torch
from models import llama
from torchao.quantization import Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig
from transformers.utils import logging

from poet_peft.linear import Linear


# Its warning that inputs are cast comes once a layer and call.
logging.get_logger("bitsandbytes").setLevel("ERROR")


def _four_bits(quant_type, **settings):
    return lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, **settings)


FORMATS = {
    "nf4": _four_bits("nf4"),
    "nf4-double": _four_bits("nf4", bnb_4bit_use_double_quant=True),
    "nf4-stored-as-bf16": _four_bits("nf4", bnb_4bit_quant_storage=torch.bfloat16),
    "fp4": _four_bits("fp4"),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
}
for_every_format = pytest.mark.parametrize("name", FORMATS)
# Where the format makes no other difference than the library.
for_every_library = pytest.mark.parametrize("name", ["nf4-double", "int8", "torchao-int8"])


@functools.cache
def _saved(dtype, seed):
    directory = tempfile.TemporaryDirectory()
    sizes = {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.1}
    model = llama(seed=seed, attention_bias=True, mlp_bias=True, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.5)
    model.to(dtype).save_pretrained(directory.name)
    return directory  # deleted with the cache, at the end


def base_directory(dtype=torch.float32, seed=0):
    """Where the unquantized model is."""
    return _saved(dtype, seed).name


def quantized_llama(name, dtype=torch.float32, seed=0):
    """A Llama with biases, 2 layers of 14 quantized linear layers of sizes 64, 128 and 192."""
    model = LlamaForCausalLM.from_pretrained(
        base_directory(dtype, seed), dtype=dtype, quantization_config=FORMATS[name](), device_map="cpu"
    )
    return model.eval()


def rotated_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def dequantized(layer):
    """The weight (out, in) of a quantized layer in fp64, by the library that quantized it."""
    weight = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        scales = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales).double()
    return weight.dequantize().double()


def fresh_quantization_error(layer, matrix):
    """`||Q(W) - W|| / ||W||` of the library's own quantization of a matrix."""
    matrix = matrix.float()
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        other = bitsandbytes.nn.Linear4bit(
            *matrix.shape[::-1],
            bias=False,
            quant_type=layer.weight.quant_type,
            compress_statistics=layer.weight.compress_statistics,
        )
        other.weight.data = matrix
        other.to("cpu")
    elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        other = bitsandbytes.nn.Linear8bitLt(*matrix.shape[::-1], bias=False, has_fp16_weights=False)
        other.weight.data = matrix
        other.to("cpu")
    else:
        from torchao import quantize_

        other = torch.nn.Linear(*matrix.shape[::-1], bias=False)
        other.weight.data = matrix
        quantize_(other, Int8WeightOnlyConfig())
    return float((dequantized(other) - matrix).norm() / matrix.norm())


def parts(model):
    """A copy of all tensors of all quantized base weights."""
    return {
        f"{name}.{part}": tensor.clone()
        for name, layer in rotated_layers(model).items()
        for part, tensor in layer.base_weight.parts().items()
    }


def assert_same(actual, expected):
    """Two dicts have the same keys and tensors of the same bits. Packed values stored as floats may be NaN."""
    assert actual.keys() == expected.keys()
    different = [
        name
        for name, tensor in expected.items()
        if not torch.equal(actual[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
    ]
    assert not different
