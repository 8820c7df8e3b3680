"""A step of one side leaves to the other what both ask for alike."""

import pytest
import torch
from cases import PLAIN, Case, OneLayer, base_layer, inputs, wrap
from mixtures import config as expert_config
from mixtures import moe
from models import tokens
from peft import get_peft_model

from poet_peft import RotationMuon, poet_param_groups
from poet_peft.layer import poet_layers
from poet_peft.maths.orthogonal import skew
from poet_peft.quick_fold import rotate_in_place


ANGLE = 1e-4
KINDS = {
    "linear": PLAIN,
    "one-block": Case("", 12, 12, block_size=12),
    "one-block-of-outputs": Case("", 6, 20, block_size=16),
    "conv1d": Case("", 19, 22, kind="conv1d"),
    "fully-stochastic": Case("", 14, 22, block_size=0.5, variant="fully_stochastic"),
    "convolution": Case("", 19, 27, kind="convolution2d"),
}
EVERY_STEP = {"merge_interval": 1, "reinit_interval": 0}


def of_one_layer(kind, **overrides):
    """A model with one rotated layer, the layer, and what gives the loss."""
    case = KINDS[kind]
    model = wrap(OneLayer(base_layer(case)), case.config(**EVERY_STEP, **overrides))
    return model, model.base_model.model.layer, lambda: model(inputs(case, 5)).pow(3).sum()


def of_experts():
    model = get_peft_model(moe("mixtral"), expert_config(**EVERY_STEP))
    _, layer = next(iter(poet_layers(model)))
    return model, layer, lambda: model(input_ids=tokens(), labels=tokens()).loss


MODELS = {**{kind: lambda kind=kind: of_one_layer(kind) for kind in KINDS}, "experts": of_experts}


def muon(model, **settings):
    return RotationMuon(poet_param_groups(model, lr=0.0, angle=ANGLE), **settings)


def take_step(optimizer, loss):
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def asked_by(layer, rotation, optimizer, weight):
    """The change of the weight that the momentum of a rotation asks for."""
    momentum = optimizer.state[rotation.weight]["momentum_buffer"]
    generators = [skew(triangles, size) for triangles, size in rotation.partition.split(momentum / momentum.norm())]
    rotated = weight.clone()
    rotate_in_place(rotated, rotation.side, rotation.index, generators)
    return rotated - weight


@pytest.mark.parametrize("num_steps", [1, 2])  # the first moves R, the second P
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("kind", MODELS)
def test_step_has_nothing_of_what_the_other_side_asks_for(kind, share, num_steps):
    model, layer, loss = MODELS[kind]()
    optimizer = muon(model, decorrelation=share)
    for _ in range(num_steps):
        before = layer.base_weight.read().clone()
        take_step(optimizer, loss)
    idle = layer.rotations("default")[num_steps % 2]
    change = layer.base_weight.read() - before
    cosine = torch.cosine_similarity(change.flatten(), asked_by(layer, idle, optimizer, before).flatten(), dim=0)
    assert (cosine.abs() < 2e-3) == (share == 1)


def test_share_scales_what_is_left_out():
    changes = []
    for share in (0.0, 0.5, 1.0):
        model, layer, loss = of_one_layer("linear")
        before = layer.base_weight.read().clone()
        take_step(muon(model, decorrelation=share), loss)
        changes.append(layer.base_weight.read() - before)
    torch.testing.assert_close(changes[1], (changes[0] + changes[2]) / 2, rtol=1e-3, atol=1e-7)


def test_layer_with_one_side_takes_its_step():
    case = Case("", 1, 12, block_size=4)
    weights = []
    for share in (0.0, 0.5):
        model = wrap(OneLayer(base_layer(case)), case.config(**EVERY_STEP))
        optimizer = muon(model, decorrelation=share)
        for _ in range(2):
            take_step(optimizer, lambda model=model: model(inputs(case, 5)).pow(3).sum())
        weights.append(model.base_model.model.layer.base_weight.read())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], base_layer(case).weight)


def test_a_frozen_side_asks_for_nothing():
    model, layer, loss = of_one_layer("linear")
    layer.rotations("default")[1].weight.requires_grad_(False)
    optimizer = muon(model, decorrelation=0.5)
    take_step(optimizer, loss)
    assert layer.state("default").num_folds == 1
    assert len(optimizer.state_dict()["state"]) == 1


def test_rotations_that_are_folded_less_often_are_refused():
    case = KINDS["linear"]
    model = wrap(OneLayer(base_layer(case)), case.config(merge_interval=2))
    with pytest.raises(ValueError, match=r"decorrelation=0\.25 .* merge_interval=1"):
        muon(model, decorrelation=0.25)


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_share_out_of_range_is_refused(value):
    model, _, _ = of_one_layer("linear")
    with pytest.raises(ValueError, match=rf"decorrelation={value} must lie in \[0, 1\]"):
        muon(model, decorrelation=value)
