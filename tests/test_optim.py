"""Which parameters an optimizer gets, and what a fold does to its state."""

import copy
import functools
import math

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from models import (
    REGIMES,
    adamw,
    assert_same_state,
    gpt2,
    llama,
    llama_classifier,
    poet_config,
    state,
    step,
    train,
    wrap,
)
from transformers.optimization import Adafactor

from poet_peft import (
    AngleLaw,
    POETFoldError,
    RotationMuon,
    merge_and_reinitialize,
    poet_optimizer,
    poet_param_groups,
)
from poet_peft.layer import poet_layers
from poet_peft.maths.orthogonal import skew
from poet_peft.optim import rotation_parameters
from poet_peft.weights.plain import PlainWeight


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def two_active_adapters():
    model = wrap(llama(), adapter_name="first")
    model.add_adapter("second", poet_config())
    model.base_model.set_adapter(["first", "second"])
    return model


def in_transformers():
    model = llama()
    model.add_adapter(poet_config("pretraining"))
    return model


MODELS = {
    **{regime: functools.partial(lambda regime: wrap(llama(), regime), regime) for regime in REGIMES},
    "tied": lambda: wrap(llama(tied=True), "pretraining"),
    "biases": lambda: wrap(gpt2(), bias="all"),
    "biases-and-rest": lambda: wrap(gpt2(), "pretraining"),
    "classifier": lambda: wrap(llama_classifier(), modules_to_save=["score"]),
    "two-adapters": two_active_adapters,
    "transformers": in_transformers,
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def groups_by_name(model, **kwargs):
    groups = poet_param_groups(model, **{"lr": 1e-3, "poet_lr": 2e-3, "weight_decay": 0.1, **kwargs})
    return {group["name"]: group for group in groups}


def names_in(model, group):
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


# Parameter groups


@each_model
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_trainable_parameter_is_in_the_groups_exactly_once(build, weight_decay):
    model = build()
    groups = poet_param_groups(model, lr=1e-3, poet_lr=2e-3, weight_decay=weight_decay)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, trainable(model)))


@each_model
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_no_group_is_empty(build, weight_decay):
    groups = poet_param_groups(build(), lr=1e-3, poet_lr=2e-3, weight_decay=weight_decay)
    assert all(group["params"] for group in groups)


@each_model
def test_rotations_have_a_group_of_their_own_without_decay(build):
    model = build()
    group = groups_by_name(model)["poet"]
    assert {id(p) for p in group["params"]} == {id(p) for p in rotation_parameters(model)}
    assert (group["lr"], group["weight_decay"]) == (2e-3, 0.0)


@pytest.mark.parametrize("name", ["pretraining", "tied", "biases", "biases-and-rest", "classifier", "transformers"])
def test_everything_but_the_rotations_has_the_other_learning_rate(name):
    assert {group["lr"] for key, group in groups_by_name(MODELS[name]()).items() if key != "poet"} == {1e-3}


@pytest.mark.parametrize("angles", [{"poet_lr": 2e-3}, {}], ids=["poet_lr", "law"])
def test_a_model_that_is_offloaded_whole_is_refused(angles):
    model = cpu_offload(wrap(llama(), "pretraining"), execution_device="cpu")
    with pytest.raises(ValueError, match=r"parameter '.+' is on the meta device.*offloads whole"):
        poet_param_groups(model, lr=1e-3, **angles)


@each_model
def test_rotations_come_with_the_sizes_of_their_blocks(build):
    group = groups_by_name(build())["poet"]
    for parameter, (num_rotated, block_size) in zip(group["params"], group["blocks"], strict=True):
        full_blocks, remainder = divmod(num_rotated, block_size)
        assert parameter.numel() == full_blocks * math.comb(block_size, 2) + math.comb(remainder, 2)


def test_only_the_head_decays():
    model = wrap(llama(attention_bias=True), "pretraining")
    group = groups_by_name(model)["decay"]
    assert names_in(model, group) == {"base_model.model.lm_head.weight"}
    assert group["weight_decay"] == 0.1


def test_head_that_is_tied_to_the_embedding_does_not_decay():
    assert "decay" not in groups_by_name(wrap(llama(tied=True), "pretraining"))


@pytest.mark.parametrize("kind", ["embed_tokens", "norm", "bias"])
def test_embeddings_norms_and_biases_do_not_decay(kind):
    model = wrap(llama(attention_bias=True), "pretraining")
    group = groups_by_name(model)["no_decay"]
    assert {name for name in (name for name, _ in model.named_parameters()) if kind in name} <= names_in(model, group)
    assert group["weight_decay"] == 0.0


def test_saved_head_of_a_classifier_decays():
    model = wrap(llama_classifier(), modules_to_save=["score"])
    assert names_in(model, groups_by_name(model)["decay"]) == {"base_model.model.score.modules_to_save.default.weight"}


