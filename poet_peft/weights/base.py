"""One base weight as a matrix (out, in), however its layer keeps it: what reads and writes it, and what refuses to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class BaseWeight:
    """The weight of one base layer.

    Attributes:
        is_quantized: whether writing a matrix quantizes it.
    """

    is_quantized = False

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def parts(self) -> dict[str, Tensor]:
        """All tensors that the weight is made of, by their names in the layer. Writing to them changes it."""
        raise NotImplementedError

    def write_parts(self, parts: dict[str, Tensor]) -> None:
        """Give the layer the weight that consists of these parts, in place."""
        raise NotImplementedError

    def read(self) -> Tensor:
        """The weight (out, in) as a forward pass sees it, whole, in fp32 or wider."""
        raise NotImplementedError

    def read_exact(self, residual: Tensor | None) -> Tensor:
        """`read` with the residual that rounding a 16-bit weight left over, see `residual.split`."""
        return self.read()

    def write(self, matrix: Tensor, residual: Tensor | None = None) -> None:
        """Write a whole matrix (out, in), in place.

        Args:
            residual: receives what rounding to 16 bits leaves over.
        """
        raise NotImplementedError

    def change(self, change: Callable[[Tensor], None], residual: Tensor | None = None) -> None:
        """Write what is left of the exact matrix (out, in), fp32 or wider, after `change` has changed it in place."""
        matrix = self.read_exact(residual)
        change(matrix)
        self.write(matrix, residual)

    @property
    def range_dtype(self) -> torch.dtype:
        """The dtype whose range limits what can be stored."""
        raise NotImplementedError

    def is_storable(self, matrix: Tensor) -> bool:
        """Whether all entries are finite, also once they are stored."""
        return bool(torch.isfinite(matrix.to(self.range_dtype)).all())

    def check_readable(self, name: str) -> None:
        """Refuse a layer whose weight cannot be read, or written, truthfully.

        Raises:
            ValueError: names the module, what is in the way, and the way out.
        """
