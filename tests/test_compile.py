"""`torch.compile` of rotated models: one graph without a break, the same numbers, no recompilation at a fold."""

import functools
from typing import NamedTuple

import pytest
import torch
from cases import PLAIN, for_cases, inputs, randomize, relative_error, rotated
from mixtures import rotated as mixture
from mixtures import route
from models import adamw, llama, tokens, wrap
from torch._dynamo.utils import counters

from poet_peft import merge_and_reinitialize
from poet_peft.layer import poet_layers


for_both_variants = for_cases(lambda case: case.name in {"plain", "fully-stochastic"})
for_few = for_cases(
    lambda case: case.name in {"plain", "remainder", "fully-stochastic", "bfloat16", "grouped", "embedding"}
)


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


@for_few
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


@for_both_variants
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


@for_both_variants
def test_compiled_layer_computes_with_the_folded_weight(case):
    model, layer = rotated(case, merge_interval=4)
    forward = compiled(layer)
    x = inputs(case, 8)
    forward(x)
    merge_and_reinitialize(model)
    randomize(model, 0.4, seed=30)
    assert relative_error(forward(x), layer(x)) < 1e-5


# Experts


def call(layer):
    """Experts called with tokens as a mixture sends them."""
    hidden, experts, weights = route()
    return lambda: layer(hidden, experts, weights)


EVERY_STEP = {"merge_interval": 1, "reinit_interval": 0}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("gpt_oss", {"merge_interval": 4}), ("mixtral", EVERY_STEP)],
    ids=["folds", "fold-every-step"],
)
def test_compiled_experts_give_the_same_gradients_without_a_break_and_fold_without_a_recompilation(name, overrides):
    model = mixture(name, theta=0.0 if overrides is EVERY_STEP else 0.2, **overrides)
    layer = next(layer for _, layer in poet_layers(model))
    eager, forward = call(layer), call(compiled(layer))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            expected = loss_and_gradients(layer, lambda _: eager(), None)
            assert_close(loss_and_gradients(layer, lambda _: forward(), None), expected)
            merge_and_reinitialize(model)
    assert (num_compilations(), dict(counters["graph_break"])) == (1, {})


def test_compiled_experts_notice_a_rotation_that_was_not_folded():
    model = mixture("mixtral", theta=0.0, **EVERY_STEP)
    layer = next(layer for _, layer in poet_layers(model))
    forward = call(compiled(layer))
    forward()
    randomize(model, 0.1)
    with pytest.raises(RuntimeError, match="not the identity"):
        forward()


# A model


class Trained(NamedTuple):
    """What a model of one layer computed: before its first step, and then after each of three folds."""

    first: tuple  # loss and gradients
    losses: list[float]
    compilations: tuple  # number of graphs, and breaks


@pytest.fixture(scope="module")
def trained():
    """Models that were trained alike, compiled or not."""

    @functools.cache
    def train(use_compiler):
        targets = ["q_proj", "gate_proj", "down_proj"]  # of all shapes
        model = wrap(llama(num_hidden_layers=1), "pretraining", target_modules=targets, merge_interval=4).train()
        forward = compiled(model) if use_compiler else model
        optimizer = adamw(model)
        first = language_loss(model, forward, tokens())
        optimizer.step()
        losses = []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(3):
                merge_and_reinitialize(model, optimizer, reinitialize=seed != 1)
                losses.append(language_loss(model, forward, tokens(seed=seed))[0].item())
                optimizer.step()
        return Trained(first, losses, (num_compilations(), dict(counters["graph_break"])))

    return train


@pytest.mark.slow
def test_compiled_model_gives_the_same_loss_and_gradients(trained):
    assert_close(trained(True).first, trained(False).first)


@pytest.mark.slow
def test_fold_recompiles_no_model(trained):
    assert trained(True).compilations == (1, {})


@pytest.mark.slow
def test_compiled_model_trains_through_folds_as_the_eager_one(trained):
    assert trained(True).losses == pytest.approx(trained(False).losses, rel=1e-4)


@pytest.mark.slow
def test_sequences_of_three_lengths_need_no_break():
    """The path is chosen by shapes, which a compiler holds for symbols after the second one."""
    model = wrap(llama(num_hidden_layers=1), target_modules=["q_proj", "down_proj"])
    forward = compiled(model)
    for length in (12, 20, 33):
        input_ids = tokens(length=length)
        assert_close(language_loss(model, forward, input_ids), language_loss(model, model, input_ids))
    assert num_compilations() <= 2
