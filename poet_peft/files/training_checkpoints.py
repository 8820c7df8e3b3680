"""Which checkpoint to go on from after a run was killed. Only headers and JSON are read; nothing is unpickled."""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ..config import POETConfig
from ..errors import POETCheckpointError


# As in transformers.trainer, whose import takes seconds.
_STATE, _OPTIMIZER, _SCHEDULER, _SCALER = "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt"
_TRAINER_FILES = (_STATE, _OPTIMIZER, _SCHEDULER, _SCALER)
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_WHY = "Was the process that wrote it killed, or the disk full?"
# What every Trainer logs of a step, and repeats only if it is the same run. (Times are never the same.)
_LOGGED = ("loss", "grad_norm", "learning_rate")
# The first two are brought back from the file, the others change no result.
_MAY_DIFFER = {"seed", "init_weights", "memory_efficient", "max_drift"}


def verify_checkpoint(path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
    """Refuse a checkpoint that is half-written, damaged or of other settings, before anything of it is loaded.

    For two kinds of directory: what `save_pretrained` writes, one adapter or several, and what Trainer writes, which
    is known by its name `checkpoint-N` or by any of Trainer's files in it. Trainer writes `trainer_state.json` last.
    With `save_only_model` it saves neither optimizer, scheduler nor random state; one of them without the others is
    taken for damage. Checked is that every file is there, whole and readable: lengths, headers and tables of contents,
    so that it takes milliseconds. What the tensors hold is checked against the model when they are loaded.

    Args:
        path: the directory.
        model: the wrapped model that is to be trained further. Its `POETConfig` and that of the checkpoint must be the
            same in everything that a run is made of: all settings of `POETConfig` itself but `seed`, `init_weights`,
            `memory_efficient` and `max_drift`. None compares nothing.

    Raises:
        POETCheckpointError: names the file and what is wrong with it, or the settings that differ.
        ValueError: `model` has no POET adapter.
    """
    path = Path(path)
    try:
        _check_files(path)
        if model is not None:
            _check_settings(path, model)
    except OSError as error:
        raise POETCheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error


def latest_checkpoint(output_dir: str | os.PathLike[str], model: nn.Module | None = None) -> str | None:
    """The newest complete `checkpoint-N` of a Trainer run, to pass to `trainer.train(resume_from_checkpoint=...)`.

    The newest is that of the largest N. Checkpoints that `verify_checkpoint` refuses are skipped, and so is everything
    of another name. transformers' `get_last_checkpoint`, which `resume_from_checkpoint=True` stands for, takes the
    newest one whatever state it is in.

    A directory is for one run. Checkpoints of two are refused instead of one being chosen, since the larger N may well
    be of the older run. What tells two runs apart is what they logged: a checkpoint holds the log of its run from the
    first step on, and `loss`, `grad_norm` and `learning_rate` of the same step are the same in all checkpoints of one
    run, however often it was resumed. Where two checkpoints have no logged step in common (`logging_steps` larger than
    `save_steps`), only the time of writing is left, which copying a directory changes: if a smaller N was written
    later, a warning says so. Pass `model` to compare the settings as well: a run that has not saved anything yet is
    told from what an earlier one left in its directory by nothing else.

    The checkpoint may be the end of its run, from which Trainer would make one step more:

        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        is_finished = state.global_step >= state.max_steps

    Args:
        output_dir: the run's `TrainingArguments.output_dir`.
        model: see `verify_checkpoint`.

    Returns:
        The path, or None where there is nothing to resume: training then starts from the beginning.

    Raises:
        POETCheckpointError: the directory cannot be read, holds checkpoints of two runs, or the newest complete one is
            of other settings than the model. Names them, the difference and the way out.
        ValueError: `model` has no POET adapter.

    Warns:
        UserWarning: once, with the damaged file of every checkpoint that was skipped; and if the order in which
            checkpoints were written is not that of their steps.
    """
    output_dir = Path(output_dir)
    steps = _steps_of_checkpoints(output_dir)
    problems = []
    complete = None
    while steps and complete is None:
        path = output_dir / f"checkpoint-{steps.pop()}"
        try:
            verify_checkpoint(path)
        except POETCheckpointError as error:
            problems.append(str(error))
        else:
            complete = path
    if problems:
        warnings.warn(f"Skipped damaged checkpoints, going on from {complete}: {' '.join(problems)}")
    if complete is None:
        return None
    _check_one_run(complete, [output_dir / f"checkpoint-{step}" for step in steps])
    if model is not None:
        verify_checkpoint(complete, model)
    return str(complete)


def _steps_of_checkpoints(output_dir: Path) -> list[int]:
    """The N of everything called `checkpoint-N` that is not a file, in increasing order."""
    if not output_dir.exists():
        return []
    try:
        matches = [_CHECKPOINT.fullmatch(name) for name in os.listdir(output_dir)]
    except OSError as error:
        raise POETCheckpointError(f"{output_dir} cannot be read as a run's directory: {error.strerror}.") from error
    return sorted(int(match[1]) for match in matches if match and not (output_dir / match[0]).is_file())


def _check_one_run(newest: Path, others: list[Path]) -> None:
    logged = _logged(newest)
    written_later = []
    for other in others:
        try:
            logged_by_other = _logged(other)
        except (OSError, POETCheckpointError):
            continue  # damaged, and not to be loaded
        common = [key for key in logged if key in logged_by_other]
        for step, name in common:
            one, two = logged[step, name], logged_by_other[step, name]
            if repr(one) != repr(two):  # NaN is the same as NaN
                raise POETCheckpointError(
                    f"{newest.parent} holds checkpoints of two runs: at step {step}, {newest.name} logged "
                    f"{name}={one!r} and {other.name} {name}={two!r}. Move the checkpoints of one run away, and give "
                    "each run a directory of its own; or pass the path of the checkpoint to go on from to "
                    "resume_from_checkpoint."
                )
        if not common and (other / _STATE).stat().st_mtime_ns > (newest / _STATE).stat().st_mtime_ns:
            written_later.append(other.name)
    if written_later:
        warnings.warn(
            f"Going on from {newest}, but {', '.join(written_later)} was written later. If that is of another run, "
            "pass its path to resume_from_checkpoint, and give each run a directory of its own. In a directory that "
            "was copied, times of writing mean nothing."
        )


def _logged(checkpoint: Path) -> dict[tuple[Any, str], Any]:
    """What the run of a checkpoint logged, {(step, name): value}, in order."""
    logged: dict[tuple[Any, str], Any] = {}
    for entry in _read_state(checkpoint)["log_history"]:
        for name in _LOGGED:
            if name in entry:
                logged.setdefault((entry.get("step"), name), entry[name])
    return logged


def _check_settings(path: Path, model: nn.Module) -> None:
    configs = {
        name: config for name, config in getattr(model, "peft_config", {}).items() if isinstance(config, POETConfig)
    }
    if not configs:
        raise ValueError(
            f"the model, a {type(model).__name__}, has no POET adapter to compare {path} with: pass what "
            "get_peft_model(model, POETConfig(...)) returned."
        )
    for name, config in configs.items():
        own = path / name / CONFIG_NAME
        saved = _read_json(own if own.is_file() else path / CONFIG_NAME)
        current = json.loads(json.dumps(config.to_dict(), default=sorted))
        differing = [
            key
            for key in POETConfig.__annotations__
            if key in saved
            and key in current
            and key not in _MAY_DIFFER
            and _plain(saved[key]) != _plain(current[key])
        ]
        if differing:
            there, here = (", ".join(f"{key}={_brief(of[key])}" for key in differing) for of in (saved, current))
            raise POETCheckpointError(
                f"{path} was trained with {there}; the adapter {name!r} of the model has {here}. Give a new run an "
                "output_dir of its own. To go on from this checkpoint, use its settings; or pass its path to "
                "resume_from_checkpoint to change them on purpose."
            )


def _plain(value: Any) -> Any:
    """PEFT saves a set of names as a list in any order."""
    return sorted(value, key=str) if isinstance(value, list) else value


def _brief(value: Any) -> str:
    text = repr(_plain(value))
    return text if len(text) <= 100 else f"{text[:100]}..."


def _check_files(path: Path) -> None:
    if not path.is_dir():
        raise POETCheckpointError(f"{path} is no directory: there is no checkpoint to load.")
    directories = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    adapters = [directory for directory in directories if _holds_adapter(directory)]
    for directory in adapters or [path]:
        _check_adapter(directory)
    random_states = sorted(path.glob("rng_state*.pth"))
    if _CHECKPOINT.fullmatch(path.name) or random_states or any((path / name).exists() for name in _TRAINER_FILES):
        _check_trainer_files(path, random_states)


def _holds_adapter(directory: Path) -> bool:
    return any((directory / name).exists() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))


