"""What a run's numbers say, in plain words."""

from __future__ import annotations

import math
from typing import NamedTuple

from .run import Run


_MAX_DRIFT = 0.05
_MAX_ANGLE = math.pi / 2


class Sentence(NamedTuple):
    is_good: bool
    text: str


def verdict(run: Run) -> list[Sentence]:
    """Sentences on whether a run ended, whether its loss fell, and whether its rotations stayed in their range."""
    return [*_progress(run), *_loss(run), *_ranges(run)]


def _progress(run: Run) -> list[Sentence]:
    if not run.log:
        return [Sentence(True, "No log of a training run was found here, so nothing is said about training.")]
    if run.last_step < run.max_steps:
        return [Sentence(False, f"The run stopped early: step {run.last_step} of {run.max_steps}.")]
    return [Sentence(True, f"The run went through all of its {run.last_step} steps.")]


def _loss(run: Run) -> list[Sentence]:
    losses = run.series("loss")
    bad = next((step for step, loss in losses if not math.isfinite(loss)), None)
    if bad is not None:
        return [Sentence(False, f"The training loss was not finite at step {bad:.0f}: lower the learning rate.")]
    if len(losses) < 2:
        return []
    first, last = losses[0][1], losses[-1][1]
    verb = "fell" if last < first else "did not fall"
    return [Sentence(last < first, f"The training loss {verb}: {first:.3f} at first, {last:.3f} at last.")]


def _ranges(run: Run) -> list[Sentence]:
    if not run.diagnostics:
        hint = "No diagnostics were recorded: pass POETCallback(diagnostics_every=100) to see what the rotations did."
        return [Sentence(True, hint)]
    limit = run.config.get("max_drift") or _MAX_DRIFT
    sentences = []
    worst = 0.0
    for line in run.diagnostics:
        for layer in line.get("layers", []):
            drift = layer["spectral_drift"]
            turned = max((side["max_angle"] or 0.0 for side in layer["sides"]), default=0.0)
            where = f"{layer['name']} at step {line['step']}"
            if drift is None:
                return [Sentence(False, f"{where} held values that are not finite: go back to an earlier checkpoint.")]
            worst = max(worst, drift)
            if drift > limit and not any("range" in sentence.text for sentence in sentences):
                text = f"{where} left the range of the series (drift bound {drift:.2%}, limit {limit:.2%}): "
                sentences.append(Sentence(False, text + "lower the rate of the rotations, or shorten merge_interval."))
            if turned > _MAX_ANGLE and not any("turned by" in sentence.text for sentence in sentences):
                sentences.append(
                    Sentence(False, f"{where} turned by {math.degrees(turned):.0f} degrees: a large angle.")
                )
    if not any("range" in sentence.text for sentence in sentences):
        text = f"No measured set of rotations changes a singular value by more than {worst:.2g} of its size (a bound)."
        sentences.append(Sentence(True, text))
    return sentences
