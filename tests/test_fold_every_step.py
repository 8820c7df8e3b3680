"""Rotations that are folded after every optimizer step, so that every forward meets the identity."""

import copy

import pytest
import torch
from cases import PLAIN, OneLayer, base_layer, for_cases, inputs, matrix, relative_error, with_gradient
from cases import wrap as wrap_one
from models import adamw, assert_same_state, gpt2, llama, logits, state, step, tokens, train, wrap
from peft import PeftModel, get_peft_model

from poet_peft import POETConfig, POETFoldError, RotationMuon, merge_and_reinitialize, poet_param_groups, quick_fold
from poet_peft.layer import poet_layers
from poet_peft.maths import blocks
from poet_peft.ops import reference
from poet_peft.ops.paths import compute_path
from poet_peft.schedule import take_report


INTERVALS = {"merge_interval": 1, "reinit_interval": 0}
for_every_case = for_cases()
for_both_rules = pytest.mark.parametrize("rule", ["tangent", "weight_centric"])


def one_layer(case, **overrides):
    """A model of one layer with rotations at the identity, and the layer."""
    model = wrap_one(OneLayer(base_layer(case)), case.config(**{**INTERVALS, **overrides}))
    return model, model.base_model.model.layer


def small_model(base=None, **overrides):
    settings = {"init_weights": True, "block_size": 16, "train_rest": True, "base_init": "normalized"}
    return wrap(llama() if base is None else base, **{**INTERVALS, **settings, **overrides})


def muon(model, **kwargs):
    return RotationMuon(poet_param_groups(model, lr=1e-3, angle=0.02), **kwargs)


def gradients(layer, x):
    rotations = {name: p for name, p in layer.named_parameters() if name.startswith("poet_")}
    y = layer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    wanted = {**({"x": x} if x.requires_grad else {}), **rotations}
    return dict(zip(wanted, torch.autograd.grad((y * weights).sum(), list(wanted.values())), strict=True))


def weights(model):
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in poet_layers(model)}


def spectra(model):
    return [torch.linalg.svdvals(layer.base_weight.read().double()) for _, layer in poet_layers(model)]


def largest_drift(before, after):
    return max(float(((a - b) / b).abs().max()) for a, b in zip(after, before, strict=True))


# The forward and the gradient at the identity


@for_every_case
def test_forward_is_the_base_layers_own(case):
    _, layer = one_layer(case)
    x = inputs(case, 5)
    assert torch.equal(layer(x), layer.base_layer(x))


