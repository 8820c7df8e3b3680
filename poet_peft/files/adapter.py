"""What an adapter file must hold before anything of it is loaded, and how base weights are loaded from it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..config import POETConfig
from ..errors import POETCheckpointError
from ..layer import POETLayer
from ..state import AdapterState
from ..targets import parameter_names
from ..weights.quantized import CONSTANT_PARTS, overwrite
from ..weights.residual import join, split, zero_residual
from .keys import base_key, base_keys


def check_adapter_tensors(
    adapter_name: str, layers: dict[str, POETLayer], tensors: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Check the rotations of a file against the model and against each other.

    Args:
        layers: rotated layers by name in the model.
        tensors: the file's tensors of the adapter, under the model's names.
        expected: the model's own tensors of the adapter.

    Raises:
        POETCheckpointError: tensors are missing, extra or of another shape; an index is not the one of the epoch.
    """
    _check_states(adapter_name, layers, tensors)
    _raise_if(_names(expected.keys() - tensors.keys()), "lacks tensors of the adapter", "Was it cut or edited?")
    _raise_if(_names(tensors.keys() - expected.keys()), "has tensors that the model's adapter lacks", _SAME_CONFIG)
    _check_shapes_and_kinds(tensors, expected, _SAME_CONFIG)
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise POETCheckpointError(
                f"the adapter {adapter_name!r} is merged into {name!r}, so loading it again would not change what the "
                "model computes. Call unmerge_adapter() first."
            )
        state = AdapterState.of(tensors[f"{name}.poet_state.{adapter_name}"])
        for rotation in layer.rotations(adapter_name):
            index = tensors[f"{name}.poet_{rotation.side}.{adapter_name}.index"].cpu()
            redrawn = rotation.draw_index(state.seed, state.num_reinits)
            problem = rotation.order_problem(index)
            if problem is not None:
                raise POETCheckpointError(f"poet_{rotation.side}.index of {name!r} {problem}")
            if state.num_reinits > state.num_folds or not torch.equal(index, redrawn):
                raise POETCheckpointError(
                    f"the file contradicts itself: poet_{rotation.side}.index of {name!r} is not what seed "
                    f"{state.seed} and {state.num_reinits} reinitialisations give after {state.num_folds} folds. It "
                    "was put together from several checkpoints, or the layer has another name in this model."
                )


def _check_states(adapter_name: str, layers: dict[str, POETLayer], tensors: dict[str, Tensor]) -> None:
    """Name the settings in which the file's adapter was trained otherwise than the model's configuration says."""
    differences: dict[str, list[str]] = {}
    for name, layer in layers.items():
        tensor = tensors.get(f"{name}.poet_state.{adapter_name}")
        if tensor is None or tensor.shape != (len(AdapterState._fields),) or tensor.is_floating_point():
            continue
        file, own = AdapterState.of(tensor), layer.state_at_start(adapter_name)
        for field, setting in _SETTINGS.items():
            if getattr(file, field) != getattr(own, field):
                what = f"{setting}, {getattr(file, field)} in the file and {getattr(own, field)} in the model"
                differences.setdefault(what, []).append(name)
    problems = [f"{what} ({names[0]!r} and {len(names) - 1} more)" for what, names in differences.items()]
    _raise_if(problems, "was trained with other settings", _SAME_CONFIG)


