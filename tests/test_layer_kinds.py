"""Convolutions and embeddings: what is theirs beside the properties that all layers of the table share."""

import copy
import warnings

import pytest
import torch
from cases import (
    TRAINING_REGIMES,
    Case,
    OneLayer,
    base_layer,
    dense_rotation,
    inputs,
    matrix,
    randomize,
    relative_error,
    rotated,
    wrap,
)
from models import adamw, assert_same_state, llama, logits, state, step
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

from poet_peft import POETConfig, RotationMuon, merge_and_reinitialize, poet_param_groups, verify_checkpoint
from poet_peft.cli.difference import diff
from poet_peft.layer import poet_layers


CONVOLUTION = Case("convolution2d", 19, 27, kind="convolution2d")
GROUPED = Case("grouped", 16, 18, block_size=4, kind="grouped")
EMBEDDING = Case("embedding", 20, 30, kind="embedding")

for_both_variants = pytest.mark.parametrize("variant", ["block_stochastic", "fully_stochastic"])


class TextModel(nn.Module):
    """Tokens to the logits of 5 classes by an embedding, two convolutions and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 12, padding_idx=0)
        self.convolution = nn.Conv1d(12, 16, 3, padding="same")
        self.grouped = nn.Conv1d(16, 8, 3, groups=4, stride=2)
        self.linear = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embedding(ids).mT
        x = torch.tanh(self.grouped(torch.tanh(self.convolution(x))))
        return self.linear(x.mean(-1))


TARGETS = ["embedding", "convolution", "grouped", "linear"]


def ids(num=6, seed=0):
    return torch.randint(40, (num, 10), generator=torch.Generator().manual_seed(seed))


def text_model(**overrides):
    model = TextModel().to(overrides.pop("dtype", torch.float32))
    return wrap(model, POETConfig(target_modules=TARGETS, **{"block_size": 4, **overrides}))


def optimizer_of(model, muon=False):
    if muon:
        return RotationMuon(poet_param_groups(model, lr=1e-2, angle=0.05))
    return torch.optim.AdamW(poet_param_groups(model, lr=1e-2, poet_lr=2e-2))


def train(model, optimizer, seeds):
    for seed in seeds:
        labels = torch.arange(6) % 5
        nn.functional.cross_entropy(model(ids(seed=seed)).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


# Training, files and export of a model with all kinds


for_every_regime = pytest.mark.parametrize("regime", TRAINING_REGIMES)


def trained(regime, num_steps=5):
    model = text_model(**TRAINING_REGIMES[regime])
    train(model, optimizer_of(model, muon=regime == "fold-every-step"), range(num_steps))
    return model


@for_every_regime
def test_training_moves_every_layer(regime):
    model, fresh = trained(regime), TextModel()
    for name, layer in poet_layers(model):
        merged = layer.get_base_layer().weight if "folds" in regime or "every" in regime else None
        kind = name.rpartition(".")[2]
        moved = merged is not None and relative_error(merged.float(), fresh.get_submodule(kind).weight) > 1e-3
        assert moved or all(rotation.weight.any() for rotation in layer.rotations("default")), name


@for_every_regime
def test_training_keeps_every_spectrum(regime):
    model, fresh = trained(regime), TextModel()
    model.merge_adapter()
    tolerance = 4e-3 if "bf16" in regime else 1e-5
    for name, layer in poet_layers(model):
        before = torch.linalg.svdvals(matrix(fresh.get_submodule(name.rpartition(".")[2])))
        after = torch.linalg.svdvals(matrix(layer.get_base_layer()))
        assert ((after - before).abs() <= tolerance * before[0]).all(), name


@for_every_regime
def test_saved_and_loaded_adapter_gives_the_same_outputs(regime, tmp_path):
    model = trained(regime)
    model.save_pretrained(tmp_path)
    dtype = TRAINING_REGIMES[regime].get("dtype", torch.float32)
    loaded = PeftModel.from_pretrained(TextModel().to(dtype), tmp_path)
    assert torch.equal(loaded(ids(seed=9)), model(ids(seed=9)))


@for_every_regime
def test_merged_model_is_a_plain_one_of_the_same_outputs(regime):
    model = trained(regime)
    expected = model(ids(seed=9))
    plain = model.merge_and_unload()
    assert [type(module) for module in plain.modules()] == [type(module) for module in TextModel().modules()]
    again = TextModel().to(expected.dtype)
    again.load_state_dict(plain.state_dict())
    assert relative_error(again(ids(seed=9)), expected) < (2e-2 if "bf16" in regime else 1e-5)


@pytest.mark.parametrize("regime", ["adapter", "folds", "fold-every-step"])
def test_resumed_run_ends_as_the_uninterrupted_one(regime, tmp_path):
    model = text_model(**TRAINING_REGIMES[regime])
    optimizer = optimizer_of(model, muon=regime == "fold-every-step")
    train(model, optimizer, range(3))
    model.save_pretrained(tmp_path)
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(3, 6))

    resumed = PeftModel.from_pretrained(TextModel(), tmp_path, is_trainable=True)
    other = optimizer_of(resumed, muon=regime == "fold-every-step")
    other.load_state_dict(optimizer_state)
    train(resumed, other, range(3, 6))
    assert_same_state(state(resumed), state(model))


def test_diff_of_folded_adapters_compares_the_weights_of_every_kind(tmp_path):
    models = [trained("folds", num_steps) for num_steps in (4, 7)]
    for name, model in zip(("one", "other"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    found = {entry["layer"]: entry["weight"] for entry in diff(tmp_path / "one", tmp_path / "other")["layers"]}
    exact = [model.merge_and_unload() for model in models]
    for name in TARGETS:
        one, other = (model.get_submodule(name).weight for model in exact)
        assert found[name] == pytest.approx(relative_error(one, other), rel=1e-4), name


# Convolutions


def test_output_channels_of_a_grouped_convolution_mix_within_their_group():
    _, layer = rotated(GROUPED)
    R = dense_rotation(GROUPED, 16, layer.poet_R)
    assert not R[:8, 8:].any() and not R[8:, :8].any()
    assert (R - torch.eye(16)).any(dim=1).all()


@for_both_variants
def test_blocks_of_a_grouped_convolution_lie_in_its_groups_at_every_reinitialisation(variant):
    seen = set()
    case = Case("grouped", 16, 18, block_size=4, kind="grouped", variant=variant)
    model, layer = rotated(case, merge_interval=10)
    for _ in range(8):
        for block in layer.poet_R["default"].index.reshape(-1, 4):
            groups = {int(channel) // 8 for channel in block}
            assert len(groups) == 1
            seen |= groups
        merge_and_reinitialize(model)
    assert seen == {0, 1}


def test_block_size_of_a_grouped_convolution_is_lowered_to_a_divisor():
    base = OneLayer(nn.Conv1d(4, 24, 3, groups=2))
    with pytest.warns(UserWarning, match="'layer' output side in 2 groups, 8 to 6"):
        model = get_peft_model(base, POETConfig(target_modules=["layer"], block_size=8))
    assert model.base_model.model.layer.poet_R["default"].partition.block_size == 6


def test_depthwise_convolution_has_no_R():
    _, layer = rotated(Case("depthwise", 6, 4, block_size=2, kind="depthwise"))
    assert [rotation.side for rotation in layer.rotations("default")] == ["P"]


@pytest.mark.parametrize("merge_interval", [10, 1])
def test_weight_with_channels_last_is_folded_and_merged(merge_interval):
    case = Case("convolution2d", 16, 27, kind="convolution2d")
    base = base_layer(case).to(memory_format=torch.channels_last)
    assert not base.weight.is_contiguous()
    model = wrap(OneLayer(base), case.config(merge_interval=merge_interval, reinit_interval=0))
    x = inputs(case, 3)
    optimizer = optimizer_of(model, muon=merge_interval == 1)
    for _ in range(3):  # of folds after every step, those after the first are quick
        before = matrix(base).clone()
        model(x).pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if merge_interval == 10:
        expected = model(x)
        assert relative_error(expected, base_layer(case)(x)) > 1e-3
        merge_and_reinitialize(model)
        assert relative_error(model(x), expected) < 1e-5
    else:
        assert relative_error(matrix(base), before) > 1e-3
    expected = torch.linalg.svdvals(matrix(base_layer(case)))
    torch.testing.assert_close(torch.linalg.svdvals(matrix(base)), expected, rtol=1e-5, atol=1e-6)


def test_memory_efficient_convolution_has_the_same_gradients():
    gradients = []
    for memory_efficient in (False, True):
        _, layer = rotated(CONVOLUTION, memory_efficient=memory_efficient)
        layer(inputs(CONVOLUTION, 3)).pow(3).sum().backward()
        gradients.append([rotation.weight.grad for rotation in layer.rotations("default")])
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(*gradients, strict=True))


def test_memory_efficient_convolution_keeps_no_second_weight():
    _, layer = rotated(Case("wide", 64, 27, kind="convolution2d"), memory_efficient=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(inputs(CONVOLUTION, 1))
    assert layer.get_base_layer().weight.numel() not in kept


def test_convolution_of_a_class_of_its_own_is_run_with_the_rotated_weight():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight, self.bias)

    torch.manual_seed(0)
    model = wrap(OneLayer(Standardized(3, 8, 3)), POETConfig(target_modules=["layer"], block_size=4))
    randomize(model, 0.4)
    x = inputs(CONVOLUTION, 2)
    expected = model(x)
    base = model.base_model.model.layer.get_base_layer()
    base.__dict__["weight"] = base._parameters["weight"].detach()  # as inside FSDP1
    assert torch.equal(model(x), expected)
    del base.__dict__["weight"]
    model.merge_adapter()
    assert relative_error(model(x), expected) < 1e-5


def test_weight_that_is_no_parameter_while_it_is_called_is_rotated():
    """As inside FSDP1, which puts a view of its flat parameter there."""
    _, layer = rotated(CONVOLUTION)
    x = inputs(CONVOLUTION, 2)
    expected = layer(x)
    base = layer.get_base_layer()
    weight = base._parameters.pop("weight")
    base.weight = weight.detach()
    assert torch.equal(layer(x), expected)


# Embeddings


def test_embedding_has_no_P():
    _, layer = rotated(EMBEDDING)
    assert [rotation.side for rotation in layer.rotations("default")] == ["R"]


def test_every_row_of_an_embedding_keeps_its_length():
    _, layer = rotated(EMBEDDING)
    everything = torch.arange(30)
    before = layer.get_base_layer()(everything).norm(dim=-1)
    torch.testing.assert_close(layer(everything).norm(dim=-1), before, rtol=1e-5, atol=0)


def test_padding_row_of_zeros_stays_so():
    model = text_model()
    randomize(model, 0.4)
    layer = model.base_model.model.embedding
    assert not layer(torch.zeros(3, dtype=torch.long)).any()
    layer.merge()
    assert not layer.get_base_layer().weight[0].any()


def test_scaled_embedding_is_rotated_and_merged():
    """Gemma's multiplies by a number."""

    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3.5

    torch.manual_seed(0)
    model = wrap(OneLayer(Scaled(30, 20)), POETConfig(target_modules=["layer"], block_size=4))
    randomize(model, 0.4)
    expected = model(torch.arange(30))
    assert relative_error(expected, model.base_model.model.layer.get_base_layer()(torch.arange(30))) > 0.1
    model.merge_adapter()
    assert relative_error(model(torch.arange(30)), expected) < 1e-5


