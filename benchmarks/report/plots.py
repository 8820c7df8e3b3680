"""Plots of the result files. Each PNG carries the digest of the numbers that it shows."""

import hashlib
import json

from PIL import Image

from benchmarks.harness.fits import power_law, upper_half

from . import figures_plots, layer, model, quality_plot
from .text import method_name


PLOTTED_METHODS = ["frozen", "lora-64", "oft-64", "poet-64", "poet-128", "poet-256", "poet-fs-1/2"]
COLORS = dict(zip(PLOTTED_METHODS, ["0.55", "C1", "C2", "C0", "C3", "C4", "C5"], strict=True))
HELD = ["weights", "optimizer", "gradients", "caches", "activations"]


def digest(result):
    shown = {key: result.get(key) for key in ("cells", "memory", "settings")}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def is_current(path, result):
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get("Description") == digest(result)


def draw(result, path):
    import matplotlib

    matplotlib.use("Agg")
    path.parent.mkdir(exist_ok=True)
    drawn_by = {
        "layer": draw_layer,
        "model": draw_model,
        "scaling": draw_scaling,
        "quality": quality_plot.draw,
        "figures": figures_plots.draw,
    }
    figure = drawn_by[result["command"]](result)
    figure.savefig(path, dpi=110, metadata={"Description": digest(result)})


def _grid(num_panels, num_columns, width, height, **kwargs):
    import matplotlib.pyplot as plt

    num_rows = -(-num_panels // num_columns)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(width * num_columns, height * num_rows), squeeze=False, **kwargs
    )
    for unused in axes.flat[num_panels:]:
        unused.set_axis_off()
    return figure, axes


def draw_layer(result):
    shapes = layer.shapes(result)
    figure, axes = _grid(len(shapes), min(3, len(shapes)), 4.3, 3.6, layout="constrained")
    for panel, shape in zip(axes.flat, shapes, strict=False):
        cells = layer.cells_of(result, shape)
        for key in dict.fromkeys(key for cell in cells.values() for key in cell["timings"]):
            method, _, phase = key.partition(" ")
            if method not in COLORS:
                continue
            points = [(n, cell["timings"][key]["ratio"]) for n, cell in cells.items() if key in cell["timings"]]
            x = [n for n, _ in points]
            style = {"color": COLORS[method], "linestyle": "--" if phase == "later" else "-"}
            panel.plot(x, [r["median"] for _, r in points], marker="o", markersize=3, label=method_name(key), **style)
            panel.fill_between(
                x, [r["q1"] for _, r in points], [r["q3"] for _, r in points], alpha=0.12, color=style["color"]
            )
        panel.axhline(1, color="black", linewidth=1)
        panel.set_title(f"{shape[0]} x {shape[1]}", fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(list(cells), [f"{n:,}" for n in cells])
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.3)
    figure.supylabel("time over a linear layer trained in full", fontsize=10)
    handles = {
        label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def draw_model(result):
    figure, axes = _grid(2, 2, 6.2, 0.9 + 0.42 * len(result["memory"]), layout="constrained", sharey=True)
    held, speed = axes[0]
    methods = list(result["memory"])
    names = [model.full_name(method) for method in methods]
    left = [0.0] * len(methods)
    for category in HELD:
        sizes = [result["memory"][method][category] / 1e6 for method in methods]
        held.barh(names, sizes, left=left, label=category)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    peaks = [result["memory"][method]["peak_accumulating"] / 1e6 for method in methods]
    held.plot(peaks, names, "k|", markersize=14, markeredgewidth=2, label="peak, accumulating")
    held.set_xlabel("MB")
    above = {"fontsize": 8, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "columnspacing": 1, "frameon": False}
    held.legend(ncols=6, handlelength=1, **above)
    height = 0.8 / max(1, len(result["cells"]))
    for number, cell in enumerate(result["cells"]):
        tokens = model.num_tokens(result, cell)
        measured = model.methods_of(result, cell)
        rates = [tokens / cell["timings"][f"{method} step"]["seconds"]["median"] for method in measured]
        offset = (number - (len(result["cells"]) - 1) / 2) * height
        count = cell["micro_batches"]
        label = f"{count} micro-batch{'es' * (count > 1)} per step"
        speed.barh([methods.index(method) + offset for method in measured], rates, height=0.9 * height, label=label)
    speed.set_xlabel("tokens per second")
    speed.legend(ncols=2, **above)
    held.invert_yaxis()
    for panel in (held, speed):
        panel.grid(axis="x", alpha=0.3)
    return figure


def draw_scaling(result):
    cells = result["cells"]
    figure, axes = _grid(2 * len(cells), len(cells), 3.9, 3.7, layout="constrained")
    for column, cell in enumerate(cells):
        for panel, quantity in zip(axes[:, column], ("time", "memory"), strict=True):
            _draw_sweep(panel, cell, quantity)
            panel.set_xlabel(cell["sweep"])
    axes[0, 0].set_ylabel("time, ms")
    axes[1, 0].set_ylabel("memory held, MB")
    return figure


def _draw_sweep(panel, cell, quantity):
    values = cell["values"]
    for number, (method, fit) in enumerate(cell["exponents"][quantity].items()):
        points = [point[quantity][method] for point in cell["points"]]
        y = [1e3 * p["seconds"]["median"] if quantity == "time" else p / 1e6 for p in points]
        label = f"{method}: {fit['fitted']:.2f} ({fit['predicted']:.2f})"
        panel.loglog(values, y, "os^"[number], color=f"C{number}", markersize=5, alpha=0.8, label=label)
        x = upper_half(values)
        factor, exponent = power_law(x, upper_half(y))
        panel.loglog(x, [factor * value**exponent for value in x], color=f"C{number}", linewidth=1.2)
    panel.set_xticks(values, [f"{value:,}" for value in values], fontsize=8, rotation=30)
    panel.minorticks_off()
    panel.yaxis.set_major_locator(_few_ticks())
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, title="exponent (predicted)", title_fontsize=8)


def _few_ticks():
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1, 2, 5))
