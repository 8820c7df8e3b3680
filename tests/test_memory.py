"""What a rotated layer keeps between forward and backward."""

import pytest
import torch
from cases import relative_error
from models import llama, wrap
from models import tokens as word_ids
from torch import nn

from benchmarks.harness.memory import measure_memory
from poet_peft import POETConfig, RotationMuon, poet_param_groups
from poet_peft.linear import Linear


def layer(memory_efficient):
    torch.manual_seed(0)
    base = nn.Linear(48, 64).requires_grad_(False)
    config = POETConfig(
        target_modules=["linear"], block_size=16, init_weights=False, memory_efficient=memory_efficient
    )
    return Linear(base, "default", config, "linear")


SIZES = {"weight": (64, 48), "x": (512, 48), "y": (512, 64)}


def kept_for_backward(module, x):
    """How many tensors of each size autograd and the layer's cache keep after a forward, apart from the weight."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    kept.pop(module.get_base_layer().weight.data_ptr(), None)
    assert y.requires_grad
    return {name: list(kept.values()).count(size) for name, size in SIZES.items()}


def tokens():
    return torch.randn(512, 48, generator=torch.Generator().manual_seed(1), requires_grad=True)


def test_second_copy_of_the_weight_and_the_output_are_kept_for_speed():
    assert kept_for_backward(layer(memory_efficient=False), tokens()) == {"weight": 1, "x": 1, "y": 1}


@pytest.mark.parametrize("num_tokens", [4, 512])
def test_memory_efficient_keeps_the_input_alone(num_tokens):
    x = tokens()[:num_tokens]
    kept = set()

    def pack(tensor):
        if num_tokens in tensor.shape:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(memory_efficient=True)(x)
    assert kept == {x.untyped_storage().data_ptr()}


def test_memory_efficient_keeps_no_second_copy_of_the_weight():
    assert kept_for_backward(layer(memory_efficient=True), tokens()) == {"weight": 0, "x": 1, "y": 0}


@pytest.mark.parametrize("num_tokens", [1, 512])
def test_memory_efficient_keeps_nothing_after_inference(num_tokens):
    module = layer(memory_efficient=True)
    with torch.no_grad():
        module(tokens()[:num_tokens])
    assert all(rotation._kept._values is None for rotation in module.rotations("default"))


@pytest.mark.parametrize("num_tokens", [4, 512])
def test_memory_efficient_gives_the_same_output_and_gradients(num_tokens):
    results = []
    for memory_efficient in (False, True):
        module = layer(memory_efficient)
        x = tokens()[:num_tokens].detach().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
    for fast, efficient in zip(*results, strict=True):
        assert relative_error(fast, efficient) < 1e-5


def test_a_deleted_memory_efficient_adapter_leaves_the_others_fast():
    module = layer(memory_efficient=True)
    module.update_layer("second", POETConfig(target_modules=["linear"], block_size=16, init_weights=False))
    module.set_adapter("second")
    module.delete_adapter("default")
    assert kept_for_backward(module, tokens()) == {"weight": 1, "x": 1, "y": 1}


def test_a_step_that_is_folded_at_once_leaves_weights_and_momenta_alone():
    """The first step is measured, for which dense blocks of every rotation are made."""
    regime = {"merge_interval": 1, "reinit_interval": 0, "init_weights": True, "block_size": 32, "train_rest": True}
    model = wrap(llama(), **regime)
    optimizer = RotationMuon(poet_param_groups(model, lr=1e-3))
    ids = word_ids()
    memory = measure_memory(
        model, optimizer, lambda: model(input_ids=ids, labels=ids).loss, lambda loss: loss.backward(), [ids], "cpu"
    )
    assert memory.caches == 0
