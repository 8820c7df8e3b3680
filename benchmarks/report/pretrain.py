"""Runs of benchmarks/pretrain.py: the results section of docs/results.md."""

import json
import statistics
from pathlib import Path


RESULTS = Path(__file__).parents[1] / "results" / "pretrain"
KEPT_SETTINGS = [
    "method",
    "base_init",
    "variant",
    "block_size",
    "merge_interval",
    "poet_lr",
    "matrix_lr",
    "model_config",
    "vocab_size",
    "seq_length",
    "learning_rate",
    "max_steps",
    "per_device_train_batch_size",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "seed",
]


def keep(name, run_dir):
    """Everything but the log and settings that say nothing about the result, such as directories."""
    metrics = json.loads((Path(run_dir) / "metrics.json").read_text())
    del metrics["log"]
    metrics["settings"] = {key: metrics["settings"][key] for key in KEPT_SETTINGS}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(metrics, indent=1) + "\n")


def runs_by_setting(prefix):
    """Runs by method and learning rates: {(method, poet_lr, matrix_lr, block_size, lr): [metrics, one a seed]}."""
    runs = {}
    for path in sorted(RESULTS.glob(f"{prefix}-*.json")):
        metrics = json.loads(path.read_text())
        settings = metrics["settings"]
        names = "method", "poet_lr", "matrix_lr", "block_size", "learning_rate"
        runs.setdefault(tuple(settings[name] for name in names), []).append(metrics)
    return dict(sorted(runs.items(), key=lambda item: mean_loss(item[1])))


def mean_loss(runs):
    return statistics.mean(run["eval_loss"] for run in runs)


def label(method, poet_lr, matrix_lr, block_size):
    if method == "adamw":
        return f"AdamW, `--matrix_lr {matrix_lr:g}`"
    if poet_lr == 0:
        return "linear layers frozen, `--poet_lr 0`"
    return f"POET, b = {block_size:g}, `--poet_lr {poet_lr:g}`"


def loss_text(runs):
    spread = f" ± {statistics.stdev(run['eval_loss'] for run in runs):.3f}" if len(runs) > 1 else ""
    return f"{mean_loss(runs):.3f}{spread}"


def table(runs):
    lines = [
        "| method | `--learning_rate` | validation loss | seeds | trained in linear layers |",
        "|---|---|---|---|---|",
    ]
    for (*setting, lr), group in runs.items():
        frozen = setting[1] == 0
        trained = 0 if frozen else group[0]["parameters"]["trained_in_linear_layers"]
        lines.append(f"| {label(*setting)} | {lr:g} | {loss_text(group)} | {len(group)} | {trained:,} |")
    return "\n".join(lines)


def section():
    """The results section of docs/results.md."""
    final, tuning = runs_by_setting("pretrain"), runs_by_setting("tuning")
    first = next(iter(final.values()))[0]
    settings = first["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    printed = (RESULTS / "pretrain-default.txt").read_text().strip()
    trial = next(iter(tuning.values()))[0]
    return f"""## What the pretraining example gives

`examples/pretrain.py`, AdamW and its control (`benchmarks/pretrain.py`), all from the same initial weights
(`{settings["base_init"]}`), on the same data and schedule: {first["parameters"]["model"] / 1e6:.1f}M parameters,
{first["train_tokens"] / 1e6:.2f}M tokens of Python source, loss on {first["eval_tokens"]:,} tokens of held-out files.
Two CPU cores, fp32, {versions}.
`±` is the standard deviation over seeds: a difference below it is none. This is a short run of a small model; it says
that the example works, not which method wins at scale.

{table(final)}

What the default run printed at its end:

```text
{printed}
```

The learning rates were chosen by these runs of {trial["settings"]["max_steps"]} steps ({trial["eval_tokens"]:,}
tokens of evaluation):

{table(tuning)}
"""
