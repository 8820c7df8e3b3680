"""Runs of benchmarks/quality.py: docs/pretraining-results.md and its plots."""

import json
import math
import statistics
from pathlib import Path

from .text import table


RESULTS = Path(__file__).parents[1] / "results" / "quality"
NAMES = {
    "frozen": "linear layers frozen",
    "adamw": "AdamW",
    "muon": "Muon",
    "lora": "LoRA from scratch",
    "poet-paper": "POET, the paper's recipe",
    "poet-ortho": 'POET, recipe "ortho"',
    "poet-ortho-adamw": 'POET, recipe "ortho" with AdamW',
}
COLORS = {name: f"C{number}" for number, name in enumerate(["adamw", "muon", "poet-paper", "poet-ortho", "frozen"])}
INITIAL_WEIGHTS = {"usual": "the model's own", "normalized": "rows of norm 1", "mup": "spectral norm as mup has it"}
DATA = {"stdlib": "the source of the Python standard library", "gsm8k": "GSM8K"}
BASELINE = "adamw"
VARIANT = "-variant"  # ends the family of what the package does not have
NEAR = 1.02  # times the best loss


def read():
    """All results by (size, data), in the order of the pages."""
    found = {}
    for path in sorted(RESULTS.glob("*/*/*.json")):
        found.setdefault((path.parts[-3], path.parts[-2]), []).append(json.loads(path.read_text("utf-8")))
    return dict(sorted(found.items(), key=lambda item: (int(item[0][0].removesuffix("m")), item[0][1])))


def name_of(family):
    return NAMES.get(family, family)


def loss_of(result):
    return math.inf if result["loss"] is None else result["loss"]


def steps_of(results):
    return sorted({result["run"]["steps"] for result in results})


def short_runs(results):
    """Those of the fewest steps, of one seed."""
    shortest = steps_of(results)[0]
    return [result for result in results if result["run"]["steps"] == shortest and result["run"]["seed"] == 42]


def tuning_runs(results):
    """The results that chose the settings, by family, best first: one seed, the shortest runs."""
    families = {}
    for result in short_runs(results):
        if not result["family"].endswith(VARIANT):
            families.setdefault(result["family"], []).append(result)
    families = {family: sorted(runs, key=loss_of) for family, runs in families.items()}
    return dict(sorted(families.items(), key=lambda item: loss_of(item[1][0])))


def final_runs(results):
    """The results of the longest runs with equal settings, by family, best first; one a seed."""
    if len(steps_of(results)) == 1:
        return {}
    longest = steps_of(results)[-1]
    settings = {}
    for result in results:
        if result["run"]["steps"] == longest:
            key = json.dumps({k: v for k, v in result["run"].items() if k != "seed"}, sort_keys=True)
            settings.setdefault((result["family"], key), []).append(result)
    best = {}
    for (family, _), runs in settings.items():
        if family not in best or mean_loss(runs) < mean_loss(best[family]):
            best[family] = sorted(runs, key=lambda result: result["run"]["seed"])
    return dict(sorted(best.items(), key=lambda item: mean_loss(item[1])))


def mean_loss(runs):
    return statistics.mean(loss_of(run) for run in runs)


def difference(runs, baseline):
    """Mean and standard error of the loss over the baseline's, from the same sequences of the same seeds.

    The error has both parts: what the choice of held-out sequences and what the choice of seeds would change. None
    where no seed is common or one diverged.
    """
    by_seed = {run["run"]["seed"]: run for run in baseline}
    pairs = [(run, by_seed[run["run"]["seed"]]) for run in runs if run["run"]["seed"] in by_seed]
    if not pairs or any(loss_of(run) == math.inf for pair in pairs for run in pair):
        return None
    rows = [[a - b for a, b in zip(run["losses"], other["losses"], strict=True)] for run, other in pairs]
    by_sequence = [statistics.mean(column) for column in zip(*rows, strict=True)]
    variance = statistics.variance(by_sequence) / len(by_sequence)
    if len(rows) > 1:
        variance += statistics.variance([statistics.mean(row) for row in rows]) / len(rows)
    return statistics.mean(by_sequence), variance**0.5


def difference_text(runs, baseline):
    found = difference(runs, baseline)
    return "" if found is None or runs is baseline else f"{found[0]:+.3f} ± {found[1]:.3f}"


def along(runs, field):
    """The runs that have this rate, and all else as the best run has it."""

    def others(run):
        return {key: value for key, value in run["run"].items() if key != field}

    return [run for run in runs if run["run"][field] is not None and others(run) == others(runs[0])]


