"""A run that was cut off and goes on ends in the same bits."""

import functools
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import adamw, assert_same_state, llama, state, step, train, wrap
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from workers.resume_run import NUM_STEPS, make_trainer, result_of

from poet_peft import verify_checkpoint
from poet_peft.layer import poet_layers


TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
REGIMES = {
    "adapter": {"regime": "block_stochastic"},
    "adapter_rest": {"regime": "block_stochastic", "train_rest": True},
    "periodic": {"regime": "periodic"},
    "periodic_rest": {"regime": "periodic", "train_rest": True},
}
CASES = {
    **REGIMES,
    **{f"{name}_bf16": {**case, "dtype": "bfloat16"} for name, case in REGIMES.items()},
    "periodic_rest_muon": {**REGIMES["periodic_rest"], "optimizer": "RotationMuon"},
    **{f"{name}_accumulated": {**case, "gradient_accumulation_steps": 2} for name, case in REGIMES.items()},
}
# Folds are at steps 4 and 8, and the clip is tightened at steps 5 and 6.
SAVED_AT = {"between_folds": 7, "at_a_fold": 4, "in_the_clip_ramp": 5}


# Runs


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage():
    """Trainer collects garbage at the start of a run, which takes longer than our runs do in all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Whole runs with a checkpoint after every step, by case: their directory and what they ended with."""

    @functools.cache
    def run(name):
        directory = tmp_path_factory.mktemp(name)
        trainer = make_trainer(CASES[name], directory, save_strategy="steps", save_steps=1)
        trainer.train()
        return directory, result_of(trainer)

    return run


@pytest.fixture(scope="module")
def resumed(uninterrupted, tmp_path_factory):
    """What runs end with that went on from a checkpoint in a newly built model, from other seeds."""

    @functools.cache
    def run(name, at):
        checkpoint = uninterrupted(name)[0] / f"checkpoint-{SAVED_AT[at]}"
        trainer = make_trainer(CASES[name], tmp_path_factory.mktemp(name), seed=7)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return result_of(trainer)

    return run


@pytest.fixture(scope="module")
def resumed_in_a_new_process(uninterrupted, tmp_path_factory):
    @functools.cache
    def run(name, at):
        directory = tmp_path_factory.mktemp(name)
        checkpoint = uninterrupted(name)[0] / f"checkpoint-{SAVED_AT[at]}"
        settings = {"case": CASES[name], "directory": str(directory), "resume": str(checkpoint), "seed": 7}
        python(TESTS / "workers" / "resume_run.py", json.dumps(settings))
        return {
            "weights": load_file(directory / "weights"),
            "optimizer": load_file(directory / "optimizer"),
            "log": json.loads((directory / "log").read_text()),
        }

    return run


