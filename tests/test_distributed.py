"""Two processes (gloo, on the CPU) train as one does: DDP through Trainer and both launchers, FSDP2 in a loop.

Every launch runs several cases, since starting processes takes longer than the runs.
"""

import functools
import json

import pytest
import torch
from launch import ACCELERATE, TORCHRUN, launch
from models import assert_same_state
from safetensors.torch import load_file
from workers import fsdp_run
from workers.resume_run import NUM_STEPS, make_trainer, result_of

from poet_peft.diagnostics_file import read_diagnostics


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo"),
]

# DDP through Trainer

# A large eps: Adam's step for a gradient that is only rounding differs between two ways to add up.
SMOOTH = {"regime": "periodic", "train_rest": True, "dropout": 0.0, "eps": 1e-3}
CASES = {
    "plain": SMOOTH,  # with buffers broadcast, as is the default
    "adapter": {"regime": "block_stochastic", "dropout": 0.0, "eps": 1e-3},
    "periodic": {**SMOOTH, "train_rest": False},
    "buffers_not_broadcast": {**SMOOTH, "ddp_broadcast_buffers": False},
    "accumulation": {**SMOOTH, "gradient_accumulation_steps": 2},
    "checkpointing": {**SMOOTH, "gradient_checkpointing": True},
    "bfloat16": {**SMOOTH, "dtype": "bfloat16"},
    "bfloat16_autocast": {**SMOOTH, "bf16": True},
    "every_step": {**SMOOTH, "optimizer": "RotationMuon", "every_step": True},
}
SAVED = {"regime": "periodic", "train_rest": True, "save_strategy": "steps", "save_steps": 1}  # with dropout


