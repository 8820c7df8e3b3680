"""How far rotations turn: from their blocks alone, and against one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..maths.spectrum import skew_norm
from .saved import SavedSide


_NUM_ITERATIONS = 60


class Turn(NamedTuple):
    """Angles in radians: of the most-turned plane, and the root of the mean square over the features."""

    largest: float
    rms: float


def turn(side: SavedSide) -> Turn:
    """How far a rotation turns what it rotates."""
    return _turn(side.deltas, side.index.numel())


def turn_between(one: SavedSide, other: SavedSide) -> Turn:
    """How far `R^T S` turns, the rotation from `one` to `other`, over the features that either rotates.

    For orthogonal `R` and `S` the distance `||R^T S - I||` is `||S - R||`, in any norm that rotations leave alone.
    """
    if _same_blocks(one, other):
        deltas = [b - a for a, b in zip(one.deltas, other.deltas, strict=True)]
        return _turn(deltas, one.index.numel())
    dim = 1 + int(max(one.index.max(), other.index.max()))
    difference = (_embedded(other, dim) - _embedded(one, dim)).coalesce()
    num_rotated = torch.cat([one.index, other.index]).unique().numel()
    return Turn(_angle(_sparse_norm(difference)), _angle(_root_mean(float(difference.values().norm()), num_rotated)))


def _turn(deltas: Sequence[Tensor], num_features: int) -> Turn:
    """Of `G` from `G - I`: a plane turned by an angle has two singular values `2 sin(angle / 2)` in it."""
    largest = max(float(skew_norm(delta, _NUM_ITERATIONS).amax()) for delta in deltas)
    frobenius = math.sqrt(sum(float(delta.square().sum()) for delta in deltas))
    return Turn(_angle(largest), _angle(_root_mean(frobenius, num_features)))


def _angle(chord: float) -> float:
    return 2 * math.asin(min(1.0, chord / 2))


def _root_mean(frobenius: float, num_features: int) -> float:
    return frobenius / math.sqrt(num_features)


def _same_blocks(one: SavedSide, other: SavedSide) -> bool:
    return torch.equal(one.index, other.index) and [x.shape for x in one.deltas] == [x.shape for x in other.deltas]


def _embedded(side: SavedSide, dim: int) -> Tensor:
    """`R - I` as a sparse matrix (dim, dim)."""
    rows, columns, values = [], [], []
    start = 0
    for delta in side.deltas:
        num_blocks, b, _ = delta.shape
        features = side.index[start : start + num_blocks * b].long().view(num_blocks, b)
        rows.append(features[:, :, None].expand_as(delta).flatten())
        columns.append(features[:, None, :].expand_as(delta).flatten())
        values.append(delta.flatten())
        start += num_blocks * b
    indices = torch.stack([torch.cat(rows), torch.cat(columns)])
    return torch.sparse_coo_tensor(indices, torch.cat(values), (dim, dim), check_invariants=True)


def _sparse_norm(matrix: Tensor) -> float:
    """The largest singular value of a sparse matrix, from below, by power iteration as in `skew_norm`."""
    v = torch.cos(torch.arange(1, matrix.shape[1] + 1, dtype=matrix.dtype) ** 2)[:, None]
    norm = 0.0
    transposed = matrix.t().coalesce()
    for _ in range(_NUM_ITERATIONS):
        v = v / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
        w = matrix @ v
        norm = float(w.norm())
        v = transposed @ w
    return norm
