"""The maps from skew-symmetric to orthogonal matrices, against independent float64 formulas."""

import pytest
import torch
from cases import normal
from torch._subclasses.fake_tensor import FakeTensorMode

from poet_peft.maths import orthogonal
from poet_peft.maths.orthogonal import (
    CayleyNeumann,
    cayley,
    cayley_by_series,
    cayley_delta,
    cayley_neumann,
    cayley_neumann_delta,
    skew,
    small_rotation_delta,
    upper_triangle,
)
from poet_peft.maths.spectrum import orthogonality_error, skew_norm, spectrum_bound


SIZES = (1, 2, 3, 8, 33)
NUM_TERMS = range(1, 9)
MAPS = {"cayley": (cayley, cayley_delta), "cayley_neumann": (cayley_neumann, cayley_neumann_delta)}

for_every_size = pytest.mark.parametrize("n", SIZES)
# Positions of the entries of the large one are not kept.
for_every_size_and_a_large_one = pytest.mark.parametrize("n", [*SIZES, 1030])
for_every_num_terms = pytest.mark.parametrize("k", NUM_TERMS)
for_every_size_or_num_terms = pytest.mark.parametrize(
    ("n", "k"), [*((n, 3) for n in SIZES), *((8, k) for k in NUM_TERMS if k != 3)]
)
for_every_size_or_scale = pytest.mark.parametrize(
    ("n", "scale"), [*((n, 1.0) for n in SIZES), *((8, scale) for scale in (1e-6, 1e-3, 10.0, 1e3))]
)
for_every_size_or_angle = pytest.mark.parametrize(("n", "theta"), [*((n, 0.1) for n in SIZES), (8, 1e-6), (8, 0.9)])
for_both_maps = pytest.mark.parametrize("name", MAPS)
for_both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def skew_by_hand(n, scale, seed=0, dtype=torch.float64):
    """A skew-symmetric matrix with normal entries, made without `skew`."""
    upper = torch.triu(normal(n, n, seed=seed), diagonal=1).double() * scale
    return (upper - upper.T).to(dtype)


def skew_of_norm(n, theta, seed=0, dtype=torch.float64):
    Q = skew_by_hand(n, 1.0, seed)
    return (Q * (theta / largest_singular_value(Q)) if n > 1 else Q).to(dtype)


def largest_singular_value(Q):
    return float(torch.linalg.svdvals(Q.double())[0])


def power_series(Q, k):
    """`I + 2 Q + ... + 2 Q^k + Q^(k+1)` term by term, in float64."""
    Q = Q.double()
    identity = torch.eye(Q.shape[-1], dtype=torch.float64)
    middle = sum(2 * torch.linalg.matrix_power(Q, power) for power in range(1, k + 1))
    return identity + middle + torch.linalg.matrix_power(Q, k + 1)


# skew


