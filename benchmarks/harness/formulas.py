"""What the papers and DESIGN's arithmetic predict: numbers held in memory, and floating-point operations.

A weight is m x n (output by input features), N is the number of tokens, b the block size.
"""


def poet_parameters(m, n, b):
    """POET, arXiv 2506.08001, block-stochastic: (m + n)(b - 1) / 2."""
    return (m + n) * (b - 1) / 2


def fully_stochastic_parameters(m, n, fraction):
    return sum(b * (b - 1) / 2 for b in (int(fraction * m), int(fraction * n)))


def adamw_held(m, n):
    """The weight and AdamW's two moments: 3 m n."""
    return 3 * m * n


def adapter_held(m, n, num_parameters):
    """The frozen weight, the adapter and its two moments; for block-stochastic POET mn + 3/2 (m + n)(b - 1)."""
    return m * n + 3 * num_parameters


def full_flops(N, m, n):
    """Forward and backward of a linear layer trained in full."""
    return 6 * N * m * n


def map_flops(m, n, b):
    """Two b x b products a block for the Cayley-Neumann map of both sides, and twice that for its gradient."""
    return 12 * (m + n) * b**2


def poet_flops(N, m, n, b, is_first=True):
    """The cheapest of the three ways to compute a rotated layer, forward and backward.

    Only the first micro-batch after an optimizer step builds `R W P` and the rotations' blocks.
    """
    by_input = 4 * N * m * n + 6 * N * b * (m + n)
    building = 4 * m * n * b if is_first else 0
    tangent = 4 * N * m * n + 2 * N * b * (m + n) + building
    by_weight = 6 * N * m * n + 4 * m * n * b + building
    return min(by_input, tangent, by_weight) + map_flops(m, n, b)


def boft_flops(N, m, n):
    """PEFT's BOFT: a full linear layer, its dense n x n rotation made of two products, and its product with W."""
    return full_flops(N, m, n) + 12 * n**3 + 6 * m * n**2


def full_memory(N, m, n):
    """Numbers held between forward and backward: weight, gradient, two moments, the input."""
    return 4 * m * n + N * n


def poet_memory(N, m, n, b, copies=1):
    """The same for POET; `copies` is 1 where `R W P` is kept beside the weight, 0 where it is not."""
    return (1 + copies) * m * n + 4 * poet_parameters(m, n, b) + N * n
