"""Rotations around quantized bases: forward, gradients, training, merges, files. Folds: test_requantized_folds.py."""

import copy
import warnings

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from cases import Case, OneLayer, dense_output, dense_rotation, normal, randomize, relative_error
from models import ADAPTERS, REGIMES, adamw, logits, poet_config, step, tokens, wrap
from peft import PeftModel, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from quantized import (
    FORMATS,
    assert_same,
    dequantized,
    for_every_format,
    for_every_library,
    fresh_quantization_error,
    parts,
    quantized_llama,
    rotated_layers,
)
from safetensors import safe_open
from torch import nn
from transformers import LlamaForCausalLM

import poet_peft.layer
import poet_peft.targets
from poet_peft import POETConfig
from poet_peft.ops import reference


# Evaluation in 8 bits quantizes activations too (LLM.int8()).
EIGHT_BIT_ACTIVATIONS = 2e-2
# Two of the model's layers: 64 x 128 and 128 x 192.
SHAPES = ["self_attn.k_proj", "mlp.down_proj"]


def without_repacking(base):
    """bitsandbytes rounds the scales of 4-bit weights when a model is evaluated, see `quantization.keep_exact`."""
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def case_of(layer, regime):
    settings = {key: value for key, value in REGIMES[regime].items() if key != "merge_interval"}
    return Case("quantized", layer.out_features, layer.in_features, **settings)


def dense_matrix(layer, regime):
    """`R W P` of the dequantized weight in fp64, from the definition."""
    case = case_of(layer, regime)
    R = dense_rotation(case, case.out_features, layer.poet_R)
    P = dense_rotation(case, case.in_features, layer.poet_P)
    return R @ dequantized(layer.get_base_layer()) @ P


def gradients(model, seed=1):
    model.zero_grad()
    input_ids = tokens(seed=seed)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Forward


@for_every_format
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_identity_changes_no_bit(name, mode):
    base, model = without_repacking(quantized_llama(name)), wrap(quantized_llama(name), init_weights=True)
    assert rotated_layers(model)
    base.train(mode == "train")
    model.train(mode == "train")
    assert torch.equal(logits(model), logits(base))


@for_every_format
@pytest.mark.parametrize("regime", ADAPTERS)
def test_forward_is_the_rotated_dequantized_weight(name, regime):
    model = wrap(quantized_llama(name), regime).train()
    for layer in (model.get_submodule(f"base_model.model.model.layers.0.{key}") for key in SHAPES):
        x = normal(3, 5, layer.in_features)
        expected = x.double() @ dense_matrix(layer, regime).T + layer.get_base_layer().bias.double()
        assert relative_error(layer(x), expected) < 2e-6


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int8"])
def test_evaluation_computes_what_training_computes(name):
    model = wrap(quantized_llama(name))
    assert torch.equal(logits(model.eval()), logits(model.train()))


def test_evaluation_in_8_bits_differs_by_its_activations_only():
    model = wrap(quantized_llama("int8"))
    assert 0 < relative_error(logits(model.eval()), logits(model.train())) < EIGHT_BIT_ACTIVATIONS


@for_every_format
def test_bf16_base(name):
    model = wrap(quantized_llama(name, torch.bfloat16)).train()
    layer = rotated_layers(model)["base_model.model.model.layers.0.mlp.up_proj"]
    x = normal(3, 5, layer.in_features, dtype=torch.bfloat16)
    expected = x.double() @ dense_matrix(layer, "block_stochastic").T + layer.get_base_layer().bias.double()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 1e-2
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# Gradients and training


@for_every_format
@pytest.mark.parametrize("regime", ADAPTERS)
def test_gradients_are_those_through_the_dequantized_weight(name, regime):
    model = wrap(quantized_llama(name), regime).train()
    layer = rotated_layers(model)["base_model.model.model.layers.1.mlp.down_proj"]
    x, grad = normal(3, 5, layer.in_features).requires_grad_(), normal(3, 5, layer.out_features, seed=2)
    weights = [layer.poet_R["default"].weight, layer.poet_P["default"].weight]
    actual = torch.autograd.grad(layer(x), [x, *weights], grad)

    plain = nn.Linear(layer.in_features, layer.out_features)
    plain.weight.data, plain.bias.data = dequantized(layer.get_base_layer()).float(), layer.get_base_layer().bias.data
    R, P = ([(side.index, side.deltas()) for side in sides] for sides in layer.sides(["default"]))
    y = reference.poet_linear(x, plain.weight, plain.bias, R, P)
    expected = torch.autograd.grad(y, [x, *weights], grad)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 5e-6


@for_every_format
def test_gradients_reach_the_rotations_only(name):
    model = wrap(quantized_llama(name)).train()
    rotations = {n for n, _ in model.named_parameters() if ".poet_R." in n or ".poet_P." in n}
    grads = gradients(model)
    assert grads.keys() == rotations
    assert all(grad.abs().sum() > 0 for grad in grads.values())


