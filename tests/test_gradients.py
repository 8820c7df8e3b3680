"""Gradients with respect to the input and to both rotations, by finite differences in float64."""

import pytest
import torch
from cases import (
    PLAIN,
    TwoLayers,
    for_cases,
    for_every_case,
    for_float64_cases,
    inputs,
    randomize,
    relative_error,
    rotated,
    wrap,
)
from torch.func import functional_call

import poet_peft.layer
from poet_peft import POETConfig
from poet_peft.ops import paths, reference


PATHS = {
    "reference": reference.poet_linear,
    "input-centric": paths.input_centric,
    "weight-centric": paths.weight_centric,
}

# Largest ||g - g_exact|| / ||g_exact||: some ten roundings of numbers that partly cancel.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}

for_both_paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def rotation_parameters(layer):
    return {name: parameter for name, parameter in layer.named_parameters() if name.startswith("poet_")}


def gradients(layer, x):
    """Of a fixed random function of the output: by input and rotation parameter."""
    x = x.detach().requires_grad_()
    parameters = rotation_parameters(layer)
    y = layer(x)
    direction = inputs_like(y)
    values = torch.autograd.grad((y * direction).sum(), [x, *parameters.values()])
    return dict(zip(["x", *parameters], values, strict=True))


def inputs_like(y):
    return torch.linspace(-1, 2, y.numel(), dtype=torch.float64).cos().to(y.dtype).view(y.shape)


@pytest.mark.parametrize("theta", [0.4, 0.0], ids=["rotated", "identity"])
@for_both_paths
@for_float64_cases
def test_gradients_are_the_finite_differences(case, path, theta, monkeypatch):
    monkeypatch.setattr(poet_peft.layer, "poet_linear", path)
    _, layer = rotated(case, theta=theta)
    parameters = rotation_parameters(layer)

    def forward(x, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    leaves = [inputs(case, 2), *(parameter.detach() for parameter in parameters.values())]
    assert torch.autograd.gradcheck(forward, [leaf.requires_grad_() for leaf in leaves], fast_mode=True)


@for_float64_cases
def test_both_paths_give_the_same_gradients(case, monkeypatch):
    _, layer = rotated(case)
    x = inputs(case, 7)
    monkeypatch.setattr(poet_peft.layer, "poet_linear", reference.poet_linear)
    expected = gradients(layer, x)
    monkeypatch.setattr(poet_peft.layer, "poet_linear", paths.weight_centric)
    actual = gradients(layer, x)
    assert all(relative_error(actual[name], expected[name]) < 1e-13 for name in expected)


@pytest.mark.parametrize("num_tokens", [3, 200])
@for_cases(lambda case: case.dtype != torch.float64)
def test_gradients_agree_with_those_in_float64(case, num_tokens):
    _, layer = rotated(case)
    x = inputs(case, num_tokens)
    actual = gradients(layer, x)
    exact = gradients(layer.double(), x.double())
    assert all(relative_error(actual[name], exact[name]) < TOLERANCE[case.dtype] for name in exact)


@pytest.mark.parametrize("num_tokens", [3, 200])
@for_every_case
def test_gradients_have_the_dtypes_of_what_they_are_of(case, num_tokens):
    _, layer = rotated(case)
    found = {name: gradient.dtype for name, gradient in gradients(layer, inputs(case, num_tokens)).items()}
    # PEFT keeps the trained parameters of low-precision models in float32.
    trained = torch.promote_types(case.dtype, torch.float32)
    assert found == {"x": case.dtype, **dict.fromkeys(rotation_parameters(layer), trained)}


@for_every_case
def test_gradients_of_no_tokens_are_zero(case):
    _, layer = rotated(case)
    found = gradients(layer, inputs(case, 0))
    assert not any(gradient.any() for gradient in found.values())


@for_every_case
def test_gradient_flows_to_rotations_only(case):
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
