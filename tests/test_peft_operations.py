"""What PEFT and transformers offer on a model with adapters means for POET what it means for any other method."""

import copy
import pickle

import pytest
import torch
from models import (
    ADAPTERS,
    KINDS,
    PERIODIC,
    REGIMES,
    adamw,
    assert_same_state,
    bert_classifier,
    gpt2,
    llama,
    llama_classifier,
    logits,
    poet_config,
    state,
    step,
    tokens,
    train,
    wrap,
)
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from poet_peft import POETFoldError, POETReferenceError, merge_and_reinitialize, poet_param_groups
from poet_peft.layer import poet_layers


each_regime = pytest.mark.parametrize("regime", REGIMES)
each_kind = pytest.mark.parametrize("regime", KINDS)
each_adapter = pytest.mark.parametrize("regime", ["block_stochastic", "periodic"])  # that leave the rest alone
each_periodic = pytest.mark.parametrize("regime", PERIODIC)


def folded(regime="periodic", num_folds=1, **overrides):
    """A model that has been folded, and has rotated since."""
    model = wrap(llama(), regime, **overrides)
    optimizer = train(model, 1)
    for _ in range(num_folds):
        merge_and_reinitialize(model, optimizer)
        train(model, 1, optimizer)
    return model


def folded_in_transformers(**overrides):
    """The same without a PeftModel around it: transformers' own adapter methods."""
    model = llama()
    model.add_adapter(poet_config("periodic", **overrides))
    merge_and_reinitialize(model, train(model, 1))
    return model


def disabled(model):
    """The model with its adapter disabled, for good."""
    if isinstance(model, PeftModel):
        model.base_model.disable_adapter_layers()
    else:
        model.disable_adapters()
    return model


def two_adapters(first="first", second="second"):
    """`first` is active."""
    model = wrap(llama(), "block_stochastic", first, rotation_seed=1)
    model.add_adapter(second, poet_config("fully_stochastic"))
    return model


def logits_of(model, adapter_names):
    model.base_model.set_adapter(adapter_names)
    return logits(model)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def rotations(model, *adapter_names):
    """Names of the rotations' parameters of some adapters."""
    return {
        f"{name}.poet_{side}.{adapter}.weight"
        for name, layer in poet_layers(model)
        for side in "RP"
        for adapter in adapter_names
        if adapter in getattr(layer, f"poet_{side}")
    }


