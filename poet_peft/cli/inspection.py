"""What `poet-peft inspect` says about a directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..config import POETConfig
from ..errors import POETCheckpointError
from ..files.json_object import read_json_object
from .angles import turn
from .saved import adapter_directory, check_directory, open_adapter, open_tensors, read_metrics


_STATE_NAME = "trainer_state.json"
_SETTINGS = (
    "variant",
    "block_size",
    "block_size_pattern",
    "orthogonal_map",
    "num_neumann_terms",
    "adaptive_terms",
    "merge_interval",
    "reinit_interval",
    "base_init",
    "base_init_scale",
    "base_init_scale_pattern",
    "train_rest",
    "bias",
    "modules_to_save",
)


def inspect(path: Path) -> dict[str, Any]:
    """Everything that the files of a directory say about an adapter, a Trainer checkpoint or a merged model.

    Returns:
        What JSON can hold. `problem` is None if the files are whole; else it names the damaged one, and what lies in
        the adapter's weights is left out. `layers` has one entry per rotated layer and side, angles in radians.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such directory.
        POETCheckpointError: it holds neither an adapter nor a model, or several adapters.
    """
    check_directory(path)
    is_model = (path / "config.json").is_file() and not (path / CONFIG_NAME).is_file()
    return _inspect_model(path) if is_model else _inspect_adapter(path)


def _inspect_adapter(path: Path) -> dict[str, Any]:
    directory = adapter_directory(path)
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", path.name) or (path / _STATE_NAME).is_file()
    about: dict[str, Any] = {
        "path": str(path),
        "kind": "checkpoint" if is_checkpoint else "adapter",
        "problem": None,
        "bytes": _size(path),
        "adapter_bytes": max(_size(directory / SAFETENSORS_WEIGHTS_NAME), _size(directory / WEIGHTS_NAME)),
    }
    try:
        adapter = open_adapter(directory if directory != path else path)
    except POETCheckpointError as error:
        about["problem"] = str(error)
    else:
        with open_tensors(adapter.file) as tensors:
            state = adapter.state
            layers = [
                {
                    "layer": layer,
                    "side": side,
                    "block_sizes": [delta.shape[-1] for delta in rotation.deltas],
                    "num_blocks": sum(delta.shape[0] for delta in rotation.deltas),
                    "num_parameters": rotation.num_parameters,
                    **turn(rotation)._asdict(),
                }
                for layer, saved in adapter.layers.items()
                for side in saved.sides
                for rotation in [adapter.side(tensors, layer, side)]
            ]
        about |= {
            "num_layers": len(adapter.layers),
            "num_parameters": adapter.num_parameters(),
            "num_other_values": adapter.num_other_values(),
            "state": {name: getattr(state, name) for name in ("seed", "num_steps", "num_folds", "num_reinits")},
            "layers": layers,
        }
    about |= _settings(directory) | {"training": _training(path), "trained_on": _trained_on(directory)}
    return about


def _inspect_model(path: Path) -> dict[str, Any]:
    config = read_json_object(path / "config.json") or {}
    files = sorted(path.glob("*.safetensors"))
    num_parameters, problem = 0, None
    expected = set((read_json_object(path / "model.safetensors.index.json") or {}).get("weight_map", {}).values())
    missing = sorted(expected - {file.name for file in files})
    if missing or not files:
        problem = f"{path / (missing or ['model.safetensors'])[0]} is missing."
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                shapes = [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            problem = f"{file} is not a whole safetensors file ({error})."
        else:
            num_parameters += sum(torch.Size(shape).numel() for shape in shapes)
    return {
        "path": str(path),
        "kind": "model",
        "problem": problem,
        "bytes": _size(path),
        "architecture": (config.get("architectures") or [None])[0],
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "num_parameters": num_parameters,
        "trained_on": _trained_on(path),
    }


def _settings(directory: Path) -> dict[str, Any]:
    try:
        values = read_json_object(directory / CONFIG_NAME) or {}
        config = POETConfig.from_pretrained(str(directory))
    except (TypeError, ValueError):
        return {"base_model": values.get("base_model_name_or_path"), "settings": {}}
    settings = {name: getattr(config, name) for name in _SETTINGS}
    return {"base_model": config.base_model_name_or_path, "settings": settings}


def _training(path: Path) -> dict[str, Any] | None:
    """What Trainer logged: the step, the loss, and what `POETCallback` reported of folds."""
    state = read_json_object(path / _STATE_NAME) or {}
    log = state.get("log_history")
    if not isinstance(log, list):
        return None

    def last(key: str) -> Any:
        return next((entry[key] for entry in reversed(log) if isinstance(entry, dict) and key in entry), None)

    drifts = [
        entry["poet/spectral_drift"] for entry in log if isinstance(entry, dict) and "poet/spectral_drift" in entry
    ]
    return {
        "step": state.get("global_step"),
        "max_steps": state.get("max_steps"),
        "loss": last("loss"),
        "eval_loss": last("eval_loss"),
        "largest_drift_of_a_logged_fold": max(drifts, default=None),
        "last_logged_angle": last("poet/max_rotation_angle"),
    }


def _trained_on(directory: Path) -> dict[str, Any] | None:
    """From `metrics.json`, else from the head of a model card."""
    metrics = read_metrics(directory)
    if metrics is not None:
        data = metrics.get("data") or {}
        keys = ("task", "base_model", "train_tokens", "train_seconds", "hardware", "versions")
        results = {result["name"]: result["value"] for result in metrics.get("evaluation") or []}
        return {"data": data.get("name")} | {key: metrics.get(key) for key in keys} | {"evaluation": results}
    card = directory / "README.md"
    if not card.is_file():
        return None
    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    found = {key: data[key] for key in ("datasets", "base_model", "pipeline_tag", "library_name") if data.get(key)}
    return found or None


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; 0 where there is none."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0