def test_pure_adapter_has_one_group():
    assert list(groups_by_name(wrap(llama()))) == ["poet"]


def test_inactive_adapter_is_not_in_the_groups():
    model = wrap(llama(), adapter_name="first")
    before = names_in(model, groups_by_name(model)["poet"])
    model.add_adapter("second", poet_config())
    assert names_in(model, groups_by_name(model)["poet"]) == before


# Angles


def block_sizes_and_rates(model, **kwargs):
    """Of all groups of rotations: (size of a block, learning rate, radians)."""
    groups = poet_param_groups(model, **{"lr": 1e-3, **kwargs})
    return [(b, g["lr"], g["radians"]) for g in groups if g["name"] == "poet" for _, b in g["blocks"]]


def test_an_adam_step_of_the_converted_rate_turns_by_the_angle_for_every_block_size():
    """All parameters of a block move by the learning rate, up or down: the root mean square over its planes."""
    generator = torch.Generator().manual_seed(0)
    model = wrap(llama(), block_size=16, block_size_pattern={"q_proj": 4, "down_proj": 8})
    rates = {(b, rate) for b, rate, _ in block_sizes_and_rates(model, angle=0.02)}
    assert {b for b, _ in rates} == {4, 8, 16}
    for b, rate in rates:
        signs = torch.randint(0, 2, (64, math.comb(b, 2)), generator=generator, dtype=torch.float64) * 2 - 1
        angles = 2 * torch.linalg.svdvals(skew(rate * signs, b)).atan()
        assert float(angles.square().mean().sqrt()) == pytest.approx(0.02, rel=1.5 / b)


def test_angle_in_radians_is_that_of_every_group():
    assert {radians for *_, radians in block_sizes_and_rates(wrap(llama()), angle=0.02)} == {0.02}


@pytest.mark.parametrize(("scale", "angle"), [(1.0, 0.02), (2.0, 0.01), (0.5, 0.04)])
def test_angle_by_default_is_that_by_which_entries_change_as_much_as_the_learning_rate_says(scale, angle):
    model = wrap(llama())
    for _, layer in poet_layers(model):
        torch.nn.init.normal_(
            layer.get_base_layer().weight, std=0.01 * scale, generator=torch.Generator().manual_seed(0)
        )
    assert [radians for *_, radians in block_sizes_and_rates(model)] == pytest.approx([angle] * 28, rel=0.06)


def test_weight_turned_by_the_angle_of_the_law_changes_by_lr_times_rho():
    model = wrap(llama(), block_size=16)
    layer = next(layer for _, layer in poet_layers(model))
    W = layer.get_base_layer().weight.detach().double()
    radians = AngleLaw().radians(layer, "R", lr=1e-3)
    plane = torch.tensor([[math.cos(radians), -math.sin(radians)], [math.sin(radians), math.cos(radians)]]).double()
    R = torch.block_diag(*[plane] * (len(W) // 2))
    assert float((R @ W - W).square().mean().sqrt()) == pytest.approx(1e-3 * 0.2, rel=0.06)


def test_law_reads_every_weight_once(monkeypatch):
    model = wrap(llama())
    read, reads = PlainWeight.read, []
    monkeypatch.setattr(PlainWeight, "read", lambda weight: reads.append(weight.layer) or read(weight))
    poet_param_groups(model, lr=1e-3)
    assert len(reads) == len(set(reads)) == len(list(poet_layers(model)))


def test_clamped_angle_is_what_adam_gets():
    (group, *_) = poet_param_groups(wrap(llama(), block_size=16), lr=10.0)
    assert group["lr"] == pytest.approx(0.02 / (2 * 16**0.5))
    assert group["max_radians"] == 0.02


@pytest.mark.parametrize(("side", "share"), [("R", 80 / 48), ("P", 48 / 80)])
def test_sides_are_weighted_by_their_features(side, share):
    layer = next(layer for name, layer in poet_layers(wrap(llama())) if name.endswith("up_proj"))
    law, weighted = (AngleLaw(side_exponent=exponent) for exponent in (0.0, 2.0))
    assert weighted.radians(layer, side, 1e-3) == pytest.approx(law.radians(layer, side, 1e-3) * share, rel=0.06)


@pytest.mark.parametrize("name", ["rho", "max_angle"])
def test_law_with_a_number_that_is_not_positive_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name}=0"):
        AngleLaw(**{name: 0})


def test_law_for_a_weight_of_zero_is_refused_with_the_name_of_the_layer():
    model = wrap(llama())
    layer = next(layer for _, layer in poet_layers(model))
    torch.nn.init.zeros_(layer.get_base_layer().weight)
    with pytest.raises(ValueError, match=rf"{layer.module_name}.*Pass angle="):
        poet_param_groups(model, lr=1e-3)


def test_angle_beside_poet_lr_is_refused():
    with pytest.raises(ValueError, match="angle=0.01"):
        poet_param_groups(wrap(llama()), lr=1e-3, poet_lr=1e-3, angle=0.01)


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, torch.optim.AdamW), ({"merge_interval": 1, "reinit_interval": 0}, RotationMuon)],
    ids=["adapter", "folded-every-step"],
)
def test_optimizer_by_default_is_that_of_the_regime(config, expected):
    optimizer_cls, kwargs = poet_optimizer(lr=1e-3)
    assert type(optimizer_cls()(wrap(llama(), **config), **kwargs)) is expected