@for_every_size
def test_skew_is_skew_symmetric(n):
    Q = skew(normal(3, n * (n - 1) // 2), n)
    assert Q.shape == (3, n, n)
    assert torch.equal(Q.mT, -Q)


def test_skew_fills_the_strict_upper_triangle_row_by_row():
    Q = skew(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), 4)
    assert torch.equal(
        Q,
        torch.tensor([[0.0, 1.0, 2.0, 3.0], [-1.0, 0.0, 4.0, 5.0], [-2.0, -4.0, 0.0, 6.0], [-3.0, -5.0, -6.0, 0.0]]),
    )


def test_skew_keeps_leading_dimensions_apart():
    upper = normal(2, 3, 10)
    Q = skew(upper, 5)
    assert Q.shape == (2, 3, 5, 5)
    for i in range(2):
        for j in range(3):
            assert torch.equal(Q[i, j], skew(upper[i, j], 5))


@for_every_size_and_a_large_one
def test_upper_triangle_is_what_skew_was_made_of(n):
    upper = normal(3, n * (n - 1) // 2)
    assert torch.equal(upper_triangle(skew(upper, n)), upper)


@for_every_size_and_a_large_one
def test_skew_is_the_same_with_a_gradient(n):
    upper = normal(3, n * (n - 1) // 2)
    assert torch.equal(skew(upper.clone().requires_grad_(), n), skew(upper, n))


def test_gradient_of_skew_is_that_of_its_entries():
    upper = normal(2, 10).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda upper: skew(upper, 5), upper)


@pytest.mark.parametrize("made_in", [torch.inference_mode, FakeTensorMode])
def test_positions_of_entries_serve_training_wherever_they_were_made(made_in):
    orthogonal._kept_entries.cache_clear()
    with made_in():
        upper_triangle(skew(torch.zeros(1, 10), 5))
    Q = skew_by_hand(5, 1.0).requires_grad_()
    upper_triangle(Q).sum().backward()
    assert torch.equal(Q.grad, torch.ones(5, 5, dtype=torch.float64).triu(1))


@pytest.mark.parametrize("number", [0, 5, 7, 16])
def test_skew_refuses_a_wrong_number_of_parameters(number):
    with pytest.raises(ValueError, match=rf"4 x 4 matrix has 6 parameters, got {number}"):
        skew(torch.zeros(number), 4)


# cayley


@for_every_size_or_scale
def test_cayley_is_orthogonal_in_float64(n, scale):
    assert orthogonality_error(cayley(skew_by_hand(n, scale))) < 1e-11


@for_every_size_or_scale
def test_cayley_in_float32_is_orthogonal_to_the_rounding_of_its_solve(n, scale):
    Q = skew_by_hand(n, scale, dtype=torch.float32)
    G = cayley(Q)
    assert G.dtype == torch.float32
    # The condition number of I - Q is at most 1 + theta.
    assert orthogonality_error(G) < 32 * torch.finfo(torch.float32).eps * (1 + largest_singular_value(Q))


def test_cayley_turns_a_plane_by_twice_the_arc_tangent():
    G = cayley(torch.tensor([[0.0, -0.75], [0.75, 0.0]], dtype=torch.float64))
    angle = 2 * torch.atan(torch.tensor(0.75, dtype=torch.float64))
    expected = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    torch.testing.assert_close(G, expected, rtol=0, atol=1e-15)


@for_every_size
def test_cayley_is_the_product_with_the_inverse(n):
    Q = skew_by_hand(n, 0.3)
    identity = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(cayley(Q), (identity + Q) @ torch.linalg.inv(identity - Q), rtol=0, atol=1e-13)


# cayley_neumann


@for_every_size_or_num_terms
def test_cayley_neumann_is_its_power_series(n, k):
    Q = skew_of_norm(n, 0.6)
    torch.testing.assert_close(cayley_neumann(Q, k), power_series(Q, k), rtol=0, atol=1e-14)


def test_cayley_neumann_has_three_terms_by_default():
    Q = skew_of_norm(8, 0.6)
    assert torch.equal(cayley_neumann(Q), cayley_neumann(Q, 3))


@pytest.mark.parametrize(("k", "theta"), [*((k, 0.3) for k in NUM_TERMS), (3, 0.05), (3, 0.9), (2, 0.9)])
def test_singular_values_of_cayley_neumann_lie_within_its_bound(theta, k):
    Q = torch.stack([skew_of_norm(16, theta, seed=seed) for seed in range(4)])
    values = torch.linalg.svdvals(cayley_neumann(Q, k))
    assert float((values - 1).abs().max()) <= theta ** (k + 1) + 1e-14


@for_every_num_terms
def test_cayley_neumann_is_no_better_than_its_bound(k):
    """Otherwise the bound of the test above could not fail. (For even `k` the error is of second order in it.)"""
    theta = 0.5
    error = float((torch.linalg.svdvals(cayley_neumann(skew_of_norm(16, theta), k)) - 1).abs().max())
    expected = theta ** (k + 1) if k % 2 else (1 + theta ** (2 * k + 2)) ** 0.5 - 1
    assert error == pytest.approx(expected, rel=1e-9)


@for_every_size_or_num_terms
def test_cayley_neumann_is_cayley_times_its_defect(n, k):
    Q = skew_of_norm(n, 0.7)
    defect = torch.eye(n, dtype=torch.float64) - torch.linalg.matrix_power(Q, k + 1)
    torch.testing.assert_close(cayley_neumann(Q, k), defect @ cayley(Q), rtol=0, atol=1e-13)


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_cayley_is_the_orthogonal_matrix_next_to_an_odd_series(k):
    Q = skew_of_norm(8, 0.6)
    U, _, Vh = torch.linalg.svd(cayley_neumann(Q, k))
    torch.testing.assert_close(U @ Vh, cayley(Q), rtol=0, atol=1e-13)


@pytest.mark.parametrize("function", [cayley_neumann, cayley_neumann_delta])
@pytest.mark.parametrize("num_terms", [0, -1])
def test_series_without_terms_is_refused(function, num_terms):
    with pytest.raises(ValueError, match=f"num_terms must be at least 1, got {num_terms}"):
        function(torch.zeros(4, 4), num_terms)


# Both maps


@for_both_maps
@for_both_dtypes
def test_zero_gives_the_identity_exactly(name, dtype):
    map_, delta = MAPS[name]
    Q = torch.zeros(3, 5, 5, dtype=dtype)
    assert torch.equal(map_(Q), torch.eye(5, dtype=dtype).expand(3, 5, 5))
    assert not delta(Q).any()


@for_both_maps
@for_both_dtypes
def test_maps_keep_the_dtype(name, dtype):
    assert [f(skew_of_norm(5, 0.3, dtype=dtype)).dtype for f in MAPS[name]] == [dtype, dtype]


@for_every_size_or_angle
def test_cayley_delta_is_the_map_minus_the_identity(n, theta):
    Q = skew_of_norm(n, theta)
    identity = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(cayley_delta(Q), cayley(Q) - identity, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("k", "theta"), [*((k, 0.9) for k in NUM_TERMS), (3, 1e-6), (4, 0.1)])
def test_cayley_neumann_delta_is_the_series_minus_the_identity(k, theta):
    Q = skew_of_norm(8, theta)
    identity = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(cayley_neumann_delta(Q, k), power_series(Q, k) - identity, rtol=0, atol=2e-15)


@for_both_maps
def test_delta_keeps_digits_that_the_map_rounds_away(name):
    """Near the identity the diagonal of `G` is 1 - O(theta^2), which float32 rounds to 1."""
    map_, delta = MAPS[name]
    Q = skew_of_norm(8, 1e-5, dtype=torch.float32)
    exact = delta(Q.double()).diagonal()
    kept = delta(Q).diagonal()
    rounded = (map_(Q) - torch.eye(8)).diagonal()
    assert (kept - exact).norm() < 0.01 * exact.norm()
    assert (rounded - exact).norm() > 0.5 * exact.norm()


@for_both_maps
def test_leading_dimensions_are_batch(name):
    Q = torch.stack([skew_of_norm(6, 0.1 * (i + 1), seed=i) for i in range(6)]).view(2, 3, 6, 6)
    for f in MAPS[name]:
        whole = f(Q)
        assert whole.shape == (2, 3, 6, 6)
        for i in range(2):
            for j in range(3):
                torch.testing.assert_close(whole[i, j], f(Q[i, j]), rtol=0, atol=1e-15)


@for_both_maps
def test_maps_of_an_empty_batch_are_empty(name):
    assert [f(torch.zeros(0, 4, 4)).shape for f in MAPS[name]] == [(0, 4, 4), (0, 4, 4)]


# orthogonality_error, spectrum_bound and skew_norm


def test_orthogonality_error_is_the_largest_entry_over_the_batch():
    G = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    G[1, 0, 2] = 0.25
    # (G^T G - I) has 0.25 off the diagonal, and 0.0625 on it.
    assert float(orthogonality_error(G)) == 0.25


def test_orthogonality_error_of_nothing_is_zero():
    assert float(orthogonality_error(torch.zeros(0, 3, 3))) == 0


@pytest.mark.parametrize(
    ("n", "theta", "k"),
    [*((n, 0.4, 3) for n in SIZES), *((8, 0.4, k) for k in (1, 2, 5, 8)), (8, 0.02, 3), (8, 2.0, 3), (33, 2.0, 8)],
)
def test_spectrum_bound_holds_all_singular_values(n, theta, k):
    G = torch.stack([cayley_neumann(skew_of_norm(n, theta, seed=seed), k) for seed in range(4)])
    largest = (torch.linalg.svdvals(G) ** 2 - 1).abs().amax(-1)
    bound = spectrum_bound(G)
    assert bound.shape == (4,)
    assert (largest <= bound + 1e-13).all()
    assert (bound <= 1.2 * largest + 1e-13).all()


@pytest.mark.parametrize("n", [2, 8, 33])
def test_spectrum_bound_of_an_orthogonal_matrix_is_zero_to_rounding(n):
    assert float(spectrum_bound(cayley(skew_by_hand(n, 1.0)))) < 1e-13
    assert float(spectrum_bound(torch.eye(n))) < 1e-30


@pytest.mark.parametrize("n", [2, 3, 8, 33, 64])
def test_skew_norm_is_a_lower_bound_within_a_few_percent(n):
    Q = torch.stack([skew_by_hand(n, 1.0, seed) for seed in range(20)])
    exact = torch.linalg.svdvals(Q)[:, 0]
    ratio = skew_norm(Q) / exact
    assert float(ratio.max()) <= 1 + 1e-12
    assert float(ratio.min()) > 0.95


def test_skew_norm_gives_one_number_for_each_matrix():
    scales = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.5, 100.0]], dtype=torch.float64)
    Q = skew_of_norm(4, 1.0) * scales[:, :, None, None]
    torch.testing.assert_close(skew_norm(Q, num_iterations=200), scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("plane", [(0, 1), (1, 3), (3, 4), (0, 4)], ids=str)
def test_skew_norm_finds_any_single_plane(plane):
    Q = torch.zeros(5, 5)
    Q[plane] = 0.25
    assert float(skew_norm(Q - Q.T)) == pytest.approx(0.25, rel=1e-6)


# cayley_by_series


ANGLES = [0.0, 1e-3, 0.05, 0.3, 0.7, 2.0, 50.0]


@for_both_dtypes
@pytest.mark.parametrize("theta", ANGLES)
def test_cayley_by_series_is_the_exact_map_to_rounding(theta, dtype):
    Q = torch.stack([skew_of_norm(16, theta, seed=seed) for seed in range(3)]).to(dtype)
    exact = cayley(Q.double()) - torch.eye(16)
    largest = float((cayley_by_series(Q).double() - exact).abs().max())
    assert largest < 64 * torch.finfo(dtype).eps * (1 + theta)


def test_cayley_by_series_solves_for_the_blocks_that_no_series_reaches():
    Q = torch.stack([skew_of_norm(16, theta, seed=3) for theta in (0.1, 30.0, 0.2)])
    assert float((cayley_by_series(Q) - cayley_delta(Q)).abs().max()) < 1e-13


@pytest.mark.parametrize("theta, num_products", [(1e-3, 2), (0.1, 4), (0.3, 6)])
def test_cayley_by_series_takes_two_products_more_for_twice_the_terms(theta, num_products, monkeypatch):
    Q = skew_of_norm(16, theta, dtype=torch.float32)[None]
    count = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (count.append(1), product(a, b))[1])
    cayley_by_series(Q)
    assert len(count) == num_products


