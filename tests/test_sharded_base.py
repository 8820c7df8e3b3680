"""An adapter on a base that transformers has sharded while loading it (`DistributedConfig`): two processes as one."""

import json

import pytest
import torch
from models import assert_same_state, llama, logits, poet_config, tokens, wrap
from peft import get_peft_model
from safetensors.torch import load_file
from workers import fsdp_run, native_run
from workers.resume_run import make_trainer, result_of


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo"),
]


@pytest.fixture(scope="module")
def directory(forks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("native")
    llama().save_pretrained(directory / "base")
    forks.launch("native_run.py", directory)
    return directory


@pytest.fixture(scope="module")
def reports(directory):
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process():
    model = native_run.build(llama())
    losses = fsdp_run.train(model, native_run.make_optimizer(model))
    return losses, model.state_dict()


def test_losses_are_those_of_one_process(reports, one_process):
    assert reports[0]["whole"]["losses"] == pytest.approx(one_process[0], rel=1e-5)


def test_weights_end_as_those_of_one_process(directory, one_process):
    torch.testing.assert_close(load_file(directory / "whole.weights"), dict(one_process[1]), rtol=1e-4, atol=1e-5)


def test_resumed_run_ends_bit_equal(directory, reports):
    assert_same_state(load_file(directory / "resumed.weights"), load_file(directory / "whole.weights"))


def test_saved_adapter_is_the_same_in_one_process(directory, reports):
    model = get_peft_model(llama(), poet_config("periodic", seed=9))
    model.load_adapter(directory / "adapter", "default")
    torch.testing.assert_close(torch.tensor(reports[0]["loaded"]), logits(model), rtol=1e-5, atol=1e-6)


def test_base_computes_the_same_under_an_adapter_at_the_identity(reports):
    assert reports[0]["inference"] < 1e-6


def test_gradients_are_the_mean_where_the_adapter_came_after_a_forward(reports):
    model = wrap(llama(), target_modules=["lm_head"], init_weights=True)
    for rank in range(2):
        input_ids = tokens(seed=rank)
        (model(input_ids=input_ids, labels=input_ids).loss / 2).backward()
    expected = [p.grad for name, p in model.named_parameters() if ".poet_" in name]
    actual = [torch.tensor(gradient) for gradient in reports[0]["gradients"]]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train_rest", [False, True], ids=["periodic", "train_rest"])
def test_trainer_has_the_losses_of_one_process(reports, tmp_path, train_rest):
    case = {"regime": "periodic", "train_rest": train_rest, "dropout": 0.0, "eps": 1e-3}
    trainer = make_trainer(case, tmp_path, per_device_train_batch_size=4)
    trainer.train()
    expected = [entry[1] for entry in result_of(trainer)["log"]]
    name = "trainer-train_rest" if train_rest else "trainer-periodic"
    assert reports[0][name]["losses"] == pytest.approx(expected, rel=1e-5)


def test_ranks_report_the_same(reports):
    assert reports[0] == reports[1]


def test_tensor_parallelism_is_refused_by_name(reports):
    assert "q_proj" in reports[0]["tensor_parallel"] and "fsdp_size" in reports[0]["tensor_parallel"]
