"""Merge-then-reinitialize over a whole model (POET, arXiv 2506.08001, section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .errors import POETMergeError
from .model import poet_layers
from .optim import check_can_fold, reset_optimizer_state
from .sharding import check_checkpoints_hold_folds, check_sharding, reshard


@dataclass(frozen=True)
class MergeReport:
    """What a fold did. All values are maxima over the layers.

    Attributes:
        num_layers: layers folded.
        epoch: number of reinitialisations so far.
        relative_output_change: of a layer on random inputs, `||y_after - y_before|| / ||y_before||`; rounding of the
            weight's dtype, or requantization.
        orthogonality_error: largest entry of `|G^T G - I|` before the fold.
        max_rotation_angle: radians by which the fold turned the most-turned plane; an estimate from below.
        spectral_drift: bound on the relative change of any singular value by what was folded. Three Neumann terms
            always shrink them, by about `phi^4 / 8` where both sides turn by `phi` radians. Rounding of a 16-bit
            weight comes on top, see `POETConfig.compensated_folds`.
        requantization_error: of a quantized base weight, `||W_requantized - W_folded|| / ||W_folded||`: what this fold
            added. 0 where no layer is quantized.
        num_states_reset: parameters whose optimizer state was reset.
    """

    num_layers: int
    epoch: int
    relative_output_change: float
    orthogonality_error: float
    max_rotation_angle: float
    spectral_drift: float
    requantization_error: float
    num_states_reset: int


def merge_and_reinitialize(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, reinitialize: bool = True
) -> MergeReport:
    """Fold all rotations into the weights, `W <- R W P`, and begin anew from the identity.

    Weights and parameters are written in place. Everything that could be in the way is checked first, so that an
    error leaves the model as it was. In Trainer, `POETCallback` does this every `merge_interval` steps; in a loop of
    your own call it after `optimizer.step()`.

    Args:
        model: a model with POET layers, wrapped by PEFT or not.
        optimizer: the optimizer whose state for the rotations starts anew. None only without one.
        reinitialize: False folds only, and keeps permutations and optimizer state.

    Raises:
        ValueError: no POET layer, an optimizer that does not hold the rotations, or sharding of a kind that cannot
            be written to.
        POETMergeError: `merge_interval=0`, a merged adapter, two adapters on a layer, or a rotation that is not
            finite.
    """
    layers = [(name, layer, adapter) for name, layer in poet_layers(model) for adapter in layer.poet_schedule]
    if not layers:
        raise ValueError("the model has no POET layer to fold: wrap it first, get_peft_model(model, POETConfig(...)).")
    check_sharding(model)
    check_checkpoints_hold_folds()
    reshard(model)
    for name, layer, adapter in layers:
        if not layer.is_periodic(adapter):
            raise POETMergeError(
                f"the adapter {adapter!r} of {name!r} has merge_interval=0, which promises that base weights never "
                "change: its checkpoint would not hold them. Set merge_interval > 0, or use merge_adapter()."
            )
        layer.check_foldable(adapter)
    rotations = [rotation.weight for _, layer, adapter in layers for rotation in layer.rotations(adapter)]
    if optimizer is not None:
        check_can_fold(optimizer, rotations)

    with torch.autocast(device_type=rotations[0].device.type, enabled=False):
        folds = [layer.fold(adapter, reinitialize) for _, layer, adapter in layers]
    num_states_reset = 0
    if optimizer is not None and reinitialize:
        num_states_reset = reset_optimizer_state(optimizer, rotations)
    return MergeReport(
        num_layers=len(folds),
        epoch=max(layer.epoch(adapter) for _, layer, adapter in layers),
        relative_output_change=max(fold.relative_output_change for fold in folds),
        orthogonality_error=max(fold.orthogonality_error for fold in folds),
        max_rotation_angle=max(fold.rotation_angle for fold in folds),
        spectral_drift=max(fold.spectral_drift for fold in folds),
        requantization_error=max(fold.requantization_error for fold in folds),
        num_states_reset=num_states_reset,
    )
