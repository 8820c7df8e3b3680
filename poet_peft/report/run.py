"""What a run left in its folder, as far as it got."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..diagnostics import DIAGNOSTICS_FILE, read_diagnostics
from ..files.json_object import read_json_object


_STEP_OF_CHECKPOINT = "checkpoint-"


@dataclass
class Run:
    """One run. Whatever its folder lacks is empty.

    Attributes:
        log: entries of Trainer's log, in order.
        diagnostics: lines of `poet_diagnostics.jsonl`.
        config: of the adapter.
        metrics: of `metrics.json`.
        max_steps: of the run as planned, 0 if unknown.
        missing: names of files that are not there or cannot be read.
    """

    name: str
    log: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 0
    missing: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a key of the log, or of the diagnostics' summary if it begins with "summary/"."""
        rows = self.log
        if key.startswith("summary/"):
            rows, key = [{"step": line["step"], **line.get("summary", {})} for line in self.diagnostics], key[8:]
        points = [(row.get("step"), row.get(key)) for row in rows]
        return [(float(x), float(y)) for x, y in points if isinstance(x, int | float) and isinstance(y, int | float)]

    @property
    def last_step(self) -> int:
        return int(max((row.get("step", 0) for row in [*self.log, *self.diagnostics]), default=0))


def read_run(folder: Path) -> Run:
    """Read a Trainer output folder, a folder of a run that crashed, or one that has only an adapter.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that a run or an adapter leaves.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(folder)!r} is no folder. Pass the output folder of a run, or one of an adapter."
        )
    checkpoints = [path for path in folder.glob(f"{_STEP_OF_CHECKPOINT}*") if _step_of(path) >= 0]
    places = [folder, *sorted(checkpoints, key=_step_of, reverse=True)]
    run = Run(folder.resolve().name)
    # A folder's own trainer_state.json is of its end; else the newest checkpoint whose file is whole.
    state = _first(places, "trainer_state.json")
    run.config = _first(places, "adapter_config.json")
    run.metrics = _first([folder], "metrics.json") or _first([folder], "all_results.json")
    run.log = [row for row in state.get("log_history", []) if isinstance(row, dict)]
    run.max_steps = int(state.get("max_steps") or 0)
    run.diagnostics = read_diagnostics(folder / DIAGNOSTICS_FILE)
    found = {
        "trainer_state.json": state,
        DIAGNOSTICS_FILE: run.diagnostics,
        "adapter_config.json": run.config,
        "metrics.json": run.metrics,
    }
    run.missing = [name for name, content in found.items() if not content]
    if len(run.missing) == len(found):
        raise FileNotFoundError(
            f"{str(folder)!r} has none of {', '.join(found)}. Pass the output folder of a run, or one of an adapter."
        )
    return run


def _step_of(path: Path) -> int:
    number = path.name.removeprefix(_STEP_OF_CHECKPOINT)
    return int(number) if number.isdigit() else -1


def _first(folders: list[Path], name: str) -> dict[str, Any]:
    for folder in folders:
        content = read_json_object(folder / name)
        if content is not None:
            return content
    return {}
