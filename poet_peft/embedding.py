"""Rotated embeddings: `nn.Embedding`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .ops.input_centric import rotate
from .rotated_module import RotatedModule
from .weights.plain import is_plain


class Embedding(RotatedModule):
    """POET around an `nn.Embedding`: every row `w` of the table becomes `R w`.

    There is no `P`: it would mix the rows of the vocabulary, and with them the meanings of tokens.
    """

    def _rotated_forward(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        R, _ = self.sides(adapters)
        if is_plain(self.base_layer):
            # Frozen, also where a loader of transformers has made a new parameter of it that is not.
            y = F.embedding(x, self.base_layer.weight.detach(), *args, **kwargs)
        else:
            y = self.base_layer(x, *args, **kwargs)
        for side in R:
            y = rotate(y, side)
        return y
