"""The examples as a user runs them, on tiny models and data; the real default models in the slow tests."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import bert_classifier, llama
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import poet_peft


EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *flags):
    """The metrics that a run of an example in a process of its own writes, and what it prints."""
    directory = Path(flags[flags.index("--output_dir") + 1])
    command = [sys.executable, EXAMPLES / script, *flags]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads((directory / "metrics.json").read_text()), result.stdout


def load(script):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location("example_" + script.removesuffix(".py"), EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def byte_tokenizer():
    """A token for each byte, and two special ones: what a tokenizer is without training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def write_questions(path):
    """24 rows of questions and answers, as JSON lines."""
    rows = [{"question": f"What is {i} plus 1?", "answer": f"It is {i + 1}."} for i in range(24)]
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer, and rows of data in a file."""
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    llama(vocab_size=len(tokenizer), eos_token_id=1).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    write_questions(directory / "data.jsonl")
    return directory


def finetune_flags(tiny, output_dir):
    small = ["--num_test_rows", 8, "--num_prose_tokens", 256, "--steps", 8, "--learning_rate", 1e-2]
    return [*small, "--model", tiny / "model", "--data", tiny / "data.jsonl", "--output_dir", output_dir]


@pytest.fixture(scope="module")
def finetuned(tiny, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("finetuned")
    return output_dir, *run("finetune.py", *finetune_flags(tiny, output_dir), "--block_size", 8)


@pytest.mark.slow
def test_finetune_learns(finetuned):
    _, metrics, _ = finetuned
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.02


@pytest.mark.slow
def test_finetune_says_what_it_wrote(finetuned):
    _, metrics, printed = finetuned
    assert f"loss {metrics['eval_loss_before']:.4f} -> {metrics['eval_loss']:.4f}" in printed
    assert f"trained {metrics['parameters']['trained']:,}" in printed


@pytest.mark.slow
def test_finetune_saves_the_model_that_it_measured(tiny, finetuned):
    example = load("finetune.py")
    output_dir, metrics, _ = finetuned
    tokenizer = byte_tokenizer()
    rows = [json.loads(line) for line in (tiny / "data.jsonl").read_text().splitlines()][-8:]
    held_out = tokenizer([f"Question: {row['question']}\nAnswer: {row['answer']}<eos>" for row in rows])["input_ids"]
    for loader, name in (AutoPeftModelForCausalLM, "adapter"), (AutoModelForCausalLM, "merged"):
        loss, num_tokens = example.token_loss(loader.from_pretrained(output_dir / name), held_out)
        assert loss == pytest.approx(metrics["eval_loss"], rel=1e-4)
        assert num_tokens == metrics["eval_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--variant", "fully_stochastic", "--block_size", 0.5, "--train_norms", "True"],
        ["--block_size", 8, "--merge_interval", 4, "--freeze", "poet_P"],
        ["--block_size", 8, "--merge_interval", 4, "--rotation_optimizer", "muon"],
        ["--method", "oft", "--block_size", 8],
        ["--method", "lora", "--rank", 2],
        ["--method", "full"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_finetune_learns_with_other_methods(tiny, tmp_path, flags, monkeypatch):
    flags = [*finetune_flags(tiny, tmp_path), *flags]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    load("finetune.py").main()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.01
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("block_size", [0.25, 16.0, 64.0])
def test_default_learning_rate_turns_every_block_size_by_the_same_angle(block_size, optimizer):
    example = load("finetune.py")
    model = llama()
    args = example.ExampleArguments(block_size=block_size, rotation_optimizer=optimizer)
    b = block_size if block_size > 1 else block_size * model.config.hidden_size
    radians_by_rate = {"adamw": 2 * b**0.5, "muon": 1}[optimizer]
    angle = example.default_learning_rate(args, model) * radians_by_rate
    assert angle == pytest.approx(example.RADIANS_PER_STEP[optimizer])


def test_finetune_says_how_to_do_without_a_hub():
    example = load("finetune.py")
    with pytest.raises(SystemExit, match=r"--data train\.jsonl"):
        example.read_rows("openai/gsm8k", "main", "train")


REFUSED_FLAGS = {
    "--method lora --block_size 8": "--block_size 8.0 does not belong to --method lora",
    "--method full --rotation_optimizer muon": "--rotation_optimizer muon does not belong to --method full",
    "--rotation_optimizer sgd": "--rotation_optimizer sgd: one of adamw, muon",
}


@pytest.mark.parametrize(("flags", "message"), REFUSED_FLAGS.items(), ids=REFUSED_FLAGS)
def test_finetune_refuses_flags_that_cannot_be(monkeypatch, flags, message):
    example = load("finetune.py")
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags.split()])
    with pytest.raises(SystemExit, match=message):
        example.parse_arguments()


def test_prose_is_long_enough_and_starts_with_sentences():
    prose = load("finetune.py").read_prose(None)
    assert len(prose) > 5 * 8192  # bytes, for 8192 tokens
    assert all(paragraph[0].isupper() and paragraph.endswith(".") for paragraph in prose.split("\n\n"))


@pytest.mark.slow
def test_finetune_default_model(tmp_path):
    write_questions(tmp_path / "data.jsonl")
    small = ["--steps", 2, "--num_test_rows", 4, "--num_prose_tokens", 64, "--learning_rate", 1e-3]
    metrics, _ = run("finetune.py", "--data", tmp_path / "data.jsonl", "--output_dir", tmp_path, *small)
    assert metrics["parameters"]["trained"] == 305_280 * 31 // 2
    assert metrics["eval_loss"] < metrics["eval_loss_before"] < 4
    assert metrics["versions"]["poet_peft"] == poet_peft.__version__


@pytest.fixture(scope="module")
def tiny_classifier(tmp_path_factory):
    """A folder with a tiny BERT and a tokenizer, and sentences whose label is their first word."""
    directory = tmp_path_factory.mktemp("tiny-classifier")
    tokenizer = byte_tokenizer()
    bert_classifier(vocab_size=len(tokenizer), num_labels=2).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    rows = [f"{word} movie number {i}\t{word}" for i in range(64) for word in ("good", "bad")]
    (directory / "train.tsv").write_text("\n".join(rows[:96]))
    (directory / "test.tsv").write_text("\n".join(rows[96:]))
    return directory


@pytest.fixture(scope="module")
def classified(tiny_classifier, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("classified")
    files = ["--data", tiny_classifier / "train.tsv", "--test_data", tiny_classifier / "test.tsv"]
    small = ["--model", tiny_classifier / "model", "--block_size", 8, "--poet_lr", 1e-2, "--num_train_epochs", 8]
    return output_dir, *run("classify.py", *files, *small, "--output_dir", output_dir)


@pytest.mark.slow
def test_classify_learns(classified):
    _, metrics, printed = classified
    assert metrics["eval_accuracy_before"] < 0.8 < metrics["eval_accuracy"]
    assert f"accuracy      {metrics['eval_accuracy_before']:.4f} -> {metrics['eval_accuracy']:.4f}" in printed


@pytest.mark.slow
def test_classify_saves_the_head_with_the_adapter(classified):
    output_dir, metrics, _ = classified
    with safe_open(output_dir / "adapter_model.safetensors", "pt") as file:
        heads = [name for name in file.keys() if "classifier" in name]  # noqa: SIM118
    assert [name.rpartition(".")[2] for name in sorted(heads)] == ["bias", "weight"]
    assert metrics["labels"] == ["bad", "good"]


@pytest.mark.slow
def test_classify_names_the_file_that_it_trained_on_and_the_one_it_was_evaluated_on(classified):
    _, metrics, _ = classified
    assert (metrics["data"]["name"], metrics["evaluation"][0]["data"]["name"]) == ("train.tsv", "test.tsv")


@pytest.mark.slow
def test_classify_counts_the_head_once(classified):
    _, metrics, _ = classified
    model = bert_classifier(vocab_size=258, num_labels=2)
    assert metrics["parameters"]["model"] == model.num_parameters()
    # 2 layers of 4 square projections and 2 of the feed-forward, a pooler; blocks of 8 on both sides; the head
    sides = 2 * (4 * 96 + 2 * 128) + 96
    assert metrics["parameters"]["trained"] == sides * 7 // 2 + 2 * 48 + 2


@pytest.mark.parametrize(
    ("name", "content", "columns", "first"),
    [
        ("two.tsv", 'a "good" one\t1\n', ["text"], {"text": 'a "good" one', "label": "1"}),
        ("named.tsv", "sentence\tlabel\nfine\t0\n", ["sentence"], {"sentence": "fine", "label": "0"}),
        ("pair.csv", 'a,label,b\n"one, two",yes,three\n', ["a", "b"], {"a": "one, two", "label": "yes", "b": "three"}),
    ],
)
def test_classify_reads_files(tmp_path, name, content, columns, first):
    (tmp_path / name).write_text(content)
    data, found = load("classify.py").read_file(tmp_path / name)
    assert (found, data[0]) == (columns, first)


def test_classify_refuses_rows_that_do_not_fit(tmp_path):
    (tmp_path / "data.csv").write_text("good,1\nbad,and,worse,0\n")
    with pytest.raises(SystemExit, match="data.csv has a row that is not text, label: .*worse"):
        load("classify.py").read_file(tmp_path / "data.csv")


def test_classify_refuses_labels_that_were_not_trained(tmp_path):
    (tmp_path / "train.csv").write_text("good,1\nbad,0\n")
    (tmp_path / "test.csv").write_text("fine,2\n")
    example = load("classify.py")
    args = example.ExampleArguments(data=str(tmp_path / "train.csv"), test_data=str(tmp_path / "test.csv"))
    with pytest.raises(SystemExit, match=r"has labels that .* has not: \['2'\]"):
        example.read_data(args)


def test_classify_says_how_to_do_without_a_hub():
    example = load("classify.py")
    with pytest.raises(SystemExit, match=r"--data train\.tsv"):
        example.read_data(example.ExampleArguments(task="mrpc"))


def test_readme_of_the_examples_shows_every_example_and_what_its_run_said():
    benchmarks = EXAMPLES.parent / "benchmarks"
    result = subprocess.run([sys.executable, benchmarks / "examples.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"[{path.name}]({path.name})" in readme for path in EXAMPLES.glob("*.py"))


def test_default_pretraining_is_the_run_that_the_readme_shows():
    kept = json.loads((EXAMPLES.parent / "benchmarks/results/pretrain/pretrain-poet-42.json").read_text())
    defaults = load("pretrain.py").METHODS["poet"]
    assert {name: kept["settings"][name] for name in defaults} == defaults
