"""Gradients with respect to the input and to both rotations, by finite differences in float64."""

import pytest
import torch
from cases import (
    FEW,
    LINEAR,
    OTHERS,
    PLAIN,
    Case,
    TwoLayers,
    for_cases,
    for_few,
    for_few_cases,
    for_few_float32_cases,
    for_float64_cases,
    in_float64,
    inputs,
    is_float32,
    randomize,
    relative_error,
    rotated,
    with_gradient,
    wrap,
)
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from poet_peft import POETConfig
from poet_peft.ops import block_gradients
from poet_peft.ops.paths import PATHS, compute_path


# Largest ||g - g_exact|| / ||g_exact||: some ten roundings of numbers that partly cancel.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}

for_every_path = pytest.mark.parametrize("path", PATHS, indirect=True)
for_every_fast_path = pytest.mark.parametrize("path", PATHS[1:], indirect=True)
for_few_and_many_tokens = pytest.mark.parametrize("num_tokens", [3, 200])


@pytest.fixture
def path(request):
    """The path that everything in the test is computed by."""
    with compute_path(request.param):
        yield request.param


def rotation_parameters(layer):
    return {name: parameter for name, parameter in layer.named_parameters() if name.startswith("poet_")}


def gradients(layer, x, run=None):
    """Of a fixed random function of the output, or of `run(layer, x)`: by input and rotation parameter."""
    x = with_gradient(x.detach())
    wanted = {**({"x": x} if x.requires_grad else {}), **rotation_parameters(layer)}
    loss = function(layer(x)) if run is None else run(layer, x)
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def function(y):
    """Some number that depends on every entry of `y`."""
    return (y * torch.linspace(-1, 2, y.numel(), dtype=torch.float64).cos().to(y.dtype).view(y.shape)).sum()


def assert_gradients_are_the_finite_differences(case, theta):
    _, layer = rotated(case, theta=theta)
    parameters = rotation_parameters(layer)

    def forward(x, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    leaves = [inputs(case, 2), *(parameter.detach() for parameter in parameters.values())]
    assert torch.autograd.gradcheck(forward, [with_gradient(leaf) for leaf in leaves], fast_mode=True)


@for_float64_cases
def test_gradients_of_the_reference_are_the_finite_differences(case):
    with compute_path("reference"):
        assert_gradients_are_the_finite_differences(case, theta=0.4)


@for_every_fast_path
@in_float64(FEW.intersection(LINEAR))
def test_gradients_of_every_fast_path_at_the_identity_are_the_finite_differences(case, path):
    assert_gradients_are_the_finite_differences(case, theta=0.0)


def assert_gradients_are_those_of_the_reference(case, leading):
    _, layer = rotated(case, theta=0.2)
    x = inputs(case, *leading)
    with compute_path("reference"):
        expected = gradients(layer, x)
    actual = gradients(layer, x)
    assert all(relative_error(actual[name], expected[name]) < 1e-12 for name in expected)


@for_every_fast_path
@in_float64(LINEAR)
def test_every_path_gives_the_gradients_of_the_reference(case, path):
    assert_gradients_are_those_of_the_reference(case, (2, 3))


@in_float64(OTHERS)
def test_gradients_of_convolutions_and_embeddings_are_those_of_the_reference(case):
    assert_gradients_are_those_of_the_reference(case, (6,))


@for_every_fast_path
@pytest.mark.parametrize("leading", [(), (7,), (2, 1, 3), (0, 2), (1100,)], ids=str)
@in_float64(["conv1d-remainder"])
def test_every_path_gives_the_gradients_of_the_reference_for_any_leading_dimensions(case, leading, path):
    assert_gradients_are_those_of_the_reference(case, leading)


@pytest.mark.parametrize("theta, is_used", [(1e-3, True), (3.0, False)])
@in_float64(FEW.intersection(LINEAR))
def test_tangent_rule_is_used_where_its_inverse_is_exact(case, theta, is_used, monkeypatch):
    """Blocks that are far from orthogonal have their gradients by the other rule, which is exact for any blocks."""
    is_used = is_used or not case.is_series
    _, layer = rotated(case, theta=theta)
    x = inputs(case, 7)
    with compute_path("reference"):
        expected = gradients(layer, x)
    used = []
    rule = block_gradients.block_outer_products
    monkeypatch.setattr(block_gradients, "block_outer_products", lambda *args: (used.append(True), rule(*args))[1])
    with compute_path("tangent"):
        actual = gradients(layer, x)
    assert bool(used) == is_used
    assert all(relative_error(actual[name], expected[name]) < 1e-11 for name in expected)


def in_place(layer, x):
    return layer(x).relu_().sum()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_output_may_be_written_to_in_place(bias, checkpoints):
    """As by `ReLU(inplace=True)`, or by Falcon, which adds to it. The rule that needs the output then gives way."""
    case = Case("wide", 96, 64, block_size=16, bias=bias)
    _, layer = rotated(case)
    x = inputs(case, 200)
    with compute_path("tangent"):
        expected = gradients(layer, x, lambda layer, x: layer(x).relu().sum())
        run = (lambda layer, x: checkpoint(in_place, layer, x, use_reentrant=False)) if checkpoints else in_place
        actual = gradients(layer, x, run)
    assert all(relative_error(actual[name], expected[name]) < 1e-5 for name in expected)


def step_the_rotations(layer):
    torch.optim.SGD(layer.poet_R.parameters(), lr=0.1).step()


@torch.no_grad()
def edit_the_weight(layer):
    layer.get_base_layer().weight.mul_(2)


@pytest.mark.parametrize(
    "change, named", [(step_the_rotations, "the rotation R"), (edit_the_weight, "the base weight")]
)
def test_backward_after_a_change_in_place_names_what_changed(change, named):
    _, layer = rotated(PLAIN)
    with compute_path("weight_centric"):
        loss = layer(inputs(PLAIN, 7)).sum()
        layer(inputs(PLAIN, 7)).sum().backward()
    change(layer)
    with pytest.raises(RuntimeError, match=f"{named} changed in place between forward and backward"):
        loss.backward()


@for_every_path
def test_gradient_of_the_output_may_be_expanded(path):
    """That of a sum is one number, expanded."""
    _, layer = rotated(PLAIN)
    x = inputs(PLAIN, 2, 3)
    ones = torch.ones(2, 3, PLAIN.out_features)
    wanted = list(rotation_parameters(layer).values())
    expanded = torch.autograd.grad(layer(x).sum(), wanted)
    dense = torch.autograd.grad(layer(x), wanted, ones)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(expanded, dense, strict=True))


