"""Which checkpoint a run goes on from."""

import json
import os
import shutil
from pathlib import Path

import pytest
from damages import cut, edit_json
from models import assert_same_state, llama, poet_config, wrap
from safetensors.torch import load_file
from transformers import TrainerState
from workers.resume_run import NUM_STEPS, PERIODIC_REST, make_trainer

from poet_peft import POETCheckpointError, latest_checkpoint, verify_checkpoint


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """The directory of a run from another seed that was killed after three steps."""
    directory = tmp_path_factory.mktemp("other")
    make_trainer(PERIODIC_REST, directory, seed=7, save_strategy="steps", save_steps=1, max_steps=3).train()
    return directory


@pytest.fixture
def run_directory(periodic_run, tmp_path):
    for step_number in (4, 5, 9):
        name = f"checkpoint-{step_number}"
        shutil.copytree(periodic_run / name, tmp_path / name)
    return tmp_path


def test_newest_checkpoint_is_the_one_with_the_largest_number(periodic_run):
    assert latest_checkpoint(periodic_run) == str(periodic_run / f"checkpoint-{NUM_STEPS}")


def test_numbers_are_compared_as_numbers(run_directory):
    (run_directory / "checkpoint-5").rename(run_directory / "checkpoint-10")
    edit_json(global_step=10)(run_directory / "checkpoint-10" / "trainer_state.json")
    assert latest_checkpoint(run_directory) == str(run_directory / "checkpoint-10")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_damaged_checkpoint_is_skipped(run_directory, name):
    cut(-30)(run_directory / "checkpoint-9" / name)
    with pytest.warns(UserWarning, match="Skipped damaged checkpoints"):
        assert latest_checkpoint(run_directory) == str(run_directory / "checkpoint-5")


def test_one_warning_names_all_damaged_files_and_reasons(run_directory):
    Path.unlink(run_directory / "checkpoint-9" / "trainer_state.json")
    cut(-1)(run_directory / "checkpoint-5" / "adapter_model.safetensors")
    with pytest.warns(UserWarning) as caught:
        latest_checkpoint(run_directory)
    (warning,) = caught
    assert "checkpoint-9/trainer_state.json is missing" in str(warning.message)
    assert "checkpoint-5/adapter_model.safetensors is not a whole safetensors file" in str(warning.message)


def test_complete_checkpoint_is_found_without_a_warning(run_directory, recwarn):
    latest_checkpoint(run_directory)
    assert not recwarn.list


def test_without_a_complete_checkpoint_there_is_none(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-3/adapter_model.safetensors is missing"):
        assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_new_output_directory_has_none(tmp_path, name):
    assert latest_checkpoint(tmp_path / name) is None


def test_other_names_are_no_checkpoints(run_directory, recwarn):
    for name in (
        "checkpoint-99-old",
        "my-checkpoint-99",
        "checkpoint-best",
        "checkpoint-099",
        "checkpoint-\u0669\u0669",
    ):
        shutil.copytree(run_directory / "checkpoint-5", run_directory / name)
    (run_directory / "checkpoint-98").write_text("a file")
    assert latest_checkpoint(run_directory) == str(run_directory / "checkpoint-9")
    assert not recwarn.list


def test_checkpoint_on_a_disk_that_is_not_there_is_named(run_directory):
    (run_directory / "checkpoint-99").symlink_to(run_directory / "unmounted")
    with pytest.warns(UserWarning, match="checkpoint-99 is no directory"):
        latest_checkpoint(run_directory)


def test_output_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "output").write_text("a file")
    with pytest.raises(POETCheckpointError, match="output cannot be read as a run's directory: Not a directory"):
        latest_checkpoint(tmp_path / "output")


def test_run_goes_on_from_the_newest_complete_checkpoint_to_the_same_end(periodic_run, run_directory, tmp_path):
    cut(-1)(run_directory / "checkpoint-9" / "optimizer.pt")
    with pytest.warns(UserWarning, match="optimizer.pt"):
        resume = latest_checkpoint(run_directory)
    trainer = make_trainer(PERIODIC_REST, run_directory, seed=7)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(tmp_path / "final")
    assert_same_state(
        load_file(tmp_path / "final" / "adapter_model.safetensors"),
        load_file(periodic_run / f"checkpoint-{NUM_STEPS}" / "adapter_model.safetensors"),
    )


# Checkpoints of two runs, and of other settings


def forget_log(*checkpoints):
    for checkpoint in checkpoints:
        edit_json(log_history=[])(checkpoint / "trainer_state.json")


def write_at(time, *checkpoints):
    for checkpoint in checkpoints:
        os.utime(checkpoint / "trainer_state.json", (time, time))


@pytest.fixture
def two_runs(run_directory, other_run):
    """Checkpoints 4, 5 and 9 of a run, and then checkpoint 3 of another one."""
    shutil.copytree(other_run / "checkpoint-3", run_directory / "checkpoint-3")
    write_at(1, *(run_directory / f"checkpoint-{number}" for number in (4, 5, 9)))
    write_at(2, run_directory / "checkpoint-3")
    return run_directory


