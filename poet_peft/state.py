"""What an adapter remembers of a layer beside its rotations: `AdapterState`, which its files hold, and `Probes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .maths.blocks import SideName
from .maths.orthogonal import Cayley, OrthogonalMap
from .weights.layout import WeightLayout


class AdapterState(NamedTuple):
    """A named view of the int64 tensor `poet_state`.

    Args:
        seed: that index tensors are drawn from.
        num_reinits: reinitialisations so far, which index tensors are drawn for.
        num_folds: folds so far.
        num_steps: optimizer steps so far.
        num_terms: of the Cayley-Neumann series that the adapter is trained with; 0 = the exact Cayley map.
        adaptive_terms: 1 if the series gets more terms where it needs them, else 0.
        block_size_R, block_size_P: of the sides; 0 where a side has no rotation.
        layout: a `WeightLayout`, of the base weight.
    """

    seed: int
    num_reinits: int = 0
    num_folds: int = 0
    num_steps: int = 0
    num_terms: int = 0
    adaptive_terms: int = 0
    block_size_R: int = 0
    block_size_P: int = 0
    layout: int = WeightLayout.MATRIX

    @classmethod
    def at_start(
        cls, seed: int, orthogonal_map: OrthogonalMap, block_sizes: dict[str, int], layout: WeightLayout
    ) -> AdapterState:
        """Of an adapter that was never trained, with the block sizes of its sides by name."""
        fixed = {f"block_size_{side}": size for side, size in block_sizes.items()} | {"layout": int(layout)}
        if isinstance(orthogonal_map, Cayley):
            return cls(seed, **fixed)
        return cls(seed, num_terms=orthogonal_map.num_terms, adaptive_terms=int(orthogonal_map.adaptive), **fixed)

    @classmethod
    def of(cls, tensor: Tensor) -> AdapterState:
        return cls(*tensor.tolist())

    def tensor(self) -> Tensor:
        return torch.tensor(self, dtype=torch.int64)


class AdapterStates:
    """The part of a rotated layer that reads and advances the states of its adapters."""

    def state_at_start(self, adapter_name: str) -> AdapterState:
        """The state of the adapter before it was trained."""
        config = self.poet_config[adapter_name]
        block_sizes = {rotation.side: rotation.partition.block_size for rotation in self.rotations(adapter_name)}
        return AdapterState.at_start(config.seed, config.map, block_sizes, self.weight_layout)

    def state(self, adapter_name: str) -> AdapterState:
        """The adapter's state. Read from the device only when its tensor was written by somebody else."""
        tensor = self.poet_state[adapter_name]
        if tensor.is_inference():
            return AdapterState.of(tensor)
        known = self._states.get(adapter_name)
        if known is None or known[0] is not tensor or known[1] != tensor._version:
            known = self._states[adapter_name] = (tensor, tensor._version, AdapterState.of(tensor))
        return known[2]

    def advance(self, adapter_name: str, **counters: int) -> AdapterState:
        """Add to counters of the adapter's state, such as `num_steps=1`. Returns the new state."""
        state = self.state(adapter_name)
        tensor = self.poet_state[adapter_name]
        for name, number in counters.items():
            tensor[AdapterState._fields.index(name)] += number
        state = state._replace(**{name: getattr(state, name) + number for name, number in counters.items()})
        self._states[adapter_name] = (tensor, tensor._version, state)
        return state


@dataclass
class Probes:
    """What an adapter's folds so far have made of the fixed vectors of `probing`.

    Attributes:
        turned: by side, (num_vectors, dim), fp32.
        num_folds: those that are in it. Where the adapter's state has another number, the vectors belong to another
            training and are of no use.
    """

    turned: dict[SideName, Tensor]
    num_folds: int = 0
