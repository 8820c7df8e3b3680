"""The page: verdicts, charts and tables of runs in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ..pace import versions
from .charts import sections
from .run import Run, read_run
from .verdict import verdict


_NUMBERS = {
    "train_loss": "mean training loss",
    "train_runtime": "seconds of training",
    "train_samples_per_second": "samples a second",
    "train_steps_per_second": "steps a second",
    "train_tokens_per_second": "tokens a second",
}


def write_report(runs: list[Path], path: Path) -> Path:
    """Write one self-contained page about one or more runs, side by side.

    Args:
        runs: output folders of Trainer, also of runs that crashed, or folders that have only an adapter.
        path: the file to write; its folder is made.

    Returns:
        The path.

    Raises:
        ValueError: no run.
        FileNotFoundError: a folder is missing, or has nothing that a run or an adapter leaves.
    """
    if not runs:
        raise ValueError("runs is empty: pass the output folder of at least one run.")
    read = [read_run(Path(folder)) for folder in runs]
    names = [run.name for run in read]
    for number, run in enumerate(read, 1):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({number})"
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = environment.get_template("page.html").render(
        runs=[(run, verdict(run), _tables(run)) for run in read], sections=sections(read), versions=versions()
    )
    path.write_text(page, "utf-8")
    return path


def _tables(run: Run) -> dict[str, dict[str, str]]:
    """What is told in numbers and words, by heading."""
    numbers = {label: row[key] for row in run.log for key, label in _NUMBERS.items() if key in row}
    peaks = run.series("line/peak_memory")
    numbers |= {"peak memory (MB)": peaks[-1][1] / 1e6} if peaks else {}
    numbers |= {key: value for key, value in run.metrics.items() if isinstance(value, int | float | str)}
    tables = {
        "Results": numbers,
        "Training": run.described("settings"),
        "Adapter": run.config,
        "Versions": run.described("versions"),
    }
    texts = {
        heading: {key.replace("_", " "): _text(value) for key, value in table.items() if value not in (None, [], {})}
        for heading, table in tables.items()
    }
    return {heading: table for heading, table in texts.items() if table}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    return str(value)
