"""`RotationMuon`: orthogonalised momentum for rotations, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .decorrelation import pairs_of, without_overlap
from .maths.blocks import BlockPartition, SideName, blocks_at_once
from .maths.newton_schulz import orthogonalize, product_dtype
from .maths.orthogonal import skew, upper_triangle
from .weights.residual import at_least_fp32
from .weights.sharded import full, mesh_of, spread_like


_FOLDED_EVERY_STEP = {"nesterov": True, "alternate": True, "decorrelation": 0.25}
_OTHERS = {"nesterov": False, "alternate": False, "decorrelation": 0.0}


@dataclass(frozen=True, eq=False)
class _Turn:
    """One parameter that a step moves: the momentum of its gradient, and by how much its planes turn."""

    parameter: nn.Parameter
    partition: BlockPartition
    direction: Tensor
    angle: float
    decorrelation: float


class RotationMuon(torch.optim.Optimizer):
    """Momentum, orthogonalised block by block, for rotations; torch's AdamW for everything else.

    A step adds to the skew-symmetric `Q` of a block the orthogonalised momentum of its gradient, so that every plane
    turns by about the same angle, whatever the gradient's size and the block's. An Adam step turns some planes further
    than others. It keeps one number a parameter, Adam two.

        optimizer = RotationMuon(poet_param_groups(model, lr=5e-3))               # angles from the learning rate
        optimizer = RotationMuon(poet_param_groups(model, lr=5e-3, angle=0.015))  # radians a step

    Args:
        groups: of `poet_param_groups`. The learning rate of a rotation's group is in radians a step, the others are
            AdamW's.
        momentum: of the rotations' gradients, as an exponential mean.
        nesterov: step along the mean of the momentum and the present gradient, weighted as the next mean would be.
            None = for rotations that are folded after every step.
        alternate: move only the output sides `R` in the first, third, ... step, and only the input sides `P` in the
            others. All momenta take every gradient. None = for rotations that are folded after every step.
        decorrelation: share, of what both sides of a layer ask for alike, that a step leaves to the other side, from 0
            to 1; see `decorrelation.without_overlap`. None = 0.25 for rotations that are folded after every step, and
            0, the only value there, for others.
        num_newton_schulz_steps: of the orthogonalisation, see `maths.newton_schulz`.
        process_group: processes that train the same rotations with the same gradients, as under DDP, and share the
            orthogonalisation out among them; "world" = all processes. None: each does all of it. Sharded rotations
            (FSDP2) are shared out in any case.
        betas, eps: of AdamW, for the other groups.

    Raises:
        ValueError: no group tells how its parameters are cut into blocks, or a value is out of range.

    Source: the orthogonalised momentum of Muon (Keller Jordan, 2024), applied to the Lie algebra of the rotations.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        momentum: float = 0.9,
        nesterov: bool | None = None,
        alternate: bool | None = None,
        decorrelation: float | None = None,
        num_newton_schulz_steps: int = 4,
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1).")
        if decorrelation is not None and not 0 <= decorrelation <= 1:
            raise ValueError(f"decorrelation={decorrelation} must lie in [0, 1].")
        if num_newton_schulz_steps < 1:
            raise ValueError(f"num_newton_schulz_steps={num_newton_schulz_steps} must be at least 1.")
        groups = [dict(group) if isinstance(group, dict) else group for group in groups]
        if not any(isinstance(group, dict) and "blocks" in group for group in groups):
            raise ValueError(
                "RotationMuon needs the groups of poet_param_groups(model, lr=...), which say how the rotations are "
                "cut into blocks."
            )
        given = {"momentum": momentum, "nesterov": nesterov, "alternate": alternate, "decorrelation": decorrelation}
        given = {name: value for name, value in given.items() if value is not None}
        for group in groups:
            if "blocks" in group:
                defaults = _FOLDED_EVERY_STEP if group["folds_every_step"] else _OTHERS
                group.update({**defaults, **given, **group})
                if group["decorrelation"] and not group["folds_every_step"]:
                    raise ValueError(
                        f"decorrelation={group['decorrelation']} compares the sides of a weight that has just been "
                        "folded: set merge_interval=1 in the POETConfig, or leave it out."
                    )
            if "radians" in group:
                group["lr"] = radians_of(group)
        self.process_group = process_group
        own = {"num_newton_schulz_steps": num_newton_schulz_steps}
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": 0.0, **own})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step. Returns what the closure returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_steps: dict[int, list[_Turn]] = {}
        rest = []
        for group in self.param_groups:
            if "blocks" in group:
                by_steps.setdefault(group["num_newton_schulz_steps"], []).extend(self._turns(group))
            else:
                rest.append(group)
        for num_steps, turns in by_steps.items():
            self._turn(turns, num_steps)
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

    def _turns(self, group: dict[str, Any]) -> list[_Turn]:
        """Take the gradients of a group into the momenta. Returns what is to be moved in this step."""
        trained = [
            (parameter, BlockPartition(num_rotated, num_rotated, block_size), side)
            for parameter, (num_rotated, block_size), side in zip(
                group["params"], group["blocks"], group["sides"], strict=True
            )
            if parameter.grad is not None
        ]
        if not trained:
            return []
        for parameter, *_ in trained:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros(())
        grads = [parameter.grad for parameter, *_ in trained]
        momenta = [self.state[parameter]["momentum_buffer"] for parameter, *_ in trained]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        turns = []
        for (parameter, partition, side), grad, momentum in zip(trained, grads, momenta, strict=True):
            step = self.state[parameter]["step"]
            if not group["alternate"] or _moves(side, int(step)):
                direction = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                turns.append(_Turn(parameter, partition, direction, group["lr"], group["decorrelation"]))
            step += 1
        return turns

    def _turn(self, turns: Sequence[_Turn], num_steps: int) -> None:
        by_kind: dict[_Kind, list[tuple[_Turn, Tensor]]] = {}
        for turn in turns:
            direction = at_least_fp32(full(turn.direction))
            for triangles, size in turn.partition.split(direction):
                kind = _Kind(size, direction.device, direction.dtype, self._group_of(turn.parameter))
                by_kind.setdefault(kind, []).append((turn, triangles))
        results = {}
        for kind, blocks in by_kind.items():
            directions = torch.cat([triangles for _, triangles in blocks])
            results[kind] = _orthogonalized(directions, kind, num_steps)
        _add_up(results)
        updates: dict[_Turn, list[Tensor]] = {turn: [] for turn in turns}
        for kind, blocks in by_kind.items():
            for (turn, _), update in zip(blocks, results[kind].split([len(t) for _, t in blocks]), strict=True):
                updates[turn].append(update.flatten())
        pairs = pairs_of(turn.parameter for turn in turns if turn.decorrelation)
        for turn, parts in updates.items():
            update = torch.cat(parts)
            pair = pairs.get(turn.parameter)
            other = pair and self.state.get(pair.other.weight)  # indexing would make a state for a frozen side
            if pair and other:
                update = without_overlap(update, pair, other["momentum_buffer"], turn.decorrelation)
            # A plane of singular value theta turns by 2 atan(theta).
            turn.parameter.add_(spread_like(turn.parameter, update), alpha=-turn.angle / 2)

    def _group_of(self, parameter: Tensor) -> dist.ProcessGroup | None:
        """The processes that share the orthogonalisation of a parameter out."""
        mesh = mesh_of(parameter)
        if mesh is not None:
            return mesh.get_group() if mesh.ndim == 1 else None
        if self.process_group != "world":
            return self.process_group
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def radians_of(group: dict[str, Any]) -> float:
    """The angle of a step of a group of rotations before any schedule: as asked for, and at most as its law allows."""
    return min(group["radians"], group.get("max_radians", torch.inf))


