"""The runner of the fine-tuning comparison asks for the right runs, and its report says what they measured."""

import json

import pytest

from benchmarks import finetune


# The learning rate at which a pretended method is at its best.
OPTIMUM = {"full": 3e-5, "lora": 1e-3, "oft": 2.8e-4, "poet-bs": 3e-4, "poet-bs-muon": 1.2e-3, "poet-fs": 1e-3}


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """The runner, with results in a directory of its own."""
    monkeypatch.setattr(finetune.report, "RESULTS", tmp_path)
    return finetune


def pretend(benchmark, name, directory):
    """Measure a run: the further its learning rate is from the optimum, the worse."""
    label, rate, seed = name.split("_")
    distance = abs(float(rate) / OPTIMUM.get(label, float(rate)) - 1)
    metrics = {
        "eval_loss": 1 + distance / 10 + int(seed) / 1000,
        "eval_loss_before": 1.5,
        "prose_perplexity": 20 + distance,
        "prose_perplexity_before": 20.0,
        "eval_tokens": 1000,
        "prose_tokens": 8000,
        "parameters": {"trained": 4_700_000},
        "adapter_bytes": 18_900_000,
        "step_cpu_seconds": 10.0,
        "peak_memory_mb": 4096.0,
        "num_threads": 1,
        "versions": {"torch": "2.13.0"},
        "settings": {"max_steps": 40, "per_device_train_batch_size": 4, "num_test_rows": 64},
    }
    (directory / f"{name}.json").write_text(json.dumps(metrics))


@pytest.fixture
def finished(benchmark, tmp_path):
    """The runner after all that it asks for was measured."""
    while missing := [name for name in benchmark.wanted() if not (tmp_path / f"{name}.json").is_file()]:
        for name in missing:
            pretend(benchmark, name, tmp_path)
    return benchmark


def test_runs_begin_with_the_grid_alone(benchmark):
    rates = {name: rates for name, (_, rates) in benchmark.GRID.items()}
    assert set(benchmark.wanted()) == {f"{name}_{rate:g}_42" for name in rates for rate in rates[name]}


def test_best_learning_rate_is_not_at_the_edge_of_those_tried(finished):
    for name, optimum in OPTIMUM.items():
        tried = sorted(run.rate for run in finished.report.results() if run.label == name and run.seed == 42)
        assert tried[0] < optimum < tried[-1]


def test_one_more_rate_lies_between_the_best_and_the_better_of_its_neighbours(finished):
    tried = {run.rate for run in finished.report.results() if run.label == "oft"}
    assert tried == {1e-4, 2e-4, 4e-4, 1e-3}


def test_best_learning_rate_gets_the_second_seed(finished):
    seconds = {run.label: run.rate for run in finished.report.results() if run.seed == 43}
    assert seconds == {**OPTIMUM, "oft": 2e-4}


def test_variants_have_the_best_rate(finished):
    runs = {run.label: run.rate for run in finished.report.results()}
    assert {runs[name] for name in finished.VARIANTS} == {OPTIMUM["poet-bs-muon"]}


def test_report_shows_the_best_rate_and_all_rates(finished):
    section = finished.report.section()
    assert "| LoRA, r = 16 | 0.001 | 1.042 ± 0.001 | 20.00 ± 0.00 | 2 | 4.7M | 18.9 MB | 10.0 | 4.0 GB |" in section
    assert "| untrained | | 1.500 | 20.00 |" in section
    assert "0.0003: 1.112 (20.70), 0.00055: 1.087 (20.45), 0.001: 1.042 (20.00), 0.003: 1.242 (22.00)" in section
    assert "| b = 64, only R | 0.0012 | 1.042 |" in section


def test_report_says_what_is_unfinished(benchmark, tmp_path):
    for name in ("lora_0.001_42", "lora_0.003_42", "oft_0.0001_42", "oft_0.0004_42", "oft_0.001_42"):
        pretend(benchmark, name, tmp_path)
    assert (
        "**Not finished:** no run yet: full fine-tuning, POET-BS, b = 32, POET-BS, b = 32, RotationMuon, POET-FS, "
        "b = 152; best at the edge of the learning rates tried: LoRA, r = 16; one seed: LoRA, r = 16, OFT, b = 64."
    ) in benchmark.report.section()


def test_report_of_all_runs_is_finished(finished):
    assert "Not finished" not in finished.report.section()


def test_picture_shows_every_method(finished, tmp_path):
    finished.report.plot(tmp_path / "plots" / "finetune.png")
    assert (tmp_path / "plots" / "finetune.png").stat().st_size > 10_000
