"""What training does to weights: docs/training-figures.md and its plots, see `benchmarks/figures.py`."""

import json
import statistics
from pathlib import Path

from .quality import COLORS, name_of
from .text import table


RESULTS = Path(__file__).parents[1] / "results" / "figures"
METHODS = ("adamw", "poet-paper", "poet-ortho")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHOWN = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj")
SIDES = {"probe_R": ("output side R", "-"), "probe_P": ("input side P", "--")}


def read():
    """The results of the runs that are measured, by method, in the order of the figures."""
    paths = {method: RESULTS / f"{method}.json" for method in METHODS}
    return {method: json.loads(path.read_text("utf-8")) for method, path in paths.items() if path.is_file()}


def read_coverage():
    return json.loads((RESULTS / "coverage.json").read_text("utf-8"))


# Numbers


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


# Text


def table_of_norms(runs):
    """Largest and median singular values at the start and at the end, by kind of layer."""
    header = ["linear layer"]
    for method in runs:
        header += [f"{name_of(method)}: largest", "median", "largest / median at the end"]
    rows = []
    for kind in KINDS:
        row = [f"`{kind}`"]
        for run in runs.values():
            row += [
                arrow(largest(run, 0, [kind]), largest(run, -1, [kind])),
                arrow(median(run, 0, [kind]), median(run, -1, [kind])),
                f"{largest(run, -1, [kind]) / median(run, -1, [kind]):.1f}",
            ]
        rows.append(row)
    return table(header, rows)


def arrow(before, after):
    return f"{before:.2f} → {after:.2f}"


def pick(runs, *methods):
    return {method: runs[method] for method in methods if method in runs}


def poet_runs(runs):
    return pick(runs, "poet-paper", "poet-ortho")


def joined(texts):
    texts = list(texts)
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def text_of_curves(runs):
    losses = joined(f"{run['loss']:.3f} with {name_of(method)}" for method, run in runs.items())
    return (
        f"After {first(runs)['run']['steps']} steps, one seed each, the held-out loss is {losses}; in the paper, "
        "whose runs are far longer, POET ends ahead of AdamW."
    )


def text_of_spectra(runs):
    texts = [
        f"{name_of(method)} changes none by more than {max(100 * change_of_spectrum(run), 0.001):.2g} %"
        for method, run in poet_runs(runs).items()
    ]
    grown = pick(runs, "adamw")
    for run in grown.values():
        attention = ["q_proj", "k_proj"]
        texts.append(
            f"AdamW multiplies the largest of the query and key projections by "
            f"{largest(run, -1, attention) / largest(run, 0, attention):.1f} and leaves their median within "
            f"{100 * abs(median(run, -1, attention) / median(run, 0, attention) - 1):.0f} %"
        )
    return f"Of the singular values, {joined(texts)}: as in the paper, and here it is a few directions that grow."


def text_of_norms(runs):
    run = runs["adamw"]
    growth = {kind: largest(run, -1, [kind]) / largest(run, 0, [kind]) for kind in KINDS}
    most, least = max(growth, key=growth.get), min(growth, key=growth.get)
    ranks = [mean(run, "stable_rank", at, ["q_proj", "k_proj"]) for at in (0, -1)]
    return (
        f"AdamW multiplies the spectral norm by {growth[most]:.1f} in `{most}` and by {growth[least]:.1f} in "
        f"`{least}`, and the stable rank of the query and key projections falls from {ranks[0]:.0f} to "
        f"{ranks[1]:.1f}; POET keeps what the initial weights gave it, the same for all layers of one shape."
    )


def text_of_entropy(runs):
    return f"{_ends(runs, 'entropy', 3)}: POET keeps it, AdamW lowers it until its learning rate has decayed."


def text_of_energy(runs):
    return (
        f"{_ends(runs, 'energy', 4)}: POET's stays at what random rows have, and with AdamW it rises, in the query "
        f"and key projections to {mean(runs['adamw'], 'energy', -1, ['q_proj', 'k_proj']):.4f}; on this scale both "
        "changes are small."
    )


