"""Writes the table in examples/README.md from results/examples/, and runs the examples whose results it shows.

The cards in `model_cards/` are written from the same results, see `cards.py`.

    python -m benchmarks.examples --run classify.py --data_dir DIR    # runs it, keeps what it printed and its time
    python -m benchmarks.examples                                     # rewrite examples/README.md
    python -m benchmarks.examples --check                             # fail if it is not what the results say

DIR holds the data under the names that the commands use: `gsm8k/train.jsonl`, `sst2/train.tsv` and so on.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "examples"
README = ROOT / "examples" / "README.md"
METRICS = "***** all metrics *****\n"  # as `Trainer.log_metrics` heads them
MARKERS = "<!-- examples:begin -->", "<!-- examples:end -->"
EXAMPLES = {  # what it shows, and its flags
    "pretrain.py": ("pretraining a small Llama from scratch, inside Trainer", ""),
    "training_loop.py": ("a plain PyTorch loop with exact resume", "--output_dir loop-output"),
    "finetune.py": (
        "supervised fine-tuning with TRL",
        "--data gsm8k/train.jsonl --test_data gsm8k/test.jsonl",
    ),
    "classify.py": (
        "sequence classification, with a head that trains in full",
        "--data sst2/train.tsv --test_data sst2/test.tsv",
    ),
}


def run(name, data_dir):
    """Run an example with its flags in an empty directory that has the data, and keep what it printed at its end."""
    flags = EXAMPLES[name][1].split()
    with tempfile.TemporaryDirectory() as directory:
        for path in Path(data_dir).resolve().iterdir() if data_dir else []:
            (Path(directory) / path.name).symlink_to(path)
        start = time.perf_counter()
        command = [sys.executable, ROOT / "examples" / name, *flags]
        result = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.perf_counter() - start
        metrics = [json.loads(path.read_text("utf-8")) for path in Path(directory).glob("*-output/metrics.json")]
    _, separator, end = result.stdout.rpartition(METRICS)
    printed = separator + end if separator else "\n".join(result.stdout.splitlines()[-2:])
    kept = {
        "seconds": seconds,
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft", "trl", "poet-peft")},
        "printed": printed.strip(),
        "metrics": metrics[0] if metrics else None,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def table():
    """A row for each example, and below the table what each printed."""
    rows = ["| example | shows | time |", "|---|---|---|"]
    printed = []
    for name, (shows, flags) in EXAMPLES.items():
        path = RESULTS / f"{name}.json"
        duration, output = "not measured", "not run yet"
        if path.is_file():
            kept = json.loads(path.read_text())
            packages = ", ".join(f"{package} {number}" for package, number in kept["versions"].items())
            duration = f"{kept['seconds']:.0f} s on {kept['num_cores']} CPU cores"
            output = f"printed at its end ({packages}):\n\n```text\n{kept['printed']}\n```"
        rows.append(f"| [{name}]({name}) | {shows} | {duration} |")
        command = f"python examples/{name} {flags}".strip()
        printed.append(f"### {name}\n\n```sh\n{command}\n```\n\n{output}\n")
    return "\n".join(rows) + "\n\n" + "\n".join(printed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=EXAMPLES)
    parser.add_argument("--data_dir")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.run:
        run(args.run, args.data_dir)
    begin, end = MARKERS
    text = README.read_text()
    generated = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{table()}{end}", text, flags=re.DOTALL)
    if not args.check:
        README.write_text(generated)
    elif generated != text:
        sys.exit("examples/README.md is not what the results say: run this without --check")


if __name__ == "__main__":
    main()
