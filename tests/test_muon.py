"""RotationMuon: how far it turns what, and that everything else gets AdamW."""

import copy

import pytest
import torch
from models import assert_same_state, gpt2, llama, step, wrap

from poet_peft import AngleLaw, RotationMuon, poet_param_groups
from poet_peft.layer import poet_layers
from poet_peft.maths.blocks import BlockPartition
from poet_peft.maths.newton_schulz import orthogonalize
from poet_peft.maths.orthogonal import upper_triangle
from poet_peft.optim import rotation_parameters


LR = 0.01
SIZES = {"blocks": 8, "with-remainder": 7, "pairs": 2, "whole": 1.0}
each_size = pytest.mark.parametrize("block_size", SIZES.values(), ids=SIZES)


def muon(model, lr=1e-3, poet_lr=LR, **kwargs):
    return RotationMuon(poet_param_groups(model, lr=lr, poet_lr=poet_lr), **kwargs)


def folded_every_step(block_size=8):
    return wrap(llama(), merge_interval=1, reinit_interval=0, block_size=block_size, init_weights=True)


def step_of(momentum, block_size, num_rotated):
    """What is added to a rotation of `num_rotated` features for a step of 1 radian, from the definition."""
    parts = []
    for Q in BlockPartition(num_rotated, num_rotated, block_size).skew_blocks(momentum):
        parts += [upper_triangle(orthogonalize(block[None], num_steps=4)).flatten() for block in Q]
    return -torch.cat(parts) / 2


def at_the_identity(block_size=8, regime="block_stochastic"):
    variant = "fully_stochastic" if isinstance(block_size, float) else "block_stochastic"
    return wrap(llama(), regime, block_size=block_size, variant=variant, init_weights=True)


def rotations(model):
    return [rotation for _, layer in poet_layers(model) for rotation in layer.rotations("default")]


