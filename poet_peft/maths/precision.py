"""Products of matrices in the full precision of their dtype, whatever a training run allows for its own.

TF32 products, which `TrainingArguments(tf32=True)` and `torch.set_float32_matmul_precision("high")` ask for, carry 10
bits of the 23 of fp32, and those of "medium" 7 on some CPUs. That is enough for a forward. A rotation made of such
products is 1e-3 from orthogonal, and a weight that is written with them loses what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


_FULL = ("ieee", "none")  # "none": nobody asked for anything else


def full_precision(device_type: str) -> AbstractContextManager[None]:
    """A context in which products are computed in the dtype of their matrices, and fp32 ones in fp32.

    In a compiled graph it only turns autocast off: the precision of a graph's products is decided when it is made.
    """
    if torch.compiler.is_compiling():
        return torch.autocast(device_type=device_type, enabled=False)
    return _full_precision(device_type)


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    reduced = [(backend, backend.fp32_precision) for backend in backends if backend.fp32_precision not in _FULL]
    with torch.autocast(device_type=device_type, enabled=False):
        for backend, _ in reduced:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, before in reduced:
                backend.fp32_precision = "none"
                if backend.fp32_precision != before:  # it was its own, not inherited from `torch.backends`
                    backend.fp32_precision = before
