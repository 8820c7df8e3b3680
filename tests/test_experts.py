"""Stacked weights of experts, by `target_parameters`: every expert is rotated by itself."""

import copy

import pytest
import torch
from cases import TRAINING_REGIMES, normal, relative_error
from mixtures import (
    config,
    dense_weight,
    for_both_variants,
    for_every_model,
    moe,
    num_stacks,
    optimizer_of,
    rotated,
    route,
    stack,
    train,
)
from models import assert_same_state, logits, state, tokens
from peft import PeftModel, get_peft_model

from poet_peft import POETFoldError, fold, merge_and_reinitialize
from poet_peft.diagnostics import diagnose
from poet_peft.experts import ParamWrapper
from poet_peft.layer import poet_layers
from poet_peft.ops import reference


@for_every_model
def test_untrained_adapter_does_not_change_a_bit(name):
    base = moe(name)
    expected = logits(base)
    model = get_peft_model(base, config())
    assert len(list(poet_layers(model))) == num_stacks(name)
    assert torch.equal(logits(model), expected)


@for_every_model
@for_both_variants
def test_merged_weight_is_every_experts_own_rotation(name, variant):
    model = rotated(name, variant=variant)
    expected = {layer.module_name: dense_weight(layer) for _, layer in poet_layers(model)}
    model.merge_adapter()
    for _, layer in poet_layers(model):
        assert relative_error(stack(layer), expected[layer.module_name]) < 2e-6
        assert relative_error(stack(layer), stack_of(moe(name), layer)) > 0.1


def stack_of(base, layer):
    weight = base.get_parameter(layer.module_name).detach().double()
    return layer.weight_layout.as_matrix(weight)