def near_best(runs, field):
    """The values of a rate, all else as in the best run, whose loss is within `NEAR` of the best; and all tried."""
    tried = {run["run"][field]: loss_of(run) for run in along(runs, field)}
    near = [rate for rate, loss in sorted(tried.items()) if loss <= NEAR * loss_of(runs[0])]
    return near, sorted(tried)


def range_text(runs, field):
    """The range of rates near the best one, `<` and `>` where it goes on beyond what was tried."""
    if runs[0]["run"][field] is None:
        return ""
    near, tried = near_best(runs, field)
    before, after = "≤ " * (near[0] == tried[0]), " ≤" * (near[-1] == tried[-1])
    return f"{before}{near[0]:g}{after}" if len(near) == 1 else f"{before}{near[0]:g} – {near[-1]:g}{after}"


def is_bracketed(runs):
    """Whether both rates of the best run have a worse one on both sides, all else equal."""
    for field in ("matrix_lr", "lr"):
        rate = runs[0]["run"][field]
        if rate is None:
            continue
        _, tried = near_best(runs, field)
        if rate in (tried[0], tried[-1]):
            return False
    return True


def settings_text(run):
    beta2 = run["betas"][1]
    parts = [f"initial weights: {INITIAL_WEIGHTS[run['base_init']]}", f"decay {run['weight_decay']:g}"]
    parts += [f"warm-up {100 * run['warmup']:g} %", f"β₂ {beta2:g}"]
    options = sorted(run["options"].items())
    parts += [f"{key.partition('.')[2].replace('_', ' ')} {option_text(value)}" for key, value in options]
    return ", ".join(parts)


def option_text(value):
    """An option's value in a cell of a table; of a pattern what it has for each kind of layer."""
    if not isinstance(value, dict):
        return str(value)
    return "; ".join(f"{key.replace('|', ', ')}: {part:g}" for key, part in value.items())


def rate(value):
    return "" if value is None else f"{value:g}"


def tuning_table(results):
    families = tuning_runs(results)
    baseline = families.get(BASELINE)
    rows = []
    for family, runs in families.items():
        best = runs[0]
        run = best["run"]
        rows.append(
            [
                name_of(family),
                f"{best['loss']:.3f}",
                difference_text(runs[:1], baseline[:1]) if baseline and family != BASELINE else "",
                rate(run["matrix_lr"]),
                rate(run["lr"]),
                settings_text(run),
                len(runs),
                "yes" if is_bracketed(runs) else "not yet",
            ]
        )
    header = ["method", "loss", "over AdamW", "matrix rate", "other rate", "settings", "runs", "bracketed"]
    return table(header, rows)


def initial_weights_table(results):
    """The best loss of each method by its initial weights."""
    families = tuning_runs(results)
    kinds = sorted({run["run"]["base_init"] for runs in families.values() for run in runs})
    rows = []
    for family, runs in families.items():
        by_kind = {kind: [run for run in runs if run["run"]["base_init"] == kind] for kind in kinds}
        cells = [f"{loss_of(by_kind[kind][0]):.3f} ({len(by_kind[kind])})" if by_kind[kind] else "" for kind in kinds]
        rows.append([name_of(family), *cells])
    return table(["method", *(INITIAL_WEIGHTS[kind] for kind in kinds)], rows)


def cost_table(results):
    families = tuning_runs(results)
    baseline = families.get(BASELINE)
    rows = []
    for family, runs in families.items():
        best = runs[0]
        held = best["gradient_bytes"] + best["optimizer_bytes"]
        if baseline:
            of_baseline = baseline[0]["gradient_bytes"] + baseline[0]["optimizer_bytes"]
            share = f"{100 * held / of_baseline:.0f} %"
            # The machine did other work too: processor time of the step, the least disturbed run of each.
            seconds, of_adamw = (min(run["step_cpu_seconds"] for run in group) for group in (runs, baseline))
            time = f"{seconds / of_adamw:.2f}"
        else:
            share = time = ""
        drift = f"{best['drift']['relative']:.0e}" if "drift" in best else ""
        ranges = [range_text(runs, field) for field in ("matrix_lr", "lr")]
        rows.append([name_of(family), time, f"{held / 1e6:.1f}", share, drift, *ranges])
    header = ["method", "step / AdamW's", "gradients and state, MB", "of AdamW's", "drift"]
    return table([*header, "matrix rates within 2 %", "other rates within 2 %"], rows)


