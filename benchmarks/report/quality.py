"""The pretraining comparison: README.md's table and docs/pretraining-results.md, see `benchmarks/quality.py`."""

from benchmarks.harness.quality_methods import ORTHO_UNLESS_SAID

from .quality_names import name_of
from .quality_plot import plot_name
from .quality_runs import (
    by_seeds_and_loss,
    deviation,
    difference,
    final_runs,
    is_bracketed,
    is_variant,
    long_runs,
    long_settings,
    loss_of,
    mean_loss,
    near_best,
    read,
    read_again,
    runs_of,
    steps_of,
    tuning_runs,
)
from .text import table


BASELINE = "adamw"
INITIAL_WEIGHTS = {"usual": "the model's own", "normalized": "rows of norm 1", "mup": "spectral norm as mup has it"}
SETTINGS = ["matrix rate", "other rate", "settings"]
DATA = {"stdlib": "the source of the Python standard library", "gsm8k": "GSM8K"}


def difference_text(runs, baseline, of_seeds=0.0):
    found = difference(runs, baseline, of_seeds)
    return "" if found is None or runs is baseline else f"{found[0]:+.3f} ± {found[1]:.3f}"


def range_text(runs, field):
    """The range of rates near the best one, `<` and `>` where it goes on beyond what was tried."""
    if runs[0]["run"][field] is None:
        return ""
    near, tried = near_best(runs, field)
    before, after = "≤ " * (near[0] == tried[0]), " ≤" * (near[-1] == tried[-1])
    return f"{before}{near[0]:g}{after}" if len(near) == 1 else f"{before}{near[0]:g} – {near[-1]:g}{after}"


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


def settings_cells(run):
    """All settings of a run, in the columns `SETTINGS`."""
    return [rate(run["matrix_lr"]), rate(run["lr"]), settings_text(run)]


def tuning_table(results):
    families = tuning_runs(results)
    baseline = families.get(BASELINE)
    rows = []
    for family, runs in families.items():
        best = runs[0]
        rows.append(
            [
                name_of(family),
                f"{best['loss']:.3f}",
                difference_text(runs[:1], baseline[:1]) if baseline and family != BASELINE else "",
                *settings_cells(best["run"]),
                len(runs),
                "yes" if is_bracketed(runs) else "not yet",
            ]
        )
    return table(["method", "loss", "over AdamW", *SETTINGS, "runs", "bracketed"], rows)


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
    """What the methods hold, and their times where there are short runs of them: those of one machine."""
    short = tuning_runs(results)
    only_long = {family: runs for family, runs in final_runs(results).items() if family not in short}
    baseline = short.get(BASELINE)
    rows = []
    for family, runs in {**short, **only_long}.items():
        best, is_short = runs[0], family in short
        held = best["gradient_bytes"] + best["optimizer_bytes"]
        if baseline:
            of_baseline = baseline[0]["gradient_bytes"] + baseline[0]["optimizer_bytes"]
            share = f"{100 * held / of_baseline:.0f} %"
            time = f"{_step_seconds(runs) / _step_seconds(baseline):.2f}" if is_short else ""
        else:
            share = time = ""
        drift = "{relative:.0e} ({of_largest:.0e})".format(**best["drift"]) if "drift" in best else ""
        ranges = [range_text(runs, field) if is_short else "" for field in ("matrix_lr", "lr")]
        rows.append([name_of(family), time, f"{held / 1e6:.1f}", share, drift, *ranges])
    header = ["method", "step / AdamW's", "gradients and state, MB", "of AdamW's", "drift"]
    return table([*header, "matrix rates within 2 %", "other rates within 2 %"], rows)


def _step_seconds(runs):
    """Of the method at its best options. The machine did other work too: processor time, the least disturbed run."""
    alike = [run for run in runs if run["run"]["options"] == runs[0]["run"]["options"]]
    return min(run["step_cpu_seconds"] for run in alike)


def final_table(results):
    families = final_runs(results)
    if not families:
        return "The long runs are not measured yet: `python -m benchmarks.quality --plan final`."
    baselines = {family: families.get(family) for family in ("adamw", "muon")}
    tried = long_runs(results)
    of_seeds = _of_seeds(results)
    rows = []
    for family, runs in families.items():
        over = [
            difference_text(runs, baseline, of_seeds) if baseline and family != name else ""
            for name, baseline in baselines.items()
        ]
        tokens = runs[0]["tokens"] / 1e6
        rows.append(
            [name_of(family), mean_text(runs, of_seeds), *over, len(runs), len(tried[family]), f"{tokens:.2f}"]
        )
    header = ["method", "loss", "over AdamW", "over Muon", "seeds", "settings tried", "million tokens"]
    return table(header, rows)


def _about_seeds(results):
    """How far runs that differ in their seed alone end from each other."""
    found = deviation(results)
    if found is None:
        return ""
    of_seeds, freedom = found
    return f"""
From one seed to another the loss deviates by {of_seeds:.3f} ({freedom} degrees of freedom, all settings with several
seeds together): two single runs that differ in nothing else are {2**0.5 * of_seeds:.3f} apart, root mean square.
"""


