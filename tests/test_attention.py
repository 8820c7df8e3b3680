"""`nn.MultiheadAttention`, which reads its weights, and the encoder of torch, which reads those of its layers."""

import copy
import re
import warnings

import pytest
import torch
from cases import TRAINING_REGIMES, Case, dense_rotation, normal, randomize, relative_error, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

from poet_peft import POETConfig, RotationMuon, merge_and_reinitialize, poet_param_groups
from poet_peft.layer import poet_layers
from poet_peft.ops.paths import compute_path


WIDTH, NUM_HEADS, LENGTH = 12, 2, 5
PARTS = {"attention": (3 * WIDTH, WIDTH), "attention.base_layer.out_proj": (WIDTH, WIDTH)}


class Attending(nn.Module):
    """Attention to itself, or to something else, and a linear layer."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, NUM_HEADS, **{"batch_first": True, **settings})
        self.head = nn.Linear(WIDTH, 4)
        with torch.no_grad():  # biases that are not zero
            self.attention.in_proj_bias.copy_(normal(3 * WIDTH, seed=1))
            self.attention.out_proj.bias.copy_(normal(WIDTH, seed=2))

    def forward(self, x, memory=None, **settings):
        memory = x if memory is None else memory
        return self.head(self.attention(x, memory, memory, **settings)[0])


def attending(theta=0.4, dtype=torch.float32, settings=None, **overrides):
    base = Attending(**(settings or {})).to(dtype)
    model = wrap(base, POETConfig(**{"target_modules": ["attention"], "block_size": 4, **overrides}))
    randomize(model, theta)
    return model


def parts(model):
    """The rotated layers of the attention by their names in the model."""
    return dict(poet_layers(model.get_base_model()))


def sequences(num=3, seed=20, dtype=torch.float32):
    return normal(num, LENGTH, WIDTH, seed=seed, dtype=dtype)


def dense_weights(model, adapter="default"):
    """`R W P` of both weights in float64, by the definition."""
    weights = []
    for name, (out_features, in_features) in PARTS.items():
        layer = parts(model)[name]
        case = Case(name, out_features, in_features, 4)
        R, P = (
            dense_rotation(case, dim, rotations, adapter)
            for dim, rotations in ((out_features, layer.poet_R), (in_features, layer.poet_P))
        )
        weights.append(R @ layer.base_parameter.detach().double() @ P)
    return weights


def attend(query, memory, in_proj, in_bias, out_proj, out_bias, hidden=None):
    """Multi-head attention by hand: outputs, and the weights of each head. `hidden` are keys that are not seen."""
    q, k, v = (
        (x @ W.T + b).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
        for x, W, b in zip((query, memory, memory), in_proj.chunk(3), in_bias.chunk(3), strict=True)
    )
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2) @ out_proj.T + out_bias, weights


# What it computes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("to", ["itself", "others", "others-padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_attention_is_computed_with_both_rotated_weights(to, training, dtype):
    model = attending(dtype=dtype).train(training)
    attention = model.get_base_model().attention
    x = sequences(dtype=dtype)
    memory = x if to == "itself" else sequences(seed=21, dtype=dtype)
    hidden = torch.arange(LENGTH) >= torch.tensor([[5], [3], [4]]) if to == "others-padded" else None
    y, weights = attention(x, memory, memory, key_padding_mask=hidden, average_attn_weights=False)
    in_proj, out_proj = dense_weights(model)
    biases = attention.in_proj_bias.double(), attention.out_proj.bias.double()
    expected, scores = attend(x.double(), memory.double(), in_proj, biases[0], out_proj, biases[1], hidden)
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(y, expected) < tolerance
    assert relative_error(weights, scores) < tolerance


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_gradients_are_those_of_autograd(memory_efficient):
    gradients = []
    for path in ("reference", "weight_centric"):
        model = attending(dtype=torch.float64, memory_efficient=memory_efficient)
        with compute_path(path):
            model(sequences(dtype=torch.float64)).pow(3).sum().backward()
        gradients.append([r.weight.grad for layer in parts(model).values() for r in layer.rotations("default")])
    assert len(gradients[0]) == 4
    # The rule of the fast path neglects Q^8.
    assert all(a.any() and relative_error(b, a) < 1e-5 for a, b in zip(*gradients, strict=True))


def test_memory_efficient_attention_keeps_no_second_weight():
    kept = []
    model = attending(memory_efficient=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(sequences(2))
    assert 3 * WIDTH**2 not in kept and WIDTH**2 not in kept


def test_sequence_first_attention_without_biases():
    base = nn.MultiheadAttention(WIDTH, NUM_HEADS, bias=False)
    model = wrap(nn.ModuleDict({"attention": base}), POETConfig(target_modules=["attention"], block_size=4))
    randomize(model, 0.4)
    x = sequences()
    y, _ = model.get_base_model().attention(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))
    in_proj, out_proj = dense_weights(model)
    expected, _ = attend(x.double(), x.double(), in_proj, torch.zeros(3 * WIDTH), out_proj, torch.zeros(WIDTH))
    assert relative_error(y.transpose(0, 1), expected) < 2e-6


def test_weights_that_are_read_from_outside_are_the_rotated_ones():
    model = attending()
    attention = model.get_base_model().attention
    for weight, expected in zip(
        (attention.in_proj_weight, attention.out_proj.weight), dense_weights(model), strict=True
    ):
        assert weight.requires_grad and relative_error(weight, expected) < 1e-6
    with model.disable_adapter():
        assert torch.equal(attention.in_proj_weight, Attending().attention.in_proj_weight)
        assert torch.equal(attention.out_proj.weight, Attending().attention.out_proj.weight)


def test_weights_that_views_hide_are_rotated():
    """As inside FSDP1, which puts views of its flat parameter before them."""
    model = attending()
    expected = model(sequences())
    base = model.get_base_model().attention.get_base_layer()
    for layer, name in ((base, "in_proj_weight"), (base.out_proj.get_base_layer(), "weight")):
        layer.__dict__[name] = layer._parameters[name].detach()
    assert torch.equal(model(sequences()), expected)


# Training, files and export


for_every_regime = pytest.mark.parametrize("regime", TRAINING_REGIMES)


def optimizer_of(model, muon=False):
    if muon:
        return RotationMuon(poet_param_groups(model, lr=1e-2, angle=0.05))
    return torch.optim.AdamW(poet_param_groups(model, lr=1e-2, poet_lr=2e-2))


def train(model, optimizer, seeds):
    dtype = model.get_base_model().head.weight.dtype
    for seed in seeds:
        nn.functional.cross_entropy(
            model(sequences(seed=seed, dtype=dtype))[:, -1].float(), torch.arange(3)
        ).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(regime, num_steps=5):
    model = attending(0, **TRAINING_REGIMES[regime])
    train(model, optimizer_of(model, muon=regime == "fold-every-step"), range(num_steps))
    return model.eval()


@for_every_regime
def test_training_moves_both_weights_and_keeps_their_spectra(regime):
    model, fresh = trained(regime), Attending().attention
    model.merge_adapter()
    tolerance = 4e-3 if "bf16" in regime else 1e-5
    for layer, before in zip(parts(model).values(), (fresh.in_proj_weight, fresh.out_proj.weight), strict=True):
        after = layer.base_parameter
        assert relative_error(after, before) > 1e-2
        one, other = (torch.linalg.svdvals(weight.detach().double()) for weight in (before, after))
        assert ((one - other).abs() <= tolerance * one[0]).all()


@for_every_regime
def test_saved_and_loaded_adapter_gives_the_same_outputs(regime, tmp_path):
    model = trained(regime)
    model.save_pretrained(tmp_path)
    dtype = TRAINING_REGIMES[regime].get("dtype", torch.float32)
    x = sequences(dtype=dtype)
    for low_cpu_mem_usage in (False, True):
        base = Attending().to(dtype).eval()
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))


@for_every_regime
def test_merged_model_is_a_plain_one_of_the_same_outputs(regime):
    model = trained(regime)
    x = sequences(dtype=TRAINING_REGIMES[regime].get("dtype", torch.float32))
    expected = model(x)
    plain = model.merge_and_unload()
    assert [type(module) for module in plain.modules()] == [type(module) for module in Attending().modules()]
    again = Attending().to(expected.dtype).eval()
    again.load_state_dict(plain.state_dict())
    assert relative_error(again(x), expected) < (2e-2 if "bf16" in regime else 1e-5)


def test_fold_keeps_the_output():
    model = attending(merge_interval=4).eval()
    x = sequences()
    expected = model(x)
    report = merge_and_reinitialize(model)
    assert report.num_layers == 2
    assert not any(r.weight.any() for layer in parts(model).values() for r in layer.rotations("default"))
    assert relative_error(model(x), expected) < 1e-5


def test_unmerging_is_exact_and_unload_gives_the_original():
    model = attending()
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    original = model.unload()
    fresh = Attending()
    assert all(torch.equal(tensor, fresh.state_dict()[key]) for key, tensor in original.state_dict().items())
    assert type(original.attention.out_proj) is type(fresh.attention.out_proj)


def test_second_adapter_rotates_both_weights_and_the_first_comes_back():
    model = attending().eval()
    x = sequences()
    first = model(x)
    config = POETConfig(target_modules=["attention"], block_size=2, init_weights=False)
    model.add_adapter("second", config)
    assert torch.equal(model(x), first)
    model.set_adapter("second")
    assert [list(layer.poet_config) for layer in parts(model).values()] == [["default", "second"]] * 2
    assert relative_error(model(x), first) > 1e-2
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 and all("second" in name for name in trainable)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(x), first)


def test_drawing_the_weights_anew_gives_rows_of_norm_one():
    model = attending(0, base_init="normalized", merge_interval=4)
    for layer in parts(model).values():
        norms = layer.base_parameter.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


# Inside torch's encoder


def encoder(**settings):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, **{"batch_first": True, "dropout": 0.0, **settings})
    model = nn.TransformerEncoder(layer, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # layers that are not copies of each other
            parameter.add_(0.1 * normal(*parameter.shape, seed=len(name) + int(name.split(".")[1])))
    return model.eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("targets", [["self_attn"], ["linear1", "linear2"], "all-linear"], ids=str)
def test_fast_path_of_torchs_encoder_computes_with_the_rotated_weights(targets, padded, monkeypatch):
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(None) or fast(*args))
    model = wrap(encoder(), POETConfig(target_modules=targets, block_size=8))
    randomize(model, 0.4)
    x = normal(3, LENGTH, 16)
    hidden = torch.arange(LENGTH) >= torch.tensor([[5], [3], [4]]) if padded else None
    seen = slice(None) if hidden is None else ~hidden
    expected = model.train()(x, src_key_padding_mask=hidden)[seen]
    assert relative_error(model.eval()(x, src_key_padding_mask=hidden)[seen], expected) < 1e-6
    assert calls == []
    with torch.no_grad():
        fast_one = model(x, src_key_padding_mask=hidden)[seen]
        assert len(calls) == 2
        assert relative_error(fast_one, expected) < 1e-6
        assert relative_error(fast_one, encoder()(x, src_key_padding_mask=hidden)[seen]) > 0.05
        plain = model.merge_and_unload()
        assert relative_error(plain(x, src_key_padding_mask=hidden)[seen], expected) < 1e-5


def test_every_rotation_of_torchs_encoder_and_decoder_trains():
    torch.manual_seed(0)
    base = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    model = wrap(base, POETConfig(target_modules="all-linear", block_size=8, init_weights=False))
    assert len(list(poet_layers(model))) == 2 + 2 + 4 + 2
    model(normal(2, 4, 16), normal(2, 3, 16, seed=1)).pow(3).sum().backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in trainable.items() if p.grad is None or not p.grad.any()} == set()


# Which are rotated


def warnings_of(base, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = get_peft_model(base, POETConfig(**{"target_modules": "all-linear", "block_size": 4, **settings}))
    return model, [str(warning.message) for warning in caught]


def test_all_linear_reaches_the_attention_and_says_nothing(tmp_path):
    model, messages = warnings_of(Attending())
    assert messages == []
    assert list(parts(model)) == [*PARTS, "head"]
    assert model.peft_config["default"].target_modules == {"attention", "head"}
    model.save_pretrained(tmp_path)
    assert list(parts(PeftModel.from_pretrained(Attending(), tmp_path))) == [*PARTS, "head"]


def test_all_linear_leaves_out_an_attention_that_is_excluded_or_saved_in_full():
    for settings in ({"exclude_modules": ["attention"]}, {"modules_to_save": ["attention"]}):
        assert "attention" not in parts(warnings_of(Attending(), **settings)[0])


def test_last_layer_is_left_out_by_its_own_name():
    model = attending(exclude_modules=["attention.out_proj"])
    assert list(parts(model)) == ["attention"]
    expected = model(sequences())
    assert relative_error(model.merge_and_unload()(sequences()), expected) < 1e-5


def test_sizes_of_blocks_by_the_names_of_the_weights():
    pattern = {"attention.in_proj_weight": 6, "attention.out_proj": 2}
    model, messages = warnings_of(Attending(), target_modules=["attention"], block_size_pattern=pattern)
    assert messages == []
    assert [layer.poet_P["default"].partition.block_size for layer in parts(model).values()] == [6, 2]


def test_attention_with_keys_of_another_width_is_refused_with_a_way_out():
    class ToImages(Attending):
        def __init__(self):
            nn.Module.__init__(self)
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(WIDTH, NUM_HEADS, kdim=8, vdim=8, batch_first=True)
            self.head = nn.Linear(WIDTH, 4)

    with pytest.raises(TypeError, match="'attention' of type MultiheadAttention: .*kdim.*target_parameters"):
        get_peft_model(ToImages(), POETConfig(target_modules=["attention"], block_size=4))
    model, messages = warnings_of(ToImages())
    assert list(parts(model)) == ["head"]
    about_weights, about_last = sorted(messages, key=lambda message: "out_proj" in message)
    assert re.match("target_modules='all-linear' leaves out attention: .*kdim.*target_parameters", about_weights)
    assert "MultiheadAttention computes with the weight of attention.out_proj" in about_last

    names = [f"attention.{name}_proj_weight" for name in "qkv"]
    model = get_peft_model(ToImages(), POETConfig(target_modules=[], target_parameters=names, block_size=4))
    randomize(model, 0.4)
    x, images = sequences(), normal(3, 7, 8)
    expected = model(x, images)
    assert relative_error(expected, ToImages()(x, images)) > 1e-2
    assert relative_error(model.merge_and_unload()(x, images), expected) < 1e-5


def test_weight_of_an_attention_is_rotated_by_the_name_of_the_attention():
    config = POETConfig(target_modules=[], target_parameters=["attention.in_proj_weight"], block_size=4)
    with pytest.raises(ValueError, match="'attention.in_proj_weight': it is the weight of a layer .*target_modules"):
        get_peft_model(Attending(), config)


def test_last_layer_alone_is_refused_with_the_name_to_take():
    with pytest.raises(TypeError, match="'attention.out_proj' .*MultiheadAttention, by the name of that"):
        get_peft_model(Attending(), POETConfig(target_modules=["attention.out_proj"], block_size=4))


def parametrized():
    base = Attending()
    parametrizations.orthogonal(base.attention.out_proj, "weight")
    return base


def shared():
    base = Attending()
    base.other = nn.MultiheadAttention(WIDTH, NUM_HEADS)
    base.other.in_proj_weight = base.attention.in_proj_weight
    return base


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (parametrized, TypeError, "'attention' .*out_proj is of type ParametrizedNonDynamic.*Take it out"),
        (shared, ValueError, "'attention': its weight is shared by .*'other.in_proj_weight'"),
        (lambda: nn.ModuleDict({"attention": nn.MultiheadAttention(1, 1)}), TypeError, "'attention' .*one feature"),
    ],
)
def test_attention_is_refused_by_name(make, error, match):
    with pytest.raises(error, match=match):
        get_peft_model(make(), POETConfig(target_modules=["attention"], block_size=4))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_with_another_adapter_is_refused():
    lora = get_peft_model(Attending(), LoraConfig(target_modules=["attention"], r=2)).base_model.model
    with pytest.raises(ValueError, match="'attention' is a MultiheadAttention that carries another adapter"):
        get_peft_model(lora, POETConfig(target_modules=["attention"], block_size=4))


def test_batch_of_several_adapters_is_refused():
    model = attending().eval()
    with pytest.raises(ValueError, match="'attention.in_proj_weight' is rotated, and its weights are read for all"):
        model(sequences(), adapter_names=["default", "default", "__base__"])


def test_attention_is_not_converted_to_lora():
    layers = parts(attending()).values()
    with pytest.warns(UserWarning, match="PEFT converts linear layers, and 'attention.in_proj_weight' is a Multihead"):
        assert not next(iter(layers)).supports_lora_conversion()
