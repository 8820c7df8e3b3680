"""When a fold is due: optimizer steps, counted through torch's hook after `optimizer.step()`.

`follow_optimizers` sets the hook once for the process. After a step of an optimizer that holds rotations, their layers
count it in the adapter's state, which is saved and loaded with the adapter, and folds that are due happen. A step that
a gradient scaler skipped, or in which no rotation had a gradient, is not counted. Where several optimizers share the
rotations of a layer, a step is complete when each of its trainable rotations was stepped once.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .errors import POETFoldError
from .fold import FoldItem, MergeReport, check_can_fold, check_foldable, fold_quietly
from .layer import POETLayer, living_layers
from .rotation import Rotation
from .weights.sharded import check_checkpoints_hold_folds, check_whole, full, reshard, sharded_modules


# Over so many steps rotations grow far beyond what one step adds, so that one which came back is told from a new one.
_MANY_STEPS = 8


@dataclass
class _Progress:
    """What is known of a layer's training in this process.

    Attributes:
        held_by: the optimizer that stepped each rotation last, by adapter and side.
        stepped: adapters and sides that were stepped since the last complete step.
        trained: adapters and sides that ever had a gradient.
        checked: adapters whose first step was looked at for rotations without gradient.
        folded_away: rotations as they were before a fold, until the step after it.
    """

    held_by: dict[tuple[str, str], weakref.ref] = field(default_factory=dict)
    stepped: set[tuple[str, str]] = field(default_factory=set)
    trained: set[tuple[str, str]] = field(default_factory=set)
    checked: set[str] = field(default_factory=set)
    folded_away: dict[tuple[str, str], Tensor] = field(default_factory=dict)


_progress: weakref.WeakKeyDictionary[POETLayer, _Progress] = weakref.WeakKeyDictionary()
_reports: weakref.WeakKeyDictionary[torch.optim.Optimizer, MergeReport] = weakref.WeakKeyDictionary()
_trusted: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_handle: Any = None


def follow_optimizers() -> None:
    """Count the steps of all optimizers of the process from now on. Safe to call again."""
    global _handle
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_after_step)


def take_report(optimizer: torch.optim.Optimizer) -> MergeReport | None:
    """The report of the fold after the optimizer's last step, once; None if there was none."""
    while not isinstance(optimizer, torch.optim.Optimizer) or optimizer not in _reports:
        optimizer = getattr(optimizer, "optimizer", None)  # accelerate's wrapper
        if optimizer is None:
            return None
    return _reports.pop(optimizer)


@torch._dynamo.disable
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    layers = living_layers()
    if not layers or _was_skipped(optimizer) or _only_made_state(optimizer):
        return
    reshard(sharded_modules())
    # A step without any gradient moves nothing, as the one that Trainer adds to a finished run.
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    mine = [r for layer in layers for adapter in layer.poet_config for r in layer.rotations(adapter)]
    if not any(rotation.weight.grad is not None for rotation in mine if id(rotation.weight) in held):
        return
    stepped = [(layer, adapter) for layer in layers for adapter in _complete_steps(layer, optimizer, held)]
    if not stepped:
        return
    if any(layer.is_periodic(adapter) for layer, adapter in stepped):
        check_checkpoints_hold_folds()
    _check_gradients(stepped)
    for layer, adapter in stepped:
        _check_not_undone(optimizer, layer, adapter)
    due = []
    for layer, adapter in stepped:
        config = layer.poet_config[adapter]
        num_steps = layer.advance(adapter, num_steps=1).num_steps
        if config.folds_at(num_steps):
            due.append(FoldItem(layer, adapter, config.reinitializes_at(num_steps)))
    if due:
        _fold(due, optimizer)