def _of_seeds(results):
    """The deviation from seed to seed, 0 where no settings were run with two."""
    found = deviation(results)
    return found[0] if found else 0.0


def mean_text(runs, of_seeds=0.0):
    """The mean loss of the seeds and, where their standard deviation is known, its standard error."""
    if diverged := sum(run["loss"] is None for run in runs):
        return "diverged" if diverged == len(runs) else f"{diverged} of {len(runs)} diverged"
    error = f" ± {of_seeds / len(runs) ** 0.5:.3f}" if of_seeds else ""
    return f"{mean_loss(runs):.3f}{error}"


def long_settings_table(results):
    """Every setting that the long runs were made with, in the order in which they are chosen."""
    of_seeds = _of_seeds(results)
    rows = []
    for runs in sorted(long_settings(results), key=by_seeds_and_loss):
        settings = settings_cells(runs[0]["run"])
        rows.append([name_of(runs[0]["family"]), mean_text(runs, of_seeds), len(runs), *settings])
    return table(["method", "loss", "seeds", *SETTINGS], rows)


def again_table(pairs):
    """Runs that were made twice, as `read_again` gives them: everything equal but the processor."""
    rows = [
        [
            name_of(first["family"]),
            first["run"]["seed"],
            *(f"{loss_of(run):.3f}" for run in (first, again)),
            *settings_cells(first["run"]),
        ]
        for first, again in pairs
    ]
    return table(["method", "seed", "loss", "again", *SETTINGS], rows) if rows else ""


