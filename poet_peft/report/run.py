"""What a run left in its folder, as far as it got."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..diagnostics_file import DIAGNOSTICS_FILE, read_diagnostics
from ..files.json_object import read_json_object


_STEP_OF_CHECKPOINT = "checkpoint-"

Series = list[tuple[float, float]]


@dataclass
class Run:
    """One run. Whatever its folder lacks is empty.

    Attributes:
        log: entries of Trainer's log, in order.
        diagnostics: lines of `poet_diagnostics.jsonl`.
        config: of the adapter.
        metrics: of `metrics.json`.
        max_steps: of the run as planned, 0 if unknown.
        missing: names of files that are not there or cannot be read, of those that every run with diagnostics leaves.
    """

    name: str
    log: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 0
    missing: list[str] = field(default_factory=list)

    def series(self, key: str) -> Series:
        """(step, value) of a key of the log, or of the diagnostics if it has a prefix: "summary/", "line/" for what
        stands beside the measures, "learning_rates/"."""
        kind, _, name = key.partition("/")
        if kind == "line":
            rows = self.diagnostics
        elif kind in ("summary", "learning_rates"):
            rows = [{"step": line["step"], **(line.get(kind) or {})} for line in self.diagnostics]
        else:
            rows, name = self.log, key
        points = [(row.get("step"), row.get(name)) for row in rows]
        return [(float(x), float(y)) for x, y in points if isinstance(x, int | float) and isinstance(y, int | float)]

    def losses(self) -> Series:
        """Of training: of Trainer's log, else of an own loop's lines."""
        return self.series("loss") or self.series("line/loss")

    def learning_rates(self) -> dict[str, Series]:
        """By name of the parameter group, where diagnostics have them; else the one that Trainer logs, as ""."""
        names = list(dict.fromkeys(name for line in self.diagnostics for name in line.get("learning_rates") or {}))
        by_name = {name: self.series(f"learning_rates/{name}") for name in names}
        return by_name or {"": self.series("learning_rate")}

    def spectral_change(self) -> Series:
        """(step, largest relative change of any layer since the first measurement).

        Of the smallest and the largest singular value and the quartiles where they were measured, else of the root
        mean square of the singular values.
        """
        first: dict[tuple[str, str], list[float]] = {}
        points = []
        for line in self.diagnostics:
            changes = []
            for layer in line.get("layers", []):
                values = self._spectrum(layer)
                before = first.setdefault((layer["name"], layer["adapter"]), values)
                if len(before) == len(values):
                    changes += [abs(b - a) / a for a, b in zip(before, values, strict=True) if a > 0]
            if changes:
                points.append((float(line["step"]), max(changes)))
        return points

    @property
    def is_exact(self) -> bool:
        """Whether singular values were measured one by one."""
        return any(layer.get("singular_values") for line in self.diagnostics for layer in line.get("layers", []))

    def _spectrum(self, layer: dict[str, Any]) -> list[float]:
        values = layer.get("singular_values") if self.is_exact else [layer.get("rms_singular_value")]
        return [value for value in values or [] if value is not None]

    def described(self, kind: str) -> dict[str, Any]:
        """`settings` or `versions` as the diagnostics have them, of the last start; else those of `metrics.json`."""
        lines = [line[kind] for line in self.diagnostics if isinstance(line.get(kind), dict)]
        return lines[-1] if lines else self.metrics.get(kind) or {}

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
    run.missing = [name for name, content in found.items() if not content and name != "metrics.json"]
    if not any(found.values()):
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
