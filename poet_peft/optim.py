"""What an optimizer needs to know of a model with rotations: parameter groups, and a factory for Trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .layer import POETLayer, poet_layers
from .maths.blocks import SideName
from .rotation import Rotation
from .rotation_muon import RotationMuon, radians_of


@dataclass(frozen=True)
class AngleLaw:
    """How far a step turns a rotation, by the learning rate of everything else: `min(lr * rho / RMS(W), max_angle)`.

    The weight `W` then changes by about `lr * rho` an entry, the step of Muon and of AdamW, so that one learning rate
    serves the whole model. A schedule multiplies the angle, also one that `max_angle` has cut. Public notes of POET's
    authors on orthogonalised momentum, 2026.

    Args:
        rho: root mean square of a step's change of an entry of the weight, over the learning rate.
        max_angle: radians.
        side_exponent: of `d / sqrt(d_out d_in)`, by which a side of `d` features turns further; 0 = all alike.

    Raises:
        ValueError: `rho` or `max_angle` is not positive.
    """

    rho: float = 0.2
    max_angle: float = 0.02
    side_exponent: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rho", "max_angle"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")

    def radians(self, layer: POETLayer, side: SideName, lr: float, rms: float | None = None) -> float:
        """The angle of a step of this side, to two digits, so that layers of one kind share a group; not yet clamped.

        Args:
            rms: `rms_of` the layer, where it is known already; None reads the whole weight.

        Raises:
            ValueError: the weight cannot be read, or is zero.
        """
        rms = rms_of(layer) if rms is None else rms
        features = {"R": layer.out_features, "P": layer.in_features}[side]
        share = (features / (layer.out_features * layer.in_features) ** 0.5) ** self.side_exponent
        return float(f"{lr * self.rho / rms * share:.2g}")


def rms_of(layer: POETLayer) -> float:
    """The root mean square of the base weight, which is read whole.

    Raises:
        ValueError: the weight cannot be read, or is zero.
    """
    layer.base_weight.check_readable(layer.module_name)
    is_meta = layer.base_parameter.is_meta
    rms = 0.0 if is_meta else float(layer.base_weight.read().square().mean().sqrt())
    if not 0 < rms < math.inf:
        raise ValueError(
            f"the weight of {layer.module_name!r} has no size that an angle could follow from (root mean square "
            f"{rms:.3g}{', on the meta device' if is_meta else ''}). Pass angle= in radians."
        )
    return rms


def poet_param_groups(
    model: nn.Module,
    lr: float,
    poet_lr: float | None = None,
    weight_decay: float = 0.0,
    *,
    angle: float | AngleLaw | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of a model with POET layers, for any torch optimizer.

    How far a step turns the rotations is said in one of three ways:

    - by `lr` alone: the angle follows from it and from the size of each weight, see `AngleLaw`;
    - `angle=0.015`: radians a step;
    - `poet_lr=1e-3`: the optimizer's own learning rate for the parameters `Q`, as in the paper. An Adam step turns a
      block of size b by about `poet_lr * 2 sqrt(b)` radians, so good values shrink with the block size: the paper uses
      1e-3 for b = 256, 2e-3 for 128 and 4e-3 for 64 in pretraining. `RotationMuon` takes it for radians.

    Angles become learning rates of Adam by that formula, block size by block size, so that they mean the same for all
    sizes; `RotationMuon` reads them as they are.

    Args:
        model: a model with POET layers, wrapped by PEFT or not.
        lr: learning rate of everything but the rotations: embeddings, norms, head, biases.
        poet_lr: learning rate of the rotations. 0 keeps them where they are.
        weight_decay: of matrices outside the rotated layers, such as the output head. Rotations, embeddings, norms
            and biases never decay.
        angle: of a step, in radians, or a law with settings of its own. Not beside `poet_lr`.

    Returns:
        Groups with the names (the key "name") "poet", one for each angle, "decay" and "no_decay", without the empty
        ones. Those of rotations also have the keys "blocks", how each parameter is cut: (features that rotate, size
        of a full block), "sides" and "folds_every_step", what `RotationMuon` needs, and unless `poet_lr` is given
        "radians".

    Raises:
        ValueError: a negative value, `poet_lr` beside `angle`, a weight whose size cannot be read, a trainable
            parameter on the meta device, or no rotation in the model is trainable.
    """
    numbers = {"lr": lr, "poet_lr": poet_lr, "weight_decay": weight_decay}
    for name, value in (numbers | ({} if isinstance(angle, AngleLaw) else {"angle": angle})).items():
        if value is not None and value < 0:
            raise ValueError(f"{name}={value} must not be negative.")
    if poet_lr is not None and angle is not None:
        raise ValueError(f"poet_lr={poet_lr} and angle={angle} both say how far a step turns; pass one of them.")
    _check_has_data(model)
    groups = _rotation_groups(model, lr, poet_lr, AngleLaw() if angle is None else angle)
    rotations = {id(parameter) for group in groups for parameter in group["params"]}
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
    rest: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "lr": lr, "weight_decay": weight_decay, "name": "decay"},
        "no_decay": {"params": [], "lr": lr, "weight_decay": 0.0, "name": "no_decay"},
    }
    rotated = {id(layer.base_parameter) for _, layer in poet_layers(model)}
    for parameter in model.parameters():
        if not parameter.requires_grad or id(parameter) in rotated | rotations:
            continue
        decays = id(parameter) not in embeddings and parameter.dim() >= 2 and weight_decay > 0
        rest["decay" if decays else "no_decay"]["params"].append(parameter)
    return [*groups, *(group for group in rest.values() if group["params"])]