@for_every_path
@for_few_cases(lambda case: case.is_linear and case.bias and is_float32(case))
def test_bias_trains_where_it_is_asked_to(case, path):
    _, layer = rotated(case, bias="poet_only")
    bias = layer.get_base_layer().bias
    layer(inputs(case, 5)).square().sum().backward()
    with torch.no_grad():
        expected = 2 * layer(inputs(case, 5)).sum(0)
    assert relative_error(bias.grad, expected) < 1e-6
    assert all(parameter.grad.any() for parameter in rotation_parameters(layer).values())


@for_few_and_many_tokens
@for_few
def test_gradients_agree_with_those_in_float64(case, num_tokens):
    _, layer = rotated(case)
    x = inputs(case, num_tokens)
    actual = gradients(layer, x)
    exact = gradients(layer.double(), x.double() if x.is_floating_point() else x)
    assert all(relative_error(actual[name], exact[name]) < TOLERANCE[case.dtype] for name in exact)


@for_few_and_many_tokens
@for_cases(lambda case: case.name in {"float64", *FEW})
def test_gradients_have_the_dtypes_of_what_they_are_of(case, num_tokens):
    _, layer = rotated(case)
    found = {name: gradient.dtype for name, gradient in gradients(layer, inputs(case, num_tokens)).items()}
    # PEFT keeps the trained parameters of low-precision models in float32.
    trained = torch.promote_types(case.dtype, torch.float32)
    found.setdefault("x", case.dtype)  # tokens have none
    assert found == {"x": case.dtype, **dict.fromkeys(rotation_parameters(layer), trained)}


@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward-outside", "backward-inside"])
@for_few_and_many_tokens
@for_few_float32_cases
def test_autocast_changes_gradients_by_its_rounding_only(case, num_tokens, backward_inside):
    _, layer = rotated(case)
    x = with_gradient(inputs(case, num_tokens))
    wanted = {**({"x": x} if x.requires_grad else {}), **rotation_parameters(layer)}
    exact = gradients(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(layer(x).float())
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert all(tensor.grad.dtype == tensor.dtype for tensor in wanted.values())
    assert all(relative_error(wanted[name].grad, exact[name]) < TOLERANCE[torch.bfloat16] for name in exact)


@for_few
def test_gradients_of_no_tokens_are_zero(case):
    _, layer = rotated(case)
    found = gradients(layer, inputs(case, 0))
    assert not any(gradient.any() for gradient in found.values())


@for_every_path
@for_few_float32_cases
def test_gradient_flows_to_rotations_only(case, path):
    model, layer = rotated(case)
    model(inputs(case, 5)).square().sum().backward()
    reached = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert reached == set(rotation_parameters(layer))
    assert all(parameter.grad.any() for parameter in rotation_parameters(layer).values())


def test_gradient_flows_through_a_frozen_layer_to_the_one_before():
    model = wrap(TwoLayers(), POETConfig(target_modules=["first", "second"], block_size=4))
    randomize(model, 0.4)
    model(inputs(PLAIN, 5)[:, :12]).square().sum().backward()
    reached = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"first", "second"}


def test_inactive_adapter_gets_no_gradient():
    model, layer = rotated(PLAIN)
    model.add_adapter("second", PLAIN.config(seed=1))
    model(inputs(PLAIN, 5)).square().sum().backward()
    reached = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert reached == {"poet_R.default.weight", "poet_P.default.weight"}
