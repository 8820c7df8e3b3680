"""The file that measures are kept in along a run: one line of JSON a measurement."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from .pace import learning_rates, peak_memory


DIAGNOSTICS_FILE = "poet_diagnostics.jsonl"


def append_diagnostics(
    measures: dict[str, Any],
    path: str | Path,
    step: int,
    optimizer: torch.optim.Optimizer | None = None,
    **numbers: Any,
) -> None:
    """Append one line of JSON to a file, made with its folder where missing.

    Beside the measures, `Diagnostics.as_dict()`, it has the peak memory of this process in bytes, and the learning
    rates of the optimizer's groups by their names.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    line = {"step": step, "peak_memory": peak_memory(), "learning_rates": learning_rates(optimizer), **numbers}
    text = json.dumps(finite(line) | measures) + "\n"
    with Path(path).open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                text = "\n" + text  # a crash cut off the line before
        file.write(text.encode())


def read_diagnostics(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a file of `log_diagnostics`; a line that a crash cut off is left out."""
    lines = []
    for line in Path(path).read_text("utf-8").splitlines() if Path(path).exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not have, also in lists and dicts."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