def _check_has_data(model: nn.Module) -> None:
    """An optimizer of parameters on the meta device would run, and train nothing."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_meta:
            raise ValueError(
                f"the parameter {name!r} is on the meta device, where an optimizer trains nothing. Load the weights "
                "first; a model that accelerate offloads whole (cpu_offload, disk_offload) cannot be trained."
            )


def _rotation_groups(
    model: nn.Module, lr: float, poet_lr: float | None, angle: float | AngleLaw
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, ...], dict[str, Any]] = {}
    rms: dict[POETLayer, float] = {}
    for layer, adapter, rotation in _rotations(model):
        if not rotation.weight.requires_grad:
            continue
        partition = rotation.partition
        folds_every_step = layer.poet_config[adapter].folds_every_step
        group: dict[str, Any] = {"params": [], "lr": poet_lr, "weight_decay": 0.0, "name": "poet"}
        group["folds_every_step"] = folds_every_step
        if poet_lr is None:
            if isinstance(angle, AngleLaw):
                if layer not in rms:
                    rms[layer] = rms_of(layer)
                group["radians"] = angle.radians(layer, rotation.side, lr, rms[layer])
                group["max_radians"] = angle.max_angle
            else:
                group["radians"] = float(angle)
            # The root mean square over the planes of a block whose parameters all move by the learning rate.
            group["lr"] = radians_of(group) / (2 * partition.block_size**0.5)
        key = (group["lr"], group.get("radians", 0.0), folds_every_step)
        group = groups.setdefault(key, {**group, "blocks": [], "sides": []})
        group["params"].append(rotation.weight)
        group["blocks"].append((partition.num_rotated, partition.block_size))
        group["sides"].append(rotation.side)
    return list(groups.values())


class _OptimizerFactory:
    """What transformers calls with the wrapped model; see `poet_optimizer`."""

    def __call__(
        self,
        model: nn.Module,
        *,
        groups: dict[str, Any],
        optimizer_cls: type[torch.optim.Optimizer] | None,
        **optimizer_kwargs: Any,
    ) -> torch.optim.Optimizer:
        if optimizer_cls is None:
            configs = [config for _, layer in poet_layers(model) for config in layer.poet_config.values()]
            folds_every_step = any(config.folds_every_step for config in configs)
            optimizer_cls = RotationMuon if folds_every_step else torch.optim.AdamW
        return optimizer_cls(poet_param_groups(model, **groups), **optimizer_kwargs)


def poet_optimizer(
    lr: float,
    poet_lr: float | None = None,
    weight_decay: float = 0.0,
    optimizer_cls: type[torch.optim.Optimizer] | None = None,
    *,
    angle: float | AngleLaw | None = None,
    **optimizer_kwargs: Any,
) -> tuple[type, dict[str, Any]]:
    """The argument `optimizer_cls_and_kwargs` of Trainer and of TRL's SFTTrainer and RewardTrainer.

        Trainer(model, args, ..., optimizer_cls_and_kwargs=poet_optimizer(lr=5e-3, weight_decay=0.1))

    The trainer makes the optimizer from the groups of `poet_param_groups`, once the model is wrapped. Its own
    `learning_rate` and `weight_decay` are not read; its schedule is. For trainers without the argument, set it
    afterwards: `trainer.optimizer_cls_and_kwargs = poet_optimizer(...)`.

    Args:
        lr, poet_lr, weight_decay, angle: see `poet_param_groups`.
        optimizer_cls: any of torch's optimizers, or `RotationMuon`. None = `RotationMuon` for rotations that are
            folded after every step, AdamW for others.
        optimizer_kwargs: further arguments of the optimizer, such as `betas`.

    Raises:
        TypeError: `optimizer_cls` is no class of a torch optimizer.
    """
    if optimizer_cls is not None and not (
        isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)
    ):
        raise TypeError(f"optimizer_cls={optimizer_cls!r} must be a subclass of torch.optim.Optimizer.")
    groups = {"lr": lr, "poet_lr": poet_lr, "weight_decay": weight_decay, "angle": angle}
    return _OptimizerFactory, {"groups": groups, "optimizer_cls": optimizer_cls, **optimizer_kwargs}


def rotation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all rotations of all adapters."""
    return [rotation.weight for *_, rotation in _rotations(model)]


def _rotations(model: nn.Module) -> list[tuple[POETLayer, str, Rotation]]:
    """All rotations, with their layers and adapters."""
    return [
        (layer, adapter, rotation)
        for _, layer in poet_layers(model)
        for adapter in layer.poet_config
        for rotation in layer.rotations(adapter)
    ]