def test_given_optimizer_holds_in_every_regime():
    optimizer_cls, kwargs = poet_optimizer(lr=1e-3, optimizer_cls=torch.optim.SGD)
    model = wrap(llama(), merge_interval=1, reinit_interval=0)
    assert type(optimizer_cls()(model, **kwargs)) is torch.optim.SGD


# Bad input


@pytest.mark.parametrize("name", ["lr", "poet_lr", "weight_decay", "angle"])
def test_negative_value_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^{name}=-0.1"):
        poet_param_groups(wrap(llama()), **{"lr": 1e-3, name: -0.1})


def test_model_without_poet_is_refused():
    with pytest.raises(ValueError, match="get_peft_model"):
        poet_param_groups(llama(), lr=1e-3, poet_lr=1e-3)


def test_frozen_adapter_is_refused():
    model = wrap(llama())
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(ValueError, match="is_trainable=True"):
        poet_param_groups(model, lr=1e-3, poet_lr=1e-3)


def test_rotations_stay_where_they_are_with_a_learning_rate_of_zero():
    model = wrap(llama(), "pretraining")
    before = [parameter.detach().clone() for parameter in rotation_parameters(model)]
    train(model, 2, torch.optim.AdamW(poet_param_groups(model, lr=1e-2, poet_lr=0.0, weight_decay=0.1)))
    assert all(torch.equal(a, b) for a, b in zip(rotation_parameters(model), before, strict=True))


# Optimizer state after a fold

