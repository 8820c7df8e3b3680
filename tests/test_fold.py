"""Folding rotations into the weights: it changes no output and no singular value, and begins anew at the identity."""

import functools
import math

import pytest
import torch
from cases import (
    FEW,
    PLAIN,
    Case,
    TwoLayers,
    base_layer,
    dense_output,
    dense_rotation,
    dense_weight,
    for_cases,
    for_every_case,
    for_few,
    for_few_float32_cases,
    for_few_float64_cases,
    inputs,
    is_float32,
    matrix,
    normal,
    randomize,
    relative_error,
    rotated,
    wrap,
)

from poet_peft import POETConfig, POETFoldError, merge_and_reinitialize
from poet_peft.maths.blocks import draw_index, partition_side
from poet_peft.weights.residual import join, split


# Largest relative change of the output: rounding of the folded weight.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

for_both_16_bit_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])

# Below an angle of about 0.03 the orthogonal matrix next to a series is folded instead of the series.
for_every_series = for_cases(lambda case: case.is_series)


def periodic(case, theta=0.4, **overrides):
    return rotated(case, theta=theta, **{"merge_interval": 10, "max_drift": 10.0, **overrides})


def two_layers(**overrides):
    settings = {"target_modules": ["first", "second"], "block_size": 4, "merge_interval": 10}
    model = wrap(TwoLayers(), POETConfig(**{**settings, **overrides}))
    randomize(model, 0.4)
    return model


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    # As bytes, so that NaN equals itself.
    different = [name for name in before if not same_bits(after[name], before[name])]
    assert different == []


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def singular_values(layer):
    return torch.linalg.svdvals(matrix(layer.get_base_layer()))


# The function that the model computes


def assert_fold_changes_no_output(case, theta):
    model, layer = periodic(case, theta)
    x = inputs(case, 50)
    before = model(x)
    merge_and_reinitialize(model)
    assert relative_error(model(x), before) < TOLERANCE[case.dtype]


@for_few
def test_fold_changes_no_output(case):
    assert_fold_changes_no_output(case, theta=0.4)


def test_fold_of_a_small_angle_of_a_series_changes_no_output():
    assert_fold_changes_no_output(Case("series", adaptive_terms=False), theta=0.02)


def assert_folded_weight_is_the_effective_weight(case, theta):
    model, layer = periodic(case, theta)
    exact = dense_weight(case, layer)
    merge_and_reinitialize(model)
    rounding = 0.5 * torch.finfo(case.dtype).eps * exact.abs()
    arithmetic = 1e-14 if case.dtype == torch.float64 else 2e-6
    assert ((matrix(layer.get_base_layer()) - exact).abs() <= rounding + arithmetic).all()


@for_every_case
def test_folded_weight_is_the_effective_weight_rounded_once(case):
    assert_folded_weight_is_the_effective_weight(case, theta=0.4)


@for_every_series
def test_folded_weight_of_a_small_angle_is_the_effective_weight_rounded_once(case):
    assert_folded_weight_is_the_effective_weight(case, theta=0.02)


@for_few
def test_folded_layer_is_the_base_layer(case):
    """Right after a fold the rotations are the identity, whatever index they would act on."""
    model, layer = periodic(case)
    merge_and_reinitialize(model)
    x = inputs(case, 5)
    assert relative_error(layer(x), layer.get_base_layer()(x)) < 2 * torch.finfo(case.dtype).eps


def test_fold_leaves_the_bias_alone():
    model, layer = periodic(PLAIN)
    merge_and_reinitialize(model)
    assert torch.equal(layer.get_base_layer().bias, base_layer(PLAIN).bias)


def test_fold_without_reinitialization_changes_no_output_either():
    model, _ = periodic(PLAIN)
    x = inputs(PLAIN, 50)
    before = model(x)
    merge_and_reinitialize(model, reinitialize=False)
    assert relative_error(model(x), before) < TOLERANCE[torch.float32]


def test_second_fold_goes_on_from_the_first():
    model, layer = periodic(PLAIN)
    merge_and_reinitialize(model)
    randomize(model, 0.4, seed=30)
    x = inputs(PLAIN, 50)
    expected = dense_output(PLAIN, layer, x)
    merge_and_reinitialize(model)
    assert relative_error(model(x), expected) < TOLERANCE[torch.float32]


