r"""Maps from skew-symmetric to (nearly) orthogonal matrices. Leading dimensions are always batch.

Notation: `Q` is skew-symmetric (`Q^T = -Q`), `theta = ||Q||_2` its largest singular value, `G` its image. `Q` turns
each of its invariant planes by `2 atan(theta_i)` radians, so all of them by at most `2 atan(theta)`.

Every map has a `_delta` form that returns `G - I`. It is what the layers use: near the identity `x + (G - I) x`
keeps digits that `G x` rounds away in low precision.

What layers compute with is a map as an object, `Cayley()` or `CayleyNeumann(k)`, which knows its own gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn


# What is taken for rounding, in units of the dtype's eps: 1e-6 in fp32.
_ROUNDING = 8
# A series longer than this costs more than the solve that it would replace.
_MOST_TERMS = 63
# Positions of the entries of a matrix are kept up to this size: 8 MB for the largest.
_LARGEST_KEPT = 1024


def skew(upper: Tensor, n: int) -> Tensor:
    """Skew-symmetric matrices (..., n, n) from their strict upper triangles (..., n (n - 1) / 2), row-major."""
    if upper.shape[-1] != n * (n - 1) // 2:
        raise ValueError(f"a skew-symmetric {n} x {n} matrix has {n * (n - 1) // 2} parameters, got {upper.shape[-1]}")
    entries = _entries(n, upper)
    if torch.compiler.is_compiling() or (upper.requires_grad and torch.is_grad_enabled()):
        # The gradient of a scatter is a gather; that of a gather would be a sum, entry by entry.
        scattered = upper.new_zeros(*upper.shape[:-1], n * n).index_copy(-1, entries.upper.long(), upper)
        Q = scattered.unflatten(-1, (n, n))
        return Q - Q.mT
    values = torch.cat([upper, -upper, upper.new_zeros(*upper.shape[:-1], 1)], dim=-1)
    return values.index_select(-1, entries.source).unflatten(-1, (n, n))


def upper_triangle(Q: Tensor) -> Tensor:
    """The strict upper triangles (..., n (n - 1) / 2), row-major, of matrices (..., n, n): the inverse of `skew`."""
    return Q.flatten(-2).index_select(-1, _entries(Q.shape[-1], Q).upper)


class _Entries(NamedTuple):
    """Where entries of an n x n matrix stand in it, flat and row-major.

    Args:
        upper: those of the strict upper triangle.
        lower: those that `upper` are in the transpose.
        source: of every entry of a skew-symmetric matrix, its place in the upper triangle, the same negated, and a
            zero, one after the other.
    """

    upper: Tensor
    lower: Tensor
    source: Tensor


def _entries(n: int, like: Tensor) -> _Entries:
    # What is computed while a graph is traced or captured must not outlive that.
    is_plain = type(like) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    is_captured = like.is_cuda and torch.cuda.is_current_stream_capturing()
    if n > _LARGEST_KEPT or not is_plain or is_captured:
        return _computed_entries(n, like.device)
    return _kept_entries(n, like.device)


@lru_cache(maxsize=16)
def _kept_entries(n: int, device: torch.device) -> _Entries:
    # A tensor made in inference mode could not be used in training later, and only a copy from the CPU is there for
    # all streams of the device.
    with torch.inference_mode(False):
        return _Entries(*(positions.to(device) for positions in _computed_entries(n, torch.device("cpu"))))


def _computed_entries(n: int, device: torch.device) -> _Entries:
    dtype = torch.int32 if n * n < 2**31 else torch.int64
    rows, columns = torch.triu_indices(n, n, offset=1, device=device, dtype=dtype)
    upper, lower = rows * n + columns, columns * n + rows
    places = torch.arange(len(upper), device=device, dtype=dtype)
    source = torch.full((n * n,), 2 * len(upper), device=device, dtype=dtype)
    source = source.index_copy(0, upper.long(), places).index_copy(0, lower.long(), places + len(upper))
    return _Entries(upper, lower, source)


def cayley(Q: Tensor) -> Tensor:
    """The Cayley map `(I + Q) (I - Q)^-1`: orthogonal for `Q` of any size, to rounding of about `eps (1 + theta)`.

    Args:
        Q: skew-symmetric, shape (..., n, n).
    """
    return _add_identity(cayley_delta(Q))


def cayley_delta(Q: Tensor) -> Tensor:
    """`cayley(Q) - I = 2 Q (I - Q)^-1`, shape (..., n, n)."""
    # Q and (I - Q)^-1 commute, so the solve from the left is the product from the right.
    # Without a check of the result: what is not finite is for the caller to see.
    return torch.linalg.solve_ex(_add_identity(-Q), 2 * Q)[0]


def cayley_neumann(Q: Tensor, num_terms: int = 3) -> Tensor:
    """The Cayley map with its inverse cut to a Neumann series: `(I + Q) (I + Q + ... + Q^k)`, `k = num_terms`.

    Not exactly orthogonal: `G = (I - Q^(k+1)) cayley(Q)`, so for `theta < 1` the singular values of `G` lie within
    `theta^(k+1)` of 1. For odd `k` the orthogonal matrix next to `G` is `cayley(Q)`. POET, arXiv 2506.08001, sec. 3.2.

    Args:
        Q: skew-symmetric, shape (..., n, n).
        num_terms: `k >= 1`, the highest power of the series; 3 in the paper.
    """
    return _add_identity(cayley_neumann_delta(Q, num_terms))


def cayley_neumann_delta(Q: Tensor, num_terms: int = 3) -> Tensor:
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
        delta, power, exponent = 2 * Q + Q2, Q2, 2
        while exponent < num_terms:
            delta = delta + power + delta @ power
            exponent *= 2
            if exponent < num_terms:
                power = power @ power
        return delta
    inner = 2 * Q + Q2
    for _ in range(num_terms - 1):
        inner = 2 * Q + Q @ inner
    return inner


def cayley_vjp(delta: Tensor, grad: Tensor) -> Tensor:
    """The gradient by the strict upper triangles of `Q` from that by `G = cayley(Q)`: (..., n (n - 1) / 2).

    `dL/dQ = 2 K^T (dL/dG) K^T` with `K = (I - Q)^-1 = I + (G - I) / 2`: no solve.

    Args:
        delta: `G - I`, shape (..., n, n).
        grad: `dL/dG`, shape (..., n, n).
    """
    return _skew_gradient(_cayley_gradient(delta, grad))


def _cayley_gradient(delta: Tensor, grad: Tensor) -> Tensor:
    """The gradient by all entries of `Q`, as if they were independent, (..., n, n); see `cayley_vjp`."""
    K = _add_identity(delta / 2)
    return 2 * (K.mT @ grad @ K.mT)


def cayley_neumann_vjp(Q: Tensor, grad: Tensor, num_terms: int = 3) -> Tensor:
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
    entries = _entries(grad.shape[-1], grad)
    flat = grad.flatten(-2)
    return flat.index_select(-1, entries.upper) - flat.index_select(-1, entries.lower)


def vjp_at_identity(grad: Tensor) -> Tensor:
    """The gradient by the strict upper triangles of `Q` from that by `G`, at `Q = 0`, where every map is `I + 2 Q`."""
    return _skew_gradient(grad).mul_(2)


def inverse_transpose_delta(delta: Tensor) -> tuple[Tensor, Tensor]:
    """`G^-T - I` of a nearly orthogonal `G`, from `G - I`, and a bound of its error over the batch.

    `G^-T = G (I + E)^-1` with `E = G^T G - I`, and the inverse as its Neumann series to `E^3`: the error is about
    `||E||_2^4 <= ||E^2||_F^2`. Shapes (batch, n, n) and ().
    """
    E = torch.baddbmm(delta + delta.mT, delta.mT, delta)
    E2 = E @ E
    series = torch.baddbmm(E2 - E, E2, E, alpha=-1)
    error = E2.square().sum((-2, -1)).amax()
    return torch.baddbmm(series, delta, series).add_(delta), error


def _add_identity(X: Tensor) -> Tensor:
    return X + torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)


def cayley_by_series(Q: Tensor, num_terms: int = 3) -> Tensor:
    """`cayley(Q) - I` to rounding, by the Cayley-Neumann series with as many terms as that takes. Differentiable.

    `G_k = (I - Q^(k+1)) cayley(Q)`, so `||Q^(k+1)||_F` bounds what a series of `k` terms misses. It is known from the
    powers of the doubling `G_(2k+1) = G_k + G_k Q^(k+1)`. Small rotations stay with the first two products; matrices
    that no series of 63 terms reaches, with `theta` above about 0.75, are solved for. The number of terms is one for
    the whole batch.

    Args:
        Q: skew-symmetric, shape (num_blocks, n, n).
        num_terms: the smallest number of terms; counted up to the next `2^j - 1`.
    """
    if torch.compiler.is_compiling() or (Q.requires_grad and torch.is_grad_enabled()):
        return _cayley_by_series_op(Q, num_terms)
    return _cayley_by_series(Q, num_terms)


def small_rotation_delta(Q: Tensor, tolerance: float) -> Tensor | None:
    """`G - I` of a `G` beside `cayley(Q)` for small `Q`, by one product or two; None where neither is near enough.

    `G = I + 2 Q + c Q^2` gives `G^T G = I + (2 c - 4) Q^2 + c^2 Q^4`. With `c = 2 + 2 t`, `t` the mean of the squared
    singular values, the error is zero where they all are equal, and below `4 theta^4` everywhere; it is of either
    sign, so that over many folds singular values do not shrink. From `cayley(Q)` it differs by about `2 theta^3`.

    `G = I + 2 (Q + Q^2 + Q^3 + Q^4)` leaves `4 theta^6`, and differs from `cayley(Q)` by `2 theta^5`.

    Args:
        Q: skew-symmetric, shape (num_blocks, n, n).
        tolerance: of the largest singular value of `G^T G - I`.
    """
    square = Q @ Q
    # The largest sum of a row's sizes bounds the norm of Q^2, and is near it for blocks whose planes turn alike.
    bound = float(torch.linalg.vector_norm(square, ord=1, dim=-1).max())
    if 4 * bound**2 <= tolerance:
        mean = -square.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        return square.mul_(2 + 2 * mean).add_(Q, alpha=2)
    if 4 * bound**3 <= tolerance:
        low = Q + square
        return torch.baddbmm(low, square, low).mul_(2)
    return None


def _cayley_by_series(Q: Tensor, num_terms: int) -> Tensor:
    tolerance = _ROUNDING * torch.finfo(Q.dtype).eps
    power = Q @ Q
    delta = 2 * Q + power
    missed = _squared_norm(power).sqrt()
    terms = 1
    while terms < num_terms or not bool((missed <= tolerance).all()):
        if terms >= max(_MOST_TERMS, num_terms):
            unreached = (~(missed <= tolerance)).nonzero().squeeze(-1)
            delta[unreached] = cayley_delta(Q[unreached])
            break
        if terms > 1:
            power = power @ power
        delta = delta + power + delta @ power
        terms = 2 * terms + 1
        missed = _squared_norm(power)
    return delta


def _squared_norm(X: Tensor) -> Tensor:
    return X.square().sum((-2, -1))


# The number of terms depends on the values, which torch.compile cannot trace: it sees one operator.
@torch.library.custom_op("poet_peft::cayley_by_series", mutates_args=(), schema="(Tensor Q, int num_terms) -> Tensor")
def _cayley_by_series_op(Q: Tensor, num_terms: int) -> Tensor:
    return _cayley_by_series(Q, num_terms)


@_cayley_by_series_op.register_fake
def _(Q: Tensor, num_terms: int) -> Tensor:
    return torch.empty_like(Q)


def _keep_delta(ctx, inputs, output) -> None:
    ctx.save_for_backward(output)


def _cayley_backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (delta,) = ctx.saved_tensors
    return _cayley_gradient(delta, grad), None


_cayley_by_series_op.register_autograd(_cayley_backward, setup_context=_keep_delta)


@dataclass(frozen=True)
class Cayley:
    """The Cayley map `G = (I + Q)(I - Q)^-1`, exactly orthogonal for `Q` of any size."""

    is_orthogonal = True

    def delta(self, Q: Tensor) -> Tensor:
        """`G - I`, shape (num_blocks, n, n)."""
        return cayley_delta(Q)

    def vjp(self, Q: Tensor, delta: Tensor, grad: Tensor) -> Tensor:
        """The gradient by the strict upper triangles of `Q`, (num_blocks, n (n - 1) / 2), from `grad = dL/dG`."""
        return cayley_vjp(delta, grad)

    def inverse_transpose(self, delta: Tensor) -> Tensor | None:
        """`G^-T - I`; None where no cheap inverse is near enough. May wait for the device, to look at how near."""
        return delta

    def fold_delta(self, Q: Tensor, delta: Tensor) -> Tensor:
        """`G - I` to fold into a weight: of the orthogonal matrix next to `G`, wherever no output notices."""
        return delta


@dataclass(frozen=True)
class CayleyNeumann:
    """The Cayley map by its Neumann series, `G_k = (I + Q)(I + Q + ... + Q^k)`; POET, arXiv 2506.08001, section 3.2.

    Args:
        num_terms: `k`.
        adaptive: more terms wherever `k` would miss orthogonality by more than rounding, see `cayley_by_series`. `G`
            then is `cayley(Q)` to rounding. False: exactly `k` terms, as in the paper; singular values of `G` then
            lie within `theta^(k+1)` of 1.
    """

    num_terms: int = 3
    adaptive: bool = True

    @property
    def is_orthogonal(self) -> bool:
        """Whether `G` is orthogonal to rounding, for `Q` of any size."""
        return self.adaptive

    def delta(self, Q: Tensor) -> Tensor:
        return cayley_by_series(Q, self.num_terms) if self.adaptive else cayley_neumann_delta(Q, self.num_terms)

    def vjp(self, Q: Tensor, delta: Tensor, grad: Tensor) -> Tensor:
        return cayley_vjp(delta, grad) if self.adaptive else cayley_neumann_vjp(Q, grad, self.num_terms)

    def inverse_transpose(self, delta: Tensor) -> Tensor | None:
        if self.adaptive:
            return delta
        inverse, error = inverse_transpose_delta(delta)
        # The error of a gradient's own sums in fp32.
        return inverse if bool(error < 80 * torch.finfo(delta.dtype).eps) else None

    def fold_delta(self, Q: Tensor, delta: Tensor) -> Tensor:
        if self.adaptive or self.num_terms % 2 == 0:
            return delta
        nearest = cayley_by_series(Q, self.num_terms)
        largest_miss = (delta - nearest).square().sum((-2, -1)).amax().sqrt()
        return nearest if bool(largest_miss <= _ROUNDING * torch.finfo(Q.dtype).eps) else delta


OrthogonalMap = Cayley | CayleyNeumann
