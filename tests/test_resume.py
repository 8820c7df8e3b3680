"""A run that was cut off and goes on ends in the same bits; a checkpoint that is damaged is refused by name."""

import functools
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from models import adamw, assert_same_state, llama, state, step, train, wrap
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from workers.resume_run import NUM_STEPS, build, make_trainer, result_of

from poet_peft import POETCheckpointError
from poet_peft.files.training_checkpoints import latest_checkpoint, verify_checkpoint
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


each_case = pytest.mark.parametrize("name", CASES)
each_place = pytest.mark.parametrize("at", SAVED_AT)


@each_case
@each_place
def test_resumed_run_ends_with_the_same_weights(uninterrupted, resumed, name, at):
    assert_same_state(resumed(name, at)["weights"], uninterrupted(name)[1]["weights"])


@each_case
@each_place
def test_resumed_run_ends_with_the_same_optimizer_state(uninterrupted, resumed, name, at):
    assert_same_state(resumed(name, at)["optimizer"], uninterrupted(name)[1]["optimizer"])


@each_case
@each_place
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


# Damaged checkpoints


@pytest.fixture
def checkpoint(uninterrupted, tmp_path):
    """A copy of a complete checkpoint of Trainer, to be damaged."""
    return Path(shutil.copytree(uninterrupted("periodic_rest")[0] / "checkpoint-5", tmp_path / "checkpoint-5"))


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """A copy of what `save_pretrained` writes."""
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        shutil.copy(checkpoint / name, tmp_path / "adapter")
    return tmp_path / "adapter"


def cut(num_bytes):
    return lambda path: path.write_bytes(path.read_bytes()[:num_bytes])


def edit_json(**values):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def replace_by_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("something", "else")


