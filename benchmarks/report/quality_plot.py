"""The picture of docs/pretraining-results.md: held-out loss along the runs, and over the learning rate."""

from .quality_names import COLORS, name_of
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

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for family, curves in result["cells"]["curves"].items():
        for number, curve in enumerate(curves):
            label = name_of(family) if number == 0 else None
            left.plot(*zip(*curve, strict=True), color=COLORS.get(family, "0.5"), linewidth=1.4, label=label)
    left.set_xlabel("steps")
    left.set_ylabel("held-out loss, first 64 sequences")
    lowest = min(curve[-1][1] for curves in result["cells"]["curves"].values() for curve in curves)
    left.set_ylim(lowest - 0.1, lowest + 1.6)
    left.legend(fontsize=8)
    for family, points in result["cells"]["rates"].items():
        best = min(loss for _, loss in points)
        at = next(rate for rate, loss in points if loss == best)
        x, y = zip(*[(rate / at, loss) for rate, loss in points], strict=True)
        right.plot(x, y, marker="o", markersize=4, color=COLORS.get(family, "0.5"), label=name_of(family))
    lowest = min(loss for points in result["cells"]["rates"].values() for _, loss in points)
    right.set_ylim(lowest - 0.1, lowest + 1.3)
    right.legend(fontsize=7)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set_xlabel("learning rate of the linear layers over the best one")
    right.set_ylabel("held-out loss, short runs")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    return figure
