"""Models whose weights accelerate keeps elsewhere and brings in for each module's own forward."""

import accelerate
import pytest
import torch
from mixtures import config, moe
from models import bert_classifier, gpt2, llama, logits, tokens, wrap
from peft import get_peft_model

from poet_peft import POETFoldError, merge_and_reinitialize, poet_param_groups


def with_biases(model):
    """A model whose biases are not zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def to_cpu(model, tmp_path):
    return accelerate.cpu_offload(model, execution_device="cpu")


def to_disk(model, tmp_path):
    return accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))


each_place = pytest.mark.parametrize("offload", [to_cpu, to_disk], ids=["cpu", "disk"])
each_model = pytest.mark.parametrize("make", [llama, gpt2, bert_classifier])


@each_place
@each_model
def test_offloaded_model_computes_the_same(tmp_path, make, offload):
    torch.manual_seed(0)
    model = wrap(with_biases(make()))
    expected = logits(model)
    model = offload(model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


@each_place
def test_offloaded_adapter_can_be_disabled_and_merged(tmp_path, offload):
    original = logits(llama())
    model = wrap(llama())
    rotated = logits(model)
    model = offload(model, tmp_path)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), original, rtol=0, atol=0)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), rotated, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), rotated, rtol=1e-5, atol=1e-6)


def test_offloaded_experts_are_refused_by_name():
    base = accelerate.cpu_offload(moe("mixtral"), execution_device="cpu")
    model = get_peft_model(base, config(init_weights=False))
    with pytest.raises(ValueError, match="experts.*is offloaded.*device_map"):
        logits(model)


@each_place
def test_fold_into_an_offloaded_weight_is_refused_by_name(tmp_path, offload):
    model = wrap(offload(llama(), tmp_path), merge_interval=2)
    before = {name: p.clone() for name, p in model.named_parameters() if ".poet_" in name}
    with pytest.raises(POETFoldError, match="q_proj.*is offloaded.*device_map.*merge_interval=0"):
        merge_and_reinitialize(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_fold_of_an_offloaded_adapter_is_refused_by_name():
    model = accelerate.cpu_offload(wrap(llama(), merge_interval=2), execution_device="cpu")
    with pytest.raises(POETFoldError, match="q_proj.*is offloaded"):
        merge_and_reinitialize(model)


def test_training_with_folds_into_an_offloaded_weight_ends_at_the_first_one_by_name():
    model = wrap(accelerate.cpu_offload(llama(), execution_device="cpu"), merge_interval=1, reinit_interval=0)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer = torch.optim.SGD(poet_param_groups(model, lr=1e-3, poet_lr=1e-3))
    with pytest.raises(POETFoldError, match="q_proj.*is offloaded"):
        optimizer.step()