def angles(model):
    """Radians of all planes of all blocks; the largest ones of each block first."""
    return [
        2 * torch.linalg.svdvals(Q)[:, : Q.shape[-1] // 2 * 2].double().atan()
        for rotation in rotations(model)
        for Q in rotation().blocks().Q
    ]


def random_gradients(model, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


@each_size
def test_a_step_turns_every_plane_by_about_the_learning_rate(block_size):
    model = at_the_identity(block_size)
    random_gradients(model)
    muon(model, num_newton_schulz_steps=8).step()
    for angle in angles(model):
        assert angle.min() > 0.74 * LR
        assert angle.max() < 1.26 * LR


@each_size
def test_a_step_turns_against_the_gradient(block_size):
    model = at_the_identity(block_size)
    random_gradients(model)
    gradients = [rotation.weight.grad.clone() for rotation in rotations(model)]
    muon(model).step()
    assert all(rotation.weight @ gradient < 0 for rotation, gradient in zip(rotations(model), gradients, strict=True))


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_scale_of_the_gradient_does_not_matter(scale):
    model, other = at_the_identity(), at_the_identity()
    random_gradients(model)
    random_gradients(other, scale)
    muon(model).step()
    muon(other).step()
    for a, b in zip(rotation_parameters(model), rotation_parameters(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * LR)


def test_momentum_is_the_exponential_mean_of_the_gradients():
    model = at_the_identity()
    optimizer = muon(model, momentum=0.75)
    expected = torch.zeros_like(rotations(model)[0].weight)
    for seed in range(3):
        random_gradients(model, seed=seed)
        expected = 0.75 * expected + 0.25 * rotations(model)[0].weight.grad
        optimizer.step()
    torch.testing.assert_close(optimizer.state[rotations(model)[0].weight]["momentum_buffer"], expected)


def test_step_is_the_orthogonalised_momentum_of_every_block():
    model = at_the_identity(7)
    random_gradients(model)
    optimizer = muon(model)
    optimizer.step()
    for rotation in rotations(model):
        momentum = optimizer.state[rotation.weight]["momentum_buffer"]
        expected = LR * step_of(momentum, rotation.partition.block_size, rotation.partition.num_rotated)
        torch.testing.assert_close(rotation.weight.detach(), expected, rtol=1e-4, atol=1e-7)


def test_nesterov_looks_ahead_to_the_mean_with_the_present_gradient():
    model = at_the_identity()
    optimizer = muon(model, momentum=0.75, nesterov=True)
    rotation = rotations(model)[0]
    for seed in range(2):
        random_gradients(model, seed=seed)
        rotation.reset()
        optimizer.step()
    momentum = optimizer.state[rotation.weight]["momentum_buffer"]
    ahead = 0.75 * momentum + 0.25 * rotation.weight.grad
    expected = LR * step_of(ahead, rotation.partition.block_size, rotation.partition.num_rotated)
    torch.testing.assert_close(rotation.weight.detach(), expected, rtol=1e-4, atol=1e-7)


def test_alternating_steps_move_one_side_each_and_output_sides_first():
    model = at_the_identity()
    optimizer = muon(model, alternate=True)
    moved = []
    for seed in range(4):
        random_gradients(model, seed=seed)
        before = [rotation.weight.detach().clone() for rotation in rotations(model)]
        optimizer.step()
        sides = {r.side for r, old in zip(rotations(model), before, strict=True) if not torch.equal(r.weight, old)}
        moved.append(sides)
    assert moved == [{"R"}, {"P"}, {"R"}, {"P"}]


def test_momentum_of_the_side_that_rests_takes_every_gradient():
    model, other = at_the_identity(), at_the_identity()
    alternating, both = muon(model, alternate=True), muon(other, alternate=False)
    for seed in range(3):
        for each, optimizer in ((model, alternating), (other, both)):
            random_gradients(each, seed=seed)
            optimizer.step()
    for a, b in zip(rotations(model), rotations(other), strict=True):
        momenta = (alternating.state[a.weight]["momentum_buffer"], both.state[b.weight]["momentum_buffer"])
        assert torch.equal(*momenta)


def test_resumed_optimizer_moves_the_side_whose_turn_it_is():
    model = at_the_identity()
    optimizer = muon(model, alternate=True)
    random_gradients(model)
    optimizer.step()
    resumed = muon(model, alternate=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [rotation.weight.detach().clone() for rotation in rotations(model)]
    resumed.step()
    assert {r.side for r, old in zip(rotations(model), before, strict=True) if not torch.equal(r.weight, old)} == {"P"}


@pytest.mark.parametrize(
    ("build", "expected"), [(folded_every_step, (0.9, 0.25, True, True)), (at_the_identity, (0.9, 0.0, False, False))]
)
def test_defaults_follow_the_regime(build, expected):
    (group,) = muon(build()).param_groups
    assert tuple(group[name] for name in ("momentum", "decorrelation", "nesterov", "alternate")) == expected


def test_given_settings_hold_in_every_regime():
    (group,) = muon(folded_every_step(), momentum=0.5, nesterov=False, alternate=False).param_groups
    assert (group["momentum"], group["nesterov"], group["alternate"]) == (0.5, False, False)


def test_angle_is_read_in_radians():
    model = at_the_identity()
    random_gradients(model)
    RotationMuon(poet_param_groups(model, lr=1e-3, angle=LR)).step()
    other = at_the_identity()
    random_gradients(other)
    muon(other).step()
    assert_same_state(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_schedule_multiplies_a_clamped_angle(part):
    model = at_the_identity()
    optimizer = RotationMuon(poet_param_groups(model, lr=10.0, angle=AngleLaw(max_angle=LR)))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: part)
    random_gradients(model)
    optimizer.step()
    largest = max(float(angle.max()) for angle in angles(model))
    assert 0.9 * part * LR < largest < 1.26 * part * LR


def test_block_without_gradient_does_not_turn():
    model = at_the_identity(8)
    random_gradients(model)
    weight = rotations(model)[0].weight
    weight.grad[:28] = 0
    muon(model).step()
    assert not weight[:28].any()
    assert weight[28:].any()


def test_rotation_without_gradient_stays_and_has_no_state():
    model = at_the_identity()
    random_gradients(model)
    first = rotations(model)[0].weight
    first.grad = None
    optimizer = muon(model)
    optimizer.step()
    assert not first.any()
    assert first not in optimizer.state


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_everything_else_gets_adamw(build):
    model = wrap(build(), "pretraining")
    other = copy.deepcopy(model)
    optimizer = muon(model)
    groups = [group for group in poet_param_groups(other, lr=1e-3, poet_lr=LR) if group["name"] != "poet"]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for seed in range(3):
        random_gradients(model, seed=seed)
        random_gradients(other, seed=seed)
        optimizer.step()
        adamw.step()
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    expected = {name: parameter for name, parameter in other.named_parameters() if id(parameter) in trained}
    actual = dict(model.named_parameters())
    assert expected
    assert_same_state({name: actual[name] for name in expected}, expected)


def test_scheduled_learning_rate_is_used():
    model = at_the_identity()
    optimizer = muon(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    random_gradients(model)
    optimizer.step()
    assert max(angle.max() for angle in angles(model)) < 0.63 * LR


def test_closure_is_called_and_its_loss_returned():
    model = at_the_identity()
    optimizer = muon(model)

    def closure():
        random_gradients(model)
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3.0
    assert rotations(model)[0].weight.any()


def test_training_lowers_the_loss():
    model = at_the_identity(16)
    optimizer = muon(model, poet_lr=0.05)
    losses = [step(model, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05


def test_plain_parameters_are_refused():
    with pytest.raises(ValueError, match="poet_param_groups"):
        RotationMuon(wrap(llama()).parameters())


@pytest.mark.parametrize(("name", "value"), [("momentum", 1.0), ("momentum", -0.1), ("num_newton_schulz_steps", 0)])
def test_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        muon(wrap(llama()), **{name: value})
