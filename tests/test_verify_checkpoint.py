"""Which checkpoints are refused, and why."""

import errno
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from damages import cut, edit_json
from models import assert_same_state, llama, state, wrap
from safetensors.torch import load_file, save_file
from workers.resume_run import PERIODIC_REST, build, make_trainer

from poet_peft import POETCheckpointError, verify_checkpoint


@pytest.fixture
def checkpoint(periodic_run, tmp_path):
    """A copy of a complete checkpoint of Trainer, to be damaged."""
    return Path(shutil.copytree(periodic_run / "checkpoint-5", tmp_path / "checkpoint-5"))


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """A copy of what `save_pretrained` writes."""
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        shutil.copy(checkpoint / name, tmp_path / "adapter")
    return tmp_path / "adapter"


def replace_by_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("something", "else")


def replace_by_directory(path):
    path.unlink()
    path.mkdir()


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
    "config with a bad pattern": (
        "adapter_config.json",
        edit_json(block_size_pattern=None),
        "block_size_pattern=None",
    ),
    "config a directory": ("adapter_config.json", replace_by_directory, "no file"),
}
TRAINER_DAMAGES = {
    "weights cut": ADAPTER_DAMAGES["weights cut in a tensor"],
    "config missing": ADAPTER_DAMAGES["config missing"],
    "state cut": ("trainer_state.json", cut(-10), "not JSON"),
    "state missing": ("trainer_state.json", Path.unlink, "missing"),
    "state of another step": ("trainer_state.json", edit_json(global_step=4), "global_step=4"),
    "state without a step": ("trainer_state.json", edit_json(global_step=None), "global_step=None"),
    "log no list": ("trainer_state.json", edit_json(log_history={}), "log_history"),
    "log of numbers": ("trainer_state.json", edit_json(log_history=[1]), "log_history"),
    "optimizer cut": ("optimizer.pt", cut(-30), "not a whole file of torch.save"),
    "optimizer cut at half": ("optimizer.pt", lambda p: cut(p.stat().st_size // 2)(p), "not a whole file"),
    "optimizer without its beginning": ("optimizer.pt", lambda p: p.write_bytes(p.read_bytes()[40:]), "torch.save"),
    "optimizer empty": ("optimizer.pt", cut(0), "empty"),
    "optimizer another archive": ("optimizer.pt", replace_by_zip, "not one of torch.save"),
    "optimizer missing": ("optimizer.pt", Path.unlink, "missing"),
    "scheduler cut": ("scheduler.pt", cut(-30), "not a whole file of torch.save"),
    "scheduler missing": ("scheduler.pt", Path.unlink, "missing"),
    "random state cut": ("rng_state.pth", cut(-30), "not a whole file of torch.save"),
    "random state missing": ("rng_state.pth", Path.unlink, "missing"),
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


def test_complete_checkpoint_is_accepted(checkpoint):
    verify_checkpoint(checkpoint)


def test_complete_adapter_is_accepted(adapter):
    verify_checkpoint(str(adapter))


def test_checkpoint_of_the_model_only_is_accepted(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "save_only_model": True}
    make_trainer(PERIODIC_REST, tmp_path, **arguments).train()
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


def test_stray_files_and_directories_are_no_damage(checkpoint):
    (checkpoint / "runs" / "events").mkdir(parents=True)
    (checkpoint / "notes.txt").write_text("best so far")
    verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt"])
def test_file_that_must_not_be_read_is_named_and_not_called_damaged(checkpoint, monkeypatch, name):
    open_path = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_path(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(POETCheckpointError) as refusal:
        verify_checkpoint(checkpoint)
    assert str(refusal.value) == f"{checkpoint / name} cannot be read: Permission denied."


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
    trainer = make_trainer(PERIODIC_REST, tmp_path / "new", seed=7)
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
def test_tensor_of_a_wrong_kind_is_refused_and_nothing_is_loaded(periodic_run, tmp_path, key):
    directory = periodic_run / "checkpoint-5"
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
