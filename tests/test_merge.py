"""Merging writes `R W P` into the base weight, and unmerging brings the weight back bit for bit."""

import math
import warnings

import pytest
import torch
from cases import (
    FULLY,
    PLAIN,
    TOLERANCE,
    Case,
    TwoLayers,
    base_layer,
    dense_weight,
    for_cases,
    for_every_case,
    for_few,
    for_few_cases,
    for_few_float32_cases,
    inputs,
    is_float32,
    matrix,
    normal,
    randomize,
    relative_error,
    rotated,
    wrap,
)
from models import assert_same_state
from peft import get_peft_model
from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

from poet_peft import POETConfig, merge_and_reinitialize


low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def weight(layer):
    return layer.get_base_layer().weight.detach().clone()


def two_adapters(case=PLAIN):
    """A model with the adapters "default" (active) and "second", and its layer."""
    model, layer = rotated(case)
    second = Case("second", case.out_features, case.in_features, 0.5, variant=FULLY, orthogonal_map="cayley")
    model.add_adapter("second", second.config(seed=1))
    randomize(model, 0.4)
    return model, layer


# Merge


@for_few
def test_safely_merged_output_is_the_forward(case):
    model, layer = rotated(case)
    x = inputs(case, 50)
    expected = model(x)
    model.merge_adapter(safe_merge=True)
    assert layer.merged_adapters == ["default"]
    # Both round: the weight or the activations.
    assert relative_error(model(x), expected) < 2 * TOLERANCE[case.dtype]


@for_every_case
def test_merged_weight_is_the_effective_weight_rounded_once(case):
    _, layer = rotated(case)
    exact = dense_weight(case, layer)
    layer.merge()
    rounding = 0.5 * torch.finfo(case.dtype).eps * exact.abs()
    arithmetic = 1e-14 if case.dtype == torch.float64 else 2e-6
    assert ((matrix(layer.get_base_layer()) - exact).abs() <= rounding + arithmetic).all()


@for_few
def test_merged_layer_is_the_base_layer(case):
    _, layer = rotated(case)
    layer.merge()
    x = inputs(case, 5)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


@for_few
def test_merge_leaves_bias_and_rotations_alone(case):
    model, layer = rotated(case)
    names = [name for name in model.state_dict() if not name.endswith("base_layer.weight")]
    before = {name: model.state_dict()[name].clone() for name in names}
    layer.merge()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in names)


def test_merge_under_autocast_is_computed_in_full_precision():
    _, layer = rotated(PLAIN)
    exact = dense_weight(PLAIN, layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.merge()
    assert relative_error(matrix(layer.get_base_layer()), exact) < TOLERANCE[torch.float32]


@for_few_cases(lambda case: not case.is_series and is_float32(case))
def test_merge_of_the_exact_map_keeps_singular_values(case):
    _, layer = rotated(case)
    before = torch.linalg.svdvals(matrix(layer.get_base_layer()))
    layer.merge()
    assert (torch.linalg.svdvals(matrix(layer.get_base_layer())) - before).abs().max() < 2e-6 * before[0]


@pytest.mark.parametrize("theta", [0.02, 0.4])
@for_cases(lambda case: case.is_series)
def test_merge_of_the_series_keeps_singular_values_within_its_bound(case, theta):
    """Each side changes them by a factor within `theta^(k+1)` of 1, with the true `theta` of its blocks."""
    _, layer = rotated(case, theta=theta)
    bound = 1.0
    for rotation in layer.rotations("default"):
        largest = max(float(torch.linalg.matrix_norm(Q.detach(), 2).max()) for Q in rotation().blocks().Q)
        bound *= 1 + largest ** (case.num_neumann_terms + 1)
    before = torch.linalg.svdvals(matrix(layer.get_base_layer()))
    layer.merge()
    after = torch.linalg.svdvals(matrix(layer.get_base_layer()))
    assert ((after - before).abs() <= (bound - 1) * before + 2e-6 * before[0]).all()


@low_precision
def test_residual_of_a_fold_does_not_belong_to_the_merged_weight(dtype):
    model, layer = rotated(Case("low", dtype=dtype), merge_interval=10)
    merge_and_reinitialize(model)
    assert layer.residual.any()
    layer.merge()
    assert layer.residual is None
    layer.unmerge()
    assert layer.residual.any()


def test_merge_and_unload_gives_a_plain_model():
    model = wrap(TwoLayers(), POETConfig(target_modules=["first", "second"], block_size=4))
    randomize(model, 0.4)
    x = normal(30, 12)
    expected = model(x)
    plain = model.merge_and_unload()
    assert [type(module) for module in plain.modules()] == [type(module) for module in TwoLayers().modules()]
    assert plain.state_dict().keys() == TwoLayers().state_dict().keys()
    assert relative_error(plain(x), expected) < 2 * TOLERANCE[torch.float32]


def test_head_tied_to_another_embedding_than_the_first_is_saved_tied(tmp_path):
    side = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    side |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    base = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=side, decoder=side, initializer_range=0.1))
    model = get_peft_model(base, POETConfig(target_modules="all-linear", block_size=4, init_weights=False))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no longer tied")
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = T5GemmaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings
    assert_same_state(loaded.state_dict(), merged.state_dict())


# Unmerge


@for_few
def test_unmerge_brings_the_weight_back_bit_for_bit(case):
    model, layer = rotated(case)
    before = weight(layer)
    parameter = layer.get_base_layer().weight
    model.merge_adapter()
    assert not torch.equal(weight(layer), before)
    model.unmerge_adapter()
    assert torch.equal(weight(layer), before)
    assert torch.equal(weight(layer), base_layer(case).weight)
    assert layer.get_base_layer().weight is parameter
    assert not layer.merged


