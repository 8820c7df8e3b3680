"""The ways to compute a rotated linear layer, and the choice between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import effective, reference
from .input_centric import input_centric
from .sides import Side


PATHS = ("reference", "input_centric", "weight_centric", "tangent")


class PathCosts(NamedTuple):
    """What a device charges beside the flops of full matrix products, in such flops.

    `benchmarks/gpu.py` measures them on a GPU. The defaults were measured on CPUs in fp32.

    Args:
        rotating: of moving an entry of an activation through a rotation, on top of its 2 b flops.
        rotating_weight: of moving an entry of the weight through a rotation.
        gathering: of gathering an entry for an outer product.
        weight_entry: of moving an entry of the weight's gradient in and out of block order.
        block_flop: of a flop in products of blocks, which are small.
    """

    rotating: float = 700
    rotating_weight: float = 400
    gathering: float = 60
    weight_entry: float = 300
    block_flop: float = 1.4


COSTS: dict[str, PathCosts] = {}
"""By device type, such as "cuda"; `PathCosts()` where there is none."""

# At the identity the weight-centric rule keeps nothing, the tangent rule an output: it has to be worth its memory.
_WORTH_AN_OUTPUT = 0.75
# A compiled graph serves all numbers of tokens; it is chosen for this one.
_TOKENS_WHEN_COMPILED = 2048

_forced_path: str | None = None


@contextlib.contextmanager
def compute_path(path: str) -> Iterator[None]:
    """Compute all rotated layers by one path, whatever their shape.

    Args:
        path: "reference", "input_centric", "weight_centric" or "tangent". See `poet_peft.ops`.

    Raises:
        ValueError: the path is unknown.
    """
    global _forced_path
    if path not in PATHS:
        raise ValueError(f"path={path!r} is unknown; choose one of {', '.join(map(repr, PATHS))}.")
    before, _forced_path = _forced_path, path
    try:
        yield
    finally:
        _forced_path = before


def choose_path(
    x: Tensor,
    weight: Tensor,
    R: Sequence[Side],
    P: Sequence[Side],
    memory_efficient: bool = False,
    identity: bool = False,
) -> str:
    """The cheapest path by a cost model of shapes alone, so that a run that is repeated takes the same.

    Args:
        memory_efficient: whether nothing may be kept for the backward that a frozen linear layer does not keep.
        identity: whether all sides are known to be the identity, so that nothing has to be rotated.
    """
    if _forced_path is not None:
        return _forced_path
    if len(R) > 1 or len(P) > 1:
        return "input_centric"
    costs = COSTS.get(weight.device.type, PathCosts())
    out_features, in_features = weight.shape
    compiled = torch.compiler.is_compiling()
    num_tokens = _TOKENS_WHEN_COMPILED if compiled else x.numel() // in_features
    partitions = [side.partition for side in (*R, *P)]
    # The tangent rule needs the gradient by x in any case, and keeps the output, which a compiler cannot follow.
    may_use_tangent = x.requires_grad and not memory_efficient and not compiled
    gathered = [p for p in partitions if not p.is_one_block]
    outer = num_tokens * sum(2 * p.num_rotated * p.block_size for p in partitions)
    outer += num_tokens * sum(2 * p.num_rotated * costs.gathering for p in gathered)
    plain = num_tokens * out_features * in_features
    if identity:
        # Both sides' blocks of D W^T and W^T D.
        products = sum(2 * p.block_size * p.num_rotated * weight.numel() // p.dim for p in partitions)
        by_weight = 2 * plain + products + costs.weight_entry * weight.numel() * len(gathered) / len(partitions)
        return "tangent" if may_use_tangent and outer < _WORTH_AN_OUTPUT * by_weight else "weight_centric"
    by_input = num_tokens * sum(p.num_rotated * (2 * p.block_size + costs.rotating) for p in partitions)
    build = sum(
        (in_features if is_R else out_features) * p.num_rotated * (2 * p.block_size + costs.rotating_weight)
        for is_R, sides in ((True, R), (False, P))
        for p in (side.partition for side in sides)
    )
    if not torch.is_grad_enabled():
        return "weight_centric" if build < by_input else "input_centric"

    # Of multiplying all blocks by others of their size: the vjp of the map does it twice.
    products = sum(costs.block_flop * 2 * p.num_rotated * p.block_size**2 for p in partitions)
    again = 1 if memory_efficient else 0
    estimates = {
        "input_centric": (3 + again) * by_input + 2 * products + 2 * again * plain,
        "weight_centric": (3 + again) * build + 2 * products + 2 * plain + costs.weight_entry * weight.numel(),
    }
    if may_use_tangent:
        estimates["tangent"] = build + 4 * products + outer
    return min(estimates, key=estimates.__getitem__)


def poet_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    R: Sequence[Side],
    P: Sequence[Side],
    path: str,
    memory_efficient: bool = False,
    identity: bool = False,
) -> Tensor:
    """`R_n ... R_1 W P_1 ... P_n x + bias` by a path of `PATHS`: (..., in) -> (..., out).

    Args:
        x: in the dtype of the weight, or in any under autocast.
        weight: (out, in), frozen.
        R, P: the rotations of the adapters, the first adapter's first. The last two paths take one adapter.
        memory_efficient: keep nothing but the input between forward and backward.
        identity: whether all sides are known to be the identity; used by the last two paths.
    """
    if path in ("reference", "input_centric"):

        def forward(x: Tensor) -> Tensor:
            if path == "input_centric":
                return input_centric(x, weight, bias, R, P)
            return reference.poet_linear(
                x, weight, bias, *([(s.index, s.deltas()) for s in sides] for sides in (R, P))
            )

        if memory_efficient and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False)
        return forward(x)
    only_R, only_P = (sides[0] if sides else None for sides in (R, P))
    tangent = path == "tangent"
    settings = {"tangent": tangent, "memory_efficient": memory_efficient, "identity": identity}
    return effective.effective_linear(x, weight, bias, only_R, only_P, **settings)


def rotated_weight(weight: Tensor, R: Sequence[Side], P: Sequence[Side], identity: bool = False) -> Tensor:
    """`R_n ... R_1 W P_1 ... P_n` in the dtype of the weight, rounded once; differentiable by the rotations.

    For layers that do more with their weight than `W x`.

    Args:
        weight: (out, in), or a stack (num_experts, out, in); frozen.
        identity: whether all sides are known to be the identity. The result is then a view of the weight.
    """
    is_stack = weight.dim() == 3
    if _forced_path == "reference" or len(R) > 1 or len(P) > 1 or (is_stack and not identity):
        exact = weight if weight.dtype == torch.float64 else weight.float()
        pairs = ([(side.index, side.deltas()) for side in sides] for sides in (R, P))
        return reference.effective_weight(exact, *pairs).to(weight.dtype)
    only_R, only_P = (sides[0] if sides else None for sides in (R, P))
    return effective.rotated_weight(weight, only_R, only_P, identity)
