"""The pretraining comparison: its methods run, and its flags are those that the kept results were measured with."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import pretrain
from benchmarks.report.pretrain import KEPT_SETTINGS


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "pretrain"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["poet", "adamw"])
def test_run_writes_what_is_kept(method, tmp_path, monkeypatch):
    rows = [{"text": f"Line {i} of a text about {i % 7} things. " * 8} for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setitem(pretrain.PRESETS, "20m", (16, 24, 1, 2))
    data = ["--data", tmp_path / "text.jsonl", "--seq_length", 32, "--max_eval_sequences", 4, "--vocab_size", 300]
    poet = ["--block_size", 8, "--merge_interval", 2] if method == "poet" else []
    flags = ["--method", method, *data, *poet, "--max_steps", 4, "--eval_steps", 2, "--output_dir", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, flags)])
    pretrain.main()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(KEPT_SETTINGS) <= set(metrics["settings"])
    assert metrics["eval_loss"] < 6 and metrics["eval_tokens"] == 4 * 32
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000


def test_flags_of_another_method_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--method", "adamw", "--poet_lr", "1e-3"])
    with pytest.raises(SystemExit):
        pretrain.parse_arguments()
    assert "--poet_lr 0.001 belongs to --method poet" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["poet", "adamw"])
def test_defaults_are_those_of_the_kept_runs(method, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--method", method, "--output_dir", str(tmp_path)])
    args, train_args = pretrain.parse_arguments()
    settings = vars(args) | train_args.to_dict()
    kept = json.loads((RESULTS / f"pretrain-{method}-42.json").read_text())["settings"]
    assert {name: settings[name] for name in kept} == kept