def test_embedding_that_adds_to_its_rows_is_rotated_around_and_not_merged():
    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    model = wrap(OneLayer(Shifted(30, 20)), POETConfig(target_modules=["layer"], block_size=4))
    with pytest.raises(ValueError, match=r"'layer' \(Shifted\) does not compute rows of a table"):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("overrides", [{}, {"merge_interval": 2}, {"merge_interval": 2, "train_rest": True}], ids=str)
def test_language_model_with_rotated_embeddings_trains_saves_and_loads(overrides, tmp_path):
    config = POETConfig(target_modules=["embed_tokens", "q_proj"], block_size=8, **overrides)
    model = get_peft_model(llama(), config)
    optimizer = adamw(model)
    for seed in range(3):
        step(model, optimizer, seed=seed)
    model.save_pretrained(tmp_path)
    verify_checkpoint(tmp_path, PeftModel.from_pretrained(llama(), tmp_path))
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert relative_error(logits(model.merge_and_unload()), logits(loaded)) < 1e-5


# Refusals


REFUSALS = {
    "max_norm": (lambda: nn.Embedding(8, 8, max_norm=1.0), ValueError, "'layer': max_norm=1.0 .*exclude_modules"),
    "scale_grad_by_freq": (
        lambda: nn.Embedding(8, 8, scale_grad_by_freq=True),
        ValueError,
        "'layer': scale_grad_by_freq=True .*exclude_modules",
    ),
    "embedding-bag": (lambda: nn.EmbeddingBag(8, 8), TypeError, "'layer' of type EmbeddingBag"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), TypeError, "'layer' of type ConvTranspose2d"),
    "weight-norm": (
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
        ValueError,
        "weight of 'layer' .*computed from other tensors.*exclude_modules",
    ),
    "lazy": (lambda: nn.LazyConv2d(4, 3), ValueError, "'layer' has no weight before its first call"),
    "prime-group": (
        lambda: nn.Conv1d(4, 14, 3, groups=2),
        ValueError,
        "'layer': no block of 2 to 4 features divides a group of 7, but 7 does.*block_size_pattern",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_layer_is_refused_by_name_with_a_way_out(name):
    make, error, match = REFUSALS[name]
    with pytest.raises(error, match=match):
        get_peft_model(OneLayer(make()), POETConfig(target_modules=["layer"], block_size=4))


def test_fully_stochastic_block_larger_than_a_group_is_refused():
    config = POETConfig(target_modules=["layer"], block_size=10, variant="fully_stochastic")
    with pytest.raises(ValueError, match="'layer': block_size=10 is larger than a group of 8 features"):
        get_peft_model(OneLayer(nn.Conv1d(8, 16, 3, groups=2)), config)


def test_drawing_an_embedding_anew_is_refused():
    config = POETConfig(target_modules=["layer"], block_size=4, base_init="normalized", merge_interval=4)
    with pytest.raises(ValueError, match="base_init='normalized' .*'layer' is an embedding.*exclude_modules"):
        get_peft_model(OneLayer(nn.Embedding(8, 8)), config)


def test_drawing_a_convolution_anew_gives_rows_of_norm_one():
    model = wrap(OneLayer(base_layer(CONVOLUTION)), CONVOLUTION.config(base_init="normalized", merge_interval=4))
    norms = matrix(model.base_model.model.layer.get_base_layer()).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_tied_embedding_is_refused_by_name():
    with pytest.raises(ValueError, match="'model.embed_tokens': its weight is shared by .*'lm_head.weight'"):
        get_peft_model(llama(tied=True), POETConfig(target_modules=["embed_tokens"], block_size=4))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_convolution_with_another_adapter_is_refused():
    lora = get_peft_model(OneLayer(nn.Conv2d(4, 8, 3)), LoraConfig(target_modules=["layer"], r=2))
    with pytest.raises(ValueError, match="carries another adapter"):
        get_peft_model(lora, POETConfig(target_modules=["layer"], block_size=4))


def test_all_linear_leaves_convolutions_and_embeddings_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(TextModel(), POETConfig(target_modules="all-linear", block_size=4))
    assert [name.rpartition(".")[2] for name, _ in poet_layers(model)] == ["linear"]
