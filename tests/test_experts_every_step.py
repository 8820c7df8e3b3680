"""Experts whose rotations are folded after every optimizer step: their forward is the model's own."""

import pytest
import torch
from cases import relative_error
from mixtures import config, for_both_variants, for_every_model, moe, optimizer_of, route
from models import logits, tokens
from peft import get_peft_model

from poet_peft.layer import poet_layers
from poet_peft.ops.paths import compute_path


def every_step(name, dtype=torch.float32, **overrides):
    return get_peft_model(moe(name, dtype), config(merge_interval=1, reinit_interval=0, **overrides))


def gradients(model):
    input_ids = tokens()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def stacks(model):
    """The parameters that are rotated, by their names in the base model."""
    return {layer.module_name: layer.base_parameter for _, layer in poet_layers(model)}


@for_every_model
@for_both_variants
def test_gradients_are_those_of_the_readable_definition(name, variant):
    actual = gradients(every_step(name, variant=variant))
    with compute_path("reference"):
        expected = gradients(get_peft_model(moe(name), config(variant=variant)))
    assert actual.keys() == expected.keys()
    assert max(relative_error(actual[key], expected[key]) for key in expected) < 2e-6


def test_gradients_in_16_bits_are_those_of_the_readable_definition():
    actual = gradients(every_step("gpt_oss", torch.bfloat16))
    with compute_path("reference"):
        expected = gradients(get_peft_model(moe("gpt_oss", torch.bfloat16), config()))
    assert max(relative_error(actual[key], expected[key]) for key in expected) < 1e-2


@for_every_model
def test_experts_are_called_with_the_weights_themselves(name):
    """Not with a second copy of them."""
    model = every_step(name)
    called_with = []
    for _, layer in poet_layers(model):
        names = [name for name, _ in layer.get_base_layer().named_parameters(recurse=False)]
        layer.get_base_layer().register_forward_pre_hook(
            lambda module, args, names=names: called_with.extend(getattr(module, name).data_ptr() for name in names)
        )
    logits(model)
    assert {p.data_ptr() for p in stacks(model).values()} <= set(called_with)


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "rotation_muon"])
def test_experts_without_tokens_do_not_move(muon):
    model = every_step("mixtral")
    optimizer = optimizer_of(model, muon)
    layers = [layer for _, layer in poet_layers(model)][:2]  # of the first block, the outer one around the other
    before = [layer.base_parameter.clone() for layer in layers]
    hidden, _, weights = route()
    for _ in range(3):
        layers[0](hidden, torch.tensor([[0, 2]]).expand(5, 2), weights).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, weight in zip(layers, before, strict=True):
        assert (layer.base_parameter != weight).flatten(1).any(1).tolist() == [True, False, True, False]