def final_table(results):
    families = final_runs(results)
    if not families:
        return "The long runs are not measured yet: `python -m benchmarks.quality --plan final`."
    baselines = {family: families.get(family) for family in ("adamw", "muon")}
    rows = []
    for family, runs in families.items():
        spread = ""
        if len(runs) > 1:
            spread = f" ± {statistics.stdev(map(loss_of, runs)) / len(runs) ** 0.5:.3f}"
        over = [
            difference_text(runs, baseline) if baseline and family != name else ""
            for name, baseline in baselines.items()
        ]
        tokens = runs[0]["tokens"] / 1e6
        rows.append([name_of(family), f"{mean_loss(runs):.3f}{spread}", *over, len(runs), f"{tokens:.2f}"])
    header = ["method", "loss", "over AdamW", "over Muon", "seeds", "million tokens"]
    return table(header, rows)


def parts_table(results):
    """What changes where one thing of the recipe is changed from its best run."""
    tuned = tuning_runs(results)
    if "poet-ortho" not in tuned:
        return ""
    best = tuned["poet-ortho"][0]
    rows = [_of_adamw(result, best) for result in tuned.pop("poet-ortho-adamw", [])]
    variants = [result for result in short_runs(results) if result["family"] == "poet-ortho" + VARIANT]
    for result in tuned["poet-ortho"][1:] + variants:
        changes = {key: value for key, value in result["run"].items() if best["run"][key] != value}
        options = changes.pop("options", None)
        if options is not None:
            keys = sorted(options.keys() | best["run"]["options"].keys())
            pairs = [(key, best["run"]["options"].get(key), options.get(key)) for key in keys]
            changes |= {key.partition(".")[2]: new for key, old, new in pairs if old != new}
        if len(changes) != 1:
            continue
        ((what, value),) = changes.items()
        text = "by default" if value is None and what != "matrix_lr" else _value_text(what, value)
        rows.append([what.replace("_", " "), text, f"{loss_of(result):.3f}", difference_text([result], [best])])
    rows.sort(key=lambda row: (row[0], row[1]))
    return table(["setting", "value", "loss", "over the best run"], rows)


def _of_adamw(result, best):
    return ["optimizer", "AdamW", f"{loss_of(result):.3f}", difference_text([result], [best])]


def _value_text(what, value):
    if what == "matrix_lr" and value is None:
        return "by the angle law"
    return ", ".join(map(str, value)) if isinstance(value, list) else option_text(value)


def summary():
    """What README.md says: the long runs, or the short ones where there are none."""
    found = read()
    if not found:
        return ""
    measured = [item for item in found.items() if final_runs(item[1])]
    (_, data), results = measured[-1] if measured else next(iter(found.items()))
    size = f"{results[0]['parameters']['model'] / 1e6:.1f}M parameters"
    about = f"Pretraining from random weights, {size}, on {DATA[data]}, each method at its best\nlearning rates"
    if measured:
        return f"{about} (mean and standard error):\n\n{final_table(results)}\n"
    return f"{about}, short runs:\n\n{tuning_table(results)}\n"


def section():
    """What docs/pretraining-results.md says about every size and data."""
    found = read()
    if not found:
        return "Not measured yet: run `python -m benchmarks.quality --plan tune`.\n"
    return "\n\n".join(_of_one(size, data, results) for (size, data), results in found.items()) + "\n"


def _of_one(size, data, results):
    first = results[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    tuned = tuning_runs(results)
    (shortest, *_), tokens = steps_of(results), next(iter(tuned.values()))[0]["tokens"]
    of_tokens = f"{first['held_out_tokens']:,}" if "held_out_tokens" in first else "the held-out"
    text = f"""## {first["parameters"]["model"] / 1e6:.1f}M parameters on {DATA[data]}

{first["parameters"]["linear"] / 1e6:.1f}M of them in the linear layers; loss in nats on {of_tokens} tokens of held-out
text. {first["hardware"]}, fp32; {versions}.

### The long runs

{final_table(results)}

![Held-out loss while training, for each method at its best settings](figures/{plot_name(size, data)})

### How the settings were chosen

Runs of {shortest} steps ({tokens / 1e6:.2f}M tokens), seed 42. Each method searched its learning rates by factors of 2
until the best had a worse neighbour on both sides, and tried other values of weight decay, warm-up, betas, momentum
and initial weights, then the rates again. "Bracketed" says whether the search of the rates has come to its end.

{tuning_table(results)}

The initial weights of the linear layers are a setting like any other. The best loss of each method, in brackets the
number of runs:

{initial_weights_table(results)}

### What it costs

{cost_table(results)}
"""
    parts = parts_table(results)
    if parts:
        text += f"""
### What each part of the recipe gives

One setting changed from the best run of the recipe, {shortest} steps, seed 42, nothing tuned again. Gains (numbers
that multiply what a layer returns, by layer or by output feature, trained with the rest) and spectra are tried by the
benchmark alone; the package has no such option.

{parts}
"""
    return text


# Plots


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
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set_xlabel("learning rate of the linear layers over the best one")
    right.set_ylabel("held-out loss, short runs")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    return figure