def _check_adapter(directory: Path) -> None:
    weights = directory / SAFETENSORS_WEIGHTS_NAME
    if not weights.exists() and (directory / WEIGHTS_NAME).exists():
        _check_archive(directory / WEIGHTS_NAME)
    else:
        _check_safetensors(weights)
    path = directory / CONFIG_NAME
    values = _read_json(path)
    if values.get("peft_type") != "POET":
        raise POETCheckpointError(f"{path} is of peft_type={values.get('peft_type')!r}, not 'POET'.")
    try:
        POETConfig.from_pretrained(str(directory))
    except (TypeError, ValueError) as error:
        raise POETCheckpointError(f"{path} is no valid POETConfig: {error}") from error


def _check_trainer_files(path: Path, random_states: list[Path]) -> None:
    for archive in [*random_states, *(path / name for name in (_OPTIMIZER, _SCHEDULER, _SCALER))]:
        if archive.exists():
            _check_archive(archive)
    # FSDP saves the optimizer in a directory of its own, DeepSpeed both optimizer and scheduler.
    in_directory = {_OPTIMIZER: ("optimizer_*/", "global_step*/"), _SCHEDULER: ("global_step*/",)}
    exists = {"rng_state.pth": bool(random_states)}
    for name, patterns in in_directory.items():
        exists[name] = (path / name).exists() or any(any(path.glob(pattern)) for pattern in patterns)
    missing = [str(path / name) for name, is_there in exists.items() if not is_there]
    if 0 < len(missing) < len(exists):
        raise POETCheckpointError(
            f"{', '.join(missing)} is missing, while other files of the training state are there. {_WHY}"
        )
    step = _read_state(path).get("global_step")
    match = _CHECKPOINT.fullmatch(path.name)
    if not isinstance(step, int) or (match and step != int(match[1])):
        raise POETCheckpointError(f"{path / _STATE} is of global_step={step!r}, not of {path.name!r}.")


