"""The readable definition of a rotated linear layer, `y = R W P x + bias`, and of a stack of them.

Works in any dtype, float64 included.

A rotation is a pair `(index, deltas)`: `index` (k,) names the rotated features, `deltas` holds `G - I` of its
consecutive blocks, a list of batched square matrices (num_blocks, b, b) whose sizes add up to k. All other features
stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..maths.precision import full_precision


RotationTensors = tuple[Tensor, list[Tensor]]


def rotate(x: Tensor, rotation: RotationTensors, transpose: bool = False) -> Tensor:
    """Rotate the last dimension: (..., dim) -> (..., dim).

    Computed as `x + (G - I) x`, which keeps the precision of `x` whatever the dtype of the products is.

    Args:
        transpose: apply the transposed blocks. `rotate(W, P, transpose=True)` is the matrix product `W P`, since it
            takes each row `w` to `w P = (P^T w)^T`.
    """
    index, deltas = rotation
    selected = x.index_select(-1, index)
    changes = []
    start = 0
    for delta in deltas:
        num_blocks, b, _ = delta.shape
        blocks = selected.narrow(-1, start, num_blocks * b).unflatten(-1, (num_blocks, b))
        equation = "...ni,nij->...nj" if transpose else "...nj,nij->...ni"
        changes.append(torch.einsum(equation, blocks, delta.to(x.dtype)).flatten(-2))
        start += num_blocks * b
    return x.index_add(-1, index, torch.cat(changes, dim=-1).to(x.dtype))


def effective_weight(weight: Tensor, R: Sequence[RotationTensors], P: Sequence[RotationTensors]) -> Tensor:
    """`R_n ... R_1 W P_1 ... P_n`, shape (out, in): one adapter's rotations after the other's, first innermost.

    In the dtype of the weight, whatever autocast and TF32 say. A stack of weights (num_experts, out, in) has the
    features of all experts in one row: feature i of expert e is feature `e * out + i` of R, and likewise for P.
    """
    with full_precision(weight.device.type):
        for rotation in P:
            weight = _from_rows(rotate(_to_rows(weight), rotation, transpose=True), weight)
        for rotation in R:
            weight = _from_rows(rotate(_to_rows(weight.mT), rotation), weight.mT).mT
    return weight


def _to_rows(weight: Tensor) -> Tensor:
    """(num_experts, m, n) -> (m, num_experts * n)."""
    return weight.transpose(0, 1).flatten(1) if weight.dim() == 3 else weight


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    return rows.unflatten(1, (like.shape[0], -1)).transpose(0, 1) if like.dim() == 3 else rows


def poet_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    R: Sequence[RotationTensors],
    P: Sequence[RotationTensors],
) -> Tensor:
    """`R_n ... R_1 W P_1 ... P_n x + bias`: (..., in) -> (..., out). The bias is not rotated.

    Of a stack of weights each expert gets tokens of its own: (num_experts, num_tokens, in) ->
    (num_experts, num_tokens, out).

    Args:
        weight: (out, in), or a stack (num_experts, out, in); see `effective_weight` for its features.
        bias: (out,), or (num_experts, out).
    """
    is_stack = weight.dim() == 3
    for rotation in reversed(P):
        x = _from_rows(rotate(_to_rows(x), rotation), x) if is_stack else rotate(x, rotation)
    y = x @ weight.mT if is_stack else F.linear(x, weight)
    for rotation in R:
        y = _from_rows(rotate(_to_rows(y), rotation), y) if is_stack else rotate(y, rotation)
    if bias is None:
        return y
    return y + (bias.unsqueeze(-2) if is_stack else bias).to(y.dtype)
