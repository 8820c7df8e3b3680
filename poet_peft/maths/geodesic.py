"""Powers of rotations, and sums of them in the Lie algebra: what scales an adapter and what averages several.

A skew-symmetric `Q` has an orthonormal basis `U` of complex eigenvectors, `Q = U diag(i w) U^*` with real `w`. Every
map `g` of `orthogonal` is a function of its eigenvalues, so that `g(Q)^s = U diag(g(i w)^s) U^*`, and the generator of
the rotation, the skew-symmetric `A` with `exp(A) = cayley(Q)`, is `U diag(2 i atan(w)) U^*`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .orthogonal import Cayley, OrthogonalMap


def power_delta(Q: Tensor, scale: float, num_terms: int = 0) -> Tensor:
    """`G^scale - I`: `G` with every plane turned by `scale` times its angle. Not differentiable.

    Of an orthogonal `G` this is the point at `scale` on the geodesic from the identity, 0, to `G`, 1. A `G` that is
    stretched, as a series of few terms stretches it, is stretched by the `scale`-th power.

    Args:
        Q: skew-symmetric, shape (num_blocks, n, n).
        num_terms: `G` is `cayley_neumann(Q, num_terms)`; 0: `cayley(Q)`.

    Returns:
        shape (num_blocks, n, n), in the dtype of `Q`.
    """
    return _power_delta(Q.detach(), float(scale), num_terms)


# One operator for torch.compile, which has no code for complex numbers.
@torch.library.custom_op(
    "poet_peft::power_delta", mutates_args=(), schema="(Tensor Q, float scale, int num_terms) -> Tensor"
)
def _power_delta(Q: Tensor, scale: float, num_terms: int) -> Tensor:
    w, U = _eigen(Q)
    angle = 2 * torch.atan(w)
    log_size = torch.zeros_like(w)
    if num_terms:
        # The series is the Cayley map times 1 - (i w)^(k+1).
        missed = (1j * w) ** (num_terms + 1)
        log_size = 0.5 * torch.log1p(missed.abs() ** 2 - 2 * missed.real)
        angle = angle + torch.atan2(-missed.imag, 1 - missed.real)
    half = torch.polar(torch.ones_like(w), scale * angle / 2)
    # exp(a + i b) - 1, which keeps its digits for small a and b.
    change = torch.expm1(scale * log_size) * half.square() + 2j * half.imag * half
    return _matrix(change, U).to(Q.dtype)


@_power_delta.register_fake
def _(Q: Tensor, scale: float, num_terms: int) -> Tensor:
    return torch.empty_like(Q)


def generator(Q: Tensor) -> Tensor:
    """The skew-symmetric `A` with `exp(A) = cayley(Q)` and angles below pi, shape (num_blocks, n, n), float64."""
    w, U = _eigen(Q)
    return _skew_part(_matrix(2j * torch.atan(w), U))


def from_generator(A: Tensor) -> Tensor:
    """The `Q` with `cayley(Q) = exp(A)`, shape (num_blocks, n, n), float64.

    A plane that `A` turns by exactly pi has no such `Q`: the nearer to it, the larger `Q` is.
    """
    w, U = _eigen(A)
    return _skew_part(_matrix(1j * torch.tan(w / 2), U))


def _eigen(Q: Tensor) -> tuple[Tensor, Tensor]:
    """`w` (num_blocks, n) and `U` (num_blocks, n, n) of `Q = U diag(i w) U^*`, in float64."""
    return torch.linalg.eigh(-1j * Q.double())


def _matrix(values: Tensor, U: Tensor) -> Tensor:
    """`U diag(values) U^*`, which is real for a function of a real matrix."""
    return ((U * values.unsqueeze(-2)) @ U.mH).real


def _skew_part(A: Tensor) -> Tensor:
    return (A - A.mT) / 2


@dataclass(frozen=True)
class ScaledMap:
    """A map whose image is turned by `scale` times its angle, `G^scale`; see `power_delta`. It has no gradient.

    Args:
        base: the map of the adapter.
        scale: 0 is the identity, 1 is `base`.
    """

    base: OrthogonalMap
    scale: float

    @property
    def is_orthogonal(self) -> bool:
        return self.base.is_orthogonal

    def delta(self, Q: Tensor) -> Tensor:
        """`G^scale - I`, shape (num_blocks, n, n)."""
        is_exact = isinstance(self.base, Cayley) or self.base.is_orthogonal
        return power_delta(Q, self.scale, 0 if is_exact else self.base.num_terms)

    def inverse_transpose(self, delta: Tensor) -> Tensor | None:
        return self.base.inverse_transpose(delta)


def scaled_map(base: OrthogonalMap, scale: float) -> OrthogonalMap | ScaledMap:
    """The map itself at `scale` 1, so that nothing of it changes by a bit."""
    return base if scale == 1 else ScaledMap(base, scale)
