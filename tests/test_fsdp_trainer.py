"""Trainer under accelerate's FSDP2: checkpoints hold what folds changed, or training does not start."""

import json

import pytest
import torch
from models import llama
from peft import PeftModel
from workers.ddp_run import digest
from workers.resume_run import make_trainer, result_of


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo"),
]

SHARDED = {"state_dict_type": "SHARDED_STATE_DICT", "regime": "periodic"}
FULL = {"state_dict_type": "FULL_STATE_DICT", "regime": "block_stochastic", "train_rest": False}
WHOLE = {
    "periodic": {**SHARDED, "train_rest": False},
    "train_rest": {**SHARDED, "train_rest": True},
    "adapter": FULL,
}
RESUMED = [("periodic", 4), ("train_rest", 5), ("adapter", 5)]  # at a fold, and in the clip ramp after it
each_resumed = pytest.mark.parametrize(("name", "step"), RESUMED, ids=[f"{name}-{step}" for name, step in RESUMED])


@pytest.fixture(scope="module")
def directory(forks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fsdp")
    runs = {name: {**case} for name, case in WHOLE.items()}
    for name, step in RESUMED:
        seed = 0 if name == "adapter" else 7  # an adapter's file holds no base weights
        runs[f"{name}-{step}"] = {**WHOLE[name], "seed": seed, "resume": f"{name}/checkpoint-{step}"}
    runs["refused"] = {**FULL, "regime": "periodic"}
    forks.launch("accelerate_fsdp_run.py", directory, json.dumps(runs))
    return directory


@pytest.fixture(scope="module")
def reports(directory):
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("train_rest", [False, True], ids=["periodic", "train_rest"])
def test_losses_are_those_of_one_process(reports, tmp_path, train_rest):
    case = {"regime": "periodic", "train_rest": train_rest, "dropout": 0.0, "eps": 1e-3}
    trainer = make_trainer(case, tmp_path, per_device_train_batch_size=4)
    trainer.train()
    expected = [entry[1] for entry in result_of(trainer)["log"]]
    assert reports[0]["train_rest" if train_rest else "periodic"]["log"] == pytest.approx(expected, rel=1e-5)


@each_resumed
@pytest.mark.parametrize("what", ["log", "weights"])
def test_resumed_run_ends_as_the_uninterrupted_one(reports, name, step, what):
    assert reports[0][f"{name}-{step}"][what] == reports[0][name][what]


def test_ranks_report_the_same(reports):
    assert reports[0] == reports[1]


@pytest.mark.parametrize("name", ["periodic", "train_rest"])
def test_file_saved_at_the_end_is_the_model(directory, reports, name):
    base = llama(seed=0 if name == "periodic" else 3)
    model = PeftModel.from_pretrained(base, directory / name / "last")
    assert digest(model.state_dict()) == reports[0][name]["weights"]


def test_full_state_dict_with_folds_is_refused_at_the_start(reports):
    assert "SHARDED_STATE_DICT" in reports[0]["refused"]["error"]