@for_every_library
def test_training_lowers_the_loss_and_leaves_the_base(name):
    model = wrap(quantized_llama(name), init_weights=True).train()
    before = parts(model)
    optimizer = adamw(model, poet_lr=1e-2)
    losses = [step(model, optimizer) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]
    assert_same(parts(model), before)


@for_every_format
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["all", "some"])
def test_evaluation_takes_no_gradient_away(name, targets):
    """bitsandbytes repacks 4-bit layers when they are evaluated, rotated or not, and loses their backward."""
    model = wrap(quantized_llama(name), target_modules=targets).train()
    before = gradients(model)
    logits(model.eval())
    assert_same(gradients(model.train()), before)


@for_every_library
def test_gradient_checkpointing_changes_no_gradient(name):
    model = wrap(quantized_llama(name)).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same(gradients(model), expected)


@for_every_library
def test_prepare_model_for_kbit_training(name):
    base = prepare_model_for_kbit_training(quantized_llama(name, torch.bfloat16))
    model = wrap(base, init_weights=True).train()
    before = parts(model)
    optimizer = adamw(model, poet_lr=1e-2)
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert_same(parts(model), before)


@pytest.mark.parametrize("name", ["nf4-stored-as-bf16", "int8", "torchao-int8"])
def test_train_rest_trains_no_quantized_weight(name):
    model = wrap(quantized_llama(name), train_rest=True, target_modules=["q_proj"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n in trained if n.endswith("_proj.weight")]
    assert "base_model.model.model.layers.0.mlp.up_proj.bias" in trained
    assert "base_model.model.lm_head.weight" in trained


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")
@pytest.mark.parametrize("name", ["nf4", "nf4-double", "nf4-stored-as-bf16", "fp4"])
def test_base_that_was_evaluated_before_is_unpacked_with_a_warning(name):
    base = quantized_llama(name)
    exact = dequantized(base.model.layers[0].mlp.down_proj)
    logits(base)
    with pytest.warns(UserWarning, match="14 4-bit layers .* 'model.layers.0.self_attn.q_proj' among them"):
        model = wrap(base, init_weights=True).train()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert relative_error(dequantized(layer.get_base_layer()), exact) < 5e-3
    assert len(gradients(model)) == 28


# Merge


@for_every_format
@pytest.mark.parametrize("ran_before", [False, True], ids=["untouched", "after-a-forward"])
def test_unmerge_is_bit_exact(name, ran_before):
    model = wrap(quantized_llama(name)).train()
    if ran_before:
        logits(model)
    before = parts(model)
    model.merge_adapter()
    logits(model)
    assert any(not torch.equal(part, before[key]) for key, part in parts(model).items())
    model.unmerge_adapter()
    assert_same(parts(model), before)
    assert torch.equal(logits(model), logits(wrap(quantized_llama(name)).train()))


@for_every_format
def test_merged_weight_is_a_fresh_quantization(name):
    model = wrap(quantized_llama(name))
    layers = {key: model.get_submodule(f"base_model.model.model.layers.0.{key}") for key in SHAPES}
    exact = {key: dense_matrix(layer, "block_stochastic") for key, layer in layers.items()}
    model.merge_adapter(safe_merge=True)
    for key, layer in layers.items():
        base_layer = layer.get_base_layer()
        error = relative_error(dequantized(base_layer), exact[key])
        assert 0 < error < 1.01 * fresh_quantization_error(base_layer, exact[key])


@for_every_format
def test_merged_model_computes_with_its_new_weight(name):
    model = wrap(quantized_llama(name)).train()
    logits(model)
    model.merge_adapter()
    layer = rotated_layers(model)["base_model.model.model.layers.1.mlp.down_proj"]
    x, base_layer = normal(4, layer.in_features), layer.get_base_layer()
    expected = x.double() @ dequantized(base_layer).T + base_layer.bias.double()
    assert relative_error(layer(x), expected) < 2e-6


@for_every_library
def test_safe_merge_refuses_nan_and_changes_nothing(name):
    model = wrap(quantized_llama(name))
    before = parts(model)
    first = next(iter(rotated_layers(model).values()))
    with torch.no_grad():
        first.poet_R["default"].weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights.*'model.layers.0.self_attn.q_proj'"):
        model.merge_adapter(safe_merge=True)
    assert_same(parts(model), before)


@pytest.mark.parametrize("name", ["nf4", "nf4-double", "int8"])
def test_merged_model_saves_and_loads_without_poet(name, tmp_path):
    merged = without_repacking(wrap(quantized_llama(name)).merge_and_unload())
    assert not rotated_layers(merged)
    expected = logits(merged)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(without_repacking(LlamaForCausalLM.from_pretrained(tmp_path).eval())), expected)


# Operations


@for_every_library
def test_file_brings_the_same_logits_back(name, tmp_path):
    model = wrap(quantized_llama(name))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "base_layer" in key]  # noqa: SIM118
    assert torch.equal(logits(PeftModel.from_pretrained(quantized_llama(name), tmp_path)), logits(model))