def test_fold_under_autocast_is_computed_in_full_precision():
    model, layer = periodic(PLAIN)
    exact = dense_weight(PLAIN, layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge_and_reinitialize(model)
    assert relative_error(matrix(layer.get_base_layer()), exact) < TOLERANCE[torch.float32]


def test_fold_does_not_move_the_global_generator():
    model, _ = periodic(PLAIN)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    merge_and_reinitialize(model)
    assert torch.equal(torch.get_rng_state(), before)


# Singular values


@for_cases(
    lambda case: is_float32(case) and (case.name in FEW or case.orthogonal_map == "cayley") and not case.is_series
)
def test_exact_map_keeps_singular_values(case):
    model, layer = periodic(case)
    before = singular_values(layer)
    report = merge_and_reinitialize(model)
    assert report.spectral_drift < 1e-6
    assert (singular_values(layer) - before).abs().max() < 2e-6 * before[0]


@for_cases(lambda case: case.is_series and case.dtype == torch.float32 and case.num_neumann_terms > 2)
def test_series_of_a_small_angle_keeps_singular_values(case):
    model, layer = periodic(case, theta=0.02)
    before = singular_values(layer)
    report = merge_and_reinitialize(model)
    assert report.spectral_drift < 1e-6
    assert (singular_values(layer) - before).abs().max() < 2e-6 * before[0]


@pytest.mark.parametrize("theta", [0.02, 0.1, 0.4])
@for_few_float64_cases
def test_fold_changes_singular_values_by_the_reported_drift_at_most(case, theta):
    model, layer = periodic(case, theta)
    before = singular_values(layer)
    report = merge_and_reinitialize(model)
    change = (singular_values(layer) / before - 1).abs().max()
    assert change <= report.spectral_drift + 1e-12


def worst_fold(k, theta, both_sides=True):
    """Largest change of a singular value, and the report: the identity as weight, turned by the same blocks from both
    sides, so that every defect of the series adds up; or from one side only."""
    series = {"num_neumann_terms": k, "adaptive_terms": False}
    case = Case("worst", 64, 64, block_size=32, bias=False, dtype=torch.float64, **series)
    model, layer = periodic(case, theta)
    R, P = layer.rotations("default")
    with torch.no_grad():
        layer.get_base_layer().weight.copy_(torch.eye(64))
        P.weight.copy_(R.weight * both_sides)
        P.index.copy_(R.index)
    report = merge_and_reinitialize(model)
    return float((singular_values(layer) - 1).abs().max()), report


@pytest.mark.parametrize(
    ("k", "theta", "both_sides"),
    [*((k, 0.4, True) for k in range(1, 9)), (3, 0.1, True), (3, 0.8, True), (3, 0.4, False), (2, 0.8, False)],
)
def test_reported_drift_bounds_the_worst_weight_and_rotations(k, theta, both_sides):
    change, report = worst_fold(k, theta, both_sides)
    assert change <= report.spectral_drift + 1e-12


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_reported_drift_is_not_far_above_the_worst_weight_and_rotations(k):
    change, report = worst_fold(k, theta=0.4)
    assert report.spectral_drift < 2 * change


@pytest.mark.parametrize("k", [1, 3])
def test_reported_drift_bounds_rotations_beyond_the_convergence_of_the_series(k):
    series = {"num_neumann_terms": k, "adaptive_terms": False}
    case = Case("beyond", 32, 32, block_size=16, dtype=torch.float64, **series)
    model, layer = periodic(case, theta=2.0, max_drift=1e9)
    before = singular_values(layer)
    report = merge_and_reinitialize(model)
    assert (singular_values(layer) / before - 1).abs().max() <= report.spectral_drift + 1e-12


@functools.cache
def drift_of_many_folds(case, compensated_folds=True):
    """Largest change of a singular value in 200 folds, relative to the largest, and the layer."""
    model, layer = periodic(case, compensated_folds=compensated_folds)
    before = singular_values(layer)
    for step in range(200):
        randomize(model, 0.02, seed=100 + 2 * step)
        merge_and_reinitialize(model)
    return float((singular_values(layer) - before).abs().max() / before[0]), layer


MANY_FOLDS = {
    "adaptive": PLAIN,
    "series": Case("series", adaptive_terms=False),
    "exact": Case("exact", orthogonal_map="cayley"),
}


@pytest.mark.parametrize("case", MANY_FOLDS.values(), ids=MANY_FOLDS)
def test_many_folds_of_small_angles_do_not_wear_singular_values_down(case):
    drift, layer = drift_of_many_folds(case)
    assert layer.state("default").num_folds == 200
    assert drift < 1e-4


def test_many_folds_turn_the_weight():
    """Otherwise the test above could not fail."""
    _, layer = drift_of_many_folds(PLAIN)
    assert relative_error(matrix(layer.get_base_layer()), matrix(base_layer(PLAIN))) > 0.1


@for_both_16_bit_dtypes
def test_many_folds_of_a_low_precision_weight_drift_by_its_rounding_only(dtype):
    drift, _ = drift_of_many_folds(Case("low", dtype=dtype))
    assert drift < torch.finfo(dtype).eps / 8


def test_many_folds_without_compensation_drift_further():
    compensated, _ = drift_of_many_folds(Case("low", dtype=torch.bfloat16))
    plain, _ = drift_of_many_folds(Case("low", dtype=torch.bfloat16), compensated_folds=False)
    assert plain > 4 * compensated


# The residual of a 16-bit weight


def awkward_numbers():
    """Many sizes, and the neighbours of powers of two, where the last place changes."""
    sizes = torch.cat([normal(500, seed=e + 10) * 10.0**e for e in range(-7, 5)]).clamp(-6e4, 6e4)
    powers = 2.0 ** torch.arange(-16, 15)
    eps = torch.finfo(torch.float32).eps
    return torch.cat([sizes, powers, -powers, powers * (1 - eps / 2), powers * (1 + eps), torch.zeros(1)])


@for_both_16_bit_dtypes
def test_weight_and_residual_together_hold_the_float32_value(dtype):
    value = awkward_numbers()
    rounded, rest = split(value, dtype)
    assert torch.equal(rounded, value.to(dtype))
    assert rest.nbytes == 2 * value.numel()
    smallest = 2.0**-40  # of float16, which has no digits below 2^-24
    assert ((join(rounded, rest) - value).abs() <= torch.finfo(torch.float32).eps * value.abs() + smallest).all()


@for_both_16_bit_dtypes
def test_weight_without_residual_is_itself(dtype):
    weight = awkward_numbers().to(dtype)
    rounded, rest = split(weight.float(), dtype)
    assert torch.equal(rounded, weight)
    assert not rest.any()
    assert torch.equal(join(weight, rest), weight.float())


@for_both_16_bit_dtypes
def test_second_fold_goes_on_from_the_unrounded_weight(dtype):
    case = Case("low", dtype=dtype)
    model, layer = periodic(case)
    exact = matrix(layer.get_base_layer())
    for seed in (30, 40):
        randomize(model, 0.4, seed=seed)
        R = dense_rotation(case, case.out_features, layer.poet_R)
        P = dense_rotation(case, case.in_features, layer.poet_P)
        exact = R @ exact @ P
        merge_and_reinitialize(model)
    rounding = 0.5 * torch.finfo(dtype).eps * exact.abs()
    assert ((matrix(layer.get_base_layer()) - exact).abs() <= rounding + 4e-6).all()


@for_few
def test_residual_is_kept_for_16_bit_weights_in_periodic_training_only(case):
    low = case.dtype in (torch.bfloat16, torch.float16)
    for overrides, kept in (
        ({"merge_interval": 10}, low),
        ({"merge_interval": 10, "compensated_folds": False}, False),
        ({"merge_interval": 0}, False),
    ):
        _, layer = rotated(case, **overrides)
        assert ("default" in layer.poet_residual) == kept


# What is left behind


@for_few
def test_rotations_are_zero_afterwards(case):
    model, layer = periodic(case)
    assert any(rotation.weight.any() for rotation in layer.rotations("default"))
    merge_and_reinitialize(model)
    assert not any(rotation.weight.any() for rotation in layer.rotations("default"))


@for_few
def test_index_is_redrawn_with_every_reinitialisation(case):
    model, layer = periodic(case, seed=7)
    for num_reinits in (1, 2):
        merge_and_reinitialize(model)
        for side, dim in (("R", case.out_features), ("P", case.in_features)):
            rotations = layer.poet_R if side == "R" else layer.poet_P
            if "default" in rotations:
                groups = getattr(layer.get_base_layer(), "groups", 1) if side == "R" else 1
                partition = partition_side(case.variant, case.block_size, dim, groups)
                expected = draw_index(partition, seed=7, module_name="layer", side=side, num_reinits=num_reinits)
                assert torch.equal(rotations["default"].index, expected)


def test_index_changes_with_a_reinitialisation():
    """Otherwise the test above could not fail."""
    model, layer = periodic(PLAIN)
    before = [rotation.index.clone() for rotation in layer.rotations("default")]
    merge_and_reinitialize(model)
    after = [rotation.index for rotation in layer.rotations("default")]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@for_few
def test_index_is_kept_without_reinitialization(case):
    model, layer = periodic(case)
    before = [rotation.index.clone() for rotation in layer.rotations("default")]
    merge_and_reinitialize(model, reinitialize=False)
    after = [rotation.index for rotation in layer.rotations("default")]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_folds_and_reinitialisations_are_counted():
    model, layer = periodic(PLAIN)
    counts = [(layer.state("default").num_reinits, layer.state("default").num_folds)]
    for reinitialize in (True, False, False, True):
        report = merge_and_reinitialize(model, reinitialize=reinitialize)
        counts.append((layer.state("default").num_reinits, layer.state("default").num_folds))
        assert report.num_reinits == layer.state("default").num_reinits
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3), (2, 4)]


