"""Muon for rotations: an optimizer that turns all planes of a block by the same angle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .block_map import BlockMap
from .orthogonal import orthogonalize, upper_triangle
from .primitives import BlockPartition
from .sharding import full, spread_like


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
        blocks = BlockMap(partition).skew_blocks(full(state["momentum_buffer"]))
        turns = [upper_triangle(orthogonalize(Q, group["num_newton_schulz_steps"])).flatten() for Q in blocks]
        # A plane of singular value theta turns by 2 atan(theta).
        parameter.add_(spread_like(parameter, torch.cat(turns)), alpha=-group["lr"] / 2)
