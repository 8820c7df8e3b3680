"""What the two sides of a layer ask for alike, and a step of one side without it.

To first order the generator `A_R` of one side changes the weight by `A_R W`, and `A_P` of the other by `W A_P`. The
two changes overlap: a part of what one side does next is what the other does already.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layer import POETLayer, living_layers
from .maths.orthogonal import upper_triangle
from .ops.block_gradients import conjugated
from .rotation import Rotation
from .weights.residual import at_least_fp32
from .weights.sharded import full


class Pair(NamedTuple):
    """A rotation, and that of the other side of the same weight."""

    layer: POETLayer
    rotation: Rotation
    other: Rotation


def pairs_of(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Pair]:
    """The pairs whose rotation has one of these parameters; none for a layer with a rotation at one side only."""
    wanted = {id(parameter) for parameter in parameters}
    pairs = {}
    for layer in living_layers() if wanted else ():
        for adapter in layer.poet_config:
            rotations = layer.rotations(adapter)
            for rotation, other in zip(rotations, reversed(rotations), strict=True):
                if rotation is not other and id(rotation.weight) in wanted:
                    pairs[rotation.weight] = Pair(layer, rotation, other)
    return pairs


def without_overlap(update: Tensor, pair: Pair, other_momentum: Tensor, share: float) -> Tensor:
    """A step of one side, less a share of its component along what the other side's momentum `M` asks for.

    `A <- A - share <A, g> / <g, g> g`, with `g = W M_P W^T` for `R` and `g = W^T M_R W` for `P`: what the changes of
    the weight have in common, `<A_R W, W M_P>`, is `<A_R, g>`.

    Args:
        update: the strict upper triangles of the generator `A`, flat.
        pair: both rotations are the identity.
        other_momentum: of the other side's parameters, flat; a sharded one is gathered.

    Source: public notes of POET's authors on cross-side decorrelation, 2026.
    """
    momentum = at_least_fp32(full(other_momentum))
    momentum = momentum / _nonzero(momentum.abs().max())
    rotation, other = pair.rotation(), pair.other()
    g = conjugated(
        pair.layer.base_weight.read(),
        other.partition.skew_blocks(momentum),
        pair.rotation.side,
        rotation.blocks_at_identity(),
        other.blocks_at_identity(),
    )
    g = torch.cat([upper_triangle(block).flatten() for block in g]).to(update.dtype)
    g = g / _nonzero(g.norm())
    return update - share * (update @ g) * g


def _nonzero(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)
