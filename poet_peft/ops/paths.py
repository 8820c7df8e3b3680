"""The ways to compute a rotated linear layer, and the choice between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import reference
from .effective import effective_linear
from .input_centric import input_centric
from .prepared import Prepared, RotationParameters, only


PATHS = ("reference", "input_centric", "weight_centric", "tangent")

# Measured on CPUs in fp32, in flops: what moving an entry through a rotation costs on top of its 2 b flops, what
# gathering one for an outer product costs, and what moving an entry of the weight in and out of the basis costs.
_COST_OF_ROTATING = 700
_COST_OF_ROTATING_WEIGHT = 400
_COST_OF_GATHERING = 60
_COST_OF_WEIGHT_ENTRY = 300

_COST_OF_BLOCK_FLOP = 1.4  # small products are slower, and come with a pass over their matrices
_TOKENS_OF_A_STEP = 2048

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
    R: Sequence[RotationParameters],
    P: Sequence[RotationParameters],
    keeps_weight: bool,
    memory_efficient: bool = False,
) -> str:
    """The cheapest path by a cost model of shapes alone, so that a run that is repeated takes the same.

    Args:
        keeps_weight: whether the effective weight, once built, serves further calls.
        memory_efficient: whether nothing may be kept for the backward that a frozen linear layer does not keep.
    """
    if len(R) > 1 or len(P) > 1:
        return "reference"
    if _forced_path is not None:
        return _forced_path
    out_features, in_features = weight.shape
    num_tokens = x.numel() // in_features
    by_input = num_tokens * sum(_cost_per_vector(rotation, _COST_OF_ROTATING) for rotation in (*R, *P))
    rotate_R, rotate_P = (sum(_cost_per_vector(r, _COST_OF_ROTATING_WEIGHT) for r in side) for side in (R, P))
    build = in_features * rotate_R + out_features * rotate_P
    if not torch.is_grad_enabled():
        return "weight_centric" if keeps_weight or build < by_input else "input_centric"

    products = sum(map(_cost_of_product, (*R, *P)))
    # What is kept serves all micro-batches of a step, and small ones are seldom alone.
    share = min(max(num_tokens / _TOKENS_OF_A_STEP, 0.5), 1) if keeps_weight else 1
    forward_again = 1 if memory_efficient else 0
    plain = num_tokens * out_features * in_features
    costs = {
        "input_centric": (3 + forward_again) * by_input + 6 * products + 2 * forward_again * plain,
        "weight_centric": (share + forward_again) * (build + 2 * products)
        + (2 * build + 4 * products)
        + (2 * plain + _COST_OF_WEIGHT_ENTRY * out_features * in_features),
    }
    # The tangent rule looks at numbers, which a compiler cannot trace; and it needs the gradient by x in any case.
    if x.requires_grad and not memory_efficient and not torch.compiler.is_compiling():
        outer = num_tokens * sum(map(_cost_of_outer_product, (*R, *P)))
        costs["tangent"] = share * (build + 6 * products) + 5 * products + outer
    return min(costs, key=costs.get)


def _cost_per_vector(rotation: RotationParameters, cost_of_moving: int) -> int:
    """Of one rotation of a vector."""
    partition = rotation.block_map.partition
    return partition.num_rotated * (2 * partition.block_size + cost_of_moving)


def _cost_of_outer_product(rotation: RotationParameters) -> int:
    """Of one token's share of the block outer products."""
    partition = rotation.block_map.partition
    return partition.num_rotated * (2 * partition.block_size + 2 * _COST_OF_GATHERING)


def _cost_of_product(rotation: RotationParameters) -> float:
    """Of multiplying all blocks by others of their size, as the map and its pull-back do a few times."""
    partition = rotation.block_map.partition
    return _COST_OF_BLOCK_FLOP * 2 * partition.num_rotated * partition.block_size**2


def poet_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    R: Sequence[RotationParameters],
    P: Sequence[RotationParameters],
    path: str,
    memory_efficient: bool = False,
    prepared: Prepared | None = None,
) -> Tensor:
    """`reference.poet_linear` by a path of `PATHS`.

    Args:
        x: (..., in), in the dtype of the weight, or in any under autocast.
        weight: (out, in), frozen.
        memory_efficient: keep nothing but the input between forward and backward.
        prepared: for the last two paths, what `prepare` gives, if it is at hand.
    """
    if path in ("reference", "input_centric"):
        linear = reference.poet_linear if path == "reference" else input_centric

        def forward(x: Tensor) -> Tensor:
            return linear(x, weight, bias, [r.tensors() for r in R], [p.tensors() for p in P])

        if memory_efficient and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False)
        return forward(x)
    return effective_linear(
        x,
        weight,
        bias,
        only(R),
        only(P),
        tangent=path == "tangent",
        memory_efficient=memory_efficient,
        prepared=prepared,
    )
