"""Orthogonalisation of skew-symmetric matrices by matrix products."""

import pytest
import torch
from test_orthogonal import for_both_dtypes, skew_by_hand

from poet_peft.maths.newton_schulz import minimax_coefficients, orthogonalize, product_dtype
from poet_peft.maths.orthogonal import skew, upper_triangle


each_size = pytest.mark.parametrize("n", [2, 3, 8, 33])
# The smallest singular value, over the largest, that so many steps bring to within 0.25 of 1.
REACH = {3: 1.2e-2, 4: 2.8e-3, 5: 6.6e-4}
each_number_of_steps = pytest.mark.parametrize(("num_steps", "smallest"), REACH.items())


def one_matrix(n, scale=1.0, **kwargs):
    return skew_by_hand(n, scale, **kwargs)[None]


@each_size
@for_both_dtypes
def test_singular_values_come_near_one_but_for_those_of_zero(n, dtype):
    values = torch.linalg.svdvals(orthogonalize(one_matrix(n, 5.0, dtype=dtype), num_steps=8))[0]
    assert values[n // 2 * 2 - 1] > 0.74
    assert values[0] < 1.26


@each_number_of_steps
def test_composed_polynomials_stay_within_their_error(num_steps, smallest):
    values = torch.logspace(float(torch.tensor(smallest).log10()), 0, 2000, dtype=torch.float64)
    for a, b, c in minimax_coefficients(num_steps):
        values = a * values + b * values**3 + c * values**5
    assert (values - 1).abs().max() < 0.2501


@each_number_of_steps
def test_no_composition_of_as_many_steps_reaches_much_further(num_steps, smallest):
    """Else the coefficients would not be the best ones."""
    values = torch.tensor(0.8 * smallest, dtype=torch.float64)
    for a, b, c in minimax_coefficients(num_steps):
        values = a * values + b * values**3 + c * values**5
    assert values < 0.75


@each_number_of_steps
def test_all_planes_of_a_wide_spectrum_turn_alike(num_steps, smallest):
    sizes = torch.logspace(float(torch.tensor(2 * smallest).log10()), 0, 8, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    planes = torch.block_diag(*[torch.tensor([[0.0, s], [-s, 0.0]], dtype=torch.float64) for s in sizes])
    values = torch.linalg.svdvals(orthogonalize((turned @ planes @ turned.T)[None], num_steps))
    assert values.min() > 0.74
    assert values.max() < 1.26


@each_size
def test_result_is_skew(n):
    O = orthogonalize(one_matrix(n))
    torch.testing.assert_close(O.mT, -O, rtol=0, atol=1e-12)


@each_size
def test_singular_vectors_stay(n):
    """It commutes with the matrix, and in each plane the sense of rotation stays."""
    Q = one_matrix(n)
    O = orthogonalize(Q)
    torch.testing.assert_close(O @ Q, Q @ O, rtol=0, atol=1e-10)
    assert (torch.linalg.eigvalsh((Q.mT @ O + O.mT @ Q) / 2) > -1e-10).all()


@for_both_dtypes
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(dtype, scale):
    Q = one_matrix(8, dtype=dtype)
    torch.testing.assert_close(orthogonalize(Q * scale), orthogonalize(Q), rtol=1e-4, atol=1e-5)


def test_zero_stays_as_it_is():
    Q = torch.cat([one_matrix(4), torch.zeros(1, 4, 4, dtype=torch.float64)])
    O = orthogonalize(Q)
    assert not O[1].any()
    torch.testing.assert_close(O[:1], orthogonalize(Q[:1]))


def test_singular_values_come_near_one_in_16_bits():
    Q = one_matrix(96, dtype=torch.float32).bfloat16()
    values = torch.linalg.svdvals(skew(upper_triangle(orthogonalize(Q, num_steps=5)).float(), 96))
    assert values.min() > 0.7
    assert values.max() < 1.3


HAS_BF16 = {"avx512_bf16": True, "amx_bf16": False}


@pytest.mark.parametrize(
    ("n", "dtype", "num_steps", "capabilities", "expected"),
    [
        (64, torch.float32, 5, HAS_BF16, torch.bfloat16),
        (64, torch.float32, 5, {}, torch.float32),
        (63, torch.float32, 5, HAS_BF16, torch.float32),
        (64, torch.float32, 6, HAS_BF16, torch.float32),
        (64, torch.float64, 5, HAS_BF16, torch.float64),
    ],
    ids=["fast", "no-instructions", "small-block", "many-steps", "float64"],
)
def test_products_are_in_16_bits_where_that_is_faster_and_precise_enough(
    n, dtype, num_steps, capabilities, expected, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert product_dtype(torch.zeros(1, n, n, dtype=dtype), num_steps) == expected
