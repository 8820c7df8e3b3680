"""The best settings of a run, one coordinate at a time, from the losses that were measured so far.

A search is ordinary code that asks for losses. Where one is missing it stops with `Unmeasured`, which names the runs
to make; begun again with their losses it comes further, along the same way.
"""

import math
from dataclasses import dataclass, replace


MAX_STEPS_OF_RATE = 6  # of a factor 2 from where a coordinate begins, to either side
MAX_PASSES = 5


class Unmeasured(Exception):
    """Runs whose losses a search needs to go on."""

    def __init__(self, runs):
        super().__init__(", ".join(run.name for run in runs))
        self.runs = runs


@dataclass(frozen=True)
class Rate:
    """A positive number of the run that is searched by factors of 2, until the best has worse neighbours."""

    field: str

    def at(self, run, exponent):
        value = getattr(run, self.field) * 2.0**exponent
        return replace(run, **{self.field: float(f"{value:.4g}")})


@dataclass(frozen=True)
class Choice:
    """Settings to try instead of the present ones, each a dict of the run's fields.

    A value that can be called gets the run: `{"matrix_lr": lambda run: run.matrix_lr / 4}`.
    """

    changes: tuple

    def alternatives(self, run):
        runs = []
        for change in self.changes:
            values = {name: value(run) if callable(value) else value for name, value in change.items()}
            changed = replace(run, **values)
            if changed != run:
                runs.append(changed)
        return runs


def search(start, coordinates, losses_of):
    """The best run: all coordinates once in their order, then the rates again until none of them moves.

    Args:
        start: the run to begin with.
        coordinates: `Rate` and `Choice`.
        losses_of: gives the losses of a list of runs, infinite where they diverged, or raises `Unmeasured`.

    Raises:
        ValueError: no run of a coordinate has a finite loss, or a rate has no end.
    """
    best = start
    for coordinate in coordinates:
        best = _move(best, coordinate, losses_of)
    rates = [coordinate for coordinate in coordinates if isinstance(coordinate, Rate)]
    for _ in range(MAX_PASSES):
        before = best
        for rate in rates:
            best = _move(best, rate, losses_of)
        if best == before:
            return best
    raise ValueError(f"the rates of {best.name} still move after {MAX_PASSES} passes")


def _move(run, coordinate, losses_of):
    if isinstance(coordinate, Rate):
        return bracket(run, coordinate, losses_of)
    return _best([run, *coordinate.alternatives(run)], losses_of)


def bracket(run, rate, losses_of):
    """The run whose rate is best, with a worse neighbour on both sides."""
    low, high = -1, 1
    while True:
        tried = {exponent: rate.at(run, exponent) for exponent in sorted(range(low, high + 1), key=abs)}
        best = _best(list(tried.values()), losses_of)
        if best == tried[low]:
            low -= 1
        elif best == tried[high]:
            high += 1
        else:
            return best
        if max(-low, high) > MAX_STEPS_OF_RATE:
            raise ValueError(f"{rate.field} of {run.name} has no best value within a factor {2**MAX_STEPS_OF_RATE}")


def _best(runs, losses_of):
    """The first of the runs with the lowest loss."""
    losses = losses_of(runs)
    if not math.isfinite(min(losses)):
        raise ValueError(f"all of these diverged: {', '.join(run.name for run in runs)}")
    return runs[losses.index(min(losses))]
