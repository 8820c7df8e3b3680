"""Measures of weights and of rotations, for looking at. Leading dimensions are always batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .spectrum import skew_norm


class SpectralChange(NamedTuple):
    """Relative changes of singular values: the largest and the median, each (...)."""

    largest: Tensor
    median: Tensor


# Weights


def spectral_change(before: Tensor, after: Tensor) -> SpectralChange:
    """`|s'_i - s_i| / s_i` of sorted singular values (..., n), each largest first."""
    change = (after - before).abs() / before.clamp_min(torch.finfo(before.dtype).tiny)
    return SpectralChange(change.amax(-1), change.quantile(0.5, dim=-1))


def svd_entropy(s: Tensor) -> Tensor:
    """`-sum p_i log(p_i) / log(n)` with `p_i = s_i^2 / sum s^2`: (..., n) -> (...), from 0 (rank 1) to 1 (all equal).

    Alter, Brown and Botstein, PNAS 97(18), 2000. A single value has entropy 0.
    """
    p = s.square() / s.square().sum(-1, keepdim=True)
    return -torch.xlogy(p, p).sum(-1) / math.log(max(s.shape[-1], 2))


def hyperspherical_energy(W: Tensor) -> Tensor:
    """The mean over pairs of rows of `1 / ||w_i - w_j||`, rows scaled to length 1: (..., m, n) -> (...).

    Liu et al., arXiv 1805.09298, with exponent 1, and the mean instead of the sum, so that layers of different sizes
    compare. Low where rows are spread evenly over the sphere: about `1 / sqrt(2)` for random rows. One row: 0.
    """
    m = W.shape[-2]
    if m < 2:
        return W.new_zeros(W.shape[:-2])
    rows = nn.functional.normalize(W, dim=-1)
    upper = torch.triu_indices(m, m, 1, device=W.device)
    gram = (rows @ rows.mT)[..., upper[0], upper[1]]
    return (2 - 2 * gram).clamp_min(torch.finfo(W.dtype).eps).rsqrt().mean(-1)


def spectral_norm(W: Tensor, num_iterations: int = 16) -> Tensor:
    """An estimate from below of the largest singular value: (..., m, n) -> (...). Power iteration, fixed start."""
    return skew_norm(W, num_iterations + 1)  # which iterates on `W^T W`, whatever W is


def rms_singular_value(W: Tensor) -> Tensor:
    """`||W||_F / sqrt(min(m, n))`, the root mean square of the singular values: (..., m, n) -> (...).

    Exact without a decomposition, and the same for `R W P` as for `W` where `R` and `P` are orthogonal.
    """
    return torch.linalg.matrix_norm(W) / min(W.shape[-2:]) ** 0.5


def stable_rank(W: Tensor, norm: Tensor) -> Tensor:
    """`||W||_F^2 / ||W||_2^2`: (..., m, n) -> (...), with `norm` (...) the largest singular value.

    Rudelson and Vershynin, arXiv math/0503442. From 1 to the rank.
    """
    return W.square().sum((-2, -1)) / norm.square().clamp_min(torch.finfo(W.dtype).tiny)


def row_rms(W: Tensor) -> Tensor:
    """The root mean square of each row: (..., m, n) -> (..., m)."""
    return W.square().mean(-1).sqrt()


# Rotations


def rotation_angles(Q: Tensor) -> Tensor:
    """The angles in radians of all planes that the Cayley transform of `Q` turns: (..., n, n) -> (..., n // 2).

    `Q` has eigenvalues `+-i theta`, and the plane of each pair turns by `2 atan(theta)`. A decomposition.
    """
    theta = torch.linalg.eigvalsh(1j * Q.to(torch.complex128 if Q.dtype == torch.float64 else torch.complex64))
    return 2 * torch.atan(theta.flip(-1)[..., : Q.shape[-1] // 2].clamp_min(0))


def rms_angle(blocks: Sequence[Tensor]) -> float:
    """`2 atan` of the root mean square `theta` of the planes of all blocks, see `rotation_angles`; radians.

    Without a decomposition, by `||Q||_F^2 = 2 sum theta^2`.

    Args:
        blocks: skew-symmetric `Q`, each (..., n, n) with an n of its own.
    """
    num_planes = sum(Q[..., 0, 0].numel() * (Q.shape[-1] // 2) for Q in blocks)
    squares = sum(float(Q.square().sum()) for Q in blocks)
    return 2 * math.atan((squares / (2 * max(num_planes, 1))) ** 0.5)


def rotation_trace(delta: Tensor) -> Tensor:
    """`trace(G) / n` of `G = I + delta`: (..., n, n) -> (...). 1 is the identity, 0 what a random rotation has.

    It is the mean of `v^T G v` over random unit vectors `v`: the vector probing of POET, arXiv 2506.08001, in
    expectation.
    """
    return 1 + delta.diagonal(dim1=-2, dim2=-1).mean(-1)