@for_every_format
def test_disabled_and_unloaded_it_is_the_quantized_base(name):
    expected = logits(without_repacking(quantized_llama(name)))
    model = wrap(quantized_llama(name))
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


@for_every_library
def test_several_adapters_compose(name):
    model = wrap(quantized_llama(name)).train()
    model.add_adapter("second", poet_config())
    model.base_model.set_adapter(["default", "second"])
    layer = rotated_layers(model)["base_model.model.model.layers.0.mlp.up_proj"]
    case = case_of(layer, "block_stochastic")
    weight = dequantized(layer.get_base_layer())
    for adapter in ("default", "second"):
        R = dense_rotation(case, case.out_features, layer.poet_R, adapter)
        weight = R @ weight @ dense_rotation(case, case.in_features, layer.poet_P, adapter)
    x = normal(4, layer.in_features)
    assert relative_error(layer(x), x.double() @ weight.T + layer.get_base_layer().bias.double()) < 2e-6


@for_every_library
def test_copy_of_a_merged_model_unmerges_by_itself(name):
    model = wrap(quantized_llama(name))
    before, expected = parts(model), logits(model)
    model.merge_adapter()
    copied = copy.deepcopy(model)
    copied.unmerge_adapter()
    assert_same(parts(copied), before)
    assert torch.equal(logits(copied), expected)
    assert any(not torch.equal(part, before[key]) for key, part in parts(model).items())


# A library that only has a forward, as PEFT's backends of GPTQ, AWQ, AQLM and EETQ have


class PackedLinear(nn.Module):
    """4-bit values in a `qweight`, unpacked in the forward, no `weight`: what a GPTQ layer looks like from outside."""

    def __init__(self, out_features, in_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        values = normal(out_features, in_features).mul(3).round().clamp(-8, 7).to(torch.int8) + 8
        self.register_buffer("qweight", (values[:, ::2] * 16 + values[:, 1::2] - 128).to(torch.int8))
        self.register_buffer("scales", torch.full((out_features, 1), 0.1))
        self.register_buffer("bias", normal(out_features, seed=3))

    def dense(self):
        values = self.qweight.to(torch.int32) + 128
        return (torch.stack([values // 16, values % 16], dim=-1).flatten(1) - 8) * self.scales

    def forward(self, x):
        return nn.functional.linear(x, self.dense(), self.bias)


@pytest.fixture
def packed(monkeypatch):
    """A model of one such layer, which PEFT says is GPTQ's."""
    for module in (poet_peft.layer, poet_peft.targets):
        monkeypatch.setattr(
            module,
            "resolve_quantization_backend",
            lambda layer, **kwargs: (
                ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, PackedLinear) else None
            ),
        )
    return OneLayer(PackedLinear(16, 24))


def test_forward_only_layer_is_rotated_through_its_activations(packed):
    from cases import wrap

    case = Case("packed")
    model = wrap(packed, case.config())
    randomize(model, theta=0.4)
    layer = model.base_model.model.layer
    x = normal(5, 24)
    case_layer = copy.deepcopy(layer)
    case_layer.base_layer = nn.Linear(24, 16)
    case_layer.base_layer.weight.data = layer.get_base_layer().dense()
    case_layer.base_layer.bias.data = layer.get_base_layer().bias
    assert relative_error(model(x), dense_output(case, case_layer, x)) < 2e-6
    optimizer = adamw(model)
    model(x).square().sum().backward()
    optimizer.step()
    assert all(rotation.weight.grad.abs().sum() > 0 for rotation in layer.rotations("default"))


def test_layer_that_normalises_its_input_is_refused(packed, monkeypatch):
    from cases import wrap

    backend = ForwardOnlyQuantizationBackend("te")
    monkeypatch.setattr(poet_peft.targets, "resolve_quantization_backend", lambda layer, **kwargs: backend)
    with pytest.raises(TypeError, match="POET cannot rotate 'layer' of type PackedLinear"):
        wrap(packed, Case("packed").config())


def test_forward_only_layer_refuses_a_merge(packed):
    from cases import wrap

    model = wrap(packed, Case("packed").config())
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.model.layer.merge):
        with pytest.raises(ValueError, match="'layer' is quantized by gptq, .* unquantized copy of the base"):
            merge()


def test_forward_only_layer_refuses_folds(packed):
    from cases import wrap

    with pytest.raises(ValueError, match="'layer' is quantized .gptq., whose weight cannot be read"):
        wrap(packed, Case("packed").config(merge_interval=4, allow_requantize=True))


def test_forward_only_layer_saves_and_loads(packed, tmp_path):
    from cases import wrap

    model = wrap(packed, Case("packed").config())
    randomize(model, theta=0.4)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the block size is clipped
        loaded = PeftModel.from_pretrained(OneLayer(PackedLinear(16, 24)), tmp_path)
    x = normal(5, 24)
    assert torch.equal(loaded(x), model(x))
    assert POETConfig.from_pretrained(tmp_path).merge_interval == 0
