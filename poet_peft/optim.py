"""Optimizers for models with rotations: parameter groups for any of torch's, a factory for Trainer, `RotationMuon`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .layer import poet_layers
from .maths.blocks import BlockPartition
from .maths.orthogonal import orthogonalize, upper_triangle
from .rotation import Rotation
from .weights.sharded import full, spread_like


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


class _OptimizerFactory:
    """What transformers calls with the wrapped model; see `poet_optimizer`."""

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        poet_lr: float,
        weight_decay: float,
        optimizer_cls: type[torch.optim.Optimizer],
        **optimizer_kwargs: Any,
    ) -> torch.optim.Optimizer:
        return optimizer_cls(poet_param_groups(model, lr, poet_lr, weight_decay), **optimizer_kwargs)


def poet_optimizer(
    lr: float,
    poet_lr: float,
    weight_decay: float = 0.0,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **optimizer_kwargs: Any,
) -> tuple[type, dict[str, Any]]:
    """The argument `optimizer_cls_and_kwargs` of Trainer and of TRL's SFTTrainer and RewardTrainer.

        Trainer(model, args, ..., optimizer_cls_and_kwargs=poet_optimizer(lr=5e-3, poet_lr=1e-3))

    The trainer makes the optimizer from the groups of `poet_param_groups`, once the model is wrapped. Its own
    `learning_rate` and `weight_decay` are not read; its schedule is. For trainers without the argument, set it
    afterwards: `trainer.optimizer_cls_and_kwargs = poet_optimizer(...)`.

    Args:
        lr, poet_lr, weight_decay: see `poet_param_groups`.
        optimizer_cls: any of torch's optimizers, or `RotationMuon`.
        optimizer_kwargs: further arguments of the optimizer, such as `betas`.

    Raises:
        TypeError: `optimizer_cls` is no class of a torch optimizer.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise TypeError(f"optimizer_cls={optimizer_cls!r} must be a subclass of torch.optim.Optimizer.")
    own = {"lr": lr, "poet_lr": poet_lr, "weight_decay": weight_decay, "optimizer_cls": optimizer_cls}
    return _OptimizerFactory, {**own, **optimizer_kwargs}


def rotation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all rotations of all adapters."""
    return [rotation.weight for rotation in _rotations(model)]


def _rotations(model: nn.Module) -> list[Rotation]:
    return [
        rotation
        for _, layer in poet_layers(model)
        for adapter_name in layer.poet_config
        for rotation in layer.rotations(adapter_name)
    ]


class RotationMuon(torch.optim.Optimizer):
    """Momentum, orthogonalised block by block, for rotations; torch's AdamW for everything else.

    A step adds to the skew-symmetric `Q` of a block the orthogonalised momentum of its gradient, so that every plane
    turns by about `lr` radians, whatever the gradient's size and the block's. An Adam step turns a block by about
    `lr * 2 sqrt(b)`, and some planes further than others. It keeps one number a parameter, Adam two. Sharded rotations
    (FSDP2) are gathered one at a time.

        optimizer = RotationMuon(poet_param_groups(model, lr=5e-3, poet_lr=1.2e-3))

    Args:
        groups: of `poet_param_groups`. The learning rate of "poet" (`poet_lr`) is in radians a step, the others are
            AdamW's.
        momentum: of the rotations' gradients, as an exponential mean.
        num_newton_schulz_steps: of the orthogonalisation, see `orthogonalize`.
        betas, eps: of AdamW, for the groups other than "poet".

    Raises:
        ValueError: no group tells how its parameters are cut into blocks, or a value is out of range.

    Source: the orthogonalised momentum of Muon (Keller Jordan, 2024), applied to the Lie algebra of the rotations.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        momentum: float = 0.9,
        num_newton_schulz_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1).")
        if num_newton_schulz_steps < 1:
            raise ValueError(f"num_newton_schulz_steps={num_newton_schulz_steps} must be at least 1.")
        groups = list(groups)
        if not any(isinstance(group, dict) and "blocks" in group for group in groups):
            raise ValueError(
                "RotationMuon needs the groups of poet_param_groups(model, lr=..., poet_lr=...), which say how the "
                "rotations are cut into blocks."
            )
        own = {"momentum": momentum, "num_newton_schulz_steps": num_newton_schulz_steps}
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": 0.0, **own})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step. Returns what the closure returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rest = []
        for group in self.param_groups:
            if "blocks" in group:
                for parameter, (num_rotated, block_size) in zip(group["params"], group["blocks"], strict=True):
                    if parameter.grad is not None:
                        self._turn(parameter, BlockPartition(num_rotated, num_rotated, block_size), group)
            else:
                rest.append(group)
        if rest:
            self._adamw_of(rest).step()
        return loss

    def _adamw_of(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        """AdamW that shares groups and state with this optimizer, so that schedulers, checkpoints and folds see them.

        Kept from step to step, since making one takes milliseconds, until loading replaces groups and state.
        """
        adamw = getattr(self, "_adamw", None)
        is_current = adamw is not None and adamw.state is self.state
        if not is_current or list(map(id, adamw.param_groups)) != list(map(id, groups)):
            adamw = self._adamw = torch.optim.AdamW(groups)
            adamw.state = self.state
        return adamw

    def _turn(self, parameter: Tensor, partition: BlockPartition, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        blocks = partition.skew_blocks(full(state["momentum_buffer"]))
        turns = [upper_triangle(orthogonalize(Q, group["num_newton_schulz_steps"])).flatten() for Q in blocks]
        # A plane of singular value theta turns by 2 atan(theta).
        parameter.add_(spread_like(parameter, torch.cat(turns)), alpha=-group["lr"] / 2)
