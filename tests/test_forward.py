"""The forward of a rotated layer is `R W P x + bias`, built densely in float64, whatever way it is computed."""

import pytest
import torch
from cases import (
    CASES,
    PLAIN,
    TOLERANCE,
    Case,
    base_layer,
    dense_output,
    dense_rotation,
    dense_weight,
    for_cases,
    for_every_case,
    for_every_shape,
    for_few,
    for_few_cases,
    for_few_float32_cases,
    for_few_linear_cases,
    inputs,
    is_float32,
    matrix,
    normal,
    output_with,
    randomize,
    relative_error,
    rotated,
    with_gradient,
)
from torch.utils.checkpoint import checkpoint

from poet_peft.ops import paths, reference


MANY = 200  # tokens: enough for the weight-centric path in every case with two sides

LEADING = [(), (1,), (5,), (2, 3), (2, 1, 3), (MANY,)]

for_every_leading_shape = pytest.mark.parametrize("leading", LEADING, ids=str)
for_both_kinds = for_cases(lambda case: case.name in ("no-bias", "conv1d-remainder"))
for_every_path = pytest.mark.parametrize("path", paths.PATHS)
for_few_and_many_tokens = pytest.mark.parametrize("num_tokens", [3, MANY])


def tensors(layer):
    """The arguments of a path after `x`: weight, bias, R, P."""
    base = layer.get_base_layer()
    weight = base.weight.mT if type(base).__name__ == "Conv1D" else base.weight
    R, P = layer.sides(list(layer.poet_config))
    return weight, base.bias, R, P


def effective_weight(layer):
    """By the reference."""
    weight, _, R, P = tensors(layer)
    return reference.effective_weight(weight, *([(s.index, s.deltas()) for s in sides] for sides in (R, P)))


# Values


@for_every_case
def test_forward_is_the_dense_rotation_of_weight_and_input(case):
    _, layer = rotated(case)
    x = inputs(case, MANY)
    y = layer(x)
    assert y.dtype == case.dtype
    assert relative_error(y, dense_output(case, layer, x)) < TOLERANCE[case.dtype]


@for_every_leading_shape
@for_both_kinds
def test_forward_takes_any_leading_dimensions(case, leading):
    _, layer = rotated(case)
    x = inputs(case, *leading)
    y = layer(x)
    assert (y.shape, y.dtype) == ((*leading, case.out_features), case.dtype)
    assert relative_error(y, dense_output(case, layer, x)) < TOLERANCE[case.dtype]


def test_rotations_of_the_table_change_the_output():
    """Otherwise the other tests of this file could not fail."""
    for case in CASES:
        _, layer = rotated(case)
        x = inputs(case, 5)
        assert relative_error(layer(x), layer.get_base_layer()(x)) > 10 * TOLERANCE[case.dtype], case.name


@for_few
def test_forward_in_inference_mode_is_the_same_function(case):
    _, layer = rotated(case)
    x = inputs(case, 40)
    with torch.inference_mode():
        y = layer(x)
    assert relative_error(y, dense_output(case, layer, x)) < TOLERANCE[case.dtype]


def test_layer_that_was_made_in_inference_mode_computes_the_same():
    with torch.inference_mode():
        _, layer = rotated(PLAIN)
        y = layer(inputs(PLAIN, MANY))
    assert relative_error(y, dense_output(PLAIN, layer, inputs(PLAIN, MANY))) < TOLERANCE[PLAIN.dtype]


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
@for_both_kinds
def test_forward_of_no_tokens_is_empty(case, leading):
    _, layer = rotated(case)
    y = layer(inputs(case, *leading))
    assert (y.shape, y.dtype) == ((*leading, case.out_features), case.dtype)


@for_few_and_many_tokens
@for_both_kinds
def test_forward_takes_non_contiguous_input(case, num_tokens):
    _, layer = rotated(case)
    transposed = inputs(case, num_tokens, 2).transpose(0, 1)
    strided = normal(num_tokens, 2 * case.in_features, dtype=case.dtype)[:, ::2]
    expanded = inputs(case, 1).expand(num_tokens, case.in_features)
    for x in (transposed, strided, expanded):
        assert relative_error(layer(x), dense_output(case, layer, x)) < TOLERANCE[case.dtype]