def assert_close(actual, expected, rtol=1e-5):
    """Equal up to rounding, measured against the whole tensor."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().max()))


# The original model


@each_adapter
def test_disabled_adapter_gives_the_original_logits(regime):
    model = wrap(llama(), regime)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


@each_adapter
def test_rotated_logits_come_back_after_disabling(regime):
    model = wrap(llama(), regime)
    before = logits(model)
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model), before)


@each_adapter
def test_disabling_a_merged_adapter_gives_the_original_logits(regime):
    model = wrap(llama(), regime)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


@each_adapter
def test_rotated_logits_come_back_after_disabling_while_merged(regime):
    model = wrap(llama(), regime)
    before = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        logits(model)
    assert_close(logits(model), before)


def test_disabling_nests():
    model = wrap(llama())
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model), logits(llama()))


def test_adapter_is_enabled_after_nested_disabling():
    model = wrap(llama())
    before = logits(model)
    with model.disable_adapter(), model.disable_adapter():
        pass
    assert torch.equal(logits(model), before)


def test_what_trains_is_the_same_after_disabling():
    model = two_adapters()
    before = trainable(model)
    with model.disable_adapter():
        pass
    assert trainable(model) == before


@each_adapter
def test_transformers_disable_adapters_gives_the_original_logits(regime):
    model = llama()
    model.add_adapter(poet_config(regime))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(llama()))


def test_transformers_enable_adapters_brings_the_rotated_logits_back():
    model = llama()
    model.add_adapter(poet_config())
    before = logits(model)
    model.disable_adapters()
    model.enable_adapters()
    assert torch.equal(logits(model), before)


@each_adapter
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_unload_gives_the_original_model(regime, merged):
    model = wrap(llama(), regime)
    train(model, 1)
    if merged:
        model.merge_adapter()
    assert_same_state(model.unload().state_dict(), llama().state_dict())


ORIGINAL_MODEL = {
    "disable_adapter": lambda model: model.disable_adapter().__enter__(),
    "unload": lambda model: model.unload(),
    "delete_adapter": lambda model: model.delete_adapter("default"),
}
each_way_back = pytest.mark.parametrize("operation", ORIGINAL_MODEL)


@each_way_back
def test_original_model_is_refused_after_a_fold_with_the_ways_out(operation):
    model = folded()
    with pytest.raises(POETReferenceError, match=f"{operation}.*keep_initial_weights=True.*merge_interval=0"):
        ORIGINAL_MODEL[operation](model)


@each_way_back
def test_refusing_the_original_model_changes_nothing(operation):
    model = folded()
    before, computed = state(model), logits(model)
    with pytest.raises(POETReferenceError):
        ORIGINAL_MODEL[operation](model)
    assert_same_state(model.state_dict(), before)
    assert torch.equal(logits(model), computed)


@each_way_back
def test_refusing_the_original_model_leaves_the_adapter_enabled_and_trainable(operation):
    model = folded()
    with pytest.raises(POETReferenceError):
        ORIGINAL_MODEL[operation](model)
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters) == (True, ["default"])
    assert trainable(model) == rotations(model, "default")


@pytest.mark.parametrize(
    "refused",
    [
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.delete_adapter("default"),
        lambda model: model.unload(),
    ],
    ids=["disable", "delete", "unload"],
)
def test_one_layer_that_was_folded_keeps_all_layers_as_they_are(refused):
    model = wrap(llama(), "periodic")
    layers = [layer for _, layer in poet_layers(model)]
    layers[-1].advance("default", num_folds=1)
    with pytest.raises(POETReferenceError):
        refused(model)
    assert [layer for _, layer in poet_layers(model)] == layers
    assert all(layer.has_adapter("default") and not layer.disable_adapters for layer in layers)


@each_way_back
@pytest.mark.parametrize("regime", ["pretraining", "block_stochastic"])
def test_original_model_is_refused_with_train_rest_even_before_a_fold(operation, regime):
    with pytest.raises(POETReferenceError, match="train_rest"):
        ORIGINAL_MODEL[operation](wrap(llama(), regime, train_rest=True))


def test_transformers_disable_adapters_is_refused_after_a_fold():
    with pytest.raises(POETReferenceError, match="keep_initial_weights=True"):
        folded_in_transformers().disable_adapters()


def test_transformers_delete_adapter_is_refused_after_a_fold():
    model = folded_in_transformers()
    before = state(model)
    with pytest.raises(POETReferenceError, match="keep_initial_weights=True"):
        model.delete_adapter("default")
    assert_same_state(model.state_dict(), before)


def test_transformers_delete_adapter_gives_the_original_logits():
    model = llama()
    model.add_adapter(poet_config())
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(llama()))


def test_refused_transformers_disable_adapters_leaves_every_layer_enabled():
    model = folded_in_transformers()
    before = logits(model)
    with pytest.raises(POETReferenceError):
        model.disable_adapters()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("num_folds", [1, 2])
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_kept_initial_weights_give_the_original_logits_after_folds(num_folds, merged):
    model = folded(num_folds=num_folds, keep_initial_weights=True)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_rotated_logits_come_back_after_disabling_with_kept_initial_weights():
    model = folded(keep_initial_weights=True)
    before = logits(model)
    with model.disable_adapter():
        logits(model)
    assert torch.equal(logits(model), before)


def test_kept_initial_weights_give_the_original_logits_in_transformers():
    model = folded_in_transformers(keep_initial_weights=True)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_kept_initial_weights_let_unload_give_the_original_model(merged):
    model = folded(keep_initial_weights=True)
    if merged:
        model.merge_adapter()
    assert_same_state(model.unload().state_dict(), llama().state_dict())


def test_kept_initial_weights_come_back_when_the_adapter_is_deleted():
    model = folded(keep_initial_weights=True)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), logits(llama()))


LOADERS = {
    "PeftModel": lambda directory: PeftModel.from_pretrained(llama(), directory),
    "PeftModel_low_memory": lambda directory: PeftModel.from_pretrained(llama(), directory, low_cpu_mem_usage=True),
    "transformers": lambda directory: (model := llama(), model.load_adapter(str(directory)))[0],
}
each_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@each_loader
def test_loaded_folded_model_refuses_to_give_the_original(tmp_path, load):
    folded().save_pretrained(tmp_path)
    model = load(tmp_path)
    with pytest.raises(POETReferenceError, match="keep_initial_weights=True"):
        disabled(model)


@each_loader
def test_loaded_folded_model_gives_the_original_logits_if_its_config_keeps_them(tmp_path, load):
    folded(keep_initial_weights=True).save_pretrained(tmp_path)
    assert torch.equal(logits(disabled(load(tmp_path))), logits(llama()))


def test_kept_initial_weights_are_not_trained_or_saved():
    model = folded(keep_initial_weights=True)
    assert not [name for name in (*model.state_dict(), *trainable(model)) if "initial" in name]


# Several adapters


def test_added_adapter_does_not_change_the_output():
    model = wrap(llama())
    before = logits(model)
    model.add_adapter("second", poet_config("fully_stochastic"))
    assert torch.equal(logits(model), before)


def test_set_adapter_switches_the_output():
    model = two_adapters()
    alone = wrap(llama(), "block_stochastic", rotation_seed=1)
    assert torch.equal(logits_of(model, "first"), logits(alone))
    assert not torch.allclose(logits_of(model, "second"), logits(alone), atol=1e-3)


def test_set_adapter_back_and_forth_gives_the_same_output():
    model = two_adapters()
    before = logits(model)
    model.set_adapter("second")
    model.set_adapter("first")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")], ids="-".join)
def test_active_adapters_compose_as_if_each_were_merged_after_the_other(order):
    model = two_adapters()
    expected = copy.deepcopy(model)
    for name in order:
        expected.merge_adapter([name])
    assert_close(logits_of(model, list(order)), logits(expected))


def test_active_adapters_compute_something_else_in_another_order():
    model = two_adapters()
    one, other = (logits_of(model, order) for order in (["first", "second"], ["second", "first"]))
    assert not torch.allclose(one, other, atol=1e-3)


def test_several_active_adapters_train_together():
    model = two_adapters()
    model.base_model.set_adapter(["first", "second"])
    before = {name: model.state_dict()[name].clone() for name in rotations(model, "first", "second")}
    train(model, 1)
    assert not [name for name, tensor in before.items() if torch.equal(model.state_dict()[name], tensor)]


def test_several_active_adapters_merge_into_a_plain_model():
    model = two_adapters()
    expected = logits_of(model, ["first", "second"])
    assert_close(logits(model.merge_and_unload()), expected)


def test_inactive_adapter_is_deleted_without_changing_the_output():
    model = two_adapters()
    before = logits(model)
    model.delete_adapter("second")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["first", "second"])
def test_deleted_adapter_leaves_nothing_behind(name):
    model = two_adapters()
    model.delete_adapter(name)
    assert not [key for key in model.state_dict() if name in key]
    assert list(model.peft_config) == [{"first": "second", "second": "first"}[name]]


def test_other_adapter_becomes_active_when_the_active_one_is_deleted():
    model = two_adapters()
    expected = logits_of(model, "second")
    model.set_adapter("first")
    model.delete_adapter("first")
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model), expected)


def test_model_without_adapters_left_is_the_original_one():
    model = two_adapters()
    model.delete_adapter("first")
    model.delete_adapter("second")
    assert torch.equal(logits(model.base_model.model), logits(llama()))


@pytest.mark.parametrize("name", ["first", "second"])
def test_merged_adapter_cannot_be_deleted(name):
    model = two_adapters()
    model.merge_adapter([name])
    before = state(model)
    with pytest.raises(ValueError, match="unmerge"):
        model.delete_adapter(name)
    assert_same_state(model.state_dict(), before)


def test_adapter_beside_a_merged_one_can_be_deleted():
    model = two_adapters()
    model.merge_adapter(["first"])
    before = logits(model)
    model.delete_adapter("second")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("regime", ["block_stochastic", "periodic"])
def test_adapter_cannot_be_added_to_a_folded_model(regime):
    """Its own file would not hold the weights that it stands on."""
    model = folded(keep_initial_weights=True)
    before = state(model)
    with pytest.raises(ValueError, match="'default' has been folded .* merge_and_unload"):
        model.add_adapter("second", poet_config(regime))
    assert_same_state(model.state_dict(), before)
    assert list(model.peft_config) == ["default"]


def test_fold_beside_another_adapter_is_refused_and_changes_nothing():
    model = wrap(llama(), "periodic")
    model.add_adapter("second", poet_config("periodic"))
    before = state(model)
    with pytest.raises(POETFoldError, match="second"):
        merge_and_reinitialize(model)
    assert_same_state(model.state_dict(), before)


@each_periodic
def test_fold_of_a_merged_adapter_is_refused_and_changes_nothing(regime):
    model = wrap(llama(), regime)
    model.merge_adapter()
    before = state(model)
    with pytest.raises(POETFoldError, match="unmerge_adapter"):
        merge_and_reinitialize(model)
    assert_same_state(model.state_dict(), before)


@each_adapter
def test_second_adapter_with_train_rest_is_refused(regime):
    model = wrap(llama(), regime)
    with pytest.raises(ValueError, match="train_rest"):
        model.add_adapter("second", poet_config("block_stochastic", train_rest=True))


def test_second_adapter_beside_train_rest_is_refused():
    with pytest.raises(ValueError, match="train_rest"):
        wrap(llama(), "pretraining").add_adapter("second", poet_config())


def test_refused_adapter_leaves_the_model_as_it_was():
    model = wrap(llama(), "pretraining")
    before, training = state(model), trainable(model)
    with pytest.raises(ValueError, match="train_rest"):
        model.add_adapter("second", poet_config())
    assert_same_state(model.state_dict(), before)
    assert trainable(model) == training
    assert list(model.peft_config) == ["default"]


@each_regime
def test_unmerging_restores_everything_bit_for_bit(regime):
    model = wrap(llama(), regime)
    train(model, 1)
    before = state(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_state(model.state_dict(), before)


@each_regime
def test_merged_model_computes_the_same(regime):
    model = wrap(llama(), regime)
    before = logits(model)
    model.merge_adapter()
    assert_close(logits(model), before)


def test_merging_one_adapter_after_the_other_is_the_same_as_both_at_once():
    one_by_one, at_once = two_adapters(), two_adapters()
    one_by_one.merge_adapter(["first"])
    one_by_one.merge_adapter(["second"])
    at_once.merge_adapter(["first", "second"])
    assert_close(logits(one_by_one), logits(at_once))


def test_safe_merge_refuses_a_broken_adapter():
    model = wrap(llama())
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    nn.init.constant_(layer.poet_R["default"].weight, float("nan"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        model.merge_adapter(safe_merge=True)


# What trains


@each_adapter
def test_only_rotations_train(regime):
    model = wrap(llama(), regime)
    assert trainable(model) == rotations(model, "default")


def test_added_adapter_does_not_train_until_it_is_active():
    model = two_adapters()
    assert trainable(model) == rotations(model, "first")


def test_set_adapter_moves_training_to_the_active_adapter():
    model = two_adapters()
    model.set_adapter("second")
    assert trainable(model) == rotations(model, "second")


@each_kind
def test_set_adapter_for_inference_freezes_everything(regime):
    model = wrap(llama(), regime)
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == set()


def test_all_active_adapters_train():
    model = two_adapters()
    model.base_model.set_adapter(["first", "second"])
    assert trainable(model) == rotations(model, "first", "second")


def test_remaining_adapter_trains_after_the_active_one_is_deleted():
    model = two_adapters()
    model.delete_adapter("first")
    assert trainable(model) == rotations(model, "second")


@each_kind
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_memory"])
def test_nothing_trains_in_a_model_loaded_for_inference(tmp_path, regime, low_cpu_mem_usage):
    wrap(llama(), regime).save_pretrained(tmp_path)
    assert trainable(PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)) == set()


@each_kind
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_memory"])
def test_the_same_trains_in_a_model_loaded_for_training(tmp_path, regime, low_cpu_mem_usage):
    model = wrap(llama(), regime)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert trainable(loaded) == trainable(model)


@each_kind
def test_rotated_weights_do_not_train_in_a_model_loaded_by_transformers(tmp_path, regime):
    """Its loader makes new parameters of them, which ask for gradients, and calls no hook of a tuner."""
    wrap(llama(), regime).save_pretrained(tmp_path)
    loaded = llama()
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    loaded(input_ids=tokens(), labels=tokens()).loss.backward()
    weights = [layer.get_base_layer().weight for _, layer in poet_layers(loaded)]
    trained = [p for group in poet_param_groups(loaded, lr=1e-3, poet_lr=1e-3) for p in group["params"]]
    assert all(weight.grad is None for weight in weights)
    assert {id(weight) for weight in weights}.isdisjoint(map(id, trained))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_a_second_adapter_keeps_the_first_one_training(tmp_path, is_trainable):
    wrap(llama(), "fully_stochastic").save_pretrained(tmp_path)
    model = wrap(llama(), adapter_name="first")
    model.load_adapter(tmp_path, "second", is_trainable=is_trainable)
    assert trainable(model) == rotations(model, "first", *(["second"] if is_trainable else []))


@each_kind
def test_what_trains_is_the_same_after_loading_over_the_adapter(tmp_path, regime):
    model = wrap(llama(), regime)
    before = trainable(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert trainable(model) == before


@each_kind
def test_what_trains_is_the_same_after_merging_and_unmerging(regime):
    model = wrap(llama(), regime)
    before = trainable(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert trainable(model) == before


@each_periodic
def test_what_trains_is_the_same_after_a_fold(regime):
    model = wrap(llama(), regime)
    before = trainable(model)
    merge_and_reinitialize(model)
    assert trainable(model) == before


@pytest.mark.parametrize("regime", ["pretraining", "block_stochastic"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_train_rest_trains_everything_but_the_rotated_weights(regime, tied):
    model = wrap(llama(tied, attention_bias=True), regime, train_rest=True)
    assert {name for name, _ in model.named_parameters()} - trainable(model) == {
        f"{name}.base_layer.weight" for name, _ in poet_layers(model)
    }


def test_train_rest_trains_again_after_switching_to_inference_and_back():
    model = wrap(llama(), "pretraining")
    before = trainable(model)
    model.set_adapter("default", inference_mode=True)
    model.set_adapter("default")
    assert trainable(model) == before


@pytest.mark.parametrize("bias", ["none", "all", "poet_only"])
def test_bias_decides_which_biases_train(bias):
    model = wrap(gpt2(), bias=bias)
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    expected = {"none": set(), "all": biases, "poet_only": {name for name in biases if ".base_layer." in name}}
    assert trainable(model) - rotations(model, "default") == expected[bias]


@pytest.mark.parametrize("bias", ["all", "poet_only"])
def test_trained_biases_survive_a_merge(bias):
    model = wrap(gpt2(), bias=bias)
    train(model, 2)
    expected = logits(model.eval())
    assert_close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize(("classifier", "head"), [(llama_classifier, "score"), (bert_classifier, "classifier")])
def test_modules_to_save_train_beside_the_rotations(classifier, head):
    model = wrap(classifier(), modules_to_save=[head])
    assert {name for name in trainable(model) if f".{head}.modules_to_save.default." in name}
    assert {name for name in trainable(model) if f".{head}." not in name} == rotations(model, "default")


def test_disabled_adapter_uses_the_original_head():
    model = wrap(llama_classifier(), modules_to_save=["score"])
    nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama_classifier()))


def test_merged_model_has_the_trained_head():
    model = wrap(llama_classifier(), modules_to_save=["score"])
    nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    expected = logits(model)
    assert_close(logits(model.merge_and_unload()), expected)


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["as_base", "autocast"])
def test_dtype_of_the_rotations_follows_autocast_adapter_dtype(dtype, autocast):
    model = get_peft_model(llama().to(dtype), poet_config(), autocast_adapter_dtype=autocast)
    parameters = dict(model.named_parameters())
    expected = torch.float32 if autocast else dtype
    assert {parameters[name].dtype for name in rotations(model, "default")} == {expected}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["as_base", "autocast"])
def test_low_precision_model_computes_nearly_what_the_fp32_model_does(dtype, autocast):
    expected = wrap(llama())
    model = get_peft_model(llama().to(dtype), poet_config(), autocast_adapter_dtype=autocast)
    model.load_state_dict(expected.state_dict())
    assert logits(model).dtype == dtype
    assert_close(logits(model).float(), logits(expected), rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["as_base", "autocast"])
def test_low_precision_model_trains(dtype, autocast):
    model = get_peft_model(llama().to(dtype), poet_config(), autocast_adapter_dtype=autocast)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@each_regime
def test_model_cast_as_a_whole_still_computes(regime, dtype):
    model = wrap(llama(), regime)
    expected = logits(model)
    assert_close(logits(model.to(dtype)).float(), expected, rtol=0.05 if dtype.itemsize == 2 else 1e-5)


def test_half_keeps_index_tensors_whole():
    model = wrap(llama())
    before = {name: b.clone() for name, b in model.named_buffers() if "poet_" in name}
    model.half()
    assert before
    assert_same_state({name: b for name, b in model.named_buffers() if "poet_" in name}, before)


@each_periodic
def test_model_cast_as_a_whole_still_folds(regime):
    model = wrap(llama(), regime).to(torch.bfloat16)
    before = logits(model)
    merge_and_reinitialize(model)
    assert_close(logits(model).float(), before.float(), rtol=0.05)


def test_forward_under_autocast_trains_fp32_rotations():
    model = wrap(llama())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


# Models in use


@each_regime
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_generation_is_the_same_after_merging(regime, merge):
    model = wrap(llama(), regime)
    expected = model.generate(input_ids=tokens(), max_new_tokens=6, do_sample=False)
    merged = getattr(model, merge)() or model
    assert torch.equal(merged.generate(input_ids=tokens(), max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("regime", ADAPTERS)
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(regime, use_reentrant):
    def loss_and_gradients(checkpointing):
        base = llama()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model = wrap(base, regime).train()
        model.enable_input_require_grads()  # as PEFT does for checkpointing; the first layers' path depends on it
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        return {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}

    checkpointed, plain = loss_and_gradients(True), loss_and_gradients(False)
    if use_reentrant:  # its first forward runs without gradients, where another path may be the cheaper one
        assert checkpointed.keys() == plain.keys()
        for name in plain:
            assert_close(checkpointed[name], plain[name], rtol=1e-4)
    else:
        assert_same_state(checkpointed, plain)


@pytest.mark.parametrize(("layers", "rotated"), [(0, {"0"}), ([0], {"0"}), ([1], {"1"}), ([0, 1], {"0", "1"})])
def test_layers_are_indexed_from_zero(layers, rotated):
    model = wrap(llama(), target_modules=["q_proj", "up_proj"], layers_to_transform=layers)
    assert {name.split(".layers.")[1][0] for name, _ in poet_layers(model)} == rotated


class Mixed(nn.Module):
    """Linear layers, a Conv1D, an embedding, a convolution and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(128, 12)
        self.convolution = nn.Conv1d(12, 12, 3, padding=1)
        self.conv1d = Conv1D(20, 12)
        self.norm = nn.LayerNorm(20)
        self.linear = nn.Linear(20, 7)
        nn.init.normal_(self.conv1d.bias)

    def forward(self, x):
        x = self.convolution(self.embedding(x).mT).mT.contiguous()
        return self.linear(self.norm(torch.tanh(self.conv1d(x))))