@for_both_rules
@for_every_case
def test_gradients_are_those_of_the_readable_definition(case, rule):
    """Which the regime of rarer folds computes by."""
    _, layer = one_layer(case)
    _, other = one_layer(case, merge_interval=10)
    x = with_gradient(inputs(case, 9))
    with compute_path(rule):
        actual = gradients(layer, x)
    with compute_path("reference"):
        expected = gradients(other, x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[case.dtype]
    for name in expected:
        assert relative_error(actual[name], expected[name]) < tolerance, name


def test_micro_batches_add_up():
    whole, parts = small_model(), small_model()
    input_ids = tokens(batch=4)
    whole(input_ids=input_ids, labels=input_ids).loss.backward()
    for part in input_ids.chunk(2):
        (parts(input_ids=part, labels=part).loss / 2).backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_nothing_of_a_weights_size_is_kept_for_the_backward():
    model, layer = one_layer(PLAIN)
    x = inputs(PLAIN, 5).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    sizes = [t for t in kept if t.numel() >= layer.base_layer.weight.numel()]
    assert {t.data_ptr() for t in sizes} == {layer.base_layer.weight.data_ptr()}


def test_base_weights_get_no_gradient():
    model = small_model()
    input_ids = tokens()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(layer.get_base_layer().weight.grad is None for _, layer in poet_layers(model))


def test_rotation_that_is_not_the_identity_is_computed_with():
    """As after a change by hand."""
    model, layer = one_layer(PLAIN)
    x = inputs(PLAIN, 5)
    before = layer(x)
    with torch.no_grad():
        layer.poet_R["default"].weight.data.fill_(0.1)
    assert relative_error(layer(x), before) > 1e-2


def test_layer_whose_forward_is_its_own_trains_alike():
    """One that is wrapped by a hook is called, and rotated around."""
    plain, hooked = small_model(), small_model()
    for _, layer in poet_layers(hooked):
        layer.base_layer.register_forward_hook(lambda module, args, output: output)
    for model in (plain, hooked):
        input_ids = tokens()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), hooked.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_compiled_model_takes_the_same_steps():
    torch.compiler.reset()
    eager, compiled = small_model(), small_model()
    optimizers = [muon(model) for model in (eager, compiled)]
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        input_ids = tokens(seed=seed)
        for model, optimizer in zip((eager, run), optimizers, strict=True):
            model(input_ids=input_ids, labels=input_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_compiled_model_refuses_a_rotation_that_is_not_the_identity():
    torch.compiler.reset()
    model, layer = one_layer(PLAIN)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = inputs(PLAIN, 5)
    run(x)
    with torch.no_grad():
        layer.poet_R["default"].weight.data.fill_(0.1)
    with pytest.raises(RuntimeError, match="merge_and_reinitialize"):
        run(x)


# The fold of the sides that moved


@for_cases(lambda case: case.dtype != torch.float16)
@pytest.mark.parametrize("angle", [0.01, 0.6], ids=["small", "large"])
def test_fold_writes_the_rotated_weight(case, angle):
    model, layer = one_layer(case)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    layer.advance("default", num_steps=1)
    expected = matrix(layer.base_layer)
    pairs = {"R": [], "P": []}
    for seed, rotation in enumerate(layer.rotations("default")):
        Q = torch.randn(rotation.weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        Q *= angle / rotation.partition.block_size**0.5 / 2
        rotation.weight.grad = -Q.to(rotation.weight.dtype)
        deltas = [rotation.orthogonal_map.delta(block) for block in rotation.partition.skew_blocks(Q)]
        pairs[rotation.side].append((rotation.index, deltas))
    expected = reference.effective_weight(expected, pairs["R"], pairs["P"])
    optimizer.step()
    # Exact but for the map, from which the quick one differs by the third power of the angle.
    tolerance = {torch.float64: 1e-9, torch.float32: 3e-6, torch.bfloat16: 3e-3}[case.dtype]
    assert relative_error(matrix(layer.base_layer), expected) < tolerance
    assert not any(rotation.weight.any() for rotation in layer.rotations("default"))
    assert layer.state("default").num_folds == 1


def test_only_the_side_that_moved_is_folded(monkeypatch):
    folded = []
    fold = quick_fold.rotate_in_place

    def record(matrix, side, *args):
        folded.append(side)
        fold(matrix, side, *args)

    monkeypatch.setattr(quick_fold, "rotate_in_place", record)
    model = small_model()
    optimizer = muon(model)
    for seed in range(3):
        step(model, optimizer, seed)
    assert folded == ["P"] * 14 + ["R"] * 14  # the first step's fold is measured, and not one of these


def test_measured_and_quick_folds_train_alike(monkeypatch):
    measured, quick = small_model(), small_model()
    for model, every in ((measured, 1), (quick, 100)):
        monkeypatch.setattr(quick_fold, "MEASURED_EVERY", every)
        train(model, 4, muon(model))
    for a, b in zip(weights(measured).values(), weights(quick).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_first_fold_and_every_hundredth_are_reported(monkeypatch):
    monkeypatch.setattr(quick_fold, "MEASURED_EVERY", 3)
    model = small_model()
    optimizer = muon(model)
    reported = []
    for number in range(1, 8):
        step(model, optimizer, number)
        if take_report(optimizer) is not None:
            reported.append(number)
    assert reported == [1, 3, 6]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_rotation_that_blew_up_is_refused_and_no_weight_is_changed(value):
    model = small_model()
    optimizer = muon(model)
    step(model, optimizer)
    before = weights(model)
    _, layer = next(poet_layers(model))
    layer.poet_P["default"].weight.grad = torch.zeros_like(layer.poet_P["default"].weight)
    with torch.no_grad():
        layer.poet_P["default"].weight.fill_(value)
    with pytest.raises(POETFoldError, match=f"rotation P of '{layer.module_name}'"):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    assert_same_state(weights(model), before)


@pytest.mark.parametrize("entries", [1, 2**30])
def test_blocks_of_a_batch_do_not_know_of_each_other(entries, monkeypatch):
    expected = small_model()
    train(expected, 3, muon(expected))
    monkeypatch.setattr(blocks, "_MOST_ENTRIES_OF_A_THREAD", entries)
    monkeypatch.setattr(blocks, "_MOST_ENTRIES", entries)
    monkeypatch.setattr(quick_fold, "_MOST_HELD", entries)
    actual = small_model()
    train(actual, 3, muon(actual))
    for name, weight in weights(expected).items():
        torch.testing.assert_close(weights(actual)[name], weight, rtol=0, atol=1e-5)


def test_blocks_of_only_so_many_layers_are_held_at_once(monkeypatch):
    held = []
    fold_deltas = quick_fold._fold_deltas

    def record(moved):
        deltas = fold_deltas(moved)
        held.append(sum(batch.numel() for batches in deltas.values() for batch in batches))
        return deltas

    monkeypatch.setattr(quick_fold, "_fold_deltas", record)
    monkeypatch.setattr(quick_fold, "_MOST_HELD", 4_000)
    model = small_model()
    train(model, 2, muon(model))
    # The second step's fold, of the input sides alone: six of 48 features and one of 80 for each of two layers.
    assert sum(held) == 2 * 16 * (6 * 48 + 80)
    assert len(held) > 1 and max(held) <= 4_000


def test_spectrum_stays_over_many_folds():
    model = small_model(block_size=24)
    before = spectra(model)
    train(model, 300, muon(model))
    # Over the largest singular value: the smallest ones are down to 1e-3, and move by the rounding of the weights.
    for old, new in zip(before, spectra(model), strict=True):
        assert float((new - old).abs().max() / old.max()) < 2e-6


@pytest.mark.parametrize("compensated", [True, False])
def test_spectrum_of_16_bit_weights_stays_with_compensation(compensated):
    model = small_model(llama().bfloat16(), compensated_folds=compensated)
    before = [torch.linalg.svdvals(exact.double()) for exact in _exact(model)]
    train(model, 60, muon(model))
    drift = largest_drift(before, [torch.linalg.svdvals(exact.double()) for exact in _exact(model)])
    assert (drift < 2e-4) == compensated


def _exact(model):
    return [layer.base_weight.read_exact(layer.residual_of("default")) for _, layer in poet_layers(model)]


def test_any_optimizer_folds_both_sides():
    model = small_model()
    before = weights(model)
    train(model, 3, adamw(model))
    assert all(not torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert {layer.state("default").num_folds for _, layer in poet_layers(model)} == {3}


def test_conv1d_model_trains_and_keeps_its_spectrum():
    model = small_model(gpt2())
    before = spectra(model)
    optimizer = muon(model)
    losses = [step(model, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert largest_drift(before, spectra(model)) < 1e-5


# Files


def test_resumed_run_ends_in_the_same_bits(tmp_path):
    """Cut off after an odd number of steps, so that the side whose turn it is has to be remembered."""
    whole = small_model()
    train(whole, 7, muon(whole))
    model = small_model()
    optimizer = muon(model)
    for seed in range(3):
        step(model, optimizer, seed)
    model.save_pretrained(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = PeftModel.from_pretrained(llama(seed=5), tmp_path, is_trainable=True)
    optimizer = muon(resumed)
    optimizer.load_state_dict(saved)
    for seed in range(3, 7):
        step(resumed, optimizer, seed)
    assert_same_state(resumed.state_dict(), whole.state_dict())


def test_merged_model_is_a_plain_one_with_the_same_logits(tmp_path):
    model = small_model()
    train(model, 3, muon(model))
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert torch.equal(logits(type(llama()).from_pretrained(tmp_path)), expected)


def test_explicit_fold_has_nothing_left_to_do():
    model = small_model()
    optimizer = muon(model)
    step(model, optimizer)
    before = state(model)
    report = merge_and_reinitialize(model, optimizer, reinitialize=False)
    assert report.max_rotation_angle == 0
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.endswith("poet_state.default"))


def test_pretraining_recipe_is_this_regime():
    model = get_peft_model(llama(), POETConfig.for_pretraining(block_size=16))
    optimizer = RotationMuon(poet_param_groups(model, lr=1e-2))
    losses = [step(model, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.3