def _ends(runs, measure, digits):
    texts = [
        f"{mean(run, measure, 0):.{digits}f} → {mean(run, measure, -1):.{digits}f} with {name_of(method)}"
        for method, run in runs.items()
    ]
    return f"Mean over the layers, {joined(texts)}"


def text_of_probing(runs):
    ends = joined(
        f"{mean(run, 'probe_R', -1):.2f} and {mean(run, 'probe_P', -1):.2f} with {name_of(method)}"
        for method, run in poet_runs(runs).items()
    )
    return (
        f"The cosines fall with the learning rate's schedule and end at {ends} for the two sides: in so short a run "
        "there are no phases to be told apart, as the paper has them."
    )


def text_of_coverage(coverage):
    smallest = coverage["fully stochastic, 1/8"]
    half = coverage["fully stochastic, 1/2"]
    num_sets = next(number for number, part in enumerate(smallest["covered"], 1) if part > 0.99)
    return (
        f"Block-stochastic rotations reach every entry each time; fully stochastic ones of 1/8 need {num_sets} index "
        f"sets for 99 % of the entries, and after {len(half['spread'])} the number of updates differs between entries "
        f"by {100 * half['spread'][-1]:.0f} % of its mean with 1/2, and by {100 * smallest['spread'][-1]:.0f} % with "
        "1/8."
    )


def first(runs):
    return next(iter(runs.values()))


def section():
    runs = read()
    run = first(runs)
    settings = "\n".join(
        f"- {name_of(method)}: rate of the linear layers {result['run']['matrix_lr']:g}, of the rest "
        f"{result['run']['lr']:g}"
        + "".join(f", {k.partition('.')[2]} {v}" for k, v in result["run"]["options"].items())
        for method, result in runs.items()
    )
    about = (
        f"{run['parameters']['model'] / 1e6:.1f}M parameters, {run['run']['steps']} steps, "
        f"{run['tokens'] / 1e6:.2f}M tokens of the Python standard library, seed {run['run']['seed']}; "
        f"{run['hardware']}, fp32."
    )
    missing = [name_of(method) for method in METHODS if method not in runs]
    if missing:
        about += f" Not measured yet: {joined(missing)}."
    parts = [f"{about}\n\n{settings}"]
    for name, (heading, alt, _) in FIGURES.items():
        text = TEXTS[name](read_coverage() if name == "coverage" else runs)
        parts.append(f"## {heading}\n\n{text}\n\n![{alt}](figures/{plot_name(name)})")
        if name == "norms":
            parts.append(f"Start → end, means over the layers of a kind:\n\n{table_of_norms(runs)}")
    return "\n\n".join(parts) + "\n"


# Plots


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
        for name in FIGURES
    }


def draw(result):
    return FIGURES[result["cells"]["figure"]][2](result["cells"]["data"])


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


FIGURES = {
    "curves": ("Loss", "Training and held-out loss along the runs", draw_curves),
    "spectra": ("Singular values", "Singular values of two layers along the runs", draw_spectra),
    "norms": ("Spectral norm and stable rank", "Spectral norm and stable rank by kind of linear layer", draw_norms),
    "entropy": ("SVD entropy", "SVD entropy along the runs, mean and range over the layers", draw_entropy),
    "energy": (
        "Hyperspherical energy",
        "Energy of the rows along the runs, mean and range over the layers",
        draw_energy,
    ),
    "probing": ("Vector probing", "Cosines of fixed vectors with what all rotations made of them", draw_probing),
    "coverage": (
        "Coverage of updates",
        "Part of the entries updated, and how evenly, by index sets drawn",
        draw_coverage,
    ),
}
TEXTS = {
    "curves": text_of_curves,
    "spectra": text_of_spectra,
    "norms": text_of_norms,
    "entropy": text_of_entropy,
    "energy": text_of_energy,
    "probing": text_of_probing,
    "coverage": text_of_coverage,
}
