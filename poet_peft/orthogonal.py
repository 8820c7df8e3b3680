r"""Maps from skew-symmetric to (nearly) orthogonal matrices. Leading dimensions are always batch.

Notation: `Q` is skew-symmetric (`Q^T = -Q`), `theta = ||Q||_2` its largest singular value, `G` its image. `Q` turns
each of its invariant planes by `2 atan(theta_i)` radians, so all of them by at most `2 atan(theta)`.

Every map has an `_offset` form that returns `G - I`. It is what the layers use: near the identity `x + (G - I) x`
keeps digits that `G x` rounds away in low precision.
"""

from __future__ import annotations

import torch
from torch import Tensor


def skew(upper: Tensor, n: int) -> Tensor:
    """Skew-symmetric matrices (..., n, n) from their strict upper triangles (..., n (n - 1) / 2), row-major."""
    if upper.shape[-1] != n * (n - 1) // 2:
        raise ValueError(f"a skew-symmetric {n} x {n} matrix has {n * (n - 1) // 2} parameters, got {upper.shape[-1]}")
    rows, columns = torch.triu_indices(n, n, offset=1, device=upper.device)
    Q = upper.new_zeros(*upper.shape[:-1], n * n).index_copy(-1, rows * n + columns, upper).unflatten(-1, (n, n))
    return Q - Q.mT


def upper_triangle(Q: Tensor) -> Tensor:
    """The strict upper triangles (..., n (n - 1) / 2), row-major, of matrices (..., n, n): the inverse of `skew`."""
    n = Q.shape[-1]
    rows, columns = torch.triu_indices(n, n, offset=1, device=Q.device)
    return Q.flatten(-2).index_select(-1, rows * n + columns)


def orthogonalize(Q: Tensor, num_steps: int = 5) -> Tensor:
    """`Q` with its singular values brought to about 1, within 0.68 and 1.21, by a Newton-Schulz iteration of order 5.

    A skew-symmetric `Q` stays skew-symmetric: all of its planes then turn by about the same angle. Singular values
    below about 1e-3 of the Frobenius norm need more steps, and a matrix of zeros stays zero. The coefficients are
    those of Muon (Keller Jordan, 2024, kellerjordan.github.io/posts/muon).

    Args:
        Q: shape (..., n, n).
    """
    tiny = torch.finfo(Q.dtype).tiny
    X = Q / Q.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)  # or the squares of a norm could underflow
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(tiny)
    for _ in range(num_steps):
        gram = X @ X.mT
        X = 3.4445 * X + (-4.7750 * gram + 2.0315 * gram @ gram) @ X
    return X


def cayley(Q: Tensor) -> Tensor:
    """The Cayley map `(I + Q) (I - Q)^-1`: orthogonal for `Q` of any size, to rounding of about `eps (1 + theta)`.

    Args:
        Q: skew-symmetric, shape (..., n, n).
    """
    return _add_identity(cayley_offset(Q))


def cayley_offset(Q: Tensor) -> Tensor:
    """`cayley(Q) - I = 2 Q (I - Q)^-1`, shape (..., n, n)."""
    # Q and (I - Q)^-1 commute, so the solve from the left is the product from the right.
    return torch.linalg.solve(_add_identity(-Q), 2 * Q)


def cayley_neumann(Q: Tensor, num_terms: int = 3) -> Tensor:
    """The Cayley map with its inverse cut to a Neumann series: `(I + Q) (I + Q + ... + Q^k)`, `k = num_terms`.

    Not exactly orthogonal: `G = (I - Q^(k+1)) cayley(Q)`, so for `theta < 1` the singular values of `G` lie within
    `theta^(k+1)` of 1. For odd `k` the orthogonal matrix next to `G` is `cayley(Q)`. POET, arXiv 2506.08001, sec. 3.3.

    Args:
        Q: skew-symmetric, shape (..., n, n).
        num_terms: `k >= 1`, the highest power of the series; 3 in the paper.
    """
    return _add_identity(cayley_neumann_offset(Q, num_terms))