@for_few
def test_weights_are_written_in_place(case):
    model, layer = periodic(case)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    before = {name: (id(tensor), tensor.data_ptr(), tensor.requires_grad) for name, tensor in tensors.items()}
    merge_and_reinitialize(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert {name: (id(t), t.data_ptr(), t.requires_grad) for name, t in tensors.items()} == before


def test_every_layer_is_folded():
    model = two_layers()
    x = normal(30, 12)
    before = model(x)
    weights = snapshot(model)
    report = merge_and_reinitialize(model)
    assert report.num_layers == 2
    assert relative_error(model(x), before) < TOLERANCE[torch.float32]
    for name in ("first", "second"):
        key = f"base_model.model.{name}.base_layer.weight"
        assert not torch.equal(model.state_dict()[key], weights[key])


def test_fold_needs_no_wrapper():
    model, layer = periodic(PLAIN)
    report = merge_and_reinitialize(model.base_model.model)
    assert (report.num_layers, layer.state("default").num_folds) == (1, 1)


# The report


@for_few_float32_cases
def test_report_describes_the_fold(case):
    model, layer = periodic(case)
    sides = ((layer.poet_R, case.out_features), (layer.poet_P, case.in_features))
    dense = [dense_rotation(case, dim, rotations) for rotations, dim in sides]
    identities = [torch.eye(dim, dtype=torch.float64) for _, dim in sides]
    defect = max(float((G.T @ G - identity).abs().max()) for G, identity in zip(dense, identities, strict=True))
    theta = max(
        float(torch.linalg.matrix_norm(Q.detach(), 2).max())
        for rotation in layer.rotations("default")
        for Q in rotation().blocks().Q
    )
    report = merge_and_reinitialize(model)
    assert report.num_layers == 1
    assert report.orthogonality_error == pytest.approx(defect, abs=1e-6)
    assert 0.95 * theta < math.tan(report.max_rotation_angle / 2) < 1.0001 * theta
    assert report.relative_output_change < 2e-6
    assert report.num_states_reset == 0


@for_both_16_bit_dtypes
def test_report_shows_the_rounding_of_the_weight(dtype):
    model, _ = periodic(Case("low", dtype=dtype))
    change = merge_and_reinitialize(model).relative_output_change
    assert torch.finfo(dtype).eps / 20 < change < torch.finfo(dtype).eps


# Refusals


def refusal_while_merged():
    model = two_layers()
    model.base_model.model.second.merge()
    return model, "second", r"merged into its weight.*unmerge_adapter"


def refusal_with_two_adapters():
    model = two_layers()
    config = POETConfig(target_modules=["second"], block_size=4, merge_interval=10)
    model.add_adapter("other", config)
    return model, "second", "carries the adapters.*'default', 'other'"


def refusal_without_merge_interval():
    return two_layers(merge_interval=0), "first", "merge_interval=0"


def refusal_of(value, side):
    def build():
        model = two_layers()
        rotation = getattr(model.base_model.model.second, f"poet_{side}")["default"]
        with torch.no_grad():
            rotation.weight[0] = value
        return model, "second", f"rotation {side}.*NaN or infinite"

    return build


REFUSALS = {
    "merged": refusal_while_merged,
    "two-adapters": refusal_with_two_adapters,
    "merge_interval-0": refusal_without_merge_interval,
    "nan-R": refusal_of(math.nan, "R"),
    "nan-P": refusal_of(math.nan, "P"),
    "infinite-R": refusal_of(math.inf, "R"),
}
for_every_refusal = pytest.mark.parametrize("build", REFUSALS.values(), ids=REFUSALS)


@for_every_refusal
def test_refused_fold_says_why_and_names_the_module(build):
    model, module, message = build()
    with pytest.raises(POETFoldError, match=f"(?s){message}") as caught:
        merge_and_reinitialize(model)
    assert module in str(caught.value)


@for_every_refusal
def test_refused_fold_changes_nothing(build):
    model, _, _ = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = snapshot(model)
    states = {id(p): {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    with pytest.raises(POETFoldError):
        merge_and_reinitialize(model, optimizer)
    assert_unchanged(model, before)
    assert states.keys() == {id(parameter) for parameter in optimizer.state}
    assert all(torch.equal(state[key], states[id(p)][key]) for p, state in optimizer.state.items() for key in state)


def test_fold_that_would_overflow_is_refused_and_changes_nothing():
    """Finite parameters, but `Q^4` is not."""
    model = two_layers(adaptive_terms=False)
    with torch.no_grad():
        model.base_model.model.second.poet_P["default"].weight.fill_(1e15)
    before = snapshot(model)
    with pytest.raises(POETFoldError, match="second"):
        merge_and_reinitialize(model)
    assert_unchanged(model, before)


def test_model_without_rotated_layers_is_refused():
    with pytest.raises(ValueError, match="no POET layer"):
        merge_and_reinitialize(TwoLayers())


def test_fold_goes_through_once_the_obstacle_is_gone():
    model, _, _ = refusal_while_merged()
    model.base_model.model.second.unmerge()
    assert merge_and_reinitialize(model).num_layers == 2
    model, _, _ = refusal_with_two_adapters()
    model.delete_adapter("other")
    assert merge_and_reinitialize(model).num_layers == 2


# Drift


def largest_change(layer, before):
    """Of a singular value, over the largest one."""
    return float((singular_values(layer) - before).abs().max() / before[0])


@pytest.mark.parametrize("theta", [0.02, 0.2, 0.5, 2.0])
def test_many_folds_keep_singular_values(theta):
    """With default settings, whatever the angle: only rounding is left of a drift."""
    model, layer = periodic(Case("square", 32, 32, block_size=16, bias=False))
    before = singular_values(layer)
    for seed in range(100):
        randomize(model, theta, seed=1000 + seed)
        merge_and_reinitialize(model)
    assert largest_change(layer, before) < 1e-5


def test_long_adapter_runs_keep_singular_values():
    """Without folds the angle grows with every step; the series alone would have left its range."""
    model, layer = rotated(Case("square", 32, 32, block_size=32, bias=False), theta=0.0)
    before = singular_values(layer)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(r.weight.numel(), generator=generator) * 1.7e-3 / 8 for r in layer.rotations("default")]
    for num_steps in (300, 1000, 2500):
        with torch.no_grad():
            for rotation, direction in zip(layer.rotations("default"), directions, strict=True):
                rotation.weight.copy_(num_steps * direction)
        effective = layer(torch.eye(32)).detach().T.double()
        change = (torch.linalg.svdvals(effective) - before).abs().max() / before[0]
        assert change < 1e-5
    assert max(rotation.angle() for rotation in layer.rotations("default")) > 1


@pytest.mark.parametrize("theta, outcome", [(0.25, "warns"), (0.9, "raises")])
def test_drift_of_a_series_out_of_its_range_is_named(theta, outcome):
    model, layer = rotated(PLAIN, theta=theta, merge_interval=10, adaptive_terms=False, max_drift=1e-3)
    before = snapshot(model)
    if outcome == "warns":
        with pytest.warns(UserWarning, match="folding 'layer' changes singular values by up to .*max_drift=0.001"):
            merge_and_reinitialize(model)
    else:
        with pytest.raises(POETFoldError, match="folding 'layer' changes singular values by up to .*adaptive_terms"):
            merge_and_reinitialize(model)
        assert_unchanged(model, before)