def python(*arguments, returncode=0):
    """Run a script in a new process, with one thread as here. Returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == returncode, process.stderr[-3000:]
    return process.stdout


# Every regime from every place, and every other case from one.
each_run = pytest.mark.parametrize(
    ("name", "at"),
    [
        *((name, at) for name in REGIMES for at in SAVED_AT),
        *((name, "at_a_fold") for name in CASES if name.endswith(("_bf16", "_muon"))),
        *((name, "in_the_clip_ramp") for name in CASES if name.endswith(("_accumulated", "_muon"))),
    ],
)


@each_run
def test_resumed_run_ends_with_the_same_weights(uninterrupted, resumed, name, at):
    assert_same_state(resumed(name, at)["weights"], uninterrupted(name)[1]["weights"])


@each_run
def test_resumed_run_ends_with_the_same_optimizer_state(uninterrupted, resumed, name, at):
    assert_same_state(resumed(name, at)["optimizer"], uninterrupted(name)[1]["optimizer"])


@each_run
def test_resumed_run_logs_the_same(uninterrupted, resumed, name, at):
    assert resumed(name, at)["log"] == uninterrupted(name)[1]["log"]


new_processes = pytest.mark.parametrize(
    ("name", "at"),
    [("adapter", "between_folds"), ("periodic_rest", "in_the_clip_ramp"), ("periodic_rest_bf16", "at_a_fold")],
)


@pytest.mark.slow
@new_processes
def test_run_resumed_in_a_new_process_ends_with_the_same_weights(uninterrupted, resumed_in_a_new_process, name, at):
    assert_same_state(resumed_in_a_new_process(name, at)["weights"], uninterrupted(name)[1]["weights"])


@pytest.mark.slow
@new_processes
def test_run_resumed_in_a_new_process_ends_with_the_same_optimizer_state(
    uninterrupted, resumed_in_a_new_process, name, at
):
    assert_same_state(resumed_in_a_new_process(name, at)["optimizer"], uninterrupted(name)[1]["optimizer"])


@pytest.mark.slow
@new_processes
def test_run_resumed_in_a_new_process_logs_the_same(uninterrupted, resumed_in_a_new_process, name, at):
    assert resumed_in_a_new_process(name, at)["log"] == uninterrupted(name)[1]["log"]


@pytest.mark.parametrize("name", REGIMES)
def test_training_goes_on_after_the_checkpoint(uninterrupted, name):
    """Without which equal ends would prove nothing."""
    directory, end = uninterrupted(name)
    saved = load_file(directory / "checkpoint-5" / "adapter_model.safetensors")
    after = load_file(directory / f"checkpoint-{NUM_STEPS}" / "adapter_model.safetensors")
    assert any(not torch.equal(saved[key], after[key]) for key in saved if key.endswith("poet_R.weight"))


# Which model a run leaves behind

BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


class Best:
    """The best model is that of step 3, before the first fold; from then on the loss that is logged grows."""

    def __init__(self, trainer):
        evaluate = trainer.evaluate

        def worse_after_step_3(*args, **kwargs):
            metrics = evaluate(*args, **kwargs)
            metrics["eval_badness"] = abs(trainer.state.global_step - 3)
            return metrics

        trainer.evaluate = worse_after_step_3


def train_to_the_best(name, directory, resume=None, **arguments):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_badness", "greater_is_better": False}
    trainer = make_trainer(CASES[name], directory, seed=7 if resume else 0, **{**BEST, **best, **arguments})
    Best(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


each_regime = pytest.mark.parametrize("name", [*REGIMES, "periodic_rest_bf16"])


@each_regime
def test_best_model_is_the_one_of_its_checkpoint(tmp_path, name):
    trainer = train_to_the_best(name, tmp_path)
    trainer.save_model(tmp_path / "final")
    checkpoint = tmp_path / "checkpoint-3"
    assert_same_state(*(load_file(path / "adapter_model.safetensors") for path in (tmp_path / "final", checkpoint)))


@each_regime
def test_resumed_run_ends_with_the_best_model_from_before(uninterrupted, tmp_path, name):
    train_to_the_best(name, tmp_path, max_steps=6, lr_scheduler_type="constant")
    trainer = train_to_the_best(name, tmp_path, str(tmp_path / "checkpoint-5"), lr_scheduler_type="constant")
    saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    trainer.save_model(tmp_path / "final")
    assert_same_state(load_file(tmp_path / "final" / "adapter_model.safetensors"), saved)


@pytest.mark.parametrize(("limit", "kept"), [(1, {3}), (2, {3, 9})])
def test_save_total_limit_keeps_the_best_checkpoint_whole(tmp_path, limit, kept):
    train_to_the_best("periodic_rest", tmp_path, save_total_limit=limit)
    left = {path.name: verify_checkpoint(path) for path in tmp_path.glob("checkpoint-*")}
    assert left.keys() == {f"checkpoint-{step}" for step in kept}


@each_regime
def test_save_model_writes_the_model_of_the_last_checkpoint(uninterrupted, tmp_path, name):
    trainer = make_trainer(CASES[name], tmp_path)
    trainer.train()
    trainer.save_model()
    last = uninterrupted(name)[0] / f"checkpoint-{NUM_STEPS}"
    assert_same_state(*(load_file(path / "adapter_model.safetensors") for path in (tmp_path, last)))


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_is_complete_and_of_the_settings_of_its_run(uninterrupted, name):
    verify_checkpoint(uninterrupted(name)[0] / "checkpoint-5", make_trainer(CASES[name], "unused", seed=7).model)


# A loop without Trainer


def losses_and_hash(output):
    return [line for line in output.splitlines() if line.startswith(("step", "model"))]


@pytest.fixture(scope="module")
def whole_loop(tmp_path_factory):
    return losses_and_hash(loop(tmp_path_factory.mktemp("whole")))


def loop(directory, *arguments, **kwargs):
    sizes = "--max_steps", 12, "--save_steps", 3, "--merge_interval", 4
    return python(EXAMPLES / "training_loop.py", "--output_dir", directory, *sizes, *arguments, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [4, 7, 11])
def test_example_loop_that_was_killed_goes_on_to_the_same_end(whole_loop, tmp_path, stop_after):
    loop(tmp_path, "--stop_after", stop_after, returncode=1)
    resumed = losses_and_hash(loop(tmp_path))
    assert resumed == whole_loop[stop_after // 3 * 3 :]


def test_optimizer_and_adapter_are_all_that_a_loop_has_to_keep(tmp_path):
    model = wrap(llama(), "pretraining")
    optimizer = train(model)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for seed in (5, 6):
        step(model, optimizer, seed=seed)

    other = PeftModel.from_pretrained(llama(seed=9), tmp_path, is_trainable=True)
    other_optimizer = adamw(other)
    other_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for seed in (5, 6):
        step(other, other_optimizer, seed=seed)
    assert_same_state(state(other), state(model))


def test_loading_an_optimizer_through_torchs_distributed_checkpoints_counts_no_step():
    """It steps once, with learning rates and gradients of zero, so that there is a state to load into."""
    model = wrap(llama(), "periodic", merge_interval=1)
    get_optimizer_state_dict(model, adamw(model))
    assert {layer.state("default").num_steps for _, layer in poet_layers(model)} == {0}