@for_few_and_many_tokens
@for_both_kinds
def test_forward_leaves_its_input_alone(case, num_tokens):
    _, layer = rotated(case)
    x = inputs(case, num_tokens)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


@for_few_cases(lambda case: case.kind != "embedding")
def test_input_of_another_dtype_is_computed_in_the_weights_and_given_back_in_its_own(case):
    _, layer = rotated(case)
    x = inputs(case, 3).double()
    y = layer(x)
    assert y.dtype == torch.float64
    assert relative_error(y, dense_output(case, layer, x)) < TOLERANCE[case.dtype]


@for_few_cases(lambda case: case.is_linear and case.bias)
def test_bias_is_not_rotated(case):
    _, layer = rotated(case)
    zeros = torch.zeros(3, case.in_features, dtype=case.dtype)
    assert torch.equal(layer(zeros), layer.get_base_layer().bias.detach().expand(3, -1))


# Paths


def assert_path_is_the_dense_rotation(case, leading, path):
    _, layer = rotated(case)
    x = inputs(case, *leading)
    y = paths.poet_linear(x, *tensors(layer), path)
    assert relative_error(y, dense_output(case, layer, x)) < TOLERANCE[case.dtype]


@for_every_path
@for_every_shape
def test_every_path_is_the_dense_rotation(case, path):
    assert_path_is_the_dense_rotation(case, (2, 3), path)


@for_every_path
@for_every_leading_shape
def test_every_path_takes_any_leading_dimensions(leading, path):
    assert_path_is_the_dense_rotation(Case("conv1d-remainder", 19, 22, kind="conv1d"), leading, path)


@for_few_linear_cases
def test_effective_weight_is_the_dense_rotation(case):
    _, layer = rotated(case)
    effective = effective_weight(layer)
    assert effective.dtype == case.dtype
    assert relative_error(effective, dense_weight(case, layer)) < TOLERANCE[case.dtype]


@for_few_linear_cases
def test_weight_centric_path_rounds_the_weight_once(case):
    """In low precision it rotates in float32: the identity matrix as input shows the weight it used."""
    _, layer = rotated(case)
    weight, _, R, P = tensors(layer)
    eye = torch.eye(case.in_features, dtype=case.dtype)
    used = paths.poet_linear(eye, weight, None, R, P, "weight_centric").T
    exact = dense_weight(case, layer)
    rounding = 0.5 * torch.finfo(case.dtype).eps * exact.abs()
    arithmetic = 1e-14 if case.dtype == torch.float64 else 2e-6
    assert ((used.double() - exact).abs() <= rounding + arithmetic).all()