@for_every_model
def test_forward_is_that_of_the_merged_model(name):
    model = rotated(name)
    expected = logits(model)
    assert relative_error(logits(moe(name)), expected) > 1e-3
    model.merge_adapter()
    assert relative_error(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


@for_every_model
def test_merge_keeps_the_spectrum_of_every_expert(name):
    model = rotated(name)
    before = {layer.module_name: torch.linalg.svdvals(stack(layer)) for _, layer in poet_layers(model)}
    model.merge_adapter()
    for _, layer in poet_layers(model):
        torch.testing.assert_close(torch.linalg.svdvals(stack(layer)), before[layer.module_name], rtol=1e-5, atol=1e-6)


@for_every_model
def test_every_rotation_gets_a_gradient_and_nothing_else_does(name):
    model = rotated(name, theta=0.1)
    input_ids = tokens()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    rotations = [rotation.weight for _, layer in poet_layers(model) for rotation in layer.rotations("default")]
    assert all(weight.grad.any() for weight in rotations)
    reached = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert len(reached) == len(rotations)


def test_gradients_are_the_finite_differences():
    model = rotated("mixtral", theta=0.2).double()
    model.base_model.model.set_experts_implementation("eager")  # another has no float64
    _, layer = next(poet_layers(model))
    names = [name for name, _ in layer.named_parameters() if ".default.weight" in name]
    assert len(names) == 4  # of both of its parameters
    hidden, experts, weights = route()

    def forward(*values):
        arguments = (hidden.double(), experts, weights.double())
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), arguments)

    leaves = [layer.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(forward, leaves, fast_mode=True)


def test_experts_without_tokens_get_no_gradient():
    model = rotated("mixtral", theta=0.1)
    _, layer = next(poet_layers(model))
    hidden, _, weights = route()
    layer(hidden, torch.tensor([[0, 2]]).expand(5, 2), weights).square().sum().backward()
    for rotation in layer.rotations("default"):
        by_expert = rotation.weight.grad.view(4, -1).abs().amax(1) > 0
        assert by_expert.tolist() == [True, False, True, False]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_every_implementation_of_the_experts_computes_the_same(name, implementation):
    model = rotated(name)
    model.base_model.model.set_experts_implementation("eager")
    expected = logits(model)
    model.base_model.model.set_experts_implementation(implementation)
    assert relative_error(logits(model), expected) < 1e-5


REGIMES = {**TRAINING_REGIMES, "rest": {"merge_interval": 2, "train_rest": True}}
CASES = [("mixtral", regime) for regime in REGIMES] + [
    ("gpt_oss", "folds"),
    ("gpt_oss", "fold-every-step"),
    ("llama4", "folds"),
]
for_every_regime = pytest.mark.parametrize(("name", "regime"), CASES)


def trained(name, regime, num_steps=4):
    model = rotated(name, theta=0.0, **REGIMES[regime])
    train(model, optimizer_of(model, muon=regime == "fold-every-step"), range(num_steps))
    return model


@for_every_regime
def test_trained_adapter_is_saved_loaded_and_merged(name, regime, tmp_path):
    model = trained(name, regime)
    dtype = REGIMES[regime].get("dtype", torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(moe(name, dtype), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert relative_error(logits(moe(name, dtype)), logits(model)) > 1e-4

    plain = loaded.merge_and_unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in moe(name).modules()]
    plain.save_pretrained(tmp_path / "merged")
    again = type(plain).from_pretrained(tmp_path / "merged", dtype=dtype)
    assert relative_error(logits(again), logits(model)) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


@for_every_regime
def test_training_keeps_the_spectrum_of_every_expert(name, regime):
    model = trained(name, regime)
    model.merge_adapter()
    tolerance = 4e-3 if "bf16" in regime else 1e-5
    for _, layer in poet_layers(model):
        before = torch.linalg.svdvals(stack_of(moe(name), layer))
        assert ((torch.linalg.svdvals(stack(layer)) - before).abs() <= tolerance * before.amax()).all()


@pytest.mark.parametrize("regime", ["adapter", "folds", "fold-every-step"])
def test_resumed_run_ends_as_the_uninterrupted_one(regime, tmp_path):
    model = rotated("mixtral", theta=0.0, **REGIMES[regime])
    optimizer = optimizer_of(model, muon=regime == "fold-every-step")
    train(model, optimizer, range(3))
    model.save_pretrained(tmp_path)
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(3, 6))

    resumed = PeftModel.from_pretrained(moe("mixtral"), tmp_path, is_trainable=True)
    other = optimizer_of(resumed, muon=regime == "fold-every-step")
    other.load_state_dict(optimizer_state)
    train(resumed, other, range(3, 6))
    assert_same_state(state(resumed), state(model))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_quick_folds_write_what_measured_folds_write(name, monkeypatch):
    quick = trained(name, "fold-every-step")
    monkeypatch.setattr(fold, "is_quick", lambda item: False)
    measured = trained(name, "fold-every-step")
    for (_, a), (_, b) in zip(poet_layers(quick), poet_layers(measured), strict=True):
        assert relative_error(a.base_parameter, b.base_parameter) < 1e-4
        assert relative_error(a.base_parameter, moe(name).get_parameter(a.module_name)) > 1e-2


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_fold_changes_no_output(name):
    model = rotated(name, merge_interval=10)
    expected = logits(model)
    report = merge_and_reinitialize(model)
    assert report.num_layers == num_stacks(name)
    assert report.spectral_drift < 1e-5
    assert relative_error(logits(model), expected) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@for_both_variants
def test_reference_of_a_stack_is_every_experts_own_layer(name, variant):
    _, layer = next(poet_layers(rotated(name, variant=variant)))
    x, W = normal(4, 5, layer.in_features, dtype=torch.float64), stack(layer)
    bias = normal(4, layer.out_features, seed=1, dtype=torch.float64)
    R, P = ([(side.index, [d.double() for d in side.deltas()]) for side in s] for s in layer.sides(["default"]))
    expected = torch.einsum("eoi,eti->eto", dense_weight(layer), x) + bias[:, None]
    assert relative_error(reference.poet_linear(x, W, bias, R, P), expected) < 1e-6


def without_R(weight, R, P):
    return reference_weight(weight, [], P)


def other_experts(weight, R, P):
    return reference_weight(weight, R, P).roll(1, 0)


def transposed_P(weight, R, P):
    return reference_weight(weight, R, [(index, [delta.mT for delta in deltas]) for index, deltas in P])


reference_weight = reference.effective_weight


@pytest.mark.parametrize("broken", [without_R, other_experts, transposed_P])
def test_fold_that_writes_another_weight_is_undone(broken, monkeypatch):
    model = rotated("mixtral", merge_interval=10)
    _, layer = next(poet_layers(model))
    before = layer.base_parameter.clone()
    monkeypatch.setattr(reference, "effective_weight", broken)
    with pytest.raises(POETFoldError, match="changed its output by .*which is not rounding.*put back"):
        merge_and_reinitialize(model)
    assert torch.equal(layer.base_parameter, before)


def test_original_model_is_there_after_folds_with_a_copy():
    model = rotated("mixtral", merge_interval=10, keep_initial_weights=True)
    merge_and_reinitialize(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(moe("mixtral")))
    assert torch.equal(logits(model.unload()), logits(moe("mixtral")))


def test_second_adapter_composes_and_switches():
    model = rotated("mixtral")
    first = logits(model)
    model.add_adapter("second", config(seed=1, init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert relative_error(logits(model), first) > 1e-3
    assert len(list(poet_layers(model))) == num_stacks("mixtral")


def test_linear_layers_and_experts_together(tmp_path):
    settings = {"target_modules": ["q_proj", "v_proj"], "init_weights": False}
    model = get_peft_model(moe("mixtral"), config(**settings))
    assert {type(layer).__name__ for _, layer in poet_layers(model)} == {"Linear", "ParamWrapper"}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(moe("mixtral"), tmp_path)), logits(model))


def test_router_is_rotated_where_it_is_named():
    model = get_peft_model(moe("mixtral"), config(target_parameters=["gate.weight"], init_weights=False))
    layers = [layer for _, layer in poet_layers(model)]
    assert len(layers) == 2 and all(isinstance(layer, ParamWrapper) for layer in layers)
    expected = logits(model)
    model.merge_adapter()
    assert relative_error(logits(model), expected) < 1e-5


def test_gradient_checkpointing_does_not_change_a_bit_of_the_gradients():
    gradients = []
    for checkpoints in (False, True):
        model = rotated("mixtral", theta=0.1).train()
        if checkpoints:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        input_ids = tokens()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# What other parts of the package make of experts


@pytest.mark.parametrize("exact", [False, True])
def test_experts_are_measured(exact):
    diagnostics = diagnose(rotated("mixtral"), exact=exact)
    assert len(diagnostics.layers) == 4
    assert all(layer.stable_rank > 1 and layer.spectral_norm > 0 for layer in diagnostics.layers)


def test_adapters_by_sample_are_refused_by_the_name_of_the_experts():
    with pytest.raises(ValueError, match="experts.*gets the tokens of all samples together"):
        rotated("mixtral")(input_ids=tokens(2), adapter_names=["default", "__base__"])


def test_experts_at_scale_zero_are_the_base_model_bit_for_bit():
    model = rotated("mixtral")
    for _, layer in poet_layers(model):
        layer.set_scale("default", 0)
    assert torch.equal(logits(model), logits(moe("mixtral")))


def test_experts_at_half_the_scale_keep_the_spectrum():
    model = rotated("mixtral")
    for _, layer in poet_layers(model):
        layer.set_scale("default", 0.5)
        before = torch.linalg.svdvals(stack(layer))
        layer.merge()
        torch.testing.assert_close(torch.linalg.svdvals(stack(layer)), before, rtol=1e-5, atol=1e-5)
