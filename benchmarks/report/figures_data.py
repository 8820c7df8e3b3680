"""Results of benchmarks/figures.py, and means over the layers of a run."""

import json
import statistics
from pathlib import Path


RESULTS = Path(__file__).parents[1] / "results" / "figures"
METHODS = ("adamw", "poet-paper", "poet-ortho")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def read():
    """The results of the runs that are measured, by method, in the order of the figures."""
    paths = {method: RESULTS / f"{method}.json" for method in METHODS}
    return {method: json.loads(path.read_text("utf-8")) for method, path in paths.items() if path.is_file()}


def read_coverage():
    return json.loads((RESULTS / "coverage.json").read_text("utf-8"))


def pick(runs, *methods):
    return {method: runs[method] for method in methods if method in runs}


def poet_runs(runs):
    return pick(runs, "poet-paper", "poet-ortho")


def layers_of(run, kinds=KINDS):
    return [layer for name, layer in run["layers"].items() if name.rpartition(".")[2] in kinds]


def mean(run, measure, at, kinds=KINDS):
    """Over the layers of these kinds; `at` is the number of the measurement."""
    return statistics.mean(layer[measure][at] for layer in layers_of(run, kinds))


def means(run, measure, kinds=KINDS):
    return [mean(run, measure, at, kinds) for at in range(len(run["steps"]))]


def largest(run, at, kinds=KINDS):
    """The largest singular value, mean over the layers of these kinds."""
    return statistics.mean(layer["singular_values"][at][0] for layer in layers_of(run, kinds))


def median(run, at, kinds=KINDS):
    return statistics.mean(layer["singular_values"][at][8] for layer in layers_of(run, kinds))


def change_of_spectrum(run):
    """The largest relative change of a singular value that is not among the smallest."""
    return max(
        abs(b / a - 1)
        for layer in layers_of(run)
        for a, b in zip(layer["singular_values"][0][:-1], layer["singular_values"][-1][:-1], strict=True)
    )
