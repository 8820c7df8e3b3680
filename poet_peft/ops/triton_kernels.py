"""The kernels behind `ops.triton`, which documents what they compute. The only module that imports Triton at its top.

Nothing here uses `triton.language`'s own jitted functions (`tl.zeros`, `tl.cdiv`, ...): those are bound to the
compiler or to the interpreter when Triton is first imported, by whomever, and these kernels when this module is.
"""

import triton
import triton.language as tl


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["num_rows", "rows_per_split", "start"])
def block_outer_kernel(
    a,
    b,
    order,
    partial,
    num_rows,
    rows_per_split,
    start,
    block_size,
    stride_a_row,
    stride_a_feature,
    stride_b_row,
    stride_b_feature,
    stride_split,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of one block's `A_i^T B_i`, summed over one range of rows, into `partial` (splits, num_blocks, b, b).

    Axis 0 of the grid runs over blocks and tiles, axis 1 over ranges of rows, so programs that run at the same time
    gather different features of the same rows, and find them in the L2 cache.
    """
    tiles = (block_size + TILE - 1) // TILE
    block = tl.program_id(0) // (tiles * tiles)
    tile_m = tl.program_id(0) // tiles % tiles
    tile_n = tl.program_id(0) % tiles
    split = tl.program_id(1)

    m = tile_m * TILE + tl.arange(0, TILE)
    n = tile_n * TILE + tl.arange(0, TILE)
    first = order + start + block * block_size
    # 64 bits: rows times stride outgrows 32 from 2 GB of bf16 on.
    features_m = tl.load(first + m, mask=m < block_size, other=0).to(tl.int64)
    features_n = tl.load(first + n, mask=n < block_size, other=0).to(tl.int64)
    a_columns = a + features_m[None, :] * stride_a_feature
    b_columns = b + features_n[None, :] * stride_b_feature

    total = tl.full((TILE, TILE), 0.0, tl.float32)
    for row in range(split * rows_per_split, (split + 1) * rows_per_split, ROWS):
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        exists = rows < num_rows
        A = tl.load(a_columns + rows * stride_a_row, mask=exists & (m < block_size)[None, :], other=0.0)
        B = tl.load(b_columns + rows * stride_b_row, mask=exists & (n < block_size)[None, :], other=0.0)
        if INTERPRETED:  # its dot takes the bits of bf16 for integers
            A = A.to(tl.float32)
            B = B.to(tl.float32)
        total = tl.dot(tl.trans(A), B, total, input_precision="ieee")

    out = partial + split.to(tl.int64) * stride_split + block.to(tl.int64) * block_size * block_size
    inside = (m < block_size)[:, None] & (n < block_size)[None, :]
    tl.store(out + m[:, None] * block_size + n[None, :], total, mask=inside)


@triton.jit
def locate(n, TILE: tl.constexpr):
    """Which matrix of the batch, and which rows and columns of it, this program's tile covers."""
    tiles = (n + TILE - 1) // TILE
    matrix = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    tile_row = tl.program_id(0) // tiles % tiles
    tile_column = tl.program_id(0) % tiles
    return matrix, tile_row * TILE + tl.arange(0, TILE), tile_column * TILE + tl.arange(0, TILE)


@triton.jit
def load_dense(matrix, rows, columns, n):
    """`matrix[rows, columns]` of a contiguous n x n matrix; zero outside."""
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    return tl.load(matrix + rows[:, None] * n + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_transposed(matrix, rows, columns, n):
    """`matrix^T[rows, columns]`; zero outside."""
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    return tl.load(matrix + columns[None, :] * n + rows[:, None], mask=inside, other=0.0)


@triton.jit
def load_skew(upper, rows, columns, n):
    """`Q[rows, columns]` of the skew-symmetric n x n matrix whose strict upper triangle is `upper`; zero outside."""
    row = rows[:, None]
    column = columns[None, :]
    low = tl.where(row < column, row, column)
    high = tl.where(row < column, column, row)
    position = low * (2 * n - low - 1) // 2 + high - low - 1
    value = tl.load(upper + position, mask=(low < high) & (high < n), other=0.0)
    return tl.where(row < column, value, -value)


@triton.jit
def square_kernel(upper, square, n, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """`Q2 = Q Q`."""
    matrix, rows, columns = locate(n, TILE)
    upper += matrix * (n * (n - 1) // 2)
    square += matrix * n * n
    total = tl.full((TILE, TILE), 0.0, tl.float32)
    for start in range(0, n, DEPTH):
        middle = start + tl.arange(0, DEPTH)
        left = load_skew(upper, rows, middle, n)
        right = load_skew(upper, middle, columns, n)
        total = tl.dot(left, right, total, input_precision="ieee")
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    tl.store(square + rows[:, None] * n + columns[None, :], total, mask=inside)


@triton.jit
def series_kernel(upper, square, offset, n, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """`2 Q + 2 Q2 + Q2 (2 Q + Q2)`."""
    matrix, rows, columns = locate(n, TILE)
    upper += matrix * (n * (n - 1) // 2)
    square += matrix * n * n
    offset += matrix * n * n
    total = tl.full((TILE, TILE), 0.0, tl.float32)
    for start in range(0, n, DEPTH):
        middle = start + tl.arange(0, DEPTH)
        left = load_dense(square, rows, middle, n)
        right = 2 * load_skew(upper, middle, columns, n) + load_dense(square, middle, columns, n)
        total = tl.dot(left, right, total, input_precision="ieee")
    total += 2 * load_skew(upper, rows, columns, n) + 2 * load_dense(square, rows, columns, n)
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    tl.store(offset + rows[:, None] * n + columns[None, :], total, mask=inside)


@triton.jit
def backward_products_kernel(
    upper, square, grad, grad_square, grad_direct, n, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """With `H = grad`: `X = 2 H + H (Q2 - 2 Q) + Q2 H`, what reaches `Q2`, and `W = 2 H + 2 Q2 H`, what reaches `Q`
    past it."""
    matrix, rows, columns = locate(n, TILE)
    upper += matrix * (n * (n - 1) // 2)
    square += matrix * n * n
    grad += matrix * n * n
    right_product = tl.full((TILE, TILE), 0.0, tl.float32)
    left_product = tl.full((TILE, TILE), 0.0, tl.float32)
    for start in range(0, n, DEPTH):
        middle = start + tl.arange(0, DEPTH)
        factor = load_dense(square, middle, columns, n) - 2 * load_skew(upper, middle, columns, n)
        right_product = tl.dot(load_dense(grad, rows, middle, n), factor, right_product, input_precision="ieee")
        left = load_dense(square, rows, middle, n)
        left_product = tl.dot(left, load_dense(grad, middle, columns, n), left_product, input_precision="ieee")
    twice = 2 * load_dense(grad, rows, columns, n)
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    position = matrix * n * n + rows[:, None] * n + columns[None, :]
    tl.store(grad_square + position, twice + right_product + left_product, mask=inside)
    tl.store(grad_direct + position, twice + 2 * left_product, mask=inside)


@triton.jit
def backward_skew_kernel(upper, grad_square, grad_direct, grad_upper, n, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """The upper triangle of `W - W^T - (Z Q + Q Z)` with `Z = X + X^T`: `dL/du_ij = dL/dQ_ij - dL/dQ_ji`."""
    matrix, rows, columns = locate(n, TILE)
    tiles = (n + TILE - 1) // TILE
    if tl.program_id(0) // tiles % tiles > tl.program_id(0) % tiles:
        return
    upper += matrix * (n * (n - 1) // 2)
    grad_upper += matrix * (n * (n - 1) // 2)
    grad_square += matrix * n * n
    grad_direct += matrix * n * n
    total = tl.full((TILE, TILE), 0.0, tl.float32)
    for start in range(0, n, DEPTH):
        middle = start + tl.arange(0, DEPTH)
        left = load_dense(grad_square, rows, middle, n) + load_transposed(grad_square, rows, middle, n)
        total = tl.dot(left, load_skew(upper, middle, columns, n), total, input_precision="ieee")
        right = load_dense(grad_square, middle, columns, n) + load_transposed(grad_square, middle, columns, n)
        total = tl.dot(load_skew(upper, rows, middle, n), right, total, input_precision="ieee")
    direct = load_dense(grad_direct, rows, columns, n) - load_transposed(grad_direct, rows, columns, n)
    row = rows[:, None]
    column = columns[None, :]
    position = row * (2 * n - row - 1) // 2 + column - row - 1
    tl.store(grad_upper + position, direct - total, mask=(row < column) & (column < n))
