"""One base weight of a layer, read and written as a matrix (out, in) however it is kept.

`base` has the interface, `plain` and `quantized` the kinds of it, `residual` what rounding a 16-bit weight leaves
over, `sharded` the weights that are spread over processes, and `initial` the weights to start pretraining from.
"""

from __future__ import annotations

from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from .base import BaseWeight
from .plain import PlainWeight
from .quantized import UnreadableWeight, quantized_weight


def base_weight_of(layer: nn.Module, backend: QuantizationBackend | None) -> BaseWeight:
    """The weight of a base layer.

    Args:
        layer: of a kind that can be rotated.
        backend: what PEFT recognises the layer's quantization as; None if it is not quantized.
    """
    if backend is None:
        return PlainWeight(layer)
    return quantized_weight(layer, backend) or UnreadableWeight(layer, backend.backend_name)
