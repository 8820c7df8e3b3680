"""The fine-tuning comparison: SmolLM2-135M on GSM8K, each method at learning rates around its best, two seeds of that.

    python -m benchmarks.finetune --data gsm8k/train.jsonl --test_data gsm8k/test.jsonl --workers 2
    python -m benchmarks.finetune --list                     # what is still to run, as far as it is known by now

Runs `benchmarks/finetune_run.py` in processes of their own and keeps what each measured in `results/finetune/`. Runs
that are there are not run again, so it can be stopped and started at any time. Where the best learning rate of a
method turns out to be at the edge of those tried, the next one beyond it is tried too; then one more, between the best
and the better of its neighbours. Afterwards it writes the picture; `python -m benchmarks.tables` writes the tables.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.report import finetune as report
from benchmarks.report.finetune import Run


ROOT = Path(__file__).parents[1]
SEEDS = 42, 43
BLOCK = 32  # POET's block size at about the parameters of LoRA r = 16 and OFT b = 64
ADAMW, MUON = ["--rotation_optimizer", "adamw"], ["--rotation_optimizer", "muon"]
# Flags of each method, and the learning rates to begin with. All but full fine-tuning train 4.7 to 4.9M parameters.
GRID = {
    "full": (["--method", "full"], [1e-5, 3e-5, 1e-4]),
    "lora": (["--method", "lora", "--rank", 16], [1e-3, 3e-3, 1e-2]),
    "oft": (["--method", "oft", "--block_size", 64], [1e-4, 4e-4, 1e-3]),
    "poet-bs": ([*ADAMW, "--block_size", BLOCK], [1e-4, 3e-4, 1e-3]),
    "poet-bs-muon": ([*MUON, "--block_size", BLOCK], [6e-4, 1.2e-3, 2.4e-3]),
    "poet-fs": ([*ADAMW, "--variant", "fully_stochastic", "--block_size", 152], [1e-4, 3e-4, 1e-3]),
}
# What may help POET further, once each at the best learning rate of poet-bs-muon, an angle whatever the block size.
VARIANTS = {
    "poet-bs-muon-64": [*MUON, "--block_size", 64],
    "poet-bs-muon-64-only-R": [*MUON, "--block_size", 64, "--freeze", "poet_P"],
    "poet-bs-muon-64-only-P": [*MUON, "--block_size", 64, "--freeze", "poet_R"],
    "poet-bs-muon-norms": [*MUON, "--block_size", BLOCK, "--train_norms", "True"],
    "poet-bs-muon-warmup": [*MUON, "--block_size", BLOCK, "--warmup_steps", 5],
    "poet-bs-muon-folds": [*MUON, "--block_size", BLOCK, "--merge_interval", 5],
    "poet-fs-muon": [*MUON, "--variant", "fully_stochastic", "--block_size", 152],
}
MAX_EXTRA_RATES = 3
KEPT_SETTINGS = [
    "method",
    "variant",
    "block_size",
    "merge_interval",
    "rotation_optimizer",
    "rank",
    "train_norms",
    "freeze",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "num_test_rows",
    "num_prose_tokens",
    "template",
    "seed",
]
KEPT = [
    "method",
    "limits",
    "eval_loss",
    "eval_loss_before",
    "eval_tokens",
    "prose_perplexity",
    "prose_perplexity_before",
    "prose_tokens",
    "train_loss",
    "train_tokens",
    "parameters",
    "adapter_bytes",
    "step_seconds",
    "step_cpu_seconds",
    "peak_memory_mb",
    "train_seconds",
    "seconds",
    "num_threads",
    "versions",
]


def rounded(rate):
    """1, 3, 10, 30, ...: half a decade apart."""
    exponent = math.floor(2 * math.log10(rate) + 0.25) / 2
    return float(f"{10**exponent:.0e}")


def next_rate(losses):
    """The learning rate beyond the best of those tried, if that is at their edge; else None."""
    best = min(losses, key=losses.get)
    if best == max(losses):
        return rounded(best * 10**0.5)
    if best == min(losses):
        return rounded(best / 10**0.5)
    return None


def rate_between(losses):
    """The learning rate halfway (of logarithms) from the best of those tried to the better of its two neighbours."""
    rates = sorted(losses)
    i = rates.index(min(losses, key=losses.get))
    neighbour = min(rates[i - 1], rates[i + 1], key=losses.get)
    return float(f"{math.sqrt(rates[i] * neighbour):.1e}")


def wanted():
    """All runs that the results so far ask for: done, or to be done. {name: flags}"""
    results, runs = report.results(), {}

    def want(label, flags, rate, seed=SEEDS[0]):
        run = Run(label, rate, seed)
        runs[run.name] = [*flags, "--learning_rate", rate, "--seed", seed]
        return results.get(run)

    best_rate = {}
    for label, (flags, rates) in GRID.items():
        rates = list(rates)
        for _ in range(1 + MAX_EXTRA_RATES):
            done = {rate: want(label, flags, rate) for rate in rates}
            if None in done.values():
                break
            losses = {rate: metrics["eval_loss"] for rate, metrics in done.items()}
            if next_rate(losses) is None:
                between = rate_between(losses)
                if metrics := want(label, flags, between):
                    losses[between] = metrics["eval_loss"]
                    best_rate[label] = min(losses, key=losses.get)
                break
            rates.append(next_rate(losses))
        else:
            print(f"{label}: the best learning rate is still at the edge of those tried", file=sys.stderr)
        if label in best_rate:
            want(label, flags, best_rate[label], SEEDS[1])
            if label == "poet-bs-muon":
                for variant, variant_flags in VARIANTS.items():
                    want(variant, variant_flags, best_rate[label])
    return runs


def execute(name, flags, args):
    """One run; what it measured goes into a file of its name."""
    if (report.RESULTS / f"{name}.json").is_file():  # another process has run it meanwhile
        return
    with tempfile.TemporaryDirectory() as directory:
        data = ["--data", args.data, "--max_steps", args.steps]
        data += ["--num_test_rows", args.num_test_rows, "--num_prose_tokens", args.num_prose_tokens]
        if args.test_data:
            data += ["--test_data", args.test_data]
        command = [sys.executable, "-m", "benchmarks.finetune_run", *data, *flags, "--output_dir", directory]
        path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": os.pathsep.join(path)}
        run = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
        if run.returncode:
            print(f"{name} failed:\n{run.stderr}", file=sys.stderr, flush=True)
            return
        metrics = json.loads((Path(directory) / "metrics.json").read_text())
    kept = {key: metrics[key] for key in KEPT}
    kept["settings"] = {key: metrics["settings"][key] for key in KEPT_SETTINGS}
    report.RESULTS.mkdir(parents=True, exist_ok=True)
    (report.RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{name}: held-out loss {kept['eval_loss']:.4f}, {kept['seconds']:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--test_data")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--num_test_rows", type=int, default=32)
    parser.add_argument("--num_prose_tokens", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; each needs up to 9 GB of memory")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--only", default="", help="runs whose name starts with this")
    parser.add_argument("--list", action="store_true", help="print the runs still to do, and do none")
    args = parser.parse_args()

    tried = set()
    while True:
        todo = {name: flags for name, flags in wanted().items() if not (report.RESULTS / f"{name}.json").is_file()}
        todo = {name: flags for name, flags in todo.items() if name not in tried and name.startswith(args.only)}
        if args.list or not todo:
            print("\n".join(todo))
            break
        tried |= todo.keys()
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda name: execute(name, todo[name], args), todo))  # noqa: B023
    if not args.list:
        report.plot()


if __name__ == "__main__":
    main()