def match_residuals(adapter_name: str, layers: dict[str, POETLayer], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fit weights that a file holds in 16 bits and a residual (`precision.split`) to the model's dtype, either way.

    A file from bf16 training loads into an fp32 model with the digits of its residuals, and the other way round.
    """
    tensors = dict(tensors)
    for name, layer in layers.items():
        weight_key, residual_key = base_key(name, layer), f"{name}.poet_residual.{adapter_name}"
        if layer.quantization_backend is not None:
            continue
        weight = tensors.get(weight_key)
        in_model = adapter_name in layer.poet_residual
        # Without a residual in the model, its key was not given the adapter's name.
        residual = tensors.pop(residual_key, None)
        residual = tensors.pop(f"{name}.poet_residual", residual)
        dtype = layer.base_parameter.dtype
        if weight is None or (residual is None and not in_model):
            continue
        fitting = zero_residual(weight)
        if residual is not None and (residual.dtype, residual.shape) != (fitting.dtype, fitting.shape):
            raise POETCheckpointError(
                f"the adapter file is damaged: poet_residual of {name!r} is {residual.dtype} {tuple(residual.shape)}, "
                f"and its weight asks for {fitting.dtype} {tuple(fitting.shape)}. Nothing was loaded."
            )
        if residual is not None and in_model and weight.dtype == dtype:
            tensors[residual_key] = residual
            continue
        exact = weight if residual is None else join(weight, residual)
        tensors[weight_key] = exact
        if in_model:
            tensors[weight_key], tensors[residual_key] = split(exact.float(), dtype)
    return tensors


def load_base_tensors(
    model: nn.Module,
    config: POETConfig,
    adapter_name: str,
    layers: dict[str, POETLayer],
    tensors: dict[str, Tensor],
    required: set[str],
    optional: set[str],
) -> dict[str, Tensor]:
    """Load a file's tensors outside the adapter into the model, in place, and return those left to PEFT.

    PEFT's low-memory loading assigns new parameters, which would untie shared weights; so what `POETConfig` says is in
    the file is written here. Everything is checked first: either all of it is loaded, or nothing.

    Args:
        tensors: the file's tensors outside the adapter, under the model's names.
        required: keys that the configuration says the file holds.
        optional: keys that PEFT may have put there.

    Raises:
        POETCheckpointError: tensors are missing, unknown or of another shape, or the file and the configuration
            disagree on whether base weights belong in it, or another adapter would be changed.
    """
    quantized = {
        key: part
        for name, layer in layers.items()
        if layer.base_weight.is_quantized
        for key, part in base_keys(name, layer).items()
    }
    current = {**model.state_dict(), **quantized}
    _raise_if(_names(required - tensors.keys()), f"lacks base weights, which {_regime(config)} saves", _SAME_CONFIG)
    unknown = tensors.keys() - required - optional
    _raise_if(_names(unknown), f"has tensors that do not belong into it with {_regime(config)}", _SAME_CONFIG)
    _check_shapes_and_kinds(tensors, current, _SAME_BASE)
    _check_quantized({key: tensors[key] for key in quantized.keys() & required}, quantized)
    for names in parameter_names(model).values():
        given = [name for name in names if name in tensors]
        for name in given[1:]:
            if not torch.equal(tensors[name], tensors[given[0]]):
                raise POETCheckpointError(
                    f"the file holds different values for {given[0]!r} and {name!r}, which share one parameter in "
                    "this model. Load it into a model that does not tie them (tie_word_embeddings=False)."
                )
    for name, layer in layers.items():
        others = [other for other in layer.poet_config if other != adapter_name]
        keys = [key for key in required if key.startswith(base_key(name, layer))]
        if (others or layer.merged) and not all(
            _same_bits(tensors[key].to(current[key]), current[key]) for key in keys
        ):
            what = f"the adapters {others}" if others else f"the merged adapters {layer.merged_adapters}"
            raise POETCheckpointError(
                f"the file holds a base weight of {name!r} that differs from the model's, on which {what} are built. "
                "Load it into a model of its own."
            )
    for key in sorted(required):  # the order must be the same in every process: a write may be a collective
        if not current[key].is_meta:
            overwrite(current[key], tensors[key])
    for layer in layers.values():
        layer.base_weight_was_loaded()
    return {key: tensor for key, tensor in tensors.items() if key not in required or current[key].is_meta}


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Equality also of packed values that are stored as if they were floats, where some are NaN."""
    return torch.equal(x.contiguous().flatten().view(torch.uint8), y.contiguous().flatten().view(torch.uint8))


def _check_quantized(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Packed values convert into nothing else, and mean nothing under another table."""
    _raise_if(
        [
            f"{key}: {tensor.dtype} in the file, {expected[key].dtype} in the model"
            for key, tensor in sorted(tensors.items())
            if tensor.dtype != expected[key].dtype
        ],
        "has quantized weights of another dtype",
        _SAME_BASE,
    )
    _raise_if(
        [
            repr(key)
            for key, tensor in sorted(tensors.items())
            if key.endswith(CONSTANT_PARTS) and not torch.equal(tensor.to(expected[key].device), expected[key])
        ],
        "has weights that were quantized otherwise than the model's",
        _SAME_BASE,
    )


def _check_shapes_and_kinds(tensors: dict[str, Tensor], expected: dict[str, Tensor], way_out: str) -> None:
    """Floating-point dtypes convert into each other; integers and floats do not."""
    pairs = [(key, tensor, expected[key]) for key, tensor in sorted(tensors.items())]
    _raise_if(
        [
            f"{key}: {tuple(tensor.shape)} in the file, {tuple(model.shape)} in the model"
            for key, tensor, model in pairs
            if tensor.shape != model.shape
        ],
        "has tensors of another shape",
        way_out,
    )
    _raise_if(
        [
            f"{key}: {tensor.dtype} in the file, {model.dtype} in the model"
            for key, tensor, model in pairs
            if tensor.dtype != model.dtype and not (tensor.is_floating_point() and model.is_floating_point())
        ],
        "has tensors of another dtype",
        way_out,
    )


_SETTINGS = {
    "num_terms": "num_neumann_terms (0: orthogonal_map='cayley')",
    "adaptive_terms": "adaptive_terms",
    "block_size_R": "block size of the output side",
    "block_size_P": "block size of the input side",
    "layout": "layout of the base weight (a WeightLayout)",
}
_SAME_BASE = "Load it into the model that it was trained from."
_SAME_CONFIG = "Load it with the adapter_config.json that was saved beside it."


def _regime(config: POETConfig) -> str:
    settings = ("merge_interval", "base_init", "train_rest", "bias")
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in settings)


def _names(keys: Iterable[str]) -> list[str]:
    return sorted(map(repr, keys))


def _raise_if(problems: list[str], what: str, way_out: str) -> None:
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise POETCheckpointError(f"the adapter file {what}: {shown}. {way_out} Nothing was loaded.")
