"""A pretraining run that is killed again and again, in folds and in saves, ends as one that was left alone.

One run, killed at all moments in turn.
"""

import json
import signal
import sysconfig
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
from models import assert_same_state
from safetensors.torch import load_file

from poet_peft.files.training_checkpoints import latest_checkpoint


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PRETRAIN = ROOT / "examples" / "pretrain.py"
KILLED_RUN = ROOT / "tests" / "workers" / "killed_run.py"


class Kill(NamedTuple):
    """In which step the process dies, and which checkpoint is then the newest complete one."""

    moment: str
    step: int
    newest: int


# In the order of a run that saves every second step and folds every third.
KILLS = [
    Kill("in_a_fold", 3, newest=2),
    Kill("in_the_adapter_file", 4, newest=2),
    Kill("before_the_adapter_config", 6, newest=4),
    Kill("in_the_optimizer_file", 8, newest=6),
    Kill("in_a_fold", 9, newest=8),
    Kill("in_the_trainer_state", 10, newest=8),
    Kill("in_the_deletion_of_an_old_checkpoint", 12, newest=12),
]
NUM_STEPS = 13  # so that the last model has rotations that are not folded yet
SETTINGS = {
    "max_steps": NUM_STEPS,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 4,
    "merge_interval": 3,
    "block_size": 16,
    "vocab_size": 300,
    "seq_length": 32,
    "max_eval_sequences": 4,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "eval_steps": 2,
    "use_cpu": True,
}
SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = [Path(sysconfig.get_paths()["stdlib"]) / name for name in ("bisect.py", "heapq.py", "textwrap.py")]


def run(forks, directory, *wrapper, resume=None):
    """Run the example. Returns how the process ended."""
    config = directory / "model.json"
    config.write_text(json.dumps({"model_type": "llama", **SIZES}))
    arguments = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    data = directory / "text.jsonl"
    data.write_text("\n".join(json.dumps({"text": path.read_text()}) for path in TEXTS))
    arguments += ["--model_config", str(config), "--output_dir", str(directory / "run"), "--data", str(data)]
    if resume is not None:
        arguments += ["--resume_from_checkpoint", resume]
    process = forks.run(*wrapper, PRETRAIN, *arguments)
    assert process.returncode in (0, -signal.SIGKILL), process.stderr[-5000:]
    return process.returncode


@pytest.fixture(scope="module")
def uninterrupted(forks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert run(forks, directory) == 0
    return directory / "run"


@pytest.fixture(scope="module")
def killed(forks, tmp_path_factory):
    """The directory of the run that was killed at last ended, and what was there after each kill."""
    directory = tmp_path_factory.mktemp("killed")
    ends, warned, resume = [], [], None
    for kill in KILLS:
        returncode = run(forks, directory, KILLED_RUN, kill.moment, kill.step, resume=resume)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resume = latest_checkpoint(directory / "run")
        ends.append((returncode, Path(resume).name if resume else None))
        warned.append(" ".join(str(warning.message) for warning in caught))
    assert run(forks, directory, resume=resume) == 0
    return directory / "run", ends, warned


each_kill = pytest.mark.parametrize("number", range(len(KILLS)), ids=[f"{kill.moment}-{kill.step}" for kill in KILLS])


@each_kill
def test_process_was_killed_and_left_a_complete_checkpoint(killed, number):
    assert killed[1][number] == (-signal.SIGKILL, f"checkpoint-{KILLS[number].newest}")


DAMAGED = {
    "in_the_adapter_file": "adapter_model.safetensors",
    "before_the_adapter_config": "adapter_config.json",
    "in_the_optimizer_file": "optimizer.pt",
    "in_the_trainer_state": "trainer_state.json",
}


@pytest.mark.parametrize("moment", DAMAGED)
def test_half_written_checkpoint_is_named_with_its_file(killed, moment):
    number = [kill.moment for kill in KILLS].index(moment)
    assert f"checkpoint-{KILLS[number].step}/{DAMAGED[moment]} is" in killed[2][number]


def test_killed_run_ends_with_the_weights_of_the_uninterrupted_one(killed, uninterrupted):
    assert_same_state(load_file(killed[0] / "model.safetensors"), load_file(uninterrupted / "model.safetensors"))


def test_killed_run_ends_with_the_last_checkpoint_of_the_uninterrupted_one(killed, uninterrupted):
    name = f"checkpoint-{NUM_STEPS}/adapter_model.safetensors"
    assert_same_state(load_file(killed[0] / name), load_file(uninterrupted / name))


def values(directory, key):
    """What was logged under a name, by step."""
    log = json.loads((directory / "metrics.json").read_text())["log"]
    return {entry["step"]: entry[key] for entry in log if key in entry}


@pytest.mark.parametrize("key", ["loss", "grad_norm", "learning_rate", "eval_loss", "poet/num_reinits"])
def test_killed_run_logged_what_the_uninterrupted_one_did(killed, uninterrupted, key):
    assert values(killed[0], key) == values(uninterrupted, key)


def test_killed_run_has_the_final_loss_of_the_uninterrupted_one(killed, uninterrupted):
    losses = [json.loads((path / "metrics.json").read_text())["eval_loss"] for path in (killed[0], uninterrupted)]
    assert losses[0] == losses[1]
