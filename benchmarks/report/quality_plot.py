"""The picture of docs/pretraining-results.md: held-out loss along the runs, and over the learning rate."""

from .quality_names import name_of, styles_of
from .quality_runs import along, final_runs, tuning_runs


def plot_name(size, data):
    return f"quality_{size}_{data}.png"


def shown(results):
    """What the plot shows, as a result for `plots`: curves of all seeds, and losses over rates, by family."""
    families = final_runs(results)
    families = families or {family: runs[:1] for family, runs in tuning_runs(results).items()}
    curves = {family: [run["held_out_curve"] for run in runs] for family, runs in families.items()}
    rates = {}
    for family, runs in tuning_runs(results).items():
        field = "lr" if runs[0]["run"]["matrix_lr"] is None else "matrix_lr"
        rates[family] = sorted([r["run"][field], r["loss"]] for r in along(runs, field) if r["loss"] is not None)
    return {"command": "quality", "cells": {"curves": curves, "rates": rates}}


def draw(result):
    """The figure of what `shown` gives."""
    import matplotlib.pyplot as plt

    all_curves, all_rates = result["cells"]["curves"], result["cells"]["rates"]
    styles = styles_of({*all_curves, *all_rates})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    for family, curves in all_curves.items():
        for curve in curves:
            left.plot(*zip(*curve, strict=True), **styles[family], linewidth=1.4, label=name_of(family))
    left.set_xlabel("steps")
    left.set_ylabel("held-out loss, first 64 sequences")
    lowest = min(curve[-1][1] for curves in all_curves.values() for curve in curves)
    left.set_ylim(lowest - 0.1, lowest + 1.6)
    for family, points in all_rates.items():
        best = min(loss for _, loss in points)
        at = next(rate for rate, loss in points if loss == best)
        x, y = zip(*[(rate / at, loss) for rate, loss in points], strict=True)
        right.plot(x, y, **styles[family], marker="o", markersize=4, label=name_of(family))
    lowest = min(loss for points in all_rates.values() for _, loss in points)
    right.set_ylim(lowest - 0.1, lowest + 1.3)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set_xlabel("learning rate of the linear layers over the best one")
    right.set_ylabel("held-out loss, short runs")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    lines = {line.get_label(): line for panel in (right, left) for line in panel.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, fontsize=8)
    return figure
