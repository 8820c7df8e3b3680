"""The fold: rotations are multiplied into the weights, `W <- R W P`, and begin anew from the identity.

POET, arXiv 2506.08001, section 3.2. When a fold is due is the business of `schedule`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import POETFoldError
from .layer import POETLayer, poet_layers
from .maths.precision import full_precision
from .ops import reference
from .probing import turn_probes
from .quick_fold import FoldItem, fold_moved_sides, is_quick
from .weights.sharded import check_checkpoints_hold_folds, check_sharding, reshard


_NUM_PROBES = 8
# A drift this many times `max_drift` is refused.
_FAR_ABOVE = 10
# Largest relative change of an output that rounding of the weight's dtype explains.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class MergeReport:
    """What a fold did. All values but the counts are maxima over the layers.

    Attributes:
        num_layers: layers folded.
        num_reinits: reinitialisations so far.
        relative_output_change: of a layer on random inputs, `||y_after - y_before|| / ||y_before||`; rounding of the
            weight's dtype, or requantization.
        orthogonality_error: largest entry of `|G^T G - I|` before the fold.
        max_rotation_angle: radians by which the fold turned the most-turned plane; an estimate from below.
        spectral_drift: bound on the relative change of any singular value by what was folded. Rounding, unless
            `adaptive_terms=False`: three Neumann terms always shrink singular values, by about `phi^4 / 8` where both
            sides turn by `phi` radians. Rounding of a 16-bit weight comes on top, see `compensated_folds`.
        requantization_error: of a quantized base weight, `||W_requantized - W_folded|| / ||W_folded||`: what this fold
            added. 0 where no layer is quantized.
        num_states_reset: parameters whose optimizer state was reset.
    """

    num_layers: int
    num_reinits: int
    relative_output_change: float
    orthogonality_error: float
    max_rotation_angle: float
    spectral_drift: float
    requantization_error: float
    num_states_reset: int


class _Measures(NamedTuple):
    """Of the rotations of one layer before the fold, see `MergeReport`."""

    orthogonality_error: float
    rotation_angle: float
    spectral_drift: float


def merge_and_reinitialize(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, reinitialize: bool = True
) -> MergeReport:
    """Fold all rotations into the weights now, `W <- R W P`, and begin anew from the identity.

    Folds that are due happen by themselves after the optimizer's step; this is for a fold at a moment of your own, and
    for optimizers that are none of torch's. Weights and parameters are written in place. What could be in the way is
    checked first, so that an error leaves the model as it was.

    Args:
        model: a model with POET layers, wrapped by PEFT or not.
        optimizer: the optimizer whose state for the rotations starts anew. None only without one.
        reinitialize: False folds only, and keeps permutations and optimizer state.

    Raises:
        ValueError: no POET layer, an optimizer that does not hold the rotations, or sharding of a kind that cannot
            be written to.
        POETFoldError: `merge_interval=0`, a merged adapter, two adapters on a layer, a weight that cannot be written,
            a rotation that is not finite, or too large a drift.
    """
    items = [
        FoldItem(layer, adapter, reinitialize) for _, layer in poet_layers(model) for adapter in layer.poet_config
    ]
    if not items:
        raise ValueError("the model has no POET layer to fold: wrap it first, get_peft_model(model, POETConfig(...)).")
    check_sharding(model)
    check_checkpoints_hold_folds()
    reshard(model.modules())
    if optimizer is not None:
        check_can_fold(optimizer, [rotation.weight for item in items for rotation in item.rotations])
    for layer, adapter, _ in items:
        check_foldable(layer, adapter)
    return fold(items, [] if optimizer is None else [optimizer])


def fold_quietly(items: Sequence[FoldItem], optimizers: Sequence[torch.optim.Optimizer]) -> MergeReport | None:
    """`fold`, but without measures and report where rotations are folded after every step; see `quick_fold`."""
    if not all(is_quick(item) for item in items):
        return fold(items, optimizers)
    with torch.no_grad(), full_precision(items[0].rotations[0].weight.device.type):
        fold_moved_sides(items)
    return None


def fold(items: Sequence[FoldItem], optimizers: Sequence[torch.optim.Optimizer]) -> MergeReport:
    """Fold these adapters of layers, which passed `check_foldable`, after checking what all of them would come to.

    Raises:
        POETFoldError: as `merge_and_reinitialize`; no weight was changed.
    """
    parameters = [rotation.weight for item in items for rotation in item.rotations]
    with torch.no_grad(), full_precision(parameters[0].device.type):
        measures = [_check(item) for item in items]
        _check_drift(items, measures)
        changes = [_fold_layer(item) for item in items]
    reset = [rotation.weight for item in items if item.reinitialize for rotation in item.rotations]
    return MergeReport(
        num_layers=len(items),
        num_reinits=max(item.layer.state(item.adapter).num_reinits for item in items),
        relative_output_change=max(output for output, _ in changes),
        orthogonality_error=max(measure.orthogonality_error for measure in measures),
        max_rotation_angle=max(measure.rotation_angle for measure in measures),
        spectral_drift=max(measure.spectral_drift for measure in measures),
        requantization_error=max(requantization for _, requantization in changes),
        num_states_reset=sum(reset_optimizer_state(optimizer, reset) for optimizer in optimizers) if reset else 0,
    )


# One layer


def _check(item: FoldItem) -> _Measures:
    """Refuse a fold that would be wrong, and measure what it folds."""
    layer, name = item.layer, item.layer.module_name
    for rotation in item.rotations:
        if not rotation.is_usable():
            raise POETFoldError(
                f"the rotation {rotation.side} of {name!r} is NaN or infinite, or has grown without bound. No weight "
                "was changed. Go back to the last checkpoint and lower the learning rate of the rotations."
            )
    # What may overflow is tried out first; anything else holds what it held before, rotated.
    weight = layer.base_weight
    if weight.range_dtype == torch.float16 and not weight.is_storable(_folded(item)):
        raise POETFoldError(
            f"the folded weight of {name!r} does not fit into {weight.range_dtype}. No weight was changed. Go back to "
            "the last checkpoint, and train in bf16 or fp32."
        )
    error, smallest, largest = 0.0, 1.0, 1.0
    for rotation in item.rotations:
        orthogonality = rotation.orthogonality()
        error = max(error, orthogonality.error)
        smallest *= max(1 - orthogonality.spectrum, 0.0) ** 0.5
        largest *= (1 + orthogonality.spectrum) ** 0.5
    angle = max(rotation.angle() for rotation in item.rotations)
    return _Measures(error, angle, max(1 - smallest, largest - 1))


def check_foldable(layer: POETLayer, adapter: str) -> None:
    """Refuse a layer that cannot be folded as things stand.

    Raises:
        POETFoldError: names the module, what is in the way, and the way out.
    """
    name = layer.module_name
    if not layer.is_periodic(adapter):
        raise POETFoldError(
            f"the adapter {adapter!r} of {name!r} has merge_interval=0, which promises that base weights never "
            "change: its checkpoint would not hold them. Set merge_interval > 0, or use merge_adapter()."
        )
    tensors = [layer.base_parameter, *(rotation.weight for rotation in layer.rotations(adapter))]
    if any(tensor is not None and tensor.is_meta for tensor in tensors):
        raise POETFoldError(
            f"{name!r} is offloaded, so that nothing can be folded into its weight. Keep its module on a device "
            "(device_map), or train with merge_interval=0, which leaves base weights alone."
        )
    if layer.merged:
        raise POETFoldError(
            f"{name!r} has the adapter {layer.merged_adapters} merged into its weight, so its rotations cannot be "
            "folded into it a second time. Call unmerge_adapter() first."
        )
    if layer.is_scaled(adapter):
        raise POETFoldError(
            f"the adapter {adapter!r} of {name!r} has scale={layer.scaling[adapter]:g}, and a fold is of the adapter "
            "as trained. Set the scale back to 1 (unscale_layer()), or use merge_adapter(), which merges at its scale."
        )
    adapters = list(layer.poet_config)
    if len(adapters) > 1:
        raise POETFoldError(
            f"{name!r} carries the adapters {adapters}; folding one of them into the shared weight would change the "
            "others. Delete the others, or train them with merge_interval=0."
        )
    try:
        layer.check_mergeable()
    except ValueError as error:
        raise POETFoldError(f"the rotations cannot be folded: {error}") from error


def _check_drift(items: Sequence[FoldItem], measures: Sequence[_Measures]) -> None:
    drifts = {item.layer.module_name: measure.spectral_drift for item, measure in zip(items, measures, strict=True)}
    worst = max(drifts, key=drifts.__getitem__)
    limit = min(item.layer.poet_config[item.adapter].max_drift for item in items)
    if drifts[worst] <= limit:
        return
    what = (
        f"folding {worst!r} changes singular values by up to {drifts[worst]:.2g} (max_drift={limit}): its rotations "
        "have left the range of the series"
    )
    ways_out = "Lower their learning rate, shorten merge_interval, or pass adaptive_terms=True"
    if drifts[worst] > _FAR_ABOVE * limit:
        raise POETFoldError(f"{what}. No weight was changed. {ways_out}, from the last checkpoint.")
    warnings.warn(f"{what}. {ways_out}.")


def _folded(item: FoldItem) -> Tensor:
    layer, adapter, _ = item
    pairs: dict[str, list[reference.RotationTensors]] = {"R": [], "P": []}
    for rotation in item.rotations:
        blocks = rotation().blocks()
        deltas = [rotation.orthogonal_map.fold_delta(Q, d) for Q, d in zip(blocks.Q, blocks.deltas, strict=True)]
        pairs[rotation.side].append((rotation.index, deltas))
    exact = layer.base_weight.read_exact(layer.residual_of(adapter))
    return reference.effective_weight(exact, pairs["R"], pairs["P"])


def _fold_layer(item: FoldItem) -> tuple[float, float]:
    """Fold one layer. Returns the relative change of its output, and the error of requantization."""
    layer, adapter, reinitialize = item
    weight = layer.base_weight
    before = weight.read()
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(_NUM_PROBES, layer.in_features, generator=generator).to(before)
    R, P = ([(side.index, side.blocks().deltas) for side in sides] for sides in layer.sides([adapter]))
    expected = reference.poet_linear(probes.expand(*before.shape[:-2], -1, -1), before, None, R, P)

    folded = _folded(item)
    old_parts = {name: part.detach().clone() for name, part in weight.parts().items()}
    if layer.is_compensated(adapter):
        layer._ensure_residual(adapter)
    weight.write(folded, layer.residual_of(adapter))
    written = weight.read()
    output_change = _relative_error(probes @ written.mT, expected)
    requantization_error = _relative_error(written, folded) if weight.is_quantized else 0.0
    if not weight.is_quantized and not output_change <= _ROUNDING.get(weight.range_dtype, 5e-2):
        weight.write_parts(old_parts)
        raise POETFoldError(
            f"folding {layer.module_name!r} changed its output by {output_change:.2g} of its size, which is not "
            "rounding: its weight does not hold what is written to it. It was put back as it was. Add it to "
            "exclude_modules, or train with merge_interval=0."
        )
    turn_probes(layer, adapter, lambda rotation: rotation().blocks().deltas)
    for rotation in item.rotations:
        rotation.reset()
    state = layer.advance(adapter, num_folds=1, num_reinits=int(reinitialize))
    if reinitialize:
        for rotation in item.rotations:
            rotation.redraw(state.seed, state.num_reinits)
    return output_change, requantization_error


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual - expected)
    return float(difference / torch.linalg.vector_norm(expected).clamp_min(1e-30))


# Optimizer state


def check_can_fold(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse an optimizer whose state for the rotations cannot be started anew.

    Raises:
        ValueError: DeepSpeed's, or one that trains none of the parameters; says how that comes about.
    """
    inner = optimizer
    while inner is not None:
        if type(inner).__module__.partition(".")[0] == "deepspeed":
            raise ValueError(
                f"{type(inner).__name__} of DeepSpeed ZeRO keeps its own fp32 copy of the rotations, which would undo "
                "every fold. Use DDP or FSDP2, or train without folds (merge_interval=0)."
            )
        inner = getattr(inner, "optimizer", None)
    if _group_of(optimizer).keys().isdisjoint(map(id, parameters)):
        raise ValueError(
            "the optimizer has none of the model's rotations in its parameter groups, so nothing could be reset. Make "
            "it after get_peft_model() and load_adapter(), which create new parameters."
        )


def reset_optimizer_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> int:
    """Make the optimizer's state of those of these parameters that it holds what it is before the first step.

    The state is dropped, which is fresh state bit for bit for torch's optimizers. It is set to zero in place instead
    where the optimizer keeps hold of the tensors (capturable and paged optimizers), and for sharded parameters, whose
    checkpoints must hold a state for each.

    Returns:
        Number of parameters whose state was reset; those without state need none.
    """
    group_of = _group_of(optimizer)
    num_reset = 0
    for parameter in parameters:
        state = optimizer.state.get(parameter)
        if not state or id(parameter) not in group_of:
            continue
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        is_paged = any(getattr(tensor, "is_paged", False) for tensor in tensors)
        if is_paged or group_of[id(parameter)].get("capturable") or isinstance(parameter, DTensor):
            for tensor in tensors:
                tensor.zero_()
        else:
            del optimizer.state[parameter]
        num_reset += 1
    return num_reset


def _group_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