@torch.no_grad()
def output(model):
    return model(tokens())


MIXED = {"block_size": 8, "target_modules": ["conv1d", "linear"]}


def test_layers_of_other_kinds_in_between_are_left_alone():
    model = wrap(Mixed(), **MIXED)
    assert {name.rpartition(".")[2] for name, _ in poet_layers(model)} == {"conv1d", "linear"}
    assert not torch.allclose(output(model), output(Mixed()), atol=1e-3)


def test_model_with_layers_of_other_kinds_merges():
    model = wrap(Mixed(), **MIXED)
    expected = output(model)
    assert_close(output(model.merge_and_unload()), expected)


def test_model_with_layers_of_other_kinds_unloads():
    assert_same_state(wrap(Mixed(), **MIXED).unload().state_dict(), Mixed().state_dict())


def test_targeting_a_layer_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="norm"):
        wrap(Mixed(), block_size=8, target_modules=["linear", "norm"])


@each_regime
def test_learning_rate_that_is_far_too_high_gives_no_nan_with_the_exact_map(regime):
    model = wrap(llama(), regime, orthogonal_map="cayley")
    optimizer = adamw(model, lr=1e-3, poet_lr=100.0)
    losses = [step(model, optimizer) for _ in range(5)]
    assert torch.isfinite(torch.tensor(losses)).all()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@each_periodic
