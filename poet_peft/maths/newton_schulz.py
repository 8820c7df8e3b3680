r"""Skew-symmetric matrices with all singular values brought to about 1, by matrix products alone.

A Newton-Schulz step of order 5 takes every singular value `s` of `X` to `p(s) = a s + b s^3 + c s^5`:
`X <- X (a I - b X^2 + c X^4)`, since `X X^T = -X^2` of a skew-symmetric matrix. Three products a step.

The coefficients of step after step are minimax: each polynomial comes as near to 1 as one of order 5 can on the
interval that the step before it left, which makes their composition the best there is (Amsel et al., "The Polar
Express", arXiv 2505.16932). They are computed here, by Remez's exchange, for the number of steps that is asked for.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


Coefficients = tuple[float, float, float]

_ERROR = 0.25
# Beyond their interval the polynomials grow without bound: room for the rounding of products, also in 16 bits.
_MARGIN = 1.02
_SMALLEST_IN_16_BITS = 64
_MOST_STEPS_IN_16_BITS = 5


def orthogonalize(Q: Tensor, num_steps: int = 3) -> Tensor:
    """`Q` with its singular values brought to within 0.25 of 1, so that all of its planes turn by about one angle.

    That holds for singular values above 1.2e-2 of the largest one in 3 steps, 2.8e-3 in 4 and 6.6e-4 in 5; smaller
    ones end below. A matrix of zeros stays zero.

    Args:
        Q: skew-symmetric, shape (num_blocks, n, n), of any size. The products are in its dtype.
        num_steps: at least 1.
    """
    tiny = torch.finfo(torch.float32).tiny
    X = Q / _norms(Q, torch.inf).clamp_min(tiny).to(Q.dtype)  # or the squares of a norm could underflow
    square = X @ X
    # Singular values of a skew-symmetric matrix come in pairs, so the sum of their fourth powers is at least twice
    # that of the largest. It is at least 1 where the largest entry of X is, so anywhere but for zeros.
    bound = (_norms(square, 2) / 2**0.5).clamp_min(0.5).sqrt().to(Q.dtype)
    X /= bound
    square /= bound.square()
    for step, (a, b, c) in enumerate(minimax_coefficients(num_steps)):
        if step:
            square = X @ X
        factor = torch.baddbmm(square, square, square, beta=-b, alpha=c)
        X = torch.baddbmm(X, X, factor, beta=a)
    return X


def _norms(X: Tensor, order: float) -> Tensor:
    """Of the entries of each matrix, (num_blocks, 1, 1), in fp32 at least."""
    dtype = torch.promote_types(X.dtype, torch.float32)
    return torch.linalg.vector_norm(X.flatten(1), ord=order, dim=1, dtype=dtype)[:, None, None]


def product_dtype(Q: Tensor, num_steps: int) -> torch.dtype:
    """The dtype in which to orthogonalise `Q` (..., n, n): bfloat16 instead of fp32 where that is faster.

    That is where the device has instructions for it, and blocks are large enough for products to take the time. More
    than five steps bring up singular values that are smaller than its rounding.
    """
    if Q.dtype != torch.float32 or Q.shape[-1] < _SMALLEST_IN_16_BITS or num_steps > _MOST_STEPS_IN_16_BITS:
        return Q.dtype
    return torch.bfloat16 if has_bfloat16_products(Q.device) else torch.float32


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16 matrices."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@lru_cache
def minimax_coefficients(num_steps: int) -> tuple[Coefficients, ...]:
    """The coefficients `(a, b, c)` of each step, for the widest interval [l, 1] that so many steps take to within 0.25
    of 1."""
    low, high = 1e-8, 0.25
    for _ in range(60):
        middle = (low * high) ** 0.5
        if _composition(middle, num_steps)[1] > _ERROR:
            low = middle
        else:
            high = middle
    return _composition(high, num_steps)[0]


def _composition(smallest: float, num_steps: int) -> tuple[tuple[Coefficients, ...], float]:
    steps = []
    low, high = smallest, 1.0
    for _ in range(num_steps):
        coefficients, error = _minimax(low, _MARGIN * high)
        steps.append(coefficients)
        low, high = 1 - error, 1 + error
    return tuple(steps), 1 - low


def _minimax(low: float, high: float) -> tuple[Coefficients, float]:
    """The odd polynomial of order 5 that is nearest to 1 on [low, high], and its largest error there."""
    points = low + (high - low) * np.array([0, 0.25, 0.75, 1])
    for _ in range(50):
        signs = (-1.0) ** np.arange(4)
        a, b, c, error = np.linalg.solve(np.stack([points, points**3, points**5, signs], axis=1), np.ones(4))
        # Where the derivative a + 3 b s^2 + 5 c s^4 is zero.
        roots = np.sort(np.roots([5 * c, 3 * b, a]).real.clip(low**2, high**2)) ** 0.5
        exchanged = np.array([low, *roots, high])
        if np.abs(exchanged - points).max() < 1e-12:
            break
        points = exchanged
    return (float(a), float(b), float(c)), abs(float(error))
