"""Which charts a report has, in sections."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from .run import Run, Series
from .svg import heat_map, histogram, line_chart


_SIDES = {"R": "output side R", "P": "input side P"}
_QUANTILES = "smallest", "lower quartile", "median", "upper quartile", "largest"


class Chart(NamedTuple):
    """One card of the page.

    Attributes:
        legend: colours and names of what is drawn; empty where one line needs no name.
        note: a sentence below the picture, or "".
    """

    title: str
    svg: str
    legend: list[tuple[int, str]]
    note: str = ""


def sections(runs: list[Run]) -> dict[str, list[Chart]]:
    """The charts that have something to show, by heading."""
    found = {
        "Training": _training(runs),
        "Rotations since the last fold": _rotations(runs),
        "Rotations since training began": [
            _lines(
                "Vector probing",
                _of(runs, "summary/probe_cosine"),
                note="Cosine of fixed vectors with what all rotations so far have made of them, mean over layers and "
                "sides. 1: nothing turned. 0: turned at random.",
            )
        ],
        "Folds": _folds(runs),
        "Weights": _weights(runs),
        "Memory and speed": _pace(runs),
    }
    shown = {heading: [chart for chart in charts if chart.svg] for heading, charts in found.items()}
    return {heading: charts for heading, charts in shown.items() if charts}


def _training(runs: list[Run]) -> list[Chart]:
    return [
        _lines("Training loss", [(run.name, run.losses()) for run in runs]),
        _lines("Evaluation loss", _of(runs, "eval_loss")),
        _lines("Perplexity of the evaluation", [(run.name, _perplexity(run)) for run in runs]),
        *_learning_rates(runs),
        _lines("Gradient norm", _of(runs, "grad_norm")),
    ]


def _learning_rates(runs: list[Run]) -> list[Chart]:
    """One chart, or for several runs one for each group of parameters: a run has one colour all over the page."""
    rates = {run.name: run.learning_rates() for run in runs}
    note = "“poet” is that of the rotations."
    if len(runs) == 1:
        return [_lines("Learning rates", list(rates[runs[0].name].items()), log=True, note=note)]
    groups = dict.fromkeys(group for of_run in rates.values() for group in of_run)
    return [
        _lines(
            f"Learning rate, {group}" if group else "Learning rate",
            [(name, of_run[group]) for name, of_run in rates.items() if group in of_run],
            log=True,
            note=note if group == "poet" else "",
        )
        for group in groups
    ]


def _rotations(runs: list[Run]) -> list[Chart]:
    turned = [run for run in runs if _moves(run.series("summary/max_angle"))]
    if not turned:
        return []
    return [
        _lines("Largest angle (degrees)", _of(runs, "summary/max_angle", math.degrees(1))),
        _lines("Root mean square angle (degrees)", _of(runs, "summary/rms_angle", math.degrees(1))),
        *(chart for run in turned for chart in _maps(run)),
        *(_phases(run) for run in turned),
        _lines("Mean trace", _of(runs, "summary/trace"), note="1: nothing turned. 0: turned at random."),
        _lines("Bound on the change of singular values", _of(runs, "summary/spectral_drift"), log=True),
        _lines("Orthogonality error", _of(runs, "summary/orthogonality_error"), log=True),
        _lines("Cosine of momentum and gradient", _of(runs, "summary/momentum_cosine")),
        _lines("Share of clamped angles", _of(runs, "summary/clamped_share")),
    ]


def _folds(runs: list[Run]) -> list[Chart]:
    requantized = _of(runs, "poet/requantization_error")
    return [
        _lines("Largest angle of a fold (degrees)", _of(runs, "poet/max_rotation_angle", math.degrees(1))),
        _lines("Bound on a fold's change of singular values", _of(runs, "poet/spectral_drift"), log=True),
        _lines("Orthogonality error before a fold", _of(runs, "poet/orthogonality_error"), log=True),
        _lines(
            "Requantization error of a fold", requantized if any(_moves(points) for _, points in requantized) else []
        ),
    ]


def _weights(runs: list[Run]) -> list[Chart]:
    is_exact = any(run.is_exact for run in runs)
    of_what = "The smallest, the largest and the quartiles" if is_exact else "Root mean square of the singular values"
    return [
        *(_singular_values(run) for run in runs),
        _lines(
            "Change of the spectrum since the first measurement",
            [(run.name, [(step, 100 * change) for step, change in run.spectral_change()]) for run in runs],
            note=f"In percent, of the layer that changed most. {of_what}.",
        ),
        _lines("Root mean square singular value", _of(runs, "summary/rms_singular_value")),
        _lines("SVD entropy", _of(runs, "summary/entropy"), note="1: all singular values are equal."),
        _lines("Stable rank", _of(runs, "summary/stable_rank")),
        _lines("Hyperspherical energy", _of(runs, "summary/energy"), note="0.71: rows in random directions."),
    ]


def _pace(runs: list[Run]) -> list[Chart]:
    return [
        _lines("Peak memory so far (MB)", _of(runs, "line/peak_memory", 1e-6)),
        _lines("Steps a second", _of(runs, "line/steps_per_second")),
        _lines("Tokens a second", _of(runs, "line/tokens_per_second")),
    ]


def _of(runs: list[Run], key: str, factor: float = 1.0) -> list[tuple[str, Series]]:
    return [(run.name, [(step, factor * value) for step, value in run.series(key)]) for run in runs]


def _moves(points: Series) -> bool:
    return any(value for _, value in points)


def _lines(title: str, series: list[tuple[str, Series]], log: bool = False, note: str = "") -> Chart:
    legend = [(color, name) for color, (name, points) in enumerate(series) if points]
    return Chart(title, line_chart(title, series, log), legend if len(series) > 1 else [], note)


def _perplexity(run: Run) -> Series:
    return [(step, math.exp(loss)) for step, loss in run.series("eval_loss") if loss < 50]


def _singular_values(run: Run) -> Chart:
    """Means over the layers of what `LayerDiagnostics.singular_values` has."""
    lines: list[Series] = [[] for _ in _QUANTILES]
    for line in run.diagnostics:
        spectra = [layer["singular_values"] for layer in line.get("layers", []) if layer.get("singular_values")]
        spectra = [values for values in spectra if len(values) == len(_QUANTILES) and None not in values]
        if spectra:
            for points, values in zip(lines, zip(*spectra, strict=True), strict=True):
                points.append((float(line["step"]), sum(values) / len(values)))
    title = f"Singular values of {run.name}"
    svg = line_chart(title, list(zip(_QUANTILES, lines, strict=True)), log=True)
    return Chart(title, svg, list(enumerate(_QUANTILES)), "Means over the layers.")


def _maps(run: Run) -> list[Chart]:
    """Largest angles of the last measurement by number of the layer and kind of module, a map a side."""
    values: dict[str, dict[tuple[str, str], float]] = {side: {} for side in _SIDES}
    for layer in run.diagnostics[-1].get("layers", []):
        number = re.search(r"\.(\d+)\.", f".{layer['name']}.")
        place = number[1] if number else "-", layer["name"].rpartition(".")[2]
        for rotation in layer["sides"]:
            if rotation["max_angle"] is not None:
                cells = values[rotation["side"]]
                cells[place] = max(cells.get(place, 0.0), math.degrees(rotation["max_angle"]))
    step = run.diagnostics[-1]["step"]
    charts = []
    for side, cells in values.items():
        rows = sorted({row for row, _ in cells}, key=lambda row: (not row.isdigit(), int(row) if row.isdigit() else 0))
        columns = list(dict.fromkeys(column for _, column in cells))
        title = f"Largest angle by layer, {_SIDES[side]}"
        svg = heat_map(title, "°", rows, columns, cells)
        charts.append(Chart(title, svg, [], f"{run.name}, step {step}. Rows are layers, columns kinds of module."))
    return charts


def _phases(run: Run, num_bins: int = 24) -> Chart:
    """How many planes are turned by which angle, over all layers, at the last measurement that counted them."""
    title = f"Phases of {run.name}"
    for line in reversed(run.diagnostics):
        sides = [side for layer in line.get("layers", []) for side in layer["sides"] if side.get("angle_histogram")]
        top = max((side["max_angle"] for side in sides), default=0.0)
        if top > 0:
            break
    else:
        return Chart(title, "", [])
    shares = {side: [0.0] * num_bins for side in _SIDES}
    for side in sides:
        for i, count in enumerate(side["angle_histogram"]):
            # The bins of each side end at its own largest angle.
            middle = (i + 0.5) / len(side["angle_histogram"]) * side["max_angle"] / top
            shares[side["side"]][min(int(middle * num_bins), num_bins - 1)] += count
    series = [(name, [100 * n / (sum(shares[side]) or 1) for n in shares[side]]) for side, name in _SIDES.items()]
    svg = histogram(title, "angle of a plane (degrees)", math.degrees(top), series)
    return Chart(title, svg, list(enumerate(_SIDES.values())), f"Percent of the planes at step {line['step']}.")