def test_fold_of_far_too_large_exact_rotations_keeps_the_output(regime):
    model = wrap(llama(), regime, orthogonal_map="cayley")
    optimizer = adamw(model, lr=1e-3, poet_lr=100.0)
    step(model, optimizer)
    before = logits(model)
    merge_and_reinitialize(model, optimizer)
    assert_close(logits(model), before, rtol=1e-4)


# What PEFT tells about the model


@each_regime
def test_model_status_describes_the_adapter(regime):
    status = get_model_status(wrap(llama(), regime))
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert (status.available_adapters, status.num_adapter_layers) == (["default"], 14)
    assert status.requires_grad == {"default": True}


def test_model_status_counts_the_trainable_parameters():
    model = wrap(llama())
    status = get_model_status(model)
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_model_status_tells_merged_and_disabled_adapters():
    model = wrap(llama())
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_layer_status_describes_every_layer():
    statuses = get_layer_status(two_adapters())
    assert len(statuses) == 14
    for status in statuses:
        assert status.module_type == "poet.Linear"
        assert status.active_adapters == ["first"]
        assert sorted(status.available_adapters) == ["first", "second"]
        assert status.requires_grad == {"first": True, "second": False}


# 7 layers in 2 blocks: (out, in) of q, k, v, o, gate, up and down.
SIZES = [(48, 48), (24, 48), (24, 48), (48, 48), (80, 48), (80, 48), (48, 80)] * 2