def cayley_neumann_offset(Q: Tensor, num_terms: int = 3) -> Tensor:
    """`cayley_neumann(Q, num_terms) - I = 2 Q + ... + 2 Q^k + Q^(k+1)`, shape (..., n, n)."""
    if num_terms < 1:
        raise ValueError(f"num_terms must be at least 1, got {num_terms}")
    Q2 = Q @ Q
    if num_terms == 1:
        return 2 * Q + Q2
    if num_terms == 3:
        return 2 * Q + 2 * Q2 + Q2 @ (2 * Q + Q2)
    if (num_terms + 1) & num_terms == 0:
        # k = 2^j - 1: (I + Q)^2 (I + Q^2) (I + Q^4) ... (I + Q^((k+1)/2)), two products for each doubling.
        offset, power, exponent = 2 * Q + Q2, Q2, 2
        while exponent < num_terms:
            offset = offset + power + offset @ power
            exponent *= 2
            if exponent < num_terms:
                power = power @ power
        return offset
    inner = 2 * Q + Q2
    for _ in range(num_terms - 1):
        inner = 2 * Q + Q @ inner
    return inner


def cayley_pull_back(offset: Tensor, grad: Tensor) -> Tensor:
    """The gradient by the strict upper triangles of `Q` from that by `G = cayley(Q)`: (..., n (n - 1) / 2).

    `dL/dQ = 2 K^T (dL/dG) K^T` with `K = (I - Q)^-1 = I + (G - I) / 2`: no solve.

    Args:
        offset: `G - I`, shape (..., n, n).
        grad: `dL/dG`, shape (..., n, n).
    """
    K = _add_identity(offset / 2)
    return _skew_gradient(2 * (K.mT @ grad @ K.mT))


def cayley_neumann_pull_back(Q: Tensor, grad: Tensor, num_terms: int = 3) -> Tensor:
    """The gradient by the strict upper triangles of `Q` from that by `G = cayley_neumann(Q, num_terms)`.

    Four products for `num_terms = 3`, one for 1: powers of a skew-symmetric matrix are their own transposes up to
    sign, and of `S Q + Q S` with a symmetric `S` only one half has to be computed.

    Args:
        Q: skew-symmetric, shape (batch, n, n).
        grad: `dL/dG`, shape (batch, n, n).

    Returns:
        shape (batch, n (n - 1) / 2).
    """
    if num_terms == 1:
        return _skew_gradient(torch.baddbmm(grad, grad + grad.mT, Q, beta=2, alpha=-1))
    if num_terms == 3:
        Q2 = Q @ Q
        inner = Q2 @ grad
        through_Q2 = torch.baddbmm(inner, grad, Q2 - 2 * Q).add_(grad, alpha=2)
        inner += grad
        return _skew_gradient(torch.baddbmm(inner, through_Q2 + through_Q2.mT, Q, beta=2, alpha=-1))
    # The recurrence inner_k = 2 Q + Q inner_(k-1), inner_0 = Q, backwards.
    inners = [Q]
    for _ in range(num_terms):
        inners.append(2 * Q + Q @ inners[-1])
    direct = torch.zeros_like(Q)
    for inner in reversed(inners[:-1]):
        direct = direct + 2 * grad + grad @ inner.mT
        grad = -(Q @ grad)
    return _skew_gradient(direct + grad)


def _skew_gradient(grad: Tensor) -> Tensor:
    """The gradient by the strict upper triangle of a skew-symmetric matrix from that by all its entries."""
    n = grad.shape[-1]
    rows, columns = torch.triu_indices(n, n, offset=1, device=grad.device, dtype=torch.int32)
    flat = grad.flatten(-2)
    return flat.index_select(-1, rows * n + columns) - flat.index_select(-1, columns * n + rows)


def inverse_transpose_offset(offset: Tensor) -> tuple[Tensor, Tensor]:
    """`G^-T - I` of a nearly orthogonal `G`, from `G - I`, and a bound of its error over the batch.

    `G^-T = G (I + E)^-1` with `E = G^T G - I`, and the inverse as its Neumann series to `E^3`: the error is about
    `||E||_2^4 <= ||E^2||_F^2`. Shapes (batch, n, n) and ().
    """
    E = torch.baddbmm(offset + offset.mT, offset.mT, offset)
    E2 = E @ E
    series = torch.baddbmm(E2 - E, E2, E, alpha=-1)
    error = E2.square().sum((-2, -1)).amax()
    return torch.baddbmm(series, offset, series).add_(offset), error


def orthogonality_error(G: Tensor) -> Tensor:
    """The largest entry of `|G^T G - I|` over all matrices of the batch, a scalar."""
    if G.numel() == 0:
        return G.new_zeros(())
    return _add_identity(-(G.mT @ G)).abs().amax()


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


def _add_identity(X: Tensor) -> Tensor:
    return X + torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