ADAPTER_DAMAGES = {
    "weights cut in a tensor": ("adapter_model.safetensors", cut(-1), "not a whole safetensors file"),
    "weights cut in the header": ("adapter_model.safetensors", cut(100), "not a whole safetensors file"),
    "weights cut in the length": ("adapter_model.safetensors", cut(4), "not a whole safetensors file"),
    "weights empty": ("adapter_model.safetensors", cut(0), "empty"),
    "weights missing": ("adapter_model.safetensors", Path.unlink, "missing"),
    "weights garbage": ("adapter_model.safetensors", lambda p: p.write_bytes(b"garbage" * 99), "not a whole"),
    "weights with bytes too many": (
        "adapter_model.safetensors",
        lambda p: p.write_bytes(p.read_bytes() + b"0"),
        "not a whole safetensors file",
    ),
    "config cut": ("adapter_config.json", cut(-10), "not JSON"),
    "config empty": ("adapter_config.json", cut(0), "empty"),
    "config missing": ("adapter_config.json", Path.unlink, "missing"),
    "config binary": ("adapter_config.json", lambda p: p.write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "config a list": ("adapter_config.json", lambda p: p.write_text("[1]"), "JSON list"),
    "config of LoRA": ("adapter_config.json", edit_json(peft_type="LORA"), "peft_type='LORA'"),
    "config without a type": ("adapter_config.json", edit_json(peft_type=None), "peft_type=None"),
    "config with a bad value": ("adapter_config.json", edit_json(block_size=1), "block_size=1 must be"),
}
TRAINER_DAMAGES = {
    **ADAPTER_DAMAGES,
    "state cut": ("trainer_state.json", cut(-10), "not JSON"),
    "state missing": ("trainer_state.json", Path.unlink, "missing"),
    "state of another step": ("trainer_state.json", edit_json(global_step=4), "global_step=4"),
    "state without a step": ("trainer_state.json", edit_json(global_step=None), "global_step=None"),
    **{
        f"{name} {what}": (name, damage, reason)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        for what, damage, reason in (
            ("cut", cut(-30), "not a whole file of torch.save"),
            ("cut at half", lambda p: cut(p.stat().st_size // 2)(p), "not a whole file of torch.save"),
            ("without its beginning", lambda p: p.write_bytes(p.read_bytes()[40:]), "torch.save"),
            ("empty", cut(0), "empty"),
            ("missing", Path.unlink, "missing"),
            ("another archive", replace_by_zip, "not one of torch.save"),
        )
    },
}


@pytest.mark.parametrize("damage", TRAINER_DAMAGES)
def test_damaged_checkpoint_is_refused_with_the_file_and_the_reason(checkpoint, damage):
    name, edit, reason = TRAINER_DAMAGES[damage]
    edit(checkpoint / name)
    with pytest.raises(POETCheckpointError) as refusal:
        verify_checkpoint(checkpoint)
    assert str(checkpoint / name) in str(refusal.value)
    assert reason in str(refusal.value)


@pytest.mark.parametrize("damage", ADAPTER_DAMAGES)
def test_damaged_adapter_is_refused_with_the_file_and_the_reason(adapter, damage):
    name, edit, reason = ADAPTER_DAMAGES[damage]
    edit(adapter / name)
    with pytest.raises(POETCheckpointError) as refusal:
        verify_checkpoint(adapter)
    assert str(adapter / name) in str(refusal.value)
    assert reason in str(refusal.value)


@pytest.mark.parametrize("name", CASES)
def test_complete_checkpoint_is_accepted(uninterrupted, name):
    verify_checkpoint(uninterrupted(name)[0] / "checkpoint-5")


def test_complete_adapter_is_accepted(adapter):
    verify_checkpoint(str(adapter))


def test_checkpoint_of_the_model_only_is_accepted(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "save_only_model": True}
    make_trainer(CASES["periodic_rest"], tmp_path, **arguments).train()
    verify_checkpoint(tmp_path / "checkpoint-1")


def test_checkpoint_that_trainer_left_before_its_state_is_refused(checkpoint):
    """Nothing but the name tells it from an adapter's directory."""
    for path in checkpoint.iterdir():
        if not path.name.startswith("adapter"):
            path.unlink()
    with pytest.raises(POETCheckpointError, match="trainer_state.json is missing"):
        verify_checkpoint(checkpoint)


def test_directory_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(POETCheckpointError, match="nowhere is no directory"):
        verify_checkpoint(tmp_path / "nowhere")


def test_empty_directory_is_refused(tmp_path):
    with pytest.raises(POETCheckpointError, match="adapter_model.safetensors is missing"):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize("damaged", ["", "second"])
def test_each_of_several_adapters_is_checked(tmp_path, damaged):
    model = wrap(llama())
    model.add_adapter("second", model.peft_config["default"])
    model.save_pretrained(tmp_path)
    verify_checkpoint(tmp_path)
    cut(-1)(tmp_path / damaged / "adapter_model.safetensors")
    with pytest.raises(POETCheckpointError, match="not a whole safetensors file"):
        verify_checkpoint(tmp_path)


class Runs:
    """Its pickle raises when it is loaded."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file was run')",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_code_of_a_file_is_run(checkpoint, name):
    with zipfile.ZipFile(checkpoint / name, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Runs()))
    verify_checkpoint(checkpoint)


@pytest.mark.parametrize("num_bytes", [-1, 100, 0])
def test_trainer_loads_nothing_of_a_truncated_adapter(checkpoint, tmp_path, num_bytes):
    cut(num_bytes)(checkpoint / "adapter_model.safetensors")
    trainer = make_trainer(CASES["periodic_rest"], tmp_path / "new", seed=7)
    before = state(trainer.model)
    with pytest.raises(Exception, match="(?i)header|safetensors|incomplete"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same_state(state(trainer.model), before)


WRONG_DTYPES = {
    "poet_R.weight": torch.int32,
    "poet_R.index": torch.float32,
    "poet_state": torch.float32,
    "base_layer.weight": torch.int64,
    "embed_tokens.weight": torch.uint8,
}


@pytest.mark.parametrize("key", WRONG_DTYPES)
def test_tensor_of_a_wrong_kind_is_refused_and_nothing_is_loaded(uninterrupted, tmp_path, key):
    directory = uninterrupted("periodic_rest")[0] / "checkpoint-5"
    tensors = load_file(directory / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith(key))
    tensors[name] = tensors[name].to(WRONG_DTYPES[key])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    shutil.copy(directory / "adapter_config.json", tmp_path)
    model = build("periodic", train_rest=True, seed=7)
    before = state(model)
    with pytest.raises(POETCheckpointError, match="dtype|float32|int|uint8"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same_state(state(model), before)


# The newest complete checkpoint


@pytest.fixture
def run_directory(uninterrupted, tmp_path):
    for step_number in (4, 5, 9):
        name = f"checkpoint-{step_number}"
        shutil.copytree(uninterrupted("periodic_rest")[0] / name, tmp_path / name)
    return tmp_path


def test_newest_checkpoint_is_the_one_with_the_largest_number(uninterrupted):
    directory = uninterrupted("periodic_rest")[0]
    assert latest_checkpoint(directory) == str(directory / f"checkpoint-{NUM_STEPS}")


def test_numbers_are_compared_as_numbers(run_directory):
    (run_directory / "checkpoint-5").rename(run_directory / "checkpoint-10")
    edit_json(global_step=10)(run_directory / "checkpoint-10" / "trainer_state.json")
    assert latest_checkpoint(run_directory) == str(run_directory / "checkpoint-10")


@pytest.mark.parametrize("damage", TRAINER_DAMAGES)
def test_damaged_checkpoint_is_skipped(run_directory, damage):
    name, edit, _ = TRAINER_DAMAGES[damage]
    edit(run_directory / "checkpoint-9" / name)
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


def test_other_names_are_no_checkpoints(run_directory):
    for name in ("checkpoint-99-old", "my-checkpoint-99", "checkpoint-best"):
        shutil.copytree(run_directory / "checkpoint-5", run_directory / name)
    (run_directory / "checkpoint-98").write_text("a file")
    assert latest_checkpoint(run_directory) == str(run_directory / "checkpoint-9")


def test_run_goes_on_from_the_newest_complete_checkpoint_to_the_same_end(uninterrupted, run_directory):
    cut(-1)(run_directory / "checkpoint-9" / "optimizer.pt")
    with pytest.warns(UserWarning, match="optimizer.pt"):
        resume = latest_checkpoint(run_directory)
    trainer = make_trainer(CASES["periodic_rest"], run_directory, seed=7)
    trainer.train(resume_from_checkpoint=resume)
    assert_same_state(result_of(trainer)["weights"], uninterrupted("periodic_rest")[1]["weights"])


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
    resumed = losses_and_hash(loop(tmp_path, "--seed", 3))
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
