"""How a parameter keeps a matrix (out, in)."""

from __future__ import annotations

from enum import IntEnum

from torch import Size, Tensor


class WeightLayout(IntEnum):
    """How a parameter keeps the matrix (out, in) that is rotated. Adapter files hold the number.

    - `MATRIX`: as it is.
    - `TRANSPOSED`: (in, out), as transformers' `Conv1D` and the table of an embedding.
    - `KERNEL`: (out, in / groups, *kernel), as convolutions: each output channel's kernel is a row.
    - `STACK`: (num_experts, out, in), a matrix for each expert; one matrix (out, in) is a stack of one.
    - `TRANSPOSED_STACK`: (num_experts, in, out).
    """

    MATRIX = 0
    TRANSPOSED = 1
    KERNEL = 2
    STACK = 3
    TRANSPOSED_STACK = 4

    def as_matrix(self, weight: Tensor) -> Tensor:
        """(out, in), or (num_experts, out, in) of stacks: a view if the weight is contiguous."""
        if self is WeightLayout.KERNEL:
            return weight.flatten(1)
        if weight.dim() == 2 and self in (WeightLayout.STACK, WeightLayout.TRANSPOSED_STACK):
            return weight[None]
        return weight.mT if self in (WeightLayout.TRANSPOSED, WeightLayout.TRANSPOSED_STACK) else weight

    def as_weight(self, matrix: Tensor, shape: Size) -> Tensor:
        """The inverse of `as_matrix`, in the shape of the parameter."""
        if self is WeightLayout.KERNEL:
            return matrix.reshape(shape)
        if len(shape) == 2 and self in (WeightLayout.STACK, WeightLayout.TRANSPOSED_STACK):
            return matrix[0]
        return matrix.mT if self in (WeightLayout.TRANSPOSED, WeightLayout.TRANSPOSED_STACK) else matrix
