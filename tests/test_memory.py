"""What a rotated layer keeps between forward and backward."""

import pytest
import torch
from torch import nn

from poet_peft import POETConfig
from poet_peft.layer import Linear


def layer(memory_efficient):
    torch.manual_seed(0)
    base = nn.Linear(48, 64).requires_grad_(False)
    config = POETConfig(
        target_modules=["linear"], block_size=16, init_weights=False, memory_efficient=memory_efficient
    )
    return Linear(base, "default", config, "linear")


def forward_and_kept(module, x):
    """The output, and the tensors of a weight's size that autograd kept for it, by address."""
    kept = {}

    def pack(tensor):
        if tensor.shape[-2:] in {(64, 48), (48, 64)}:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return module(x), kept


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_second_copy_of_the_weight_is_kept_only_without_memory_efficient(memory_efficient):
    module = layer(memory_efficient)
    x = torch.randn(512, 48, generator=torch.Generator().manual_seed(1), requires_grad=True)
    _, kept = forward_and_kept(module, x)
    own = module.get_base_layer().weight.untyped_storage().data_ptr()
    assert len(kept.keys() - {own}) == (0 if memory_efficient else 1)


def test_activations_are_not_kept_in_rotated_form():
    module = layer(memory_efficient=True)
    x = torch.randn(512, 48, generator=torch.Generator().manual_seed(1), requires_grad=True)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.add(tensor.untyped_storage().data_ptr()) if tensor.shape[0] == 512 else None, tensor)[1],
        lambda tensor: tensor,
    ):
        module(x)
    assert kept == {x.untyped_storage().data_ptr()}


def test_memory_efficient_gives_the_same_output_and_gradients():
    results = []
    for memory_efficient in (False, True):
        module = layer(memory_efficient)
        x = torch.randn(512, 48, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