@pytest.mark.parametrize("theta", [0.05, 0.6, 3.0])
def test_gradient_of_cayley_by_series_is_the_finite_difference(theta):
    n = 5
    upper = upper_triangle(skew_of_norm(n, theta))[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda upper: cayley_by_series(skew(upper, n)), upper)


def test_cayley_by_series_keeps_what_is_not_finite_to_its_block():
    Q = torch.stack([skew_of_norm(8, 0.1), torch.full((8, 8), torch.nan, dtype=torch.float64)])
    delta = cayley_by_series(Q)
    assert torch.isfinite(delta[0]).all()
    assert torch.isnan(delta[1]).any()


def test_series_is_folded_as_the_orthogonal_matrix_next_to_it_where_that_is_within_rounding():
    """So that many folds of small angles do not wear singular values down."""
    Q = skew_of_norm(2, 0.028, dtype=torch.float32)[None]
    exact = cayley(Q.double()) - torch.eye(2)
    series = CayleyNeumann(3, adaptive=False)
    delta = series.delta(Q)
    assert (delta - exact).abs().max() > 4e-7
    assert (series.fold_delta(Q, delta) - exact).abs().max() < 5e-8


def test_series_of_a_large_angle_is_folded_as_it_is():
    Q = skew_of_norm(2, 0.1, dtype=torch.float32)[None]
    series = CayleyNeumann(3, adaptive=False)
    assert torch.equal(series.fold_delta(Q, series.delta(Q)), series.delta(Q))