def repeats_table(results, twice=()):
    """What the long runs make of tokens that attention can copy from the text before, and of all others.

    Args:
        twice: as `read_again` gives it; the second runs are in the table too.
    """
    runs = [run for runs in long_settings(results) for run in runs] + [again for _, again in twice]
    rows = []
    for run in sorted((run for run in runs if run.get("repeat_curve") and run["loss"] is not None), key=loss_of):
        curve = run["repeat_curve"]
        shown = curve[len(curve) // 2 - 1], curve[-1]
        cells = [f"{point[kind]:.3f}" for kind in (1, 2) for point in shown]
        rows.append([name_of(run["family"]), run["run"]["seed"], *cells, *settings_cells(run["run"])])
    header = ["method", "seed", "repeated, half-way", "at the end", "others, half-way", "at the end"]
    return table([*header, *SETTINGS], rows) if rows else ""


def spectra_table(results):
    """What training makes of the spectra of weights that are trained themselves, in each method's best such run."""
    rows, by_family = [], long_runs(results)
    for family, short in tuning_runs(results).items():
        long = [run for runs in by_family.get(family, []) for run in runs]
        best = next((run for run in [*long, *short] if "spectra" in run), None)
        for kind, found in best["spectra"].items() if best else ():
            (start, end), largest, median = found["rms"], found["largest"], found["median"]
            cells = [f"{start:.2f}", f"{end:.2f}", f"{end / start:.2f}"]
            cells += [f"{a:.2f} → {b:.2f}" for a, b in (largest, median)]
            run = best["run"]
            rows.append([name_of(family), f"{run['steps']:,}", rate(run["matrix_lr"]), kind, *cells])
    header = ["method", "steps", "matrix rate", "layers", "RMS at the start", "at the end", "times"]
    return table([*header, "largest / RMS", "median / RMS"], rows) if rows else ""


def parts_tables(results):
    """`parts_table` of the short and of the long runs, `(steps, table)`; without those that have no pairs."""
    steps = steps_of(results)
    tuned = [runs[:1] for runs in tuning_runs(results).values()]
    chosen = (steps[0], tuned), (steps[-1], list(final_runs(results).values()))
    tables = []
    for length, by_family in chosen:
        of_poet = [runs for runs in by_family if runs[0]["run"]["method"] == "poet-ortho"]
        if of_poet:
            best = min(of_poet, key=by_seeds_and_loss)[0]
            tables.append((length, parts_table(runs_of(results, length), best)))
    return [(length, pairs) for length, pairs in tables if pairs]


def parts_table(runs, best):
    """What each setting of POET's best run gives: pairs of runs that differ in that alone, the best pair for each.

    Args:
        runs: of one length and one seed, the best one among them.
    """
    candidates = sorted((run for run in runs if run["family"].startswith("poet-ortho")), key=loss_of)
    candidates = [(run, _settings(run["run"])) for run in candidates]
    wanted = _settings(best["run"])
    pairs = {}
    for base, old in candidates:
        if base["run"]["method"] != "poet-ortho" or is_variant(base):
            continue
        for other, new in candidates:
            changed = _changed(old, new)
            if len(changed) == 1:
                (what,) = changed
                if old.get(what) == wanted.get(what):
                    values = old.get(what), new.get(what)
                    pairs.setdefault((what, str(values[1])), (base, other, values))
    rows = [
        [
            _setting_text(what),
            *(_value_text(what, value) for value in values),
            f"{loss_of(base):.3f}",
            "diverged" if other["loss"] is None else f"{loss_of(other):.3f}",
            difference_text([other], [base]),
        ]
        for (what, _), (base, other, values) in sorted(pairs.items(), key=lambda item: item[0])
    ]
    header = ["setting", "best run has", "instead", "loss", "loss instead", "difference"]
    return table(header, rows) if rows else ""


_OF_ROTATION_MUON = {**ORTHO_UNLESS_SAID, "nesterov": True, "alternate": True}
_UNLESS_SAID = {**_OF_ROTATION_MUON, "block_size": 256, "base_init_scale": 1.0}


def _settings(run):
    """All settings of a run by their names, its options among them, also those that it leaves at their values."""
    options = {name.partition(".")[2]: value for name, value in run["options"].items()}
    return {**_UNLESS_SAID, **options, **{name: value for name, value in run.items() if name != "options"}}


def _changed(old, new):
    """The names of the settings in which two runs differ; those of an optimizer only where both have it."""
    names = old.keys() | new.keys()
    if old["method"] != new["method"]:
        names -= _OF_ROTATION_MUON.keys()
    return {name for name in names if old.get(name) != new.get(name)}


def _setting_text(what):
    return {"method": "optimizer", "lr": "other rate", "matrix_lr": "matrix rate"}.get(what, what.replace("_", " "))


def _value_text(what, value):
    if what == "matrix_lr" and value is None:
        return "by the angle law"
    if what == "method":
        return {"poet-ortho": "RotationMuon", "poet-ortho-adamw": "AdamW"}[value]
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else option_text(value)


_ABOUT_LONG_RUNS = """Pretraining from random weights, each method at its best settings of those tried: mean of the
seeds, and its standard error by the deviation from seed to seed of all settings that were run with several."""


def summary():
    """What README.md says: the long runs of every size, or the short ones of the first where there are none."""
    found = read()
    measured = {key: results for key, results in found.items() if final_runs(results)}
    if measured:
        tables = [f"{_model_and_data(*item)}:\n\n{final_table(item[1])}\n" for item in measured.items()]
        return f"{_ABOUT_LONG_RUNS}\n\n" + "\n".join(tables)
    if not found:
        return ""
    key, results = next(iter(found.items()))
    return (
        f"Pretraining from random weights, {_model_and_data(key, results)}, short runs:\n\n{tuning_table(results)}\n"
    )


def _model_and_data(size_and_data, results):
    return f"{results[0]['parameters']['model'] / 1e6:.1f}M parameters, on {DATA[size_and_data[1]]}"


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
    shortest, longest = steps_of(results)[0], steps_of(results)[-1]
    tokens = next(iter(tuned.values()))[0]["tokens"]
    of_tokens = f"{first['held_out_tokens']:,}" if "held_out_tokens" in first else "the held-out"
    text = f"""## {first["parameters"]["model"] / 1e6:.1f}M parameters on {DATA[data]}

{first["parameters"]["linear"] / 1e6:.1f}M of them in the linear layers; loss in nats on {of_tokens} tokens of held-out
text. {first["hardware"]}, fp32; {versions}.

### The long runs

{final_table(results)}
{_about_seeds(results)}
![Held-out loss while training, for each method at its best settings](figures/{plot_name(size, data)})

### How the settings were chosen

Runs of {shortest} steps ({tokens / 1e6:.2f}M tokens), seed 42. A method's search goes through its learning rates by
factors of 2 until the best has a worse neighbour on both sides, and tries other values of weight decay, warm-up,
betas, momentum and initial weights, then the rates again. "Bracketed" says whether the search of the rates has come to
its end; a method with one run was not searched at all.

{tuning_table(results)}

The initial weights of the linear layers are a setting like any other. The best loss of each method, in brackets the
number of runs:

{initial_weights_table(results)}

### What it costs

{cost_table(results)}
"""
    if long_runs(results):
        text += f"""
### The settings of the long runs

All that were tried over {longest:,} steps, nothing left out. The choice is by the mean, among the
settings with the most seeds: one seed alone may be lucky.

{long_settings_table(results)}
"""
    twice = read_again(size, data)
    if pairs := again_table(twice):
        text += f"""
Some were made again, with the same seed on another processor, which rounds otherwise and may have bfloat16 products
where the first had none. How far they end apart says what a loss is worth to which decimal:

{pairs}
"""
    if repeats := repeats_table(results, twice):
        text += f"""
### What attention copies

The loss on two kinds of tokens of the first held-out sequences, in runs that measured it: those that follow a token
which they have followed before in the same sequence, so that attention can copy them from there, and all others.

{repeats}
"""
    if shapes := spectra_table(results):
        text += f"""
### What training makes of the spectra elsewhere

POET's weights keep the singular values that they start with. What becomes of those of the other methods, by the kind
of layer: their RMS, and the largest and the median one over it.

{shapes}
"""
    if parts := parts_tables(results):
        text += """
### What each part of the recipe gives

Two runs a row, of seed 42, which differ in one setting alone; of all such pairs whose first run has the best run's
value, the one with the lowest loss. Nothing was tuned again after the change. The errors are those of the held-out
text alone: what another seed does is said under the table of the long runs, and many a difference is smaller.
"""
    for steps, pairs in parts:
        text += f"\nAfter {steps:,} steps:\n\n{pairs}\n"
    return text
