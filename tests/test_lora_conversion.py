"""What an adapter adds to a weight, and its conversion to LoRA by PEFT."""

import pytest
import torch
from cases import PLAIN, TOLERANCE, dense_weight, for_few, for_few_float64_cases, matrix, relative_error, rotated
from models import gpt2, llama, logits, poet_config, train, wrap
from peft import PeftModel, convert_to_lora, save_as_lora
from peft.helpers import rescale_adapter_scale
from transformers.pytorch_utils import Conv1D

from poet_peft import merge_and_reinitialize
from poet_peft.layer import poet_layers


FULL_RANK = 1.0  # of the squared singular values


def delta_of(layer, adapter="default"):
    delta = layer.get_delta_weight(adapter)
    return (delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta).double()


@for_few_float64_cases
def test_delta_is_the_change_of_the_weight(case):
    _, layer = rotated(case)
    expected = dense_weight(case, layer) - matrix(layer.get_base_layer())
    assert relative_error(delta_of(layer), expected) < 1e-12


@for_few
def test_delta_has_the_shape_of_the_weight_and_keeps_digits(case):
    _, layer = rotated(case)
    delta = layer.get_delta_weight("default")
    expected = dense_weight(case, layer) - matrix(layer.get_base_layer())
    assert delta.shape == layer.get_base_layer().weight.shape
    assert relative_error(delta_of(layer), expected) < TOLERANCE[torch.float32]


def test_delta_is_that_of_the_scale():
    _, layer = rotated(PLAIN)
    layer.set_scale("default", 0)
    assert not layer.get_delta_weight("default").any()


@pytest.mark.parametrize("base", [llama, gpt2])
def test_conversion_at_full_rank_computes_the_same(tmp_path, base):
    model = wrap(base())
    save_as_lora(tmp_path, model, rank=FULL_RANK)
    converted = PeftModel.from_pretrained(base(), tmp_path)
    assert relative_error(logits(converted), logits(model)) < 1e-4


def test_conversion_is_of_the_adapter_that_is_named(tmp_path):
    model = wrap(llama(), adapter_name="first")
    model.add_adapter("second", poet_config(seed=1))
    save_as_lora(tmp_path, model, rank=FULL_RANK, adapter_name="second")
    model.set_adapter("second")
    converted = PeftModel.from_pretrained(llama(), tmp_path)
    assert relative_error(logits(converted), logits(model)) < 1e-4


def test_conversion_is_of_the_scaled_adapter(tmp_path):
    model = wrap(llama())
    with rescale_adapter_scale(model, 0.5):
        save_as_lora(tmp_path, model, rank=FULL_RANK)
        expected = logits(model)
    assert relative_error(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected) < 1e-4


def test_lower_rank_is_the_nearest_matrix_of_that_rank():
    model = wrap(llama())
    _, tensors = convert_to_lora(model, rank=4)
    for name, layer in poet_layers(model.base_model.model):
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        delta = layer.get_delta_weight("default")
        missed = torch.linalg.svdvals(delta)[4:].square().sum().sqrt()
        assert torch.linalg.matrix_norm(B @ A - delta) == pytest.approx(float(missed), rel=1e-3)


def test_folded_adapter_is_refused_with_the_reason():
    model = wrap(llama(), "periodic")
    merge_and_reinitialize(model, train(model, 1))
    with (
        pytest.warns(UserWarning, match=r"folded into the weight 1 times.*merge_and_unload"),
        pytest.raises(TypeError, match="do not support LoRA conversion"),
    ):
        convert_to_lora(model, rank=4)


def test_delta_of_a_folded_adapter_is_refused_with_the_ways_out():
    model = wrap(llama(), "periodic")
    merge_and_reinitialize(model, train(model, 1))
    _, layer = next(poet_layers(model))
    with pytest.raises(ValueError, match=r"'model\.layers\.0.*folded.*keep_initial_weights=True"):
        layer.get_delta_weight("default")


def test_kept_initial_weights_let_a_folded_adapter_be_converted(tmp_path):
    model = wrap(llama(), "periodic", keep_initial_weights=True)
    optimizer = train(model, 1)
    merge_and_reinitialize(model, optimizer)
    train(model, 1, optimizer)
    save_as_lora(tmp_path, model, rank=FULL_RANK)
    converted = PeftModel.from_pretrained(llama(), tmp_path)
    assert relative_error(logits(converted), logits(model)) < 1e-4


def test_adapter_with_train_rest_is_refused_with_the_reason():
    model = wrap(llama(), "pretraining")
    with pytest.warns(UserWarning, match="train_rest=True"):
        assert not model.supports_lora_conversion()


def test_merged_adapter_is_refused_with_the_way_out():
    _, layer = rotated(PLAIN)
    layer.merge()
    with pytest.raises(ValueError, match=r"'layer'.*default is merged\. Call unmerge_adapter"):
        layer.get_delta_weight("default")


def test_unknown_adapter_is_refused_with_the_known_ones():
    _, layer = rotated(PLAIN)
    with pytest.raises(ValueError, match=r"'layer' has no adapter 'other', but default"):
        layer.get_delta_weight("other")
