"""Values computed from parameters once and kept until a parameter may have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .ops import reference
from .ops.prepared import Prepared, RotationParameters, effective_weight, only, prepare, prepare_sides


_num_optimizer_steps = 0
_hook_is_registered = False
_SAMPLE_SIZE = 1024


def _count_optimizer_step(*_: Any) -> None:
    global _num_optimizer_steps
    _num_optimizer_steps += 1


class _Source(NamedTuple):
    """A parameter as it was when a value was computed from it."""

    alias: Tensor
    version: int
    sample: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Source:
        # The alias keeps the memory from being given to another tensor, which would then have the same address.
        return cls(tensor.detach(), tensor._version, _sample(tensor))

    def is_still(self, tensor: Tensor) -> bool:
        alias = self.alias
        return (
            tensor.data_ptr() == alias.data_ptr()
            and (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            == (alias.shape, alias.stride(), alias.dtype, alias.device)
            and tensor._version == self.version
            and (self.sample is None or torch.equal(_sample(tensor), self.sample))
        )


def _sample(tensor: Tensor) -> Tensor | None:
    """Some entries of a tensor, as a copy, on devices where looking at them does not make the program wait."""
    if tensor.device.type != "cpu":
        return None
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().mT.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE_SIZE)].clone()


class ParameterCache:
    """Values that are functions of some tensors and of comparable settings.

    They are given out again only as long as

    - no `torch.optim` optimizer has made a step, in the whole process,
    - the tensors are the same memory in the same layout, and their version counters have not moved: `load_state_dict`,
      `copy_`, `mul_` and all other in-place operations move them,
    - on CPUs, a sample of their entries is the same, since assignments through `.data` move no counter,
    - `clear` was not called.

    Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self._values: Values | None = None

    def clear(self) -> None:
        """Forget everything, and free the memory."""
        self._values = None

    def values(self, sources: Sequence[Tensor], settings: Any) -> Values:
        """The values that belong to tensors and settings: those from before, or none where they may have changed."""
        # One local name throughout: another thread may exchange the cache's at any time.
        values = self._values
        if values is None or not values.are_fresh(sources, settings):
            self._values = None  # frees the memory before it is needed again
            _register_hook()
            self._values = values = Values(sources, settings)
        return values

    def __deepcopy__(self, memo: dict[int, Any]) -> ParameterCache:
        return type(self)()

    def __reduce__(self) -> tuple[type[ParameterCache], tuple[()]]:
        return type(self), ()


class RotationCache(ParameterCache):
    """What is computed of a layer's rotations once an optimizer step.

    Rotations are those of the active adapters, by side, the first adapter's first. The weight has shape (out, in).
    """

    def effective_weight(
        self, weight: Tensor, R: Sequence[RotationParameters], P: Sequence[RotationParameters]
    ) -> Tensor:
        """`R_n ... R_1 W P_1 ... P_n`."""

        def compute() -> Tensor:
            if len(R) > 1 or len(P) > 1:
                return reference.effective_weight(weight, [r.tensors() for r in R], [p.tensors() for p in P])
            return prepare(weight, only(R), only(P), with_inverses=False).weight

        return self._rotation_values(weight, R, P).get("effective", compute)

    def preparation(
        self, weight: Tensor, R: Sequence[RotationParameters], P: Sequence[RotationParameters], with_inverses: bool
    ) -> Prepared:
        """Of one adapter, for a forward that may be followed by a backward."""
        uppers = [rotation.upper for rotation in (*R, *P) if rotation.upper.requires_grad]
        is_in_backward = torch._C._current_graph_task_id() != -1
        if uppers and not is_in_backward and not any(upper.is_leaf and upper.grad is not None for upper in uppers):
            # The first micro-batch of a step. An optimizer that is not one of torch's leaves no other trace.
            self.clear()
        values = self._rotation_values(weight, R, P)
        sides = values.get(
            f"sides, {with_inverses=}",
            lambda: prepare_sides(weight, only(R), only(P), with_inverses),
        )
        return Prepared(*sides, values.get("effective", lambda: effective_weight(weight, *sides)))

    def _rotation_values(
        self, weight: Tensor, R: Sequence[RotationParameters], P: Sequence[RotationParameters]
    ) -> Values:
        rotations = (*R, *P)
        sources = [weight, *(tensor for rotation in rotations for tensor in (rotation.upper, rotation.index))]
        return self.values(sources, (len(R), [rotation.block_map for rotation in rotations]))


class Values:
    """Named values computed from the same state of the same tensors."""

    def __init__(self, sources: Sequence[Tensor], settings: Any) -> None:
        self._sources = [_Source.of(tensor) for tensor in sources]
        self._settings = settings
        self._num_steps = _num_optimizer_steps
        self._by_name: dict[str, Any] = {}

    def are_fresh(self, sources: Sequence[Tensor], settings: Any) -> bool:
        return (
            self._num_steps == _num_optimizer_steps
            and self._settings == settings
            and len(self._sources) == len(sources)
            and all(source.is_still(tensor) for source, tensor in zip(self._sources, sources, strict=True))
        )

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value of that name, computed if it is not there."""
        if name not in self._by_name:
            # A tensor made in inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                self._by_name[name] = compute()
        return self._by_name[name]


def _register_hook() -> None:
    global _hook_is_registered
    if not _hook_is_registered:
        register_optimizer_step_post_hook(_count_optimizer_step)
        _hook_is_registered = True
