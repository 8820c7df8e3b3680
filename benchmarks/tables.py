"""Writes the results section of README.md from benchmarks/results/.

python benchmarks/tables.py            # rewrite README.md
python benchmarks/tables.py --check    # fail if README.md is not what the results say
"""

import json
import re
import statistics
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MARKERS = "<!-- results:begin -->", "<!-- results:end -->"


def pretraining_runs():
    """Runs by method and learning rates: {(method, poet_lr, matrix_lr, learning_rate): [metrics, one a seed]}."""
    runs = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("pretrain-*.json")):
        metrics = json.loads(path.read_text())
        settings = metrics["settings"]
        key = metrics["method"], settings["poet_lr"], settings["matrix_lr"], settings["learning_rate"]
        runs.setdefault(key, []).append(metrics)
    return runs


def label(method, poet_lr, matrix_lr):
    if method == "adamw":
        return f"AdamW, linear layers at {matrix_lr:g}"
    return f"POET, `--poet_lr {poet_lr:g}`" if poet_lr else "linear layers frozen, `--poet_lr 0`"


def loss_text(runs):
    losses = [run["eval_loss"] for run in runs]
    return f"{statistics.mean(losses):.3f}" + (f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else "")


def section():
    runs = pretraining_runs()
    if not runs:
        return ""
    order = sorted(runs, key=lambda key: statistics.mean(run["eval_loss"] for run in runs[key]))
    first = runs[order[0]][0]
    settings, versions = first["settings"], first["versions"]
    lines = [
        "## What the pretraining example gives",
        "",
        f"`examples/pretrain.py` and its two controls: {first['parameters']['model'] / 1e6:.1f}M parameters, "
        f"{first['train_tokens'] / 1e6:.2f}M tokens of Python source, validation on {first['eval_tokens']:,} tokens "
        f"of held-out files, the same data, initial weights (`{settings['base_init']}`) and schedule. Each learning "
        "rate was tuned by hand on the same budget; all runs that were kept are in `benchmarks/results`.",
        "",
        "| method | other lr | validation loss | seeds | trained in linear layers | seconds | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in order:
        method, poet_lr, matrix_lr, lr = key
        group = runs[key]
        trained = 0 if poet_lr == 0 and method == "poet" else group[0]["parameters"]["trained_in_linear_layers"]
        lines.append(
            f"| {label(method, poet_lr, matrix_lr)} | {lr:g} | {loss_text(group)} | {len(group)} | {trained:,} | "
            f"{statistics.median(run['seconds'] for run in group):.0f} | "
            f"{statistics.median(run['peak_memory_mb'] for run in group):,.0f} MB |"
        )
    printed = (ROOT / "benchmarks" / "results" / "pretrain-default.txt").read_text().strip()
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines += ["", f"Two CPU cores, fp32; {names}. `±` is the standard deviation over seeds.", ""]
    lines += ["The end of what the default run printed there:", "", "```text", printed, "```"]
    return "\n".join(lines) + "\n"


def main():
    begin, end = MARKERS
    text = README.read_text()
    generated = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{section()}{end}", text, flags=re.DOTALL)
    if "--check" in sys.argv:
        sys.exit(None if generated == text else "README.md is not what the results say: run this without --check")
    README.write_text(generated)


if __name__ == "__main__":
    main()
