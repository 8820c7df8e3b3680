"""A run that was cut off and goes on ends in the same bits."""

import functools
import json
from pathlib import Path

import pytest
import torch
from models import KINDS, adamw, assert_same_state, llama, state, step, train, wrap
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from workers.resume_run import NUM_STEPS, make_trainer, result_of

from poet_peft import verify_checkpoint
from poet_peft.layer import poet_layers


TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
REGIMES = {
    **{regime: {"regime": regime} for regime in KINDS},
    "adapter_rest": {"regime": "block_stochastic", "train_rest": True},
}
CASES = {
    **REGIMES,
    "block_stochastic_bf16": {"regime": "block_stochastic", "dtype": "bfloat16"},
    "pretraining_bf16": {"regime": "pretraining", "dtype": "bfloat16"},
    "pretraining_muon": {"regime": "pretraining", "optimizer": "RotationMuon"},
    "every_step_muon": {"regime": "pretraining", "optimizer": "RotationMuon", "every_step": True},
    "every_step_muon_bf16": {
        "regime": "pretraining",
        "optimizer": "RotationMuon",
        "every_step": True,
        "dtype": "bfloat16",
    },
    "pretraining_accumulated": {"regime": "pretraining", "gradient_accumulation_steps": 2},
}
# Folds are at steps 4 and 8, and the clip is tightened at steps 5 and 6.
SAVED_AT = {"between_folds": 7, "at_a_fold": 4, "in_the_clip_ramp": 5}


# Runs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Whole runs with a checkpoint after every step, by case: their directory and what they ended with."""

    @functools.cache
    def run(name):
        directory = tmp_path_factory.mktemp(name)
        trainer = make_trainer(CASES[name], directory, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
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
def resumed_in_a_new_process(forks, uninterrupted, tmp_path_factory):
    @functools.cache
    def run(name, at):
        directory = tmp_path_factory.mktemp(name)
        checkpoint = uninterrupted(name)[0] / f"checkpoint-{SAVED_AT[at]}"
        settings = {"case": CASES[name], "directory": str(directory), "resume": str(checkpoint), "seed": 7}
        process = forks.run(TESTS / "workers" / "resume_run.py", json.dumps(settings))
        assert process.returncode == 0, process.stderr[-3000:]
        return {
            "weights": load_file(directory / "weights"),
            "optimizer": load_file(directory / "optimizer"),
            "log": json.loads((directory / "log").read_text()),
        }

    return run


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
    [
        ("block_stochastic", "between_folds"),
        ("pretraining", "in_the_clip_ramp"),
        ("pretraining_bf16", "at_a_fold"),
        ("every_step_muon_bf16", "between_folds"),
    ],
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


each_regime = pytest.mark.parametrize("name", [*REGIMES, "pretraining_bf16"])


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
    train_to_the_best("pretraining", tmp_path, save_total_limit=limit)
    left = {path.name: verify_checkpoint(path) for path in tmp_path.glob("checkpoint-*")}
    assert left.keys() == {f"checkpoint-{step}" for step in kept}


@each_regime
def test_save_model_writes_the_model_of_the_last_checkpoint(uninterrupted, name):
    directory = uninterrupted(name)[0]
    last = directory / f"checkpoint-{NUM_STEPS}"
    assert_same_state(*(load_file(path / "adapter_model.safetensors") for path in (directory, last)))


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_is_complete_and_of_the_settings_of_its_run(uninterrupted, name):
    verify_checkpoint(uninterrupted(name)[0] / "checkpoint-5", make_trainer(CASES[name], "unused", seed=7).model)


# A loop without Trainer


def loop(forks, directory, *arguments, returncode=0):
    """Run the example. Returns the losses and the hash of the model that it prints."""
    sizes = "--max_steps", 12, "--save_steps", 3, "--merge_interval", 4
    process = forks.run(EXAMPLES / "training_loop.py", "--output_dir", directory, *sizes, *arguments)
    assert process.returncode == returncode, process.stderr[-3000:]
    return [line for line in process.stdout.splitlines() if line.startswith(("step", "model"))]


@pytest.fixture(scope="module")
def whole_loop(forks, tmp_path_factory):
    return loop(forks, tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [4, 11])
def test_example_loop_that_was_killed_goes_on_to_the_same_end(forks, whole_loop, tmp_path, stop_after):
    loop(forks, tmp_path, "--stop_after", stop_after, returncode=1)
    assert loop(forks, tmp_path) == whole_loop[stop_after // 3 * 3 :]


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
