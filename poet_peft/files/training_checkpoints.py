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

from ..config import POETConfig
from ..errors import POETCheckpointError


# As transformers.trainer calls them, which takes seconds to import.
OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, TRAINER_STATE_NAME = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "trainer_state.json",
)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WHY = "Was the process that wrote it killed, or the disk full?"


def verify_checkpoint(path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that is half-written or damaged, before anything of it is loaded.

    For two kinds of directory: what `save_pretrained` writes, one adapter or several, and what Trainer writes, which
    is known by its name `checkpoint-N` or by any of Trainer's files in it. Trainer writes `trainer_state.json` last.
    With `save_only_model` it saves neither optimizer, scheduler nor random state; one of them without the others is
    taken for damage. Checked is that every file is there, whole and readable: lengths, headers and tables of contents,
    so that it takes milliseconds. What the tensors hold is checked against the model when they are loaded.

    Args:
        path: the directory.

    Raises:
        POETCheckpointError: names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_dir():
        raise POETCheckpointError(f"{path} is no directory: there is no checkpoint to load.")
    directories = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    adapters = [directory for directory in directories if _holds_adapter(directory)]
    for directory in adapters or [path]:
        _check_adapter(directory)
    random_states = sorted(path.glob("rng_state*.pth"))
    if _CHECKPOINT.fullmatch(path.name) or random_states or any((path / name).exists() for name in _TRAINER_FILES):
        _check_trainer_files(path, random_states)


def latest_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete `checkpoint-N` of a Trainer run, to pass to `trainer.train(resume_from_checkpoint=...)`.

    Checkpoints that `verify_checkpoint` refuses are skipped. transformers' `get_last_checkpoint`, which
    `resume_from_checkpoint=True` stands for, takes the newest one whatever state it is in.

    Returns:
        The path, or None where there is nothing to resume: training then starts from the beginning.

    Warns:
        UserWarning: once, with the damaged file of every checkpoint that was skipped.
    """
    output_dir = Path(output_dir)
    checkpoints = {}
    for path in output_dir.glob("checkpoint-*"):
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir():
            checkpoints[int(match[1])] = path
    problems = []
    complete = None
    for _, path in sorted(checkpoints.items(), reverse=True):
        try:
            verify_checkpoint(path)
        except POETCheckpointError as error:
            problems.append(str(error))
        else:
            complete = str(path)
            break
    if problems:
        warnings.warn(f"Skipped damaged checkpoints, going on from {complete}: {' '.join(problems)}")
    return complete


_TRAINER_FILES = (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME)


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
    for archive in [*random_states, *(path / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME))]:
        if archive.exists():
            _check_archive(archive)
    # FSDP saves the optimizer in a directory of its own, DeepSpeed both optimizer and scheduler.
    in_directory = {OPTIMIZER_NAME: ("optimizer_*/", "global_step*/"), SCHEDULER_NAME: ("global_step*/",)}
    exists = {"rng_state.pth": bool(random_states)}
    for name, patterns in in_directory.items():
        exists[name] = (path / name).exists() or any(any(path.glob(pattern)) for pattern in patterns)
    missing = [str(path / name) for name, is_there in exists.items() if not is_there]
    if 0 < len(missing) < len(exists):
        raise POETCheckpointError(
            f"{', '.join(missing)} is missing, while other files of the training state are there. {_WHY}"
        )
    step = _read_json(path / TRAINER_STATE_NAME).get("global_step")
    match = _CHECKPOINT.fullmatch(path.name)
    if not isinstance(step, int) or (match and step != int(match[1])):
        raise POETCheckpointError(f"{path / TRAINER_STATE_NAME} is of global_step={step!r}, not of {path.name!r}.")


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
    if not path.is_file():
        raise POETCheckpointError(f"{path} is missing. {_WHY}")
    if path.stat().st_size == 0:
        raise POETCheckpointError(f"{path} is empty. {_WHY}")