@for_few_cases(lambda case: case.is_linear and is_float32(case))
def test_weight_centric_path_rounds_the_weight_once_under_autocast(case):
    _, layer = rotated(case)
    weight, _, R, P = tensors(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        used = paths.poet_linear(torch.eye(case.in_features), weight, None, R, P, "weight_centric").T
    exact = dense_weight(case, layer)
    assert ((used.double() - exact).abs() <= 0.5 * torch.finfo(torch.bfloat16).eps * exact.abs() + 2e-6).all()


@for_few
def test_rotate_by_the_transpose_is_the_matrix_product_from_the_right(case):
    _, layer = rotated(case.float64)
    for rotation in layer.rotations("default"):
        pair = rotation.index, rotation().deltas()
        identity = torch.eye(rotation.partition.dim, dtype=torch.float64)
        dense = reference.rotate(identity, pair).T
        assert relative_error(reference.rotate(identity, pair, transpose=True), dense) < 1e-15


@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
def test_path_follows_the_number_of_tokens(trains):
    _, layer = rotated(Case("wide", 256, 256, block_size=32))
    weight, _, R, P = tensors(layer)
    with torch.set_grad_enabled(trains):
        few, many = (
            paths.choose_path(torch.empty(1, 256, requires_grad=trains).expand(n, -1), weight, R, P)
            for n in (2, 100_000)
        )
    expected = {True: ("input_centric", "tangent"), False: ("input_centric", "weight_centric")}[trains]
    assert (few, many) == expected


def test_input_without_gradient_needs_no_tangent_rule():
    """Its gradient would be computed for the rule alone."""
    _, layer = rotated(Case("wide", 256, 256, block_size=32))
    weight, _, R, P = tensors(layer)
    assert paths.choose_path(torch.empty(100_000, 256), weight, R, P) == "weight_centric"


@pytest.mark.parametrize(("block_size", "path"), [(256, "weight_centric"), (32, "tangent")])
def test_an_output_is_kept_at_the_identity_only_where_it_saves_much(block_size, path):
    """The tangent rule is the cheaper one of the two with both block sizes, with the larger one by 7 %."""
    _, layer = rotated(Case("wide", 512, 512, block_size=block_size))
    weight, _, R, P = tensors(layer)
    x = torch.empty(1, 512, requires_grad=True).expand(2048, -1)
    assert paths.choose_path(x, weight, R, P, identity=True) == path


def test_forced_path_is_taken_whatever_the_shape():
    _, layer = rotated(PLAIN)
    weight, _, R, P = tensors(layer)
    for path in paths.PATHS:
        with paths.compute_path(path):
            assert paths.choose_path(inputs(PLAIN, 1), weight, R, P) == path


def test_unknown_path_is_refused_by_name():
    expected = "path='fastest' is unknown; choose one of 'reference', 'input_centric'"
    with pytest.raises(ValueError, match=expected), paths.compute_path("fastest"):
        pass


@for_few
def test_forward_around_a_base_layer_with_hooks_is_the_dense_rotation(case):
    """accelerate's offloading moves weights in a hook of the base layer, so the layer must be called."""
    _, layer = rotated(case)
    base = layer.get_base_layer()
    calls = []
    base._hf_hook = object()
    base.register_forward_hook(lambda *args: calls.append(1))
    x = inputs(case, 5)
    y = layer(x)
    assert calls == [1]
    assert y.dtype == case.dtype
    assert relative_error(y, dense_output(case, layer, x)) < 2 * TOLERANCE[case.dtype]


# The identity


@for_few_linear_cases
def test_effective_weight_of_an_untrained_adapter_is_the_weight_bit_for_bit(case):
    _, layer = rotated(case, theta=0.0)
    assert torch.equal(effective_weight(layer), tensors(layer)[0])


@for_few_and_many_tokens
@for_few_cases(lambda case: is_float32(case) and case.kind == "linear")
def test_untrained_adapter_does_not_change_a_bit_of_the_output(case, num_tokens):
    _, layer = rotated(case, theta=0.0)
    x = inputs(case, num_tokens)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


@for_few_and_many_tokens
@for_few_cases(lambda case: not is_float32(case) or case.kind == "conv1d")
def test_untrained_adapter_changes_the_output_by_rounding_only(case, num_tokens):
    """Conv1D adds its bias inside the product, which a rotation of the product has to keep apart."""
    _, layer = rotated(case, theta=0.0)
    x = inputs(case, num_tokens)
    assert relative_error(layer(x), layer.get_base_layer()(x)) < 2 * torch.finfo(case.dtype).eps


# Autocast


@for_few_and_many_tokens
@for_few
def test_autocast_gives_the_dtype_that_the_base_layer_gives(case, num_tokens):
    _, layer = rotated(case)
    x = inputs(case, num_tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == layer.get_base_layer()(x).dtype


@for_few_and_many_tokens
@for_few_float32_cases
def test_autocast_changes_the_output_by_its_rounding_only(case, num_tokens):
    _, layer = rotated(case)
    x = inputs(case, num_tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert relative_error(y, dense_output(case, layer, x)) < TOLERANCE[torch.bfloat16]


@for_few
def test_rotations_are_computed_in_full_precision_under_autocast(case):
    _, layer = rotated(case)
    for rotation in layer.rotations("default"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = rotation().deltas()
        assert {offset.dtype for offset in inside} == {torch.promote_types(rotation.weight.dtype, torch.float32)}
        assert all(torch.equal(a, b) for a, b in zip(inside, rotation().deltas(), strict=True))


@for_few_cases(lambda case: not case.is_series)
def test_exact_rotations_are_orthogonal_under_autocast(case):
    _, layer = rotated(case)
    for rotation in layer.rotations("default"):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            inside = rotation().deltas()
        for offset in inside:
            identity = torch.eye(offset.shape[-1], dtype=torch.float64)
            G = identity + offset.double()
            assert (G.mT @ G - identity).abs().max() < 1e-6


# Several adapters


def with_second_adapter(case):
    """The layer with the adapters "default" and "second", both active in this order."""
    model, layer = rotated(case)
    second = Case(
        "second",
        case.out_features,
        case.in_features,
        0.5,
        case.kind,
        variant="fully_stochastic",
        orthogonal_map="cayley",
    )
    model.add_adapter("second", second.config(seed=1))
    randomize(model, 0.4)
    model.base_model.set_adapter(["default", "second"])
    return layer, second


def dense_output_of_two(case, second, layer, x):
    weight = matrix(layer.get_base_layer())
    for adapter, of in (("default", case), ("second", second)):
        R = dense_rotation(of, of.out_features, layer.poet_R, adapter)
        P = dense_rotation(of, of.in_features, layer.poet_P, adapter)
        weight = R @ weight @ P
    return output_with(case, layer, x, weight)


@for_few
def test_active_adapters_compose_the_first_one_innermost(case):
    layer, second = with_second_adapter(case)
    x = inputs(case, MANY)
    expected = dense_output_of_two(case, second, layer, x)
    assert relative_error(layer(x), expected) < 2 * TOLERANCE[case.dtype]


def test_order_of_adapters_matters():
    """Otherwise the test above could not tell one order from the other."""
    layer, second = with_second_adapter(PLAIN)
    x = inputs(PLAIN, 3)
    y = layer(x)
    layer.set_adapter(["second", "default"])
    assert relative_error(layer(x), y) > 0.01


def test_inactive_adapter_does_not_count():
    layer, _ = with_second_adapter(PLAIN)
    x = inputs(PLAIN, 3)
    layer.set_adapter("default")
    assert relative_error(layer(x), dense_output(PLAIN, layer, x)) < TOLERANCE[torch.float32]


def test_active_adapter_that_the_layer_does_not_have_is_left_out():
    _, layer = rotated(PLAIN)
    x = inputs(PLAIN, 3)
    layer.set_adapter(["elsewhere"])
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_disabled_adapter_gives_the_base_layer():
    _, layer = rotated(PLAIN)
    x = inputs(PLAIN, 3)
    rotated_output = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base_layer(PLAIN)(x))
    layer.enable_adapters(True)
    assert torch.equal(layer(x), rotated_output)


# Gradient checkpointing


def gradients(forward, layer, x):
    wanted = [*([x] if x.requires_grad else []), *(rotation.weight for rotation in layer.rotations("default"))]
    for tensor in wanted:
        tensor.grad = None
    forward(x).pow(3).sum().backward()  # of squares alone, a rotation of all features is no function
    return [tensor.grad.clone() for tensor in wanted]


@for_few_and_many_tokens
@for_few_float32_cases
def test_gradient_checkpointing_does_not_change_a_bit_of_the_gradients(case, num_tokens):
    _, layer = rotated(case)
    x = with_gradient(inputs(case, num_tokens))
    plain = gradients(layer, layer, x)
    recomputed = gradients(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert all(gradient.any() for gradient in plain)


@for_few_and_many_tokens
@for_few_cases(lambda case: is_float32(case) and case.kind != "embedding")  # it needs an input with a gradient
def test_reentrant_checkpointing_changes_gradients_by_rounding_only(case, num_tokens):
    """Its first forward runs without gradients, where another path may be the cheaper one."""
    _, layer = rotated(case)
    x = with_gradient(inputs(case, num_tokens))
    plain = gradients(layer, layer, x)
    recomputed = gradients(lambda x: checkpoint(layer, x, use_reentrant=True), layer, x)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(recomputed, plain, strict=True))
