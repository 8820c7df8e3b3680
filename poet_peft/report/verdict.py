"""What a run's numbers say, in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..diagnostics import MAX_ANGLE, MAX_ORTHOGONALITY_ERROR
from .run import Run


_MAX_DRIFT = 0.05


class Sentence(NamedTuple):
    """`kind`: "good", "bad" or "note"."""

    kind: str
    text: str


def verdict(run: Run) -> list[Sentence]:
    """Sentences on whether a run ended, whether its loss fell, and whether spectrum and rotations stayed in range."""
    return [*_progress(run), *_loss(run), *_spectrum(run), *_ranges(run)]


def _progress(run: Run) -> Iterator[Sentence]:
    if not run.log and not run.diagnostics:
        yield Sentence("note", "No log of a training run was found here, so nothing is said about training.")
    elif not run.max_steps:
        yield Sentence("note", f"The last step that was written down is {run.last_step}.")
    elif run.last_step < run.max_steps:
        yield Sentence("bad", f"The run stopped early: step {run.last_step} of {run.max_steps}.")
    else:
        yield Sentence("good", f"The run went through all of its {run.max_steps} steps.")


def _loss(run: Run) -> Iterator[Sentence]:
    losses = run.losses()
    bad = next((step for step, loss in losses if not math.isfinite(loss)), None)
    if bad is not None:
        yield Sentence("bad", f"The training loss was not finite at step {bad:.0f}: lower the learning rate.")
    elif len(losses) > 1:
        first, last = losses[0][1], losses[-1][1]
        verb = "fell" if last < first else "did not fall"
        yield Sentence(
            "good" if last < first else "bad", f"The training loss {verb}: {first:.3f} at first, {last:.3f} at last."
        )


def _spectrum(run: Run) -> Iterator[Sentence]:
    changes = run.spectral_change()
    if len(changes) < 2:
        return
    worst = max(change for _, change in changes)
    what = "spectrum" if run.is_exact else "root mean square of the singular values"
    steps = f"from step {changes[0][0]:.0f} to {changes[-1][0]:.0f}"
    if worst <= _limit(run):
        yield Sentence("good", f"The {what} stayed within {_percent(worst)} of where it was, {steps}, in all layers.")
    else:
        text = f"The {what} changed by {_percent(worst)} in one layer, {steps}. Rotations keep it: lower their rate."
        yield Sentence("bad", text)


def _ranges(run: Run) -> Iterator[Sentence]:
    if not run.diagnostics:
        hint = "No diagnostics were recorded: pass POETCallback(diagnostics_every=100) to see what the rotations did."
        yield Sentence("note", hint)
        return
    layers = [(line["step"], layer) for line in run.diagnostics for layer in line.get("layers", [])]
    broken = next(((step, layer) for step, layer in layers if layer["spectral_drift"] is None), None)
    if broken:
        where = f"{broken[1]['name']} at step {broken[0]}"
        yield Sentence("bad", f"{where} held values that are not finite: go back to an earlier checkpoint.")
        return
    if layers and not any(_largest(layer, "max_angle") for _, layer in layers):
        yield _of_identities(run)
        return
    problems = list(_first_problems(run, layers))
    yield from problems
    if not problems:
        worst = _percent(max((layer["spectral_drift"] for _, layer in layers), default=0.0))
        yield Sentence("good", f"Rotations stayed in range: measured ones change singular values by at most {worst}.")


def _of_identities(run: Run) -> Sentence:
    """Why no measured rotation turned anything."""
    what = "All rotations were the identity when they were measured"
    interval = run.config.get("merge_interval")
    is_folded = any(angle for _, angle in run.series("poet/max_rotation_angle"))
    if interval == 1 or (interval is None and is_folded):
        return Sentence("note", f"{what}: they are folded into the weights after every step, see Folds.")
    if is_folded:
        return Sentence("note", f"{what}, right after folds. Measure before the optimizer's step to see them.")
    if run.last_step <= 1:
        return Sentence("note", f"{what}, before the first step.")
    return Sentence("bad", f"{what}: training turned nothing. Is the learning rate of the rotations 0?")


def _first_problems(run: Run, layers: list[tuple[int, dict[str, Any]]]) -> Iterator[Sentence]:
    """The first layer and step out of each range."""
    for step, layer in layers:
        if layer["spectral_drift"] > _limit(run):
            what = f"left its range: its singular values may change by {_percent(layer['spectral_drift'])}"
            yield _problem(step, layer, what, "shorten merge_interval")
            break
    for step, layer in layers:
        if _largest(layer, "max_angle") > MAX_ANGLE:
            what = f"was turned by {math.degrees(_largest(layer, 'max_angle')):.0f} degrees"
            yield _problem(step, layer, what, "shorten merge_interval")
            break
    for step, layer in layers:
        if _largest(layer, "orthogonality_error") > MAX_ORTHOGONALITY_ERROR:
            what = f"was {_largest(layer, 'orthogonality_error'):.2g} from orthogonal"
            yield _problem(step, layer, what, "pass adaptive_terms=True")
            break


def _problem(step: int, layer: dict[str, Any], what: str, remedy: str) -> Sentence:
    return Sentence("bad", f"{layer['name']} {what}, at step {step}. Lower the rate of the rotations, or {remedy}.")


def _percent(part: float) -> str:
    """For bounds: tiny ones are rounded up to what still reads well."""
    return f"{max(100 * part, 1e-3):.2g} %"


def _limit(run: Run) -> float:
    return run.config.get("max_drift") or _MAX_DRIFT


def _largest(layer: dict[str, Any], key: str) -> float:
    return max((side[key] or 0.0 for side in layer["sides"]), default=0.0)
