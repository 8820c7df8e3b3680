"""Workarounds for other libraries, each with what makes it unnecessary.

- `clear_leftover_gguf_flags`: until transformers removes its quantizer from a GGUF model that it has dequantized (not
  in 5.23).
- `keep_tied`: until PEFT asks which weights are tied and not whether the first embedding is (not in 0.21).
- `names_tied_with_embedding`: until PEFT knows models that raise where they are asked for their embeddings (not in
  0.21).
- `keep_exact`: until bitsandbytes keeps fp32 scales, and a backward, for 4-bit layers on CPUs with AVX512-BF16 (not in
  0.50).

Elsewhere: `weights.sharded.sharded_modules` reads a private mapping of torch (2.13), `registration.ensure_peft_type`
extends PEFT's enum (0.21).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def keep_tied(model: nn.Module) -> Iterator[None]:
    """Keep `tie_word_embeddings` in a model's configuration while PEFT unloads an adapter.

    PEFT takes it away, with a warning, from a model whose output head shares its weight with another embedding than
    the first, as an encoder-decoder's with the decoder's. The saved model then lacks the weight of its head.
    """
    before = isinstance(model, PreTrainedModel) and getattr(model.config, "tie_word_embeddings", None)
    if not (before and _is_head_shared(model)):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied after merging")
        yield
    if _is_head_shared(model):  # a trained copy of the embedding may have untied it
        model.config.tie_word_embeddings = before


def _is_head_shared(model: nn.Module) -> bool:
    try:
        weight = getattr(model.get_output_embeddings(), "weight", None)
    except NotImplementedError:
        return False
    return weight is not None and sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1


def names_tied_with_embedding(of_peft: Callable[[], list[str]]) -> list[str]:
    """What PEFT finds tied to the embedding of the model's tokens: nothing where the model has none to give.

    Detectors of objects and some models of several parts raise NotImplementedError in `get_input_embeddings`, which
    would end the injection.
    """
    try:
        return of_peft()
    except NotImplementedError:
        return []


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