OPTIMIZERS = {
    "adamw-foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "adamw-fused": functools.partial(torch.optim.AdamW, fused=True),
    "adamw-loop": functools.partial(torch.optim.AdamW, foreach=False),
    "adamw-amsgrad": functools.partial(torch.optim.AdamW, amsgrad=True),
    "sgd-momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "rmsprop": functools.partial(torch.optim.RMSprop, momentum=0.9, centered=True),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adafactor": torch.optim.Adafactor,
    "rotation-muon": RotationMuon,
    "transformers-adafactor": functools.partial(Adafactor, scale_parameter=False, relative_step=False),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def pretraining_model():
    return wrap(llama(), "pretraining")


def optimizer_of(model, make):
    return make(poet_param_groups(model, lr=1e-3, poet_lr=1e-2, weight_decay=0.1))


def step_with_random_gradients(model, optimizer, seed):
    """The same gradients whatever the weights are."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def state_by_name(model, optimizer, names=None):
    """A copy of the optimizer's state as one flat dict."""
    parameters = dict(model.named_parameters())
    return {
        f"{name}/{key}": torch.as_tensor(value).clone()
        for name in (names or parameters)
        for key, value in optimizer.state.get(parameters[name], {}).items()
        if value is not None
    }


def split_names(model):
    """Names of the rotations' parameters, and of all others that train."""
    rotations = {id(parameter) for parameter in rotation_parameters(model)}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [n for n, p in named if id(p) in rotations], [n for n, p in named if id(p) not in rotations]


@each_optimizer
def test_rotations_go_on_after_a_fold_as_with_a_fresh_optimizer(make):
    model = pretraining_model()
    optimizer = optimizer_of(model, make)
    for seed in range(3):
        step_with_random_gradients(model, optimizer, seed)
    merge_and_reinitialize(model, optimizer)
    other = copy.deepcopy(model)
    fresh = optimizer_of(other, make)
    for seed in range(3, 6):
        step_with_random_gradients(model, optimizer, seed)
        step_with_random_gradients(other, fresh, seed)
    for parameter, expected in zip(rotation_parameters(model), rotation_parameters(other), strict=True):
        assert torch.equal(parameter, expected)


@each_optimizer
def test_fold_leaves_the_state_of_everything_else_untouched(make):
    model = pretraining_model()
    optimizer = optimizer_of(model, make)
    for seed in range(3):
        step_with_random_gradients(model, optimizer, seed)
    _, rest = split_names(model)
    before = state_by_name(model, optimizer, rest)
    merge_and_reinitialize(model, optimizer)
    assert before
    assert_same_state(state_by_name(model, optimizer, rest), before)


@each_optimizer
def test_fold_without_reinitialisation_keeps_all_state(make):
    model = pretraining_model()
    optimizer = optimizer_of(model, make)
    step_with_random_gradients(model, optimizer, 0)
    before = state_by_name(model, optimizer)
    merge_and_reinitialize(model, optimizer, reinitialize=False)
    assert_same_state(state_by_name(model, optimizer), before)


@each_optimizer
def test_report_counts_the_states_that_were_reset(make):
    model = pretraining_model()
    optimizer = optimizer_of(model, make)
    step_with_random_gradients(model, optimizer, 0)
    assert merge_and_reinitialize(model, optimizer).num_states_reset == len(rotation_parameters(model))


@each_optimizer
def test_optimizer_saved_right_after_a_fold_resumes_bit_equal(make):
    model = pretraining_model()
    optimizer = optimizer_of(model, make)
    step_with_random_gradients(model, optimizer, 0)
    merge_and_reinitialize(model, optimizer)
    other = copy.deepcopy(model)
    resumed = optimizer_of(other, make)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step_with_random_gradients(model, optimizer, 1)
    step_with_random_gradients(other, resumed, 1)
    assert_same_state(other.state_dict(), model.state_dict())


def test_optimizer_without_state_has_nothing_to_reset():
    model = pretraining_model()
    assert merge_and_reinitialize(model, adamw(model)).num_states_reset == 0


def capturable_optimizer(model):
    """With the state that it has after steps on a device that can capture them."""
    optimizer = optimizer_of(model, functools.partial(torch.optim.AdamW, capturable=True))
    for parameter in trainable(model):
        moments = {"exp_avg": torch.ones_like(parameter), "exp_avg_sq": torch.ones_like(parameter)}
        optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
    return optimizer


def test_capturable_state_is_zeroed():
    model = pretraining_model()
    optimizer = capturable_optimizer(model)
    merge_and_reinitialize(model, optimizer)
    rotations, _ = split_names(model)
    assert not [key for key, tensor in state_by_name(model, optimizer, rotations).items() if tensor.any()]


def test_capturable_state_is_zeroed_in_the_tensors_that_a_graph_holds():
    model = pretraining_model()
    optimizer = capturable_optimizer(model)
    before = {parameter: dict(tensors) for parameter, tensors in optimizer.state.items()}
    merge_and_reinitialize(model, optimizer)
    assert optimizer.state.keys() == before.keys()
    for parameter, tensors in before.items():
        assert all(optimizer.state[parameter][key] is tensor for key, tensor in tensors.items())


def test_capturable_state_of_everything_else_is_untouched():
    model = pretraining_model()
    optimizer = capturable_optimizer(model)
    _, rest = split_names(model)
    before = state_by_name(model, optimizer, rest)
    merge_and_reinitialize(model, optimizer)
    assert_same_state(state_by_name(model, optimizer, rest), before)


def test_optimizer_of_another_model_is_refused_and_nothing_is_folded():
    model, other = pretraining_model(), pretraining_model()
    optimizer = train(other, 1)
    before = state(model)
    with pytest.raises(ValueError, match="none of the model's rotations"):
        merge_and_reinitialize(model, optimizer)
    assert_same_state(model.state_dict(), before)


def test_optimizer_keeps_its_state_when_a_fold_is_refused():
    model = pretraining_model()
    optimizer = train(model, 1)
    before = state_by_name(model, optimizer)
    model.merge_adapter()
    with pytest.raises(POETFoldError):
        merge_and_reinitialize(model, optimizer)
    assert_same_state(state_by_name(model, optimizer), before)


def test_fold_resets_the_state_inside_accelerates_optimizer():
    model = pretraining_model()
    wrapped = Accelerator(cpu=True).prepare(adamw(model))
    step(model, wrapped)
    assert merge_and_reinitialize(model, wrapped).num_states_reset == len(rotation_parameters(model))
    rotations, _ = split_names(model)
    assert state_by_name(model, wrapped.optimizer, rotations) == {}


def test_training_goes_on_through_accelerates_optimizer_after_a_fold():
    """As with the optimizer inside it."""
    model, other = pretraining_model(), pretraining_model()
    wrapped, plain = Accelerator(cpu=True).prepare(adamw(model)), adamw(other)
    for each, optimizer in ((model, wrapped), (other, plain)):
        step(each, optimizer)
        merge_and_reinitialize(each, optimizer)
        step(each, optimizer)
    assert_same_state(model.state_dict(), other.state_dict())


def test_fold_writes_into_the_same_parameters():
    """An optimizer, a compiled graph or a sharded model holds on to the tensors."""
    model = pretraining_model()
    optimizer = train(model, 1)
    before = [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()]
    merge_and_reinitialize(model, optimizer)
    assert [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()] == before
