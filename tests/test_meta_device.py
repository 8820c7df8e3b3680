"""Injection without memory for the weights: what is drawn from the configuration is there all the same."""

import pytest
import torch
from models import assert_same_state, llama, logits, poet_config
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

from poet_peft.layer import poet_layers


each_regime = pytest.mark.parametrize("regime", ["block_stochastic", "fully_stochastic", "exact_cayley", "periodic"])


def injected(regime, base, low_cpu_mem_usage=False):
    return inject_adapter_in_model(poet_config(regime, seed=3), base, low_cpu_mem_usage=low_cpu_mem_usage)


def meta_llama():
    with torch.device("meta"):
        return llama()


def drawn(model):
    """Everything of the adapter but its parameters."""
    return {name: tensor for name, tensor in model.named_buffers() if name.endswith((".index", ".default"))}


@each_regime
@pytest.mark.parametrize("base", [llama, meta_llama])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_index_and_state_are_complete_before_anything_is_loaded(regime, base, low_cpu_mem_usage):
    model = injected(regime, base(), low_cpu_mem_usage)
    expected = drawn(injected(regime, llama()))
    assert any(name.endswith(".index") for name in expected) and any("poet_state" in name for name in expected)
    assert_same_state(drawn(model), expected)


@each_regime
def test_loaded_adapter_computes_the_same(regime):
    source = injected(regime, llama())
    model = injected(regime, llama(), low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert torch.equal(logits(model), logits(source))


def test_adapter_of_a_model_on_the_meta_device_is_there_once_its_weights_are():
    model = injected("block_stochastic", meta_llama(), low_cpu_mem_usage=True)
    parameters = dict(injected("block_stochastic", llama()).named_parameters())
    model.load_state_dict(parameters, strict=False, assign=True)
    assert all(layer.state("default").seed == 3 for _, layer in poet_layers(model))
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