def _was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient scaler found infinities and left the skipping to the optimizer, as fused ones do it."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _only_made_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step only served to make the optimizer's state.

    `torch.distributed.checkpoint` takes such a step before it loads a state: with learning rates and gradients of 0.
    """
    if any(float(group.get("lr", 1.0)) != 0 for group in optimizer.param_groups):
        return False
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return not any(bool(full(parameter.grad.any())) for parameter in parameters if parameter.grad is not None)


def _trainable(layer: POETLayer, adapter: str) -> list[Rotation]:
    return [rotation for rotation in layer.rotations(adapter) if rotation.weight.requires_grad]


def _complete_steps(layer: POETLayer, optimizer: torch.optim.Optimizer, held: set[int]) -> Iterator[str]:
    """The adapters of a layer all of whose trainable rotations have been stepped, the last by this optimizer."""
    for adapter in layer.poet_config:
        rotations = _trainable(layer, adapter)
        mine = [rotation for rotation in rotations if id(rotation.weight) in held]
        if not mine:
            continue
        progress = _progress.setdefault(layer, _Progress())
        for rotation in mine:
            key = (adapter, rotation.side)
            progress.held_by[key] = weakref.ref(optimizer)
            progress.stepped.add(key)
            if rotation.weight.grad is not None:
                progress.trained.add(key)
        keys = {(adapter, rotation.side) for rotation in rotations}
        if keys <= progress.stepped:
            progress.stepped -= keys
            yield adapter


def _fold(due: Sequence[FoldItem], optimizer: torch.optim.Optimizer) -> None:
    optimizers = {optimizer}
    for layer, adapter, _ in due:
        progress = _progress[layer]
        for rotation in layer.rotations(adapter):
            check_whole(layer.module_name, rotation.weight, rotation.partition.num_parameters)
            held_by = progress.held_by.get((adapter, rotation.side), lambda: None)()
            optimizers |= {held_by} if held_by is not None else set()
            if (adapter, rotation.side) not in progress.trained and rotation.weight.requires_grad:
                _check_identity(layer, rotation)
        check_foldable(layer, adapter)
    parameters = [rotation.weight for item in due for rotation in item.rotations]
    check_can_fold(optimizer, parameters)
    for other in optimizers - set(_trusted):
        if _check_keeps_no_copy(other, parameters):
            _trusted.add(other)
    before = {}
    for layer, adapter, _ in due:
        if layer.poet_config[adapter].merge_interval >= _MANY_STEPS:
            for rotation in _trainable(layer, adapter):
                before[layer, adapter, rotation.side] = rotation.weight.detach().clone()
    report = fold_quietly(due, list(optimizers))
    if report is not None:
        _reports[optimizer] = report
    for (layer, adapter, side), weight in before.items():
        _progress[layer].folded_away[adapter, side] = weight


def _check_gradients(stepped: Sequence[tuple[POETLayer, str]]) -> None:
    """Warn, after the first step of a layer, of rotations that nothing trains.

    Layers whose names differ in numbers only are one kind: an expert that got no token, or a layer that was dropped,
    is no alarm while others of its kind train.
    """
    new = [(layer, adapter) for layer, adapter in stepped if adapter not in _progress[layer].checked]
    if not new:
        return
    kinds: dict[str, list[bool]] = {}
    names: dict[str, str] = {}
    for layer, adapter in new:
        _progress[layer].checked.add(adapter)
        for rotation in _trainable(layer, adapter):
            kind = re.sub(r"\d+", "*", layer.module_name) + f" ({rotation.side})"
            kinds.setdefault(kind, []).append((adapter, rotation.side) in _progress[layer].trained)
            names.setdefault(kind, layer.module_name)
    untrained = [kind for kind, trained in kinds.items() if not any(trained)]
    if untrained and len(untrained) < len(kinds):
        warnings.warn(
            f"rotations got no gradient in the first optimizer step: {', '.join(sorted(untrained))}. Their parent may "
            "read the weight without calling the layer, so that they have no effect. Add such layers to "
            f"exclude_modules, for example {names[untrained[0]]!r}."
        )


def _check_identity(layer: POETLayer, rotation: Rotation) -> None:
    """Refuse to fold a rotation that never trained, unless folding it changes nothing."""
    if bool(rotation.weight.any()):
        raise POETFoldError(
            f"the rotation {rotation.side} of {layer.module_name!r} never had a gradient, so the layer may be one "
            "that its parent reads without calling it, and folding its rotations would change the model. Add it to "
            "exclude_modules."
        )


def _check_keeps_no_copy(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Refuse an optimizer that holds copies of the rotations, such as fp32 masters, before its first fold.

    Returns:
        Whether that could be told: copies of rotations that have not moved look like any zeros.

    Raises:
        POETFoldError: names the optimizer's class.
    """
    rotations = [p.detach() for p in parameters if not isinstance(p, DTensor) and bool(p.any())]
    own = {p.data_ptr() for p in parameters} | {p.grad.data_ptr() for p in parameters if p.grad is not None}
    sizes = {p.numel() for p in rotations}
    for tensor in _tensors_in(dict(vars(optimizer)), set()):
        if isinstance(tensor, DTensor) or tensor.numel() not in sizes or tensor.data_ptr() in own:
            continue
        if not tensor.is_floating_point():
            continue
        flat = tensor.detach().flatten().float()
        if any(p.numel() == flat.numel() and _is_near(flat.to(p.device), p.flatten().float()) for p in rotations):
            raise _undone(optimizer)
    return bool(rotations)


def _check_not_undone(optimizer: torch.optim.Optimizer, layer: POETLayer, adapter: str) -> None:
    """Refuse an optimizer that brought rotations back which a fold had reset, at the step after it.

    Raises:
        POETFoldError: names the optimizer's class.
    """
    progress = _progress[layer]
    for rotation in layer.rotations(adapter):
        before = progress.folded_away.pop((adapter, rotation.side), None)
        if before is None or not bool(before.any()):
            continue
        now = rotation.weight.detach()
        if bool(torch.linalg.vector_norm(now - before) < 0.5 * torch.linalg.vector_norm(now)):
            raise _undone(optimizer)


def _undone(optimizer: torch.optim.Optimizer) -> POETFoldError:
    return POETFoldError(
        f"{type(optimizer).__name__} keeps its own copy of the rotations (as fp32 masters or by offloading), which it "
        "writes back at its next step, so that every fold would be undone. Use an optimizer that updates its "
        "parameters in place, or train without folds (merge_interval=0). If a fold has happened, go back to a "
        "checkpoint from before it."
    )


def _is_near(x: Tensor, y: Tensor) -> bool:
    norm = torch.linalg.vector_norm(y)
    return bool(norm.isfinite() & (torch.linalg.vector_norm(x - y) <= 1e-2 * norm))


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in nested containers and the attributes of inner optimizers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in list(value.values()):
            yield from _tensors_in(inner, seen)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _tensors_in(inner, seen)
    elif isinstance(value, torch.optim.Optimizer):
        yield from _tensors_in(dict(vars(value)), seen)