@pytest.mark.parametrize("regime", ["block_stochastic", "fully_stochastic"])
def test_printed_number_of_trainable_parameters(capsys, regime):
    """Block-stochastic: `b (b - 1) / 2` for each whole block of 16 and for the rest. Fully stochastic: one block of
    half the side."""
    if regime == "block_stochastic":
        num = sum(dim // 16 * 120 + (dim % 16) * (dim % 16 - 1) // 2 for size in SIZES for dim in size)
    else:
        num = sum((dim // 2) * (dim // 2 - 1) // 2 for size in SIZES for dim in size)
    wrap(llama(), regime).print_trainable_parameters()
    assert f"trainable params: {num:,} ||" in capsys.readouterr().out


def test_printed_number_of_trainable_parameters_counts_the_rest(capsys):
    rotated = sum(rows * columns for rows, columns in SIZES)
    rest = llama().num_parameters() - rotated
    adapter, _ = wrap(llama()).get_nb_trainable_parameters()
    wrap(llama(), "pretraining").print_trainable_parameters()
    assert f"trainable params: {adapter + rest:,} ||" in capsys.readouterr().out


# Copies


def merged(regime):
    model = wrap(llama(), regime)
    model.merge_adapter()
    return model


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
each_copy = pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES)


@each_copy
@each_kind
def test_copy_computes_the_same(clone, regime):
    model = wrap(llama(), regime)
    assert torch.equal(logits(clone(model)), logits(model))


@each_copy
@each_kind
def test_copy_trains_without_the_original(clone, regime):
    model = wrap(llama(), regime)
    before = state(model)
    train(clone(model), 1)
    assert_same_state(model.state_dict(), before)


@each_copy
def test_copy_folds_to_the_same_weights(clone):
    model = wrap(llama(), "periodic")
    cloned = clone(model)
    for each in (model, cloned):
        merge_and_reinitialize(each)
    assert_same_state(cloned.state_dict(), model.state_dict())


@each_copy
@each_kind
def test_copy_of_a_merged_model_unmerges(clone, regime):
    model = merged(regime)
    cloned = clone(model)
    for each in (model, cloned):
        each.unmerge_adapter()
    assert_same_state(cloned.state_dict(), model.state_dict())
