"""Models that transformers read from a GGUF file."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def clear_leftover_gguf_flags(model: nn.Module) -> None:
    """Remove transformers' marks of a quantized model from models that GGUF has left with plain floating weights.

    transformers dequantizes most GGUF files while it loads them, but keeps its quantizer on the model. Because of that
    Trainer refuses to train the model and `save_pretrained` to write it, and a written config would claim that its
    weights are packed. A model with any packed weight, or quantized in another way, is left as it is.
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        quantizer = getattr(module, "hf_quantizer", None)
        if quantizer is None or quantizer.quantization_config.quant_method != "gguf":
            continue
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            continue
        quantizer.remove_quantization_config(module)
        for part in module.modules():
            if isinstance(part, PreTrainedModel):
                vars(part.config).pop("_is_quantized", None)