def _read_state(checkpoint: Path) -> dict[str, Any]:
    values = _read_json(checkpoint / _STATE)
    history = values.setdefault("log_history", [])
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise POETCheckpointError(f"{checkpoint / _STATE} has a log_history that is no list of JSON objects.")
    return values


def _read_json(path: Path) -> dict[str, Any]:
    _check_exists(path)
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise POETCheckpointError(f"{path} is not JSON ({error}). {_WHY}") from error
    if not isinstance(values, dict):
        raise POETCheckpointError(f"{path} holds a JSON {type(values).__name__}, not an object.")
    return values


def _check_safetensors(path: Path) -> None:
    _check_exists(path)
    try:
        # Parses the header and compares the file's length with it. Tensors would be read one by one, on request.
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise POETCheckpointError(f"{path} is not a whole safetensors file ({error}). {_WHY}") from error


def _check_archive(path: Path) -> None:
    """A file that torch.save wrote is a zip archive; its table of contents is at the very end."""
    _check_exists(path)
    try:
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise POETCheckpointError(f"{path} is not a whole file of torch.save ({error}). {_WHY}") from error
    begins_with_first_file = files and min(file.header_offset for file in files) == 0
    if not begins_with_first_file or not any(file.filename.endswith("/data.pkl") for file in files):
        raise POETCheckpointError(f"{path} is a zip archive, but not one of torch.save.")


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise POETCheckpointError(f"{path} is missing. {_WHY}")
    if not path.is_file():
        raise POETCheckpointError(f"{path} is no file.")
    with path.open("rb"):
        pass  # what must not be read is no damage: OSError
    if path.stat().st_size == 0:
        raise POETCheckpointError(f"{path} is empty. {_WHY}")