# Small rotations


@pytest.mark.parametrize(
    ("theta", "tolerance", "power"), [(0.02, 1e-5, 4), (0.05, 1e-6, 6)], ids=["one-product", "two-products"]
)
def test_small_rotation_is_orthogonal_to_a_power_of_its_angle(theta, tolerance, power):
    G = small_rotation_delta(skew_of_norm(8, theta)[None], tolerance) + torch.eye(8, dtype=torch.float64)
    error = float((torch.linalg.svdvals(G).square() - 1).abs().max())
    assert error < min(4.1 * theta**power, tolerance)
    assert error > 0.1 * theta**power


def test_small_rotation_by_one_product_keeps_singular_values_where_all_planes_turn_alike():
    G = small_rotation_delta(skew_of_norm(2, 0.03)[None], 4e-6) + torch.eye(2, dtype=torch.float64)
    assert float((torch.linalg.svdvals(G) - 1).abs().max()) < 1e-8


@pytest.mark.parametrize(("tolerance", "power"), [(1e-3, 3), (1e-6, 5)], ids=["one-product", "two-products"])
def test_small_rotation_is_near_the_cayley_map(tolerance, power):
    theta = 0.05
    Q = skew_of_norm(8, theta)[None]
    difference = small_rotation_delta(Q, tolerance) - cayley_delta(Q)
    assert float(torch.linalg.matrix_norm(difference, 2)) < 2.02 * theta**power


@pytest.mark.parametrize("theta", [0.2, float("nan")])
def test_larger_rotation_is_left_to_the_map(theta):
    assert small_rotation_delta(skew_of_norm(8, theta)[None], 4e-6) is None
