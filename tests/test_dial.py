"""The scale of an adapter turns every plane by that part of its angle: forward, merge and PEFT's ways to set it."""

import pytest
import torch
from cases import (
    FEW,
    PLAIN,
    TOLERANCE,
    dense_output,
    dense_rotation,
    for_few,
    for_few_float32_cases,
    in_float64,
    inputs,
    matrix,
    output_with,
    relative_error,
    rotated,
)
from models import adamw, assert_same_state, llama, logits, state, train, wrap
from peft import get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale

from poet_peft import POETFoldError, merge_and_reinitialize
from poet_peft.layer import poet_layers
from poet_peft.maths.geodesic import from_generator, generator, power_delta
from poet_peft.maths.orthogonal import cayley, cayley_neumann, skew
from poet_peft.ops.paths import PATHS, compute_path


for_few_dials = in_float64(FEW | {"exact-remainder", "2-terms", "5-terms-remainder"})


def random_skew(theta=0.6, n=7, num_blocks=3, seed=0):
    upper = torch.randn(num_blocks, n * (n - 1) // 2, generator=torch.Generator().manual_seed(seed)).double()
    return theta / 4 * skew(upper, n)


def power(G, scale):
    """`G^scale` by the eigenvectors of `G` itself."""
    values, vectors = torch.linalg.eig(G)
    return (vectors @ torch.diag_embed(values**scale) @ torch.linalg.inv(vectors)).real


@pytest.mark.parametrize("num_terms", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("scale", [-0.5, 0.25, 1.0, 1.3])
def test_power_is_that_of_the_matrix(num_terms, scale):
    Q = random_skew()
    G = cayley_neumann(Q, num_terms) if num_terms else cayley(Q)
    delta = power_delta(Q, scale, num_terms)
    assert relative_error(delta + torch.eye(7), power(G, scale)) < 1e-13


def test_small_angle_keeps_its_digits_in_float32():
    Q = random_skew(theta=1e-4).float()
    exact = power_delta(Q.double(), 0.5)
    assert relative_error(power_delta(Q, 0.5), exact) < 1e-6


def test_scaled_rotation_is_a_point_of_the_geodesic():
    Q = random_skew()
    expected = torch.matrix_exp(0.3 * generator(Q))
    assert relative_error(power_delta(Q, 0.3) + torch.eye(7), expected) < 1e-13


def test_generator_and_back_gives_the_parameters():
    Q = random_skew(theta=3.0)
    assert relative_error(from_generator(generator(Q)), Q) < 1e-12


def scaled_output(case, layer, x, scale):
    R, P = (
        dense_rotation(case, n, side)
        for n, side in ((case.out_features, layer.poet_R), (case.in_features, layer.poet_P))
    )
    return output_with(case, layer, x, power(R, scale) @ matrix(layer.get_base_layer()) @ power(P, scale))


@for_few_dials
@pytest.mark.parametrize("path", PATHS)
def test_forward_turns_every_plane_by_part_of_its_angle(case, path):
    model, layer = rotated(case)
    x = inputs(case, 5)
    with torch.no_grad(), compute_path(path):
        model(x)  # what is kept is that of another scale
        layer.set_scale("default", 0.3)
        y = model(x)
    assert relative_error(y, scaled_output(case, layer, x, 0.3)) < 1e-12


@for_few_dials
def test_merge_at_a_scale_computes_the_same(case):
    model, layer = rotated(case)
    x = inputs(case, 5)
    layer.set_scale("default", 0.3)
    with torch.no_grad():
        expected = model(x)
        layer.merge()
        assert relative_error(model(x), expected) < TOLERANCE[case.dtype]


@for_few
def test_scale_one_is_the_adapter_bit_for_bit(case):
    model, layer = rotated(case)
    x = inputs(case, 5)
    with torch.no_grad():
        expected = model(x)
        layer.set_scale("default", 0.3)
        model(x)
        layer.set_scale("default", 1)
        assert torch.equal(model(x), expected)


@for_few
def test_scale_zero_is_the_base_layer_bit_for_bit(case):
    model, layer = rotated(case)
    x = inputs(case, 5)
    layer.set_scale("default", 0)
    assert torch.equal(model(x), layer.get_base_layer()(x))


@for_few
def test_merge_at_scale_zero_keeps_the_weight_bit_for_bit(case):
    _, layer = rotated(case)
    before = layer.get_base_layer().weight.clone()
    layer.set_scale("default", 0)
    layer.merge()
    assert torch.equal(layer.get_base_layer().weight, before)


def test_unmerge_at_another_scale_is_exact():
    model, layer = rotated(PLAIN)
    before = layer.get_base_layer().weight.clone()
    with rescale_adapter_scale(model, 0.5):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, before)


def test_adapters_have_scales_of_their_own():
    model, layer = rotated(PLAIN)
    model.add_adapter("second", PLAIN.config(init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    layer.set_scale("second", 0)
    x = inputs(PLAIN, 5)
    with torch.no_grad():
        assert relative_error(model(x), dense_output(PLAIN, layer, x, "default")) < TOLERANCE[torch.float32]


def test_scaled_layer_compiles():
    model, layer = rotated(PLAIN)
    layer.set_scale("default", 0.3)
    x = inputs(PLAIN, 5)
    with torch.no_grad():
        assert relative_error(torch.compile(model, backend="eager", fullgraph=True)(x), model(x)) < 1e-6


def test_scale_layer_multiplies_and_unscale_layer_divides():
    _, layer = rotated(PLAIN)
    layer.scale_layer(0.5)
    layer.scale_layer(0.5)
    assert layer.scaling == {"default": 0.25}
    layer.unscale_layer(0.5)
    assert layer.scaling == {"default": 0.5}
    layer.unscale_layer()
    assert layer.scaling == {"default": 1.0}


def test_scale_of_an_adapter_that_is_elsewhere_is_ignored():
    _, layer = rotated(PLAIN)
    layer.set_scale("elsewhere", 0.5)
    assert layer.scaling == {"default": 1.0}


def test_deleted_adapter_leaves_no_scale():
    model, layer = rotated(PLAIN)
    model.add_adapter("second", PLAIN.config())
    layer.set_scale("default", 0.5)
    model.delete_adapter("default")
    assert layer.scaling == {"second": 1.0}


def test_rescaling_by_peft_scales_every_layer_and_comes_back():
    model = wrap(llama())
    whole = logits(model)
    for _, layer in poet_layers(model):
        layer.set_scale("default", 0.5)
    half = logits(model)
    for _, layer in poet_layers(model):
        layer.set_scale("default", 1)
    with rescale_adapter_scale(model, 0.5):
        assert torch.equal(logits(model), half)
    assert torch.equal(logits(model), whole)


def test_rescaling_by_zero_gives_the_base_model():
    model = wrap(llama())
    with rescale_adapter_scale(model, 0):
        assert torch.equal(logits(model), logits(llama()))


def test_model_merged_at_a_scale_is_plain():
    model = wrap(llama())
    with rescale_adapter_scale(model, 0.5):
        expected = logits(model)
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_saved_adapter_is_that_of_scale_one():
    model = wrap(llama())
    before = get_peft_model_state_dict(model)
    with rescale_adapter_scale(model, 0.5):
        assert_same_state(get_peft_model_state_dict(model), before)


def test_fold_of_a_scaled_adapter_is_refused_and_changes_nothing():
    model = wrap(llama(), "periodic")
    before = state(model)
    with rescale_adapter_scale(model, 0.5), pytest.raises(POETFoldError, match=r"scale=0\.5.*unscale_layer"):
        merge_and_reinitialize(model, adamw(model))
    assert_same_state(state(model), before)


def test_fold_after_every_step_of_a_scaled_adapter_is_refused():
    model = wrap(llama(), "periodic", merge_interval=1, reinit_interval=0, init_weights=True)
    optimizer = train(model, 2)
    _, layer = next(poet_layers(model))
    layer.poet_scaling["default"] = 0.5  # as if there had been no fold yet
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    with pytest.raises(POETFoldError, match=r"scale=0\.5"):
        optimizer.step()


@for_few_float32_cases
def test_training_at_a_scale_is_refused(case):
    model, layer = rotated(case)
    layer.set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"default.*layer.*scale=0\.5.*no_grad"):
        model(inputs(case, 5))


def test_gradient_goes_through_a_frozen_scaled_layer():
    model, layer = rotated(PLAIN)
    layer.set_scale("default", 0.5)
    layer.set_adapter("default", inference_mode=True)
    x = inputs(PLAIN, 5).requires_grad_()
    model(x).sum().backward()
    with torch.no_grad():
        columns = model(torch.eye(PLAIN.in_features)) - model(torch.zeros(1, PLAIN.in_features))
    assert relative_error(x.grad, columns.sum(1).expand(5, -1)) < 1e-5


def test_folded_adapter_cannot_be_scaled():
    model = wrap(llama(), "periodic")
    merge_and_reinitialize(model, train(model, 1))
    _, layer = next(poet_layers(model))
    with pytest.raises(ValueError, match=r"folded into the weight 1 times.*merge_interval=0"):
        layer.set_scale("default", 0.5)


def test_rescaling_a_folded_adapter_by_peft_is_refused():
    model = wrap(llama(), "periodic")
    merge_and_reinitialize(model, train(model, 1))
    with pytest.raises(ValueError, match="merge_interval=0"), rescale_adapter_scale(model, 0.5):
        pass


def test_merged_adapter_cannot_be_scaled():
    _, layer = rotated(PLAIN)
    layer.merge()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        layer.scale_layer(0.5)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "half", None])
def test_scale_that_is_no_finite_number_is_refused(scale):
    _, layer = rotated(PLAIN)
    with pytest.raises(ValueError, match=r"scale=.*default.*layer.*finite"):
        layer.set_scale("default", scale)


def test_dividing_by_zero_is_refused():
    _, layer = rotated(PLAIN)
    with pytest.raises(ValueError, match="unscale_layer"):
        layer.unscale_layer(0)