def reports(directory, name):
    return [json.loads((directory / name / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """The reports of both ranks, by case."""
    directory = tmp_path_factory.mktemp("ddp")
    runs = {name: {"case": case} for name, case in CASES.items()}
    runs["saved"] = {"case": SAVED}
    for step in (4, 5):
        checkpoint = directory / "saved" / f"checkpoint-{step}"
        runs[f"resumed-{step}"] = {"case": SAVED, "seed": 7, "resume": str(checkpoint)}
    launch(TORCHRUN, "ddp_run.py", directory, json.dumps(runs))
    return functools.partial(reports, directory)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The log of one process on the same global batches, by case."""

    @functools.cache
    def run(name):
        case = {key: value for key, value in CASES[name].items() if not key.startswith("ddp")}
        trainer = make_trainer(case, tmp_path_factory.mktemp(name), per_device_train_batch_size=4)
        trainer.train()
        return result_of(trainer)["log"]

    return run


each_case = pytest.mark.parametrize("name", CASES)


@each_case
@pytest.mark.parametrize("what", ["weights", "optimizer"])
def test_ranks_end_bit_identical(ddp, name, what):
    first, second = ddp(name)
    assert first[what] == second[what]


@each_case
def test_ranks_have_folded(ddp, name):
    expected = [{"adapter": 0, "every_step": NUM_STEPS}.get(name, NUM_STEPS // 4)]
    assert [report["num_folds"] for report in ddp(name)] == [expected] * 2


@each_case
def test_loss_of_every_step_is_that_of_one_process_on_the_same_batch(ddp, single, name):
    """The last batch is smaller than a global batch in no step."""
    relative = 1e-2 if name.startswith("bfloat16") else 1e-5
    losses = [entry[1] for entry in ddp(name)[0]["log"]]
    assert losses == pytest.approx([entry[1] for entry in single(name)], rel=relative)


@pytest.mark.parametrize("step", [4, 5], ids=["at_a_fold", "in_the_clip_ramp"])
@pytest.mark.parametrize("what", ["weights", "optimizer", "log"])
def test_run_resumed_from_another_seed_ends_the_same(ddp, step, what):
    whole, resumed = ddp("saved"), ddp(f"resumed-{step}")
    assert [report[what] for report in resumed] == [report[what] for report in whole]


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("accelerate")
    launch(ACCELERATE, "ddp_run.py", directory, json.dumps({"plain": {"case": SMOOTH}}))
    return reports(directory, "plain")


def test_accelerate_launch_gives_the_same_bits_as_torchrun(ddp, accelerated):
    assert accelerated == ddp("plain")


# FSDP2 in a loop of its own


@pytest.fixture(scope="module")
def fsdp(forks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fsdp")
    forks.launch("fsdp_run.py", directory)
    return directory


@pytest.fixture(scope="module")
def fsdp_reports(fsdp):
    return [json.loads((fsdp / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process():
    model = fsdp_run.build()
    optimizer = fsdp_run.make_optimizer(model)
    losses = fsdp_run.train(model, optimizer)
    return losses, model.state_dict(), fsdp_run.moments(model, optimizer)


def test_every_parameter_is_sharded(fsdp_reports, one_process):
    model = fsdp_run.build()
    assert fsdp_reports[0]["sharded"] == sorted(name for name, _ in model.named_parameters())


def test_sharded_losses_are_those_of_one_process(fsdp_reports, one_process):
    assert fsdp_reports[0]["whole"] == pytest.approx(one_process[0], rel=1e-5)


def test_sharded_weights_end_as_those_of_one_process(fsdp, one_process):
    torch.testing.assert_close(load_file(fsdp / "whole.weights"), dict(one_process[1]), rtol=1e-4, atol=1e-5)


def test_sharded_optimizer_ends_as_that_of_one_process(fsdp, one_process):
    torch.testing.assert_close(load_file(fsdp / "whole.optimizer"), one_process[2], rtol=1e-3, atol=1e-6)


def test_sharded_checkpoint_has_the_keys_of_one_process(fsdp, tmp_path):
    fsdp_run.build().save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    saved = load_file(fsdp / "step-5" / "adapter_model.safetensors")
    assert {k: (t.shape, t.dtype) for k, t in saved.items()} == {k: (t.shape, t.dtype) for k, t in expected.items()}


@pytest.mark.parametrize("step", fsdp_run.SAVED_AT, ids=["at_a_fold", "after_a_fold"])
@pytest.mark.parametrize("what", ["weights", "optimizer"])
def test_sharded_run_resumed_from_another_seed_ends_bit_equal(fsdp, fsdp_reports, step, what):
    assert isinstance(fsdp_reports[0][f"resumed-{step}"], list), fsdp_reports[0][f"resumed-{step}"]
    assert_same_state(load_file(fsdp / f"resumed-{step}.{what}"), load_file(fsdp / f"whole.{what}"))


@pytest.mark.parametrize("step", fsdp_run.SAVED_AT, ids=["at_a_fold", "after_a_fold"])
def test_sharded_run_resumed_from_another_seed_has_the_same_losses(fsdp_reports, step):
    assert fsdp_reports[0][f"resumed-{step}"] == fsdp_reports[0]["whole"][step:]


@pytest.mark.parametrize("name", ["evaluated", "evaluated-root"], ids=["layers_sharded", "root_sharded"])
def test_fold_after_an_evaluation_is_not_lost(fsdp_reports, name):
    """An evaluation leaves the weights of the root gathered; what is written to that copy is not the parameter's."""
    assert max(fsdp_reports[0][name]) < 1e-5


def test_sharded_training_with_gradient_checkpointing_is_the_same(fsdp, fsdp_reports):
    assert fsdp_reports[0]["checkpointing"] == fsdp_reports[0]["whole"]
    assert_same_state(load_file(fsdp / "checkpointing.weights"), load_file(fsdp / "whole.weights"))


def test_sharded_rotation_muon_trains_as_in_one_process(fsdp_reports):
    model = fsdp_run.build()
    losses = fsdp_run.train(model, fsdp_run.make_rotation_muon(model))
    assert fsdp_reports[0]["rotation_muon"] == pytest.approx(losses, rel=1e-4)


def test_sharded_folds_after_every_step_train_as_in_one_process(fsdp_reports):
    model = fsdp_run.build(every_step=True)
    losses = fsdp_run.train(model, fsdp_run.make_rotation_muon(model))
    assert fsdp_reports[0]["every_step"] == pytest.approx(losses, rel=1e-4)


def numbers_in(value):
    """All numbers of nested JSON but the counts of histograms, where planes at the edge of a bin may change sides."""
    if isinstance(value, dict):
        return [n for key, item in value.items() if key != "angle_histogram" for n in numbers_in(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers_in(item)]
    return [value] if isinstance(value, float) else []


def test_diagnostics_of_a_sharded_model_are_those_of_one_process_and_written_once(fsdp, tmp_path):
    model = fsdp_run.build()
    fsdp_run.measure(model, fsdp_run.make_optimizer(model), tmp_path / "diagnostics.jsonl")
    (sharded,), (one,) = (read_diagnostics(folder / "diagnostics.jsonl") for folder in (fsdp, tmp_path))
    assert [layer["name"] for layer in sharded["layers"]] == [layer["name"] for layer in one["layers"]]
    assert all(side["momentum_cosine"] for layer in sharded["layers"] for side in layer["sides"])
    for key in ("summary", "layers"):
        assert numbers_in(sharded[key]) == pytest.approx(numbers_in(one[key]), rel=1e-3, abs=2e-4)


def test_sharded_training_in_mixed_precision_follows_that_in_fp32(fsdp_reports):
    assert fsdp_reports[0]["bfloat16"] == pytest.approx(fsdp_reports[0]["whole"], rel=1e-2)


def test_ranks_report_the_same(fsdp_reports):
    assert fsdp_reports[0] == fsdp_reports[1]
