"""Parameter groups for any torch optimizer, and the reset of optimizer state after a reinitialisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .model import poet_layers
from .rotation import Rotation


def poet_param_groups(model: nn.Module, lr: float, poet_lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups of a model with POET layers, for any torch optimizer.

    An Adam step turns a block of size b by about `poet_lr * 2 sqrt(b)` radians whatever the gradient's size, so good
    values of `poet_lr` shrink with the block size: the paper uses 1e-3 for b = 256, 2e-3 for 128 and 4e-3 for 64 in
    pretraining. It is apart from the learning rate of everything else.

    Args:
        model: a model with POET layers, wrapped by PEFT or not.
        lr: learning rate of everything but the rotations: embeddings, norms, head, biases.
        poet_lr: learning rate of the rotations. 0 keeps them where they are.
        weight_decay: of matrices outside the rotated layers, such as the output head. Rotations, embeddings, norms
            and biases never decay.

    Returns:
        The groups "poet", "decay" and "no_decay" (the key "name"), without the empty ones. "poet" also has the key
        "blocks", how each parameter is cut: (features that rotate, size of a full block), what `RotationMuon` needs.

    Raises:
        ValueError: a negative value, or no rotation in the model is trainable.
    """
    for name, value in (("lr", lr), ("poet_lr", poet_lr), ("weight_decay", weight_decay)):
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative.")
    rotations = {id(rotation.weight): rotation for rotation in _rotations(model) if rotation.weight.requires_grad}
    if not rotations:
        raise ValueError(
            "the model has no trainable rotation: wrap it first, get_peft_model(model, POETConfig(...)), and load "
            "adapters to train further with is_trainable=True."
        )
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    groups: dict[str, dict[str, Any]] = {
        "poet": {"params": [], "lr": poet_lr, "weight_decay": 0.0, "name": "poet", "blocks": []},
        "decay": {"params": [], "lr": lr, "weight_decay": weight_decay, "name": "decay"},
        "no_decay": {"params": [], "lr": lr, "weight_decay": 0.0, "name": "no_decay"},
    }
    rotated = {id(getattr(layer.get_base_layer(), "weight", None)) for _, layer in poet_layers(model)}
    for parameter in model.parameters():
        if not parameter.requires_grad or id(parameter) in rotated:
            continue
        if id(parameter) in rotations:
            name = "poet"
            partition = rotations[id(parameter)].partition
            groups["poet"]["blocks"].append((partition.num_rotated, partition.block_size))
        elif id(parameter) in embeddings or parameter.dim() < 2 or weight_decay == 0:
            name = "no_decay"
        else:
            name = "decay"
        groups[name]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def rotation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all rotations of all adapters."""
    return [rotation.weight for rotation in _rotations(model)]


def _rotations(model: nn.Module) -> list[Rotation]:
    return [
        rotation
        for _, layer in poet_layers(model)
        for adapter_name in layer.poet_schedule
        for rotation in layer.rotations(adapter_name)
    ]


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
    """Make the optimizer's state of these parameters what it is before the first step.

    The state is dropped, which is fresh state bit for bit for torch's optimizers. It is set to zero in place instead
    where the optimizer keeps hold of the tensors (capturable and paged optimizers), and for sharded parameters, whose
    checkpoints must hold a state for each.

    Returns:
        Number of parameters whose state was reset; those without state need none.

    Raises:
        ValueError: the optimizer has none of the parameters in its groups.
    """
    parameters = list(parameters)
    check_can_fold(optimizer, parameters)
    group_of = _group_of(optimizer)
    num_reset = 0
    for parameter in parameters:
        state = optimizer.state.get(parameter)
        if not state:
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
