"""Triton kernels for the two pieces of a POET layer that torch spends many launches or large copies on.

- `block_outer`: the gradient of a rotation's blocks from activations, gathers included. torch gathers both operands
  into copies of the activations first.
- `cayley_neumann_offset`: the map from parameters to `G - I`, two launches forward and two backward. torch scatters,
  transposes, multiplies and adds in about fifteen each.

Left to torch: matrix products with a dense weight, the sum over partial results, and maps of blocks above 512, where
products are most of the time.

Triton is an optional extra, imported by the first kernel call. Kernels run on CUDA devices, and on any device through
Triton's interpreter if `TRITON_INTERPRET=1` is set before that call, to test them. They are tested through the
interpreter, and compiled for Ampere and Hopper; no GPU has run them yet. `benchmarks/gpu.py` checks and times them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import orthogonal


_INSTALLED = importlib.util.find_spec("triton") is not None

# Programs that fill any GPU. A constant, so that sums are cut the same way on each of them.
_ENOUGH_PROGRAMS = 512
_FEWEST_ROWS = 1024
_ROWS = 32
_LARGEST_MAP = 512


@torch.compiler.assume_constant_result
def is_available(device: torch.device | str = "cuda") -> bool:
    """Whether the kernels can run on tensors of a device: Triton is installed, and the device is an NVIDIA GPU from
    Ampere on, or Triton interprets. Imports nothing."""
    if not _INSTALLED:
        return False
    return _interprets() or (torch.device(device).type == "cuda" and torch.cuda.is_available() and _is_recent(device))


def block_outer(a: Tensor, b: Tensor, order: Tensor, num_blocks: int, block_size: int, start: int = 0) -> Tensor:
    """`A_i^T B_i` for blocks of gathered features: `A_i = a[:, order[start + i b : start + (i + 1) b]]`.

    Takes no copy of `a` or `b`. That saves memory, not always time: neighbours in a random permutation share no
    32-byte sector, so a 16-bit feature costs the L2 cache sixteen times its size, where a sorted index set costs
    about twice. `benchmarks/gpu.py` times it beside torch. The same bits at every call, and on every GPU of a kind: no
    atomics, and sums cut by shape alone. Not differentiable.

    Args:
        a, b: (N, dim) of the same dtype, fp32, bf16 or fp16, with any strides. Summed in fp32, and for fp32 also
            multiplied in full precision.
        order: (k,) integers below dim, `k >= start + num_blocks * block_size`; see `basis.block_basis`.
        start: where in `order` the first block begins: not 0 for the smaller block behind the equal ones.

    Returns:
        (num_blocks, block_size, block_size) in fp32.

    Raises:
        ImportError: Triton is not installed.
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check_device(a)
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(f"block_outer takes a and b of one shape (N, dim), got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype or a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"block_outer takes a and b of one dtype, fp32, bf16 or fp16, got {a.dtype} and {b.dtype}: cast them"
        )
    if order.dim() != 1 or order.dtype not in (torch.int32, torch.int64) or not order.is_contiguous():
        raise ValueError(f"order must be a contiguous vector of integers, got {order.dtype} {tuple(order.shape)}")
    if not (a.device == b.device == order.device):
        raise ValueError(f"a, b and order are on different devices: {a.device}, {b.device}, {order.device}")
    if block_size < 1 or min(num_blocks, start) < 0 or start + num_blocks * block_size > order.numel():
        raise ValueError(
            f"{num_blocks} blocks of {block_size} from {start} on do not fit into an order of {order.numel()} features"
        )
    return _block_outer(a, b, order, num_blocks, block_size, start)


def cayley_neumann_offset(upper: Tensor, n: int, num_terms: int = 3) -> Tensor:
    """`orthogonal.cayley_neumann_offset(skew(upper, n), num_terms)`: (..., n (n - 1) / 2) -> (..., n, n).

    By the kernels for what POET uses, 3 terms in fp32 and blocks up to 512; by torch for everything else. Once
    differentiable by the kernels.

    Raises:
        ImportError: Triton is not installed.
        ValueError: the number of parameters does not belong to `n`.
    """
    _check_device(upper)
    if num_terms != 3 or upper.dtype != torch.float32 or not 2 <= n <= _LARGEST_MAP:
        return orthogonal.cayley_neumann_offset(orthogonal.skew(upper, n), num_terms)
    if upper.shape[-1] != n * (n - 1) // 2:
        raise ValueError(f"a skew-symmetric {n} x {n} matrix has {n * (n - 1) // 2} parameters, got {upper.shape[-1]}")
    offset = _CayleyNeumann.apply(upper.reshape(-1, upper.shape[-1]), n)
    return offset.view(*upper.shape[:-1], n, n)