@for_few
def test_forward_after_unmerge_is_the_forward_before_merge_bit_for_bit(case):
    model, _ = rotated(case)
    x = inputs(case, 5)
    before = model(x)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(x), before)


@low_precision
def test_merging_and_unmerging_many_times_loses_nothing(dtype):
    case = Case("low", dtype=dtype)
    _, layer = rotated(case)
    for _ in range(20):
        layer.merge()
        layer.unmerge()
    assert torch.equal(weight(layer), base_layer(case).weight)


def test_unmerge_without_merge_warns_and_changes_nothing():
    _, layer = rotated(PLAIN)
    before = weight(layer)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    assert torch.equal(weight(layer), before)


# Idempotent, sequential and partial merges


def test_second_merge_warns_and_changes_nothing():
    _, layer = rotated(PLAIN)
    layer.merge()
    before = weight(layer)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        layer.merge()
    assert torch.equal(weight(layer), before)
    assert layer.merged_adapters == ["default"]


def test_first_merge_is_silent():
    _, layer = rotated(PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.merge()
        layer.unmerge()


def test_partial_merge_takes_the_named_adapter_only():
    model, layer = two_adapters()
    x = inputs(PLAIN, 50)
    layer.set_adapter("second")
    expected = model(x)
    layer.set_adapter(["default", "second"])
    layer.merge(adapter_names=["second"])
    assert layer.merged_adapters == ["second"]
    assert relative_error(model(x), expected) < TOLERANCE[torch.float32]


def test_sequential_merges_compose_like_active_adapters():
    model, layer = two_adapters()
    x = inputs(PLAIN, 50)
    layer.set_adapter(["default", "second"])
    expected = model(x)
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        layer.merge(adapter_names=["second"])
    assert layer.merged_adapters == ["default", "second"]
    assert relative_error(model(x), expected) < TOLERANCE[torch.float32]


def test_merge_of_the_rest_leaves_out_what_is_merged():
    model, layer = two_adapters()
    x = inputs(PLAIN, 50)
    layer.set_adapter(["default", "second"])
    expected = model(x)
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        layer.merge()
    assert relative_error(model(x), expected) < TOLERANCE[torch.float32]


@for_few
def test_unmerge_after_sequential_merges_goes_back_to_the_beginning(case):
    _, layer = two_adapters(case)
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        layer.merge(adapter_names=["second"])
    layer.unmerge()
    assert torch.equal(weight(layer), base_layer(case).weight)
    assert layer.merged_adapters == []


def test_merge_of_an_adapter_that_the_layer_does_not_have_does_nothing():
    _, layer = rotated(PLAIN)
    layer.merge(adapter_names=["elsewhere"])
    assert torch.equal(weight(layer), base_layer(PLAIN).weight)
    assert not layer.merged


# Safe merge


def assert_safe_merge_refuses(case, value):
    _, layer = rotated(case)
    with torch.no_grad():
        layer.rotations("default")[-1].weight.fill_(value)
    with pytest.raises(ValueError, match=r"(?s)NaN.*default.*'layer'"):
        layer.merge(safe_merge=True)
    assert torch.equal(weight(layer), base_layer(case).weight)
    assert not layer.merged


@for_few
def test_safe_merge_refuses_broken_rotations_and_changes_nothing(case):
    assert_safe_merge_refuses(case, math.nan)


def test_safe_merge_refuses_infinite_rotations_and_changes_nothing():
    assert_safe_merge_refuses(PLAIN, math.inf)


@for_cases(lambda case: case.is_series)
def test_safe_merge_refuses_a_series_that_overflows_and_changes_nothing(case):
    assert_safe_merge_refuses(case, 1e30)


def test_safe_merge_of_a_broken_second_adapter_keeps_the_first_one_merged():
    _, layer = two_adapters()
    layer.merge(adapter_names=["default"])
    before = weight(layer)
    with torch.no_grad():
        layer.poet_R["second"].weight[0] = math.nan
    with pytest.raises(ValueError, match="second"), pytest.warns(UserWarning, match="additionally"):
        layer.merge(safe_merge=True, adapter_names=["second"])
    assert layer.merged_adapters == ["default"]
    assert torch.equal(weight(layer), before)
    layer.unmerge()
    assert torch.equal(weight(layer), base_layer(PLAIN).weight)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_safe_merge_refuses_what_overflows_in_the_dtype_of_the_weight(dtype):
    """6e4 is finite in float16; turned onto one axis, a column of it is not."""
    case = Case("large", 8, 8, block_size=8, bias=False, dtype=dtype)
    _, layer = rotated(case, theta=1.0)
    with torch.no_grad():
        layer.get_base_layer().weight.fill_(6e4)
    before = weight(layer)
    with pytest.raises(ValueError, match="layer"):
        layer.merge(safe_merge=True)
    assert torch.equal(weight(layer), before)


# Disabling while merged


@for_few
def test_disabling_while_merged_gives_the_original_model(case):
    model, layer = rotated(case)
    x = inputs(case, 5)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base_layer(case)(x))
    assert torch.equal(weight(layer), base_layer(case).weight)


@for_few_float32_cases
def test_enabling_again_gives_the_rotated_model(case):
    model, _ = rotated(case)
    x = inputs(case, 5)
    expected = model(x)
    model.merge_adapter()
    with model.disable_adapter():
        model(x)
    assert torch.equal(model(x), expected)
