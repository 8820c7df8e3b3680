"""Base layers that compute in their own way: the adapter goes around them, and what cannot be merged is refused."""

import pytest
import torch
from cases import OneLayer, normal, randomize, relative_error, wrap
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

from poet_peft import POETConfig, POETFoldError, merge_and_reinitialize


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def plain(cls=nn.Linear, bias=True):
    layer = cls(24, 16, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(normal(16, 24, seed=1) / 24**0.5)
        if bias:
            layer.bias.copy_(normal(16, seed=2))
    return layer


def hooked():
    layer = plain()
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


def pre_hooked():
    layer = plain()
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return layer


def patched():
    layer = plain()
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    return layer


def parametrized():
    return parametrizations.weight_norm(plain())


def fake_quantized():
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    config = IntxFakeQuantizeConfig(torch.int4, group_size=8)
    return FakeQuantizedLinear.from_linear(plain(bias=False), weight_config=config)


def bitnet():
    from transformers.integrations.bitnet import AutoBitLinear

    layer = AutoBitLinear(24, 16, bias=False)
    with torch.no_grad():
        layer.weight.copy_(normal(16, 24, seed=1))
    return layer


LAYERS = {
    "subclass": lambda: plain(Doubled),
    "forward-hook": hooked,
    "forward-pre-hook": pre_hooked,
    "patched-forward": patched,
    "parametrization": parametrized,
    "fake-quantized": fake_quantized,
    "bitnet": bitnet,
}
for_every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def without_compilation():
    """transformers compiles what its BitNet layers call, which takes longer than all tests here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def wrapped(layer, theta=0.0, **overrides):
    model = wrap(OneLayer(layer), POETConfig(target_modules=["layer"], block_size=8, **overrides))
    randomize(model, theta)
    return model


@for_every_layer
def test_an_untrained_adapter_does_not_change_the_output(name):
    layer = LAYERS[name]()
    x = normal(5, 24)
    expected = layer(x)
    assert torch.equal(wrapped(layer)(x), expected)


@for_every_layer
def test_rotations_train_around_the_layer(name):
    model = wrapped(LAYERS[name](), theta=0.2)
    model(normal(5, 24)).pow(3).sum().backward()
    rotations = model.base_model.model.layer.rotations("default")
    assert all(rotation.weight.grad.any() for rotation in rotations)


def test_forward_hooks_are_called_once():
    layer = plain()
    calls = []
    layer.register_forward_hook(lambda *args: calls.append("after"))
    layer.register_forward_pre_hook(lambda *args: calls.append("before"))
    wrapped(layer, theta=0.2)(normal(5, 24))
    assert calls == ["before", "after"]


def test_a_hook_that_comes_later_is_called_too():
    model = wrapped(plain(), theta=0.2)
    calls = []
    model(normal(5, 24))
    model.base_model.model.layer.base_layer.register_forward_hook(lambda *args: calls.append(1))
    model(normal(5, 24))
    assert calls == [1]


@for_every_layer
def test_merge_is_refused_by_name_and_changes_nothing(name):
    model = wrapped(LAYERS[name](), theta=0.2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'layer' \(.*exclude_modules|weight of 'layer'.*parametrization"):
        model.merge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@for_every_layer
def test_fold_is_refused_by_name_and_changes_nothing(name):
    model = wrapped(LAYERS[name](), theta=0.2, merge_interval=4)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(POETFoldError, match="'layer'"):
        merge_and_reinitialize(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_hook_that_only_looks_is_no_obstacle_to_a_merge():
    layer = plain()
    layer.register_forward_hook(lambda *args: None)
    model = wrapped(layer, theta=0.2)
    x = normal(5, 24)
    expected = model(x)
    model.merge_adapter()
    assert relative_error(model(x), expected) < 1e-5


def test_fp8_weights_are_rotated_around_and_not_merged():
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(128, 128, block_size=(128, 128))
    with torch.no_grad():
        layer.weight.copy_(normal(128, 128).to(torch.float8_e4m3fn))
        layer.weight_scale_inv.fill_(0.01)
    model = wrapped(layer, theta=0.2)
    with pytest.raises(ValueError, match="'layer'"):
        model.merge_adapter()


# A layer that carries LoRA already


def on_top_of_lora(adapter_name="default", **overrides):
    torch.manual_seed(0)
    lora = get_peft_model(OneLayer(plain()), LoraConfig(target_modules=["layer"], r=4, init_lora_weights=False))
    config = POETConfig(target_modules=["layer"], block_size=8, **overrides)
    return lora, lambda: get_peft_model(lora, config, adapter_name=adapter_name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_lora_below_is_kept(adapter_name):
    lora, add = on_top_of_lora(adapter_name)
    x = normal(5, 24)
    expected = lora(x)
    model = add()
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merge_above_lora_is_refused():
    _, add = on_top_of_lora()
    model = add()
    randomize(model, 0.2)
    with pytest.raises(ValueError, match="carries another adapter"):
        model.merge_adapter()
