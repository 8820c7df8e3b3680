"""`torch.compile` of rotated models: one graph without a break, the same numbers, no recompilation at a fold."""

import pytest
import torch
from cases import PLAIN, for_cases, inputs, randomize, relative_error, rotated
from models import ADAPTERS, adamw, llama, tokens, wrap
from torch._dynamo.utils import counters

from poet_peft import merge_and_reinitialize


FEW = {"plain", "remainder", "bfloat16"}
for_few = for_cases(lambda case: case.name in FEW)
for_more = for_cases(lambda case: case.name in {*FEW, "conv1d", "one-output", "fully-stochastic", "exact"})
for_regimes = pytest.mark.parametrize("regime", [*ADAPTERS, "pretraining"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()


def compiled(model):
    """Traced and differentiated ahead of time as in real use, but run without a code generator."""
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def num_compilations():
    return counters["stats"]["unique_graphs"]


def loss_and_gradients(model, forward, x):
    """`forward` is `model`, or compiled from it."""
    model.zero_grad()
    loss = forward(x).float().square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def language_loss(model, forward, input_ids):
    model.zero_grad()
    loss = forward(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_close(actual, expected, tolerance=1e-5):
    assert abs(actual[0] - expected[0]) <= tolerance * abs(expected[0])
    assert len(actual[1]) == len(expected[1])
    assert max(relative_error(a, b) for a, b in zip(actual[1], expected[1], strict=True)) < tolerance


# A layer


@for_more
def test_compiled_layer_gives_the_same_loss_and_gradients(case):
    _, layer = rotated(case)
    x = inputs(case, 64)
    expected = loss_and_gradients(layer, layer, x)
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-5
    assert_close(loss_and_gradients(layer, compiled(layer), x), expected, tolerance)


def test_compiled_layer_under_autocast_gives_the_same_output():
    _, layer = rotated(PLAIN)
    x = inputs(PLAIN, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(compiled(layer)(x), layer(x)) < 1e-2


@for_few
def test_fold_recompiles_no_layer(case):
    model, layer = rotated(case, merge_interval=4)
    forward = compiled(layer)
    x = inputs(case, 8)
    loss_and_gradients(layer, forward, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (30, 40):
            merge_and_reinitialize(model)
            loss_and_gradients(layer, forward, x)
            randomize(model, 0.4, seed=seed)
            loss_and_gradients(layer, forward, x)
    assert (num_compilations(), dict(counters["graph_break"])) == (1, {})


@for_few
def test_compiled_layer_computes_with_the_folded_weight(case):
    model, layer = rotated(case, merge_interval=4)
    forward = compiled(layer)
    x = inputs(case, 8)
    forward(x)
    merge_and_reinitialize(model)
    randomize(model, 0.4, seed=30)
    tolerance = 1e-2 if case.dtype == torch.bfloat16 else 1e-5
    assert relative_error(forward(x), layer(x)) < tolerance


# A model


def compiled_to_train(regime):
    model = wrap(llama(num_hidden_layers=1), regime, merge_interval=4).train()
    return model, compiled(model), adamw(model)


@pytest.mark.slow
@for_regimes
def test_compiled_model_gives_the_same_loss_and_gradients(regime):
    model, forward, _ = compiled_to_train(regime)
    assert_close(language_loss(model, forward, tokens()), language_loss(model, model, tokens()))


@pytest.mark.slow
@for_regimes
def test_fold_recompiles_no_model(regime):
    model, forward, optimizer = compiled_to_train(regime)
    language_loss(model, forward, tokens())
    optimizer.step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            merge_and_reinitialize(model, optimizer, reinitialize=seed % 2 == 0)
            language_loss(model, forward, tokens(seed=seed))
            optimizer.step()
    assert (num_compilations(), dict(counters["graph_break"])) == (1, {})


@pytest.mark.slow
def test_compiled_model_trains_through_folds_as_the_eager_one():
    losses = []
    for use_compiler in (True, False):
        model, forward, optimizer = compiled_to_train("pretraining")
        losses.append([])
        for step in range(4):
            loss, _ = language_loss(model, forward if use_compiler else model, tokens(seed=step))
            losses[-1].append(loss.item())
            optimizer.step()
            if step % 2:
                merge_and_reinitialize(model, optimizer)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_sequences_of_three_lengths_need_no_break():
    """The path is chosen by shapes, which a compiler holds for symbols after the second one."""
    model = wrap(llama())
    forward = compiled(model)
    for length in (12, 20, 33):
        input_ids = tokens(length=length)
        assert_close(language_loss(model, forward, input_ids), language_loss(model, model, input_ids))
    assert num_compilations() <= 2