class _CayleyNeumann(torch.autograd.Function):
    """The map for k = 3, (num_blocks, n (n - 1) / 2) -> (num_blocks, n, n), with `Q^2` kept for its gradient."""

    @staticmethod
    def forward(ctx: Any, upper: Tensor, n: int) -> Tensor:
        upper = upper.contiguous()
        offset, square = _map(upper, n)
        ctx.save_for_backward(upper, square)
        return offset

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        upper, square = ctx.saved_tensors
        return _map_backward(upper, square, grad.contiguous()), None


# Opaque to torch.compile, which then needs to know nothing but shapes.


@torch.library.custom_op("poet_peft::block_outer", mutates_args=())
def _block_outer(a: Tensor, b: Tensor, order: Tensor, num_blocks: int, block_size: int, start: int) -> Tensor:
    num_rows = a.shape[0]
    if num_rows == 0 or num_blocks == 0:
        return a.new_zeros(num_blocks, block_size, block_size, dtype=torch.float32)
    tile = max(16, min(64 if a.dtype == torch.float32 else 128, _next_power_of_2(block_size)))
    programs = num_blocks * _ceil_div(block_size, tile) ** 2
    num_splits = min(_ceil_div(_ENOUGH_PROGRAMS, programs), _ceil_div(num_rows, _FEWEST_ROWS))
    rows_per_split = _ceil_div(_ceil_div(num_rows, num_splits), _ROWS) * _ROWS
    partial = a.new_empty(num_splits, num_blocks, block_size, block_size, dtype=torch.float32)
    with _device_of(a):
        _kernels().block_outer_kernel[(programs, num_splits)](
            a,
            b,
            order,
            partial,
            num_rows,
            rows_per_split,
            start,
            block_size,
            *a.stride(),
            *b.stride(),
            partial.stride(0),
            TILE=tile,
            ROWS=_ROWS,
            num_warps=8 if tile == 128 else 4,
            num_stages=2,
        )
    return partial[0] if num_splits == 1 else partial.sum(0)


@_block_outer.register_fake
def _(a: Tensor, b: Tensor, order: Tensor, num_blocks: int, block_size: int, start: int) -> Tensor:
    return a.new_empty(num_blocks, block_size, block_size, dtype=torch.float32)


@torch.library.custom_op("poet_peft::cayley_neumann_offset", mutates_args=())
def _map(upper: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`G - I` and `Q^2`."""
    offset, square = (upper.new_empty(upper.shape[0], n, n) for _ in range(2))
    _launch("square_kernel", n, upper, square)
    _launch("series_kernel", n, upper, square, offset)
    return offset, square


@_map.register_fake
def _(upper: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return upper.new_empty(upper.shape[0], n, n), upper.new_empty(upper.shape[0], n, n)


@torch.library.custom_op("poet_peft::cayley_neumann_offset_backward", mutates_args=())
def _map_backward(upper: Tensor, square: Tensor, grad: Tensor) -> Tensor:
    r"""`dL/du` from `H = dL/d(G - I)`.

    Powers of `Q` are symmetric or skew, so with `G - I = 2 Q + 2 Q2 + Q2 (2 Q + Q2)`

        X = dL/dQ2 = 2 H + H (Q2 - 2 Q) + Q2 H,    dL/dQ = 2 H + 2 Q2 H - (X Q + Q X),

    and of `dL/dQ` only the skew part moves the parameters.
    """
    grad_square, grad_direct, grad_upper = (torch.empty_like(tensor) for tensor in (square, square, upper))
    n = square.shape[-1]
    _launch("backward_products_kernel", n, upper, square, grad, grad_square, grad_direct)
    _launch("backward_skew_kernel", n, upper, grad_square, grad_direct, grad_upper)
    return grad_upper


@_map_backward.register_fake
def _(upper: Tensor, square: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(upper)


def _launch(name: str, n: int, upper: Tensor, *tensors: Tensor) -> None:
    """Run a kernel with one program for each tile of each n x n matrix."""
    tile = 16 if n <= 16 else 32 if n <= 64 else 64
    num_programs = upper.shape[0] * _ceil_div(n, tile) ** 2
    if num_programs:
        with _device_of(upper):
            # The largest tiles whose accumulators stay in registers.
            getattr(_kernels(), name)[(num_programs,)](
                upper, *tensors, n, TILE=tile, DEPTH=16, num_warps=8 if tile == 64 else 4, num_stages=2
            )


def _kernels() -> ModuleType:
    return importlib.import_module(".triton_kernels", __package__)


def _check_device(tensor: Tensor) -> None:
    if not _INSTALLED:
        raise ImportError("these kernels need Triton, which is not installed: pip install poet_peft[triton]")
    if not is_available(tensor.device):
        raise ValueError(
            f"Triton kernels run on CUDA devices from Ampere on, not on {tensor.device}: use torch there, or set "
            "TRITON_INTERPRET=1 before the first of them to test them"
        )


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


@functools.cache
def _is_recent(device: torch.device | str) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _device_of(tensor: Tensor) -> torch.cuda.device:
    # Triton launches on the current device. An index of -1 changes nothing.
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
