"""The pictures of docs/training-figures.md."""

from .figures_data import KINDS, largest, layers_of, means, poet_runs, read, read_coverage
from .quality_names import COLORS, name_of


SHOWN = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj")
SIDES = {"probe_R": ("output side R", "-"), "probe_P": ("input side P", "--")}


def plot_name(name):
    return f"training_{name}.png"


def shown():
    """What each figure shows, as results for `plots`, by name of its file."""
    runs = read()
    if not runs:
        return {}
    shown_runs = {
        method: {key: run[key] for key in ("steps", "layers", "train_curve", "held_out_curve")}
        for method, run in runs.items()
    }
    return {
        plot_name(name): {
            "command": "figures",
            "cells": {"figure": name, "data": read_coverage() if name == "coverage" else shown_runs},
        }
        for name in DRAWN_BY
    }


def draw(result):
    return DRAWN_BY[result["cells"]["figure"]](result["cells"]["data"])


def _panels(num_rows, num_columns, height, **kwargs):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(7.2, height), squeeze=False, layout="constrained", **kwargs
    )
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
    return figure, axes


def draw_curves(runs):
    figure, ((left, right),) = _panels(1, 2, 3.0)
    for method, run in runs.items():
        style = {"color": COLORS[method], "label": name_of(method), "linewidth": 1.4}
        left.plot(*zip(*run["train_curve"], strict=True), **style)
        right.plot(*zip(*run["held_out_curve"], strict=True), marker="o", markersize=3, **style)
    left.set_ylabel("training loss")
    right.set_ylabel("held-out loss, 64 sequences")
    left.legend(fontsize=8)
    _steps(left, right)
    return figure


def draw_spectra(runs):
    from matplotlib.ticker import LogLocator

    figure, axes = _panels(len(SHOWN), len(runs), 4.8, sharex=True, sharey="row")
    for row, name in zip(axes, SHOWN, strict=True):
        for panel, (method, run) in zip(row, runs.items(), strict=True):
            # Without the smallest, which is all but 0 in a square matrix.
            values = [spectrum[:-1] for spectrum in run["layers"][name]["singular_values"]]
            for line in zip(*values, strict=True):
                panel.plot(run["steps"], line, color=COLORS[method], linewidth=0.9)
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.yaxis.set_minor_formatter(lambda value, _: "")
        row[0].set_ylabel(f"singular values of\nlayer 1, {name.rpartition('.')[2]}", fontsize=9)
    for panel, method in zip(axes[0], runs, strict=True):
        panel.set_title(name_of(method), fontsize=9)
    _steps(*axes[-1])
    return figure


def draw_norms(runs):
    figure, axes = _panels(2, len(runs), 4.8, sharex=True, sharey="row")
    for column, (method, run) in zip(axes.T, runs.items(), strict=True):
        for number, kind in enumerate(KINDS):
            norms = [largest(run, at, [kind]) for at in range(len(run["steps"]))]
            column[0].plot(run["steps"], norms, color=f"C{number}", linewidth=1.3, label=kind)
            column[1].plot(run["steps"], means(run, "stable_rank", [kind]), color=f"C{number}", linewidth=1.3)
        column[0].set_title(name_of(method), fontsize=9)
    axes[0, 0].set_ylabel("spectral norm")
    axes[1, 0].set_ylabel("stable rank")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    _steps(*axes[1])
    return figure


def draw_entropy(runs):
    return _draw_means(runs, "entropy", "SVD entropy")


def draw_energy(runs):
    return _draw_means(runs, "energy", "hyperspherical energy of the rows")


def _draw_means(runs, measure, label):
    """The mean over the layers as a line, smallest to largest as an area."""
    figure, ((panel,),) = _panels(1, 1, 3.0)
    for method, run in runs.items():
        of_layers = [layer[measure] for layer in layers_of(run)]
        color = COLORS[method]
        panel.plot(run["steps"], means(run, measure), color=color, label=name_of(method), linewidth=1.6)
        ends = [[extreme(values) for values in zip(*of_layers, strict=True)] for extreme in (min, max)]
        panel.fill_between(run["steps"], *ends, color=color, alpha=0.15, linewidth=0)
    panel.set_ylabel(label)
    panel.legend(fontsize=8)
    _steps(panel)
    return figure


def draw_probing(runs):
    figure, ((panel,),) = _panels(1, 1, 3.0)
    for method, run in poet_runs(runs).items():
        for measure, (side, style) in SIDES.items():
            label = f"{name_of(method)}, {side}"
            panel.plot(run["steps"], means(run, measure), style, color=COLORS[method], label=label, linewidth=1.6)
    panel.set_ylabel("cosine of fixed vectors\nbefore and after all rotations")
    panel.legend(fontsize=8)
    _steps(panel)
    return figure


def draw_coverage(coverage):
    figure, ((left, right),) = _panels(1, 2, 3.0)
    for number, (name, values) in enumerate(coverage.items()):
        counts = range(1, len(values["covered"]) + 1)
        left.plot(counts, values["covered"], color=f"C{number}", label=name)
        right.plot(counts, values["spread"], color=f"C{number}")
    left.set_ylabel("part of the entries ever updated")
    right.set_ylabel("spread of the number of updates\nover its mean")
    for panel in (left, right):
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel("index sets drawn")
    left.legend(fontsize=8)
    return figure


def _steps(*panels):
    for panel in panels:
        panel.set_xlabel("step", fontsize=9)


DRAWN_BY = {
    "curves": draw_curves,
    "spectra": draw_spectra,
    "norms": draw_norms,
    "entropy": draw_entropy,
    "energy": draw_energy,
    "probing": draw_probing,
    "coverage": draw_coverage,
}
