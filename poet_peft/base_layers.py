"""The layers that can be rotated, and their weight as a matrix (out, in) whatever the layer calls it."""

from __future__ import annotations

from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


# nn.MultiheadAttention reads the weight of this layer and never calls it: an adapter around it would do nothing.
_NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear


def check_supported(name: str, layer: nn.Module, **quantization_kwargs) -> None:
    """Refuse a layer that cannot be rotated.

    Raises:
        TypeError: names the module, its type and the way out.
    """
    if isinstance(layer, nn.Linear | Conv1D) and not isinstance(layer, _NEVER_CALLED):
        return
    backend = resolve_quantization_backend(layer, **quantization_kwargs)
    # TransformerEngine's layers normalise their input first, which a rotation of it would change.
    if backend is not None and backend.layer_type == "linear" and backend.backend_name != "te":
        return
    raise TypeError(
        f"POET cannot rotate {name!r} of type {type(layer).__name__}: only torch.nn.Linear (also quantized) and "
        "transformers' Conv1D are supported. Take it out of target_modules, or add it to exclude_modules."
    )


def weight_as_matrix(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A weight of the layer, its own by default, as a view (out_features, in_features): a Conv1D's is transposed."""
    weight = layer.weight if weight is None else weight
    return weight.mT if isinstance(layer, Conv1D) else weight


def features(layer: nn.Module) -> tuple[int, int]:
    """`(out_features, in_features)`, also where the weight is packed by quantization."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
