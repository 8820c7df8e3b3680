"""The runner of the fine-tuning comparison asks for the right runs, and its report says what they measured."""

import json
import sys

import pytest
from models import llama
from test_examples import byte_tokenizer, write_questions

from benchmarks import finetune, finetune_run


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


# One run


def flags_of(directory, *flags):
    """A run on a tiny Llama and 24 questions."""
    tokenizer = byte_tokenizer()
    llama(vocab_size=len(tokenizer), eos_token_id=1).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    write_questions(directory / "data.jsonl")
    small = ["--num_test_rows", 8, "--num_prose_tokens", 256, "--max_steps", 8, "--learning_rate", 1e-2]
    data = ["--model", directory / "model", "--data", directory / "data.jsonl", "--output_dir", directory / "run"]
    return [str(flag) for flag in ("finetune_run", *small, *data, *flags)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--variant", "fully_stochastic", "--block_size", 0.5, "--train_norms", "True"],
        ["--block_size", 8, "--merge_interval", 4, "--freeze", "poet_P", "--rotation_optimizer", "adamw"],
        ["--block_size", 8, "--merge_interval", 4],
        ["--method", "oft", "--block_size", 8],
        ["--method", "lora", "--rank", 2],
        ["--method", "full"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_method_learns_and_measures_what_is_kept(tmp_path, flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", flags_of(tmp_path, *flags))
    finetune_run.main()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.01
    assert set(finetune.KEPT) <= set(metrics) and set(finetune.KEPT_SETTINGS) <= set(metrics["settings"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("block_size", [0.25, 16.0, 64.0])
def test_default_learning_rate_turns_every_block_size_by_the_same_angle(block_size, optimizer):
    model = llama()
    args = finetune_run.Arguments(block_size=block_size, rotation_optimizer=optimizer)
    b = block_size if block_size > 1 else block_size * model.config.hidden_size
    radians_by_rate = {"adamw": 2 * b**0.5, "muon": 1}[optimizer]
    angle = finetune_run.default_learning_rate(args, model) * radians_by_rate
    assert angle == pytest.approx(finetune_run.RADIANS_PER_STEP[optimizer])


REFUSED_FLAGS = {
    "--method lora --block_size 8": "--block_size 8.0 does not belong to --method lora",
    "--method full --rotation_optimizer muon": "--rotation_optimizer muon does not belong to --method full",
    "--rotation_optimizer sgd": "--rotation_optimizer sgd: one of adamw, muon",
}


@pytest.mark.parametrize(("flags", "message"), REFUSED_FLAGS.items(), ids=REFUSED_FLAGS)
def test_flags_that_cannot_be_are_refused(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["finetune_run", *flags.split()])
    with pytest.raises(SystemExit, match=message):
        finetune_run.parse_arguments()


def test_prose_is_long_enough_and_starts_with_sentences():
    prose = finetune_run.read_prose(None)
    assert len(prose) > 5 * 8192  # bytes, for 8192 tokens
    assert all(paragraph[0].isupper() and paragraph.endswith(".") for paragraph in prose.split("\n\n"))
