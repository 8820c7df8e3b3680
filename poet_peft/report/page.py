"""The page: charts, tables and verdicts of runs in one file."""

from __future__ import annotations

import math
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from .run import Run, read_run
from .svg import heat_map, line_chart
from .verdict import verdict


_CHARTS = {
    "Training loss": "loss",
    "Evaluation loss": "eval_loss",
    "Learning rate": "learning_rate",
    "Gradient norm": "grad_norm",
    "Largest angle (radians)": "summary/max_angle",
    "Bound on the spectral drift": "summary/spectral_drift",
    "Orthogonality error": "summary/orthogonality_error",
    "Mean trace of the rotations": "summary/trace",
    "Stable rank": "summary/stable_rank",
    "Hyperspherical energy": "summary/energy",
    "SVD entropy": "summary/entropy",
    "Cosine between momentum and gradient": "summary/momentum_cosine",
}
_NUMBERS = {
    "train_loss": "mean training loss",
    "train_runtime": "seconds of training",
    "train_samples_per_second": "samples a second",
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
    for number, run in enumerate(read, 1):
        if sum(other.name == run.name for other in read) > 1:
            run.name = f"{run.name} ({number})"
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    charts = {
        title: line_chart(title, [(run.name, run.series(key)) for run in read]) for title, key in _CHARTS.items()
    }
    charts["Perplexity (evaluation)"] = line_chart("Perplexity", [(run.name, _perplexity(run)) for run in read])
    page = environment.get_template("page.html").render(
        runs=[(run, verdict(run), _numbers(run)) for run in read],
        charts={title: svg for title, svg in charts.items() if svg},
        maps=[(run.name, side, svg) for run in read for side in ("R", "P") if (svg := _angles(run, side))],
        versions=_versions(),
    )
    path.write_text(page, "utf-8")
    return path


def _perplexity(run: Run) -> list[tuple[float, float]]:
    return [(step, math.exp(loss)) for step, loss in run.series("eval_loss") if loss < 50]


def _angles(run: Run, side: str) -> str:
    """Largest angles of the last measurement by number of the layer and kind of module."""
    values: dict[tuple[str, str], float] = {}
    for layer in run.diagnostics[-1].get("layers", []) if run.diagnostics else []:
        number = re.search(r"\.(\d+)\.", f".{layer['name']}.")
        place = number[1] if number else "-", layer["name"].rpartition(".")[2]
        for rotation in layer["sides"]:
            if rotation["side"] == side and rotation["max_angle"] is not None:
                values[place] = max(values.get(place, 0.0), rotation["max_angle"])
    rows = sorted({row for row, _ in values}, key=lambda row: (not row.isdigit(), int(row) if row.isdigit() else 0))
    columns = list(dict.fromkeys(column for _, column in values))
    return heat_map(f"Largest angle by layer and kind, side {side}", rows, columns, values)


def _numbers(run: Run) -> dict[str, Any]:
    logged = {label: row[key] for row in run.log for key, label in _NUMBERS.items() if key in row}
    return {**logged, **{k: v for k, v in run.metrics.items() if isinstance(v, int | float | str)}}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("poet-peft", "peft", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
