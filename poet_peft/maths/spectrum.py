"""Measures of skew-symmetric and nearly orthogonal matrices. Leading dimensions are always batch."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonality_error(G: Tensor) -> Tensor:
    """The largest entry of `|G^T G - I|` over all matrices of the batch, a scalar."""
    if G.numel() == 0:
        return G.new_zeros(())
    return (torch.eye(G.shape[-1], dtype=G.dtype, device=G.device) - G.mT @ G).abs().amax()


def skew_norm(Q: Tensor, num_iterations: int = 24) -> Tensor:
    """An estimate from below of the largest singular value `theta` of skew-symmetric matrices: (..., n, n) -> (...).

    Power iteration on `Q^T Q` from a fixed start, within a few percent after the default number of steps. Costs
    `4 n^2` flops a step, where an SVD costs about `10 n^3`.
    """
    n = Q.shape[-1]
    # No simple pattern of a matrix is orthogonal to this start, and it is the same on every process.
    v = torch.cos(torch.arange(1, n + 1, device=Q.device, dtype=Q.dtype) ** 2).expand(*Q.shape[:-2], n).unsqueeze(-1)
    norm = Q.new_zeros(Q.shape[:-2])
    for _ in range(num_iterations):
        v = v / _frobenius_norm(v)
        w = Q @ v
        norm = torch.linalg.vector_norm(w, dim=(-2, -1))
        v = Q.mT @ w
    return norm


def spectrum_bound(G: Tensor) -> Tensor:
    """A bound `e` such that all singular values of `G` lie in `[sqrt(1 - e), sqrt(1 + e)]`: (..., n, n) -> (...).

    `||E||_2 <= ||E^16||_F^(1/16)` for the symmetric `E = G^T G - I`; too large by a factor of `n^(1/32)` at most, 1.2
    for n = 256. Four products, no decomposition.
    """
    E = G.mT @ G - torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    scale = _frobenius_norm(E)
    E = E / scale
    for _ in range(4):
        E = E @ E
    return (scale * _frobenius_norm(E) ** (1 / 16)).squeeze((-2, -1))


def _frobenius_norm(X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