def test_checkpoints_of_two_runs_are_refused_by_what_they_logged(two_runs):
    with pytest.raises(POETCheckpointError, match=r"step 1, checkpoint-9 logged loss=[\d.]+ and checkpoint-3 loss="):
        latest_checkpoint(two_runs)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "learning_rate"])
def test_runs_that_differ_in_one_logged_number_are_told_apart(run_directory, name):
    path = run_directory / "checkpoint-4" / "trainer_state.json"
    history = json.loads(path.read_text())["log_history"]
    history[2][name] *= 1.01
    edit_json(log_history=history)(path)
    with pytest.raises(POETCheckpointError, match=f"at step 3, checkpoint-9 logged {name}="):
        latest_checkpoint(run_directory)


def test_a_run_that_was_repeated_from_the_start_is_one_run(run_directory):
    """The same numbers, but for the times that they took, some of them NaN."""
    for number, seconds in ((4, 1.5), (5, 2.0), (9, 2.5)):
        path = run_directory / f"checkpoint-{number}" / "trainer_state.json"
        first, second, *rest = json.loads(path.read_text())["log_history"]
        timed = {"step": 1, "eval_loss": 4.0, "eval_runtime": seconds}
        edit_json(log_history=[timed, first, {**second, "grad_norm": float("nan")}, *rest])(path)
    assert latest_checkpoint(run_directory) == str(run_directory / "checkpoint-9")


def test_damaged_checkpoint_of_another_run_is_no_matter(two_runs, recwarn):
    cut(-10)(two_runs / "checkpoint-3" / "trainer_state.json")
    assert latest_checkpoint(two_runs) == str(two_runs / "checkpoint-9")
    assert not recwarn.list


def test_checkpoints_without_a_log_that_were_written_in_another_order_are_warned_of(two_runs):
    forget_log(two_runs / "checkpoint-3")
    with pytest.warns(UserWarning, match="checkpoint-9, but checkpoint-3 was written later") as caught:
        latest_checkpoint(two_runs)
    assert len(caught) == 1


def test_order_of_writing_does_not_matter_where_the_logs_agree(run_directory, recwarn):
    write_at(1, run_directory / "checkpoint-9")
    latest_checkpoint(run_directory)
    assert not recwarn.list


DIFFERENT = {
    "variant": ({"variant": "fully_stochastic"}, "variant='block_stochastic'", "variant='fully_stochastic'"),
    "two": (
        {"block_size": 8, "merge_interval": 5},
        "block_size=16, merge_interval=4",
        "block_size=8, merge_interval=5",
    ),
    "targets": ({"target_modules": ["q_proj"]}, "target_modules=['model.layers.0.mlp", "target_modules=['q_proj']"),
    "train_rest": ({"train_rest": False}, "train_rest=True", "train_rest=False"),
}


@pytest.mark.parametrize(
    "look", [lambda run, model: verify_checkpoint(run / "checkpoint-9", model), latest_checkpoint]
)
@pytest.mark.parametrize("change", DIFFERENT)
def test_checkpoint_of_other_settings_is_refused_by_their_names(periodic_run, look, change):
    overrides, there, here = DIFFERENT[change]
    model = wrap(llama(), "periodic", **{"train_rest": True, **overrides})
    with pytest.raises(POETCheckpointError) as refusal:
        look(periodic_run, model)
    assert f"was trained with {there}" in str(refusal.value)
    assert f"the adapter 'default' of the model has {here}" in str(refusal.value)


def test_checkpoint_of_the_same_settings_is_found(periodic_run):
    model = wrap(llama(), "periodic", train_rest=True, seed=5, memory_efficient=True, max_drift=0.5)
    assert latest_checkpoint(periodic_run, model) == str(periodic_run / f"checkpoint-{NUM_STEPS}")


@pytest.mark.parametrize("setting", ["default", "second"])
def test_each_adapter_is_compared_with_its_own_file(tmp_path, setting):
    model = wrap(llama())
    model.add_adapter("second", poet_config(block_size=8))
    model.save_pretrained(tmp_path)
    verify_checkpoint(tmp_path, model)
    model.peft_config[setting].block_size = 4
    with pytest.raises(POETCheckpointError, match=f"adapter '{setting}' of the model has block_size=4"):
        verify_checkpoint(tmp_path, model)


def test_model_without_an_adapter_is_refused(periodic_run):
    with pytest.raises(ValueError, match="a LlamaForCausalLM, has no POET adapter"):
        latest_checkpoint(periodic_run, llama())


# The end of a run


@pytest.mark.parametrize(("step_number", "is_finished"), [(NUM_STEPS - 1, False), (NUM_STEPS, True)])
def test_checkpoint_says_whether_it_is_the_end_of_its_run(periodic_run, step_number, is_finished):
    state = TrainerState.load_from_json(f"{periodic_run}/checkpoint-{step_number}/trainer_state.json")
    assert (state.global_step >= state.max_steps) == is_finished