class _Kind(NamedTuple):
    """What blocks that are orthogonalised together have in common."""

    size: int
    device: torch.device
    dtype: torch.dtype
    group: dist.ProcessGroup | None


def _moves(side: SideName, step: int) -> bool:
    return (step % 2 == 0) == (side == "R")


def _orthogonalized(directions: Tensor, kind: _Kind, num_steps: int) -> Tensor:
    """The strict upper triangles (num_blocks, b (b - 1) / 2) of the orthogonalised blocks, in the same dtype.

    Where processes share them, zeros in the place of the others' blocks.
    """
    first, last = 0, len(directions)
    if kind.group is not None:
        rank, num_processes = dist.get_rank(kind.group), dist.get_world_size(kind.group)
        first, last = (len(directions) * r // num_processes for r in (rank, rank + 1))
    result = torch.zeros_like(directions)
    batch_size = blocks_at_once(kind.size, kind.device)
    for start in range(first, last, batch_size):
        batch = slice(start, min(start + batch_size, last))
        Q = skew(directions[batch], kind.size)
        result[batch] = upper_triangle(orthogonalize(Q.to(product_dtype(Q, num_steps)), num_steps))
    return result


def _add_up(results: dict[_Kind, Tensor]) -> None:
    """Give every process the blocks of all, by one sum for each group of processes."""
    shared: dict[tuple[Any, ...], list[_Kind]] = {}
    for kind in results:
        if kind.group is not None:
            shared.setdefault(kind[1:], []).append(kind)
    for (*_, group), kinds in shared.items():
        flat = torch.cat([results[kind].flatten() for kind in kinds])
        dist.all_reduce(flat, group=group)
        for kind, part in zip(kinds, flat.split([results[kind].numel() for kind in kinds]), strict=True):
            results[kind] = part.view_as(results[kind])
