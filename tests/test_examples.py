"""The examples as a user runs them, on tiny models and data; the real default models in the slow tests."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import classify
import example_tools
import finetune
import pretrain
import pytest
import training_loop
from models import assert_same_state, bert_classifier, llama
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import poet_peft


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(forks, example, *flags):
    """The metrics that a run of an example in a process of its own writes, and what it prints."""
    directory = Path(flags[flags.index("--output_dir") + 1])
    result = forks.run(EXAMPLES / f"{example.__name__}.py", *flags)
    assert result.returncode == 0, result.stderr
    return json.loads((directory / "metrics.json").read_text()), result.stdout


def printed_number(printed, name):
    """A number of the table that an example prints at its end."""
    (line,) = (line for line in printed.splitlines() if line.split()[:2] == [name, "="])
    return float(line.split()[2])


def refused(example, flags, monkeypatch):
    """The one line with which an example refuses its flags, and that no model was loaded before."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        if hasattr(example, name):
            monkeypatch.setattr(getattr(example, name), "from_pretrained", loaded)
            monkeypatch.setattr(getattr(example, name), "from_config", loaded)
    monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as exit:
        example.main()
    assert isinstance(exit.value.code, str) and "\n" not in exit.value.code.strip()
    return exit.value.code


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
    small = ["--num_test_rows", 8, "--max_steps", 8, "--learning_rate", 3e-2, "--block_size", 8]
    return [*small, "--model", tiny / "model", "--data", tiny / "data.jsonl", "--output_dir", output_dir]


@pytest.fixture(scope="module")
def finetuned(forks, tiny, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("finetuned")
    return output_dir, *run(forks, finetune, *finetune_flags(tiny, output_dir))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("[cfpt]*.py")), ids=lambda path: path.name)
def test_example_is_short(path):
    assert path.read_text().count("\n") < 120


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_imports_only_public_names(path):
    lines = [line.strip() for line in path.read_text().splitlines()]
    imports = [line for line in lines if line.startswith(("from poet_peft", "import poet_peft"))]
    names = {name.strip() for line in imports for name in line.partition(" import ")[2].split(",")} - {""}
    assert imports and all(line.startswith(("from poet_peft import", "import poet_peft")) for line in imports)
    assert names <= set(poet_peft.__all__)


@pytest.mark.slow
def test_finetune_learns_and_prints_its_numbers(finetuned):
    _, metrics, printed = finetuned
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.02
    assert printed_number(printed, "eval_loss") == round(metrics["eval_loss"], 4)


@pytest.mark.slow
def test_finetune_saves_the_model_that_it_measured(tiny, finetuned):
    output_dir, metrics, _ = finetuned
    tokenizer = byte_tokenizer()
    rows = [json.loads(line) for line in (tiny / "data.jsonl").read_text().splitlines()][-8:]
    held_out = tokenizer([f"Question: {row['question']}\nAnswer: {row['answer']}<eos>" for row in rows])["input_ids"]
    for loader, name in (AutoPeftModelForCausalLM, "."), (AutoModelForCausalLM, "merged"):
        loss, num_tokens = finetune.token_loss(loader.from_pretrained(output_dir / name), held_out)
        assert loss == pytest.approx(metrics["eval_loss"], rel=1e-4)
        assert f"{num_tokens:,} tokens" == metrics["evaluation"][0]["size"]


BAD_JSON = {
    "": "has no rows",
    '{"question": "a", "answer": "b"}\n\n{"question": "c"\n': "line 3 is not JSON",
    '{"question": "a", "answer": "b"}\n[1]\n': "line 2 is a JSON list, not an object",
    '{"question": "a"}\n{"question": "b"}\n': "'answer' is no column of every row",
    '{"question": "a", "answer": "b"}\n{"question": "c"}\n{"question": "c"}\n': "'answer' is no column of every row",
    '{"question": "a", "answer": "b"}\n': "has 1 rows: pass --test_data",
}


@pytest.mark.parametrize(("text", "message"), BAD_JSON.items(), ids=BAD_JSON.values())
def test_finetune_refuses_a_bad_file_before_a_model_is_loaded(text, message, tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text(text)
    flags = ["--data", tmp_path / "data.jsonl", "--num_test_rows", 1, "--output_dir", tmp_path]
    assert message in refused(finetune, flags, monkeypatch)


def test_finetune_says_how_to_do_without_a_hub(tmp_path, monkeypatch):
    assert "--data train.jsonl" in refused(finetune, ["--output_dir", tmp_path], monkeypatch)


@pytest.mark.parametrize("example", [finetune, classify, pretrain], ids=lambda example: example.__name__)
def test_settings_that_cannot_be_are_refused_before_a_model_is_loaded(example, tmp_path, monkeypatch):
    assert "block_size=1 must be" in refused(example, ["--block_size", 1, "--output_dir", tmp_path], monkeypatch)


@pytest.mark.parametrize("example", [finetune, classify, pretrain], ids=lambda example: example.__name__)
def test_block_size_that_is_no_integer_is_refused(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [example.__name__, "--block_size", "33.7", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        example.main()
    assert "argument --block_size/--block-size: invalid int value: '33.7'" in capsys.readouterr().err


@pytest.mark.slow
def test_finetune_default_model(forks, tmp_path):
    write_questions(tmp_path / "data.jsonl")
    small = ["--max_steps", 2, "--num_test_rows", 2, "--learning_rate", 1e-3]
    metrics, _ = run(forks, finetune, "--data", tmp_path / "data.jsonl", "--output_dir", tmp_path, *small)
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
def classified(forks, tiny_classifier, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("classified")
    files = ["--data", tiny_classifier / "train.tsv", "--test_data", tiny_classifier / "test.tsv"]
    small = ["--model", tiny_classifier / "model", "--block_size", 8, "--poet_lr", 1e-2, "--num_train_epochs", 8]
    return output_dir, *run(forks, classify, *files, *small, "--output_dir", output_dir)


@pytest.mark.slow
def test_classify_learns(classified):
    _, metrics, printed = classified
    assert metrics["eval_accuracy_before"] < 0.8 < metrics["eval_accuracy"]
    assert printed_number(printed, "eval_accuracy") == round(metrics["eval_accuracy"], 4)


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
    ("name", "content", "first"),
    [
        ("two.tsv", 'a "good" one\t1\n', {"text": 'a "good" one', "label": "1"}),
        ("named.tsv", "sentence\tlabel\nNA\t0\n", {"sentence": "NA", "label": "0"}),
        ("pair.csv", 'a,label,b\n"one, two",yes,three\n', {"a": "one, two", "label": "yes", "b": "three"}),
    ],
)
def test_tables_are_read_as_text(tmp_path, name, content, first):
    (tmp_path / name).write_text(content)
    assert example_tools.read_table(tmp_path / name)[0] == first


BAD_TABLES = {
    "": "no data",
    "good,1\nbad,and,worse,0\n": "line 2",
    "good,1\nbad\n": "row 2 is not text, label",
}


@pytest.mark.parametrize(("text", "message"), BAD_TABLES.items(), ids=BAD_TABLES.values())
def test_classify_refuses_a_bad_file_before_a_model_is_loaded(text, message, tmp_path, monkeypatch):
    (tmp_path / "data.csv").write_text(text)
    flags = ["--data", tmp_path / "data.csv", "--test_data", tmp_path / "data.csv", "--output_dir", tmp_path]
    assert message in refused(classify, flags, monkeypatch)


def test_classify_refuses_labels_that_were_not_trained(tmp_path):
    (tmp_path / "train.csv").write_text("good,1\nbad,0\n")
    (tmp_path / "test.csv").write_text("fine,2\n")
    with pytest.raises(SystemExit, match=r"has labels that .* has not: \['2'\]"):
        example_tools.read_labelled(str(tmp_path / "train.csv"), None, str(tmp_path / "test.csv"), "test")


def test_classify_needs_test_data_with_a_file(tmp_path):
    (tmp_path / "train.csv").write_text("good,1\n")
    with pytest.raises(SystemExit, match="needs --test_data"):
        example_tools.read_labelled(str(tmp_path / "train.csv"), None, None, "test")


# Pretraining


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with JSON lines of text, and the sizes of a tiny Llama."""
    directory = tmp_path_factory.mktemp("corpus")
    rows = [{"text": f"Line {i} of a text about {i % 7} things.\n" * 8} for i in range(60)]
    (directory / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    return directory


def pretrain_flags(corpus, output_dir):
    data = ["--data", corpus / "text.jsonl", "--seq_length", 32, "--max_eval_sequences", 4, "--vocab_size", 300]
    model = ["--model_config", corpus / "config.json", "--block_size", 8]
    return [*data, *model, "--max_steps", 5, "--eval_steps", 5, "--output_dir", output_dir]


@pytest.fixture(scope="module")
def pretrained(forks, corpus, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("pretrained")
    saves = ["--save_strategy", "steps", "--save_steps", 5]
    return output_dir, *run(forks, pretrain, *pretrain_flags(corpus, output_dir), *saves)


@pytest.mark.slow
def test_pretraining_run_that_is_finished_ends_where_it_ended(forks, corpus, pretrained):
    output_dir, metrics, _ = pretrained
    weights = load_file(output_dir / "model.safetensors")
    saves = ["--save_strategy", "steps", "--save_steps", 5, "--resume_from_checkpoint", "true"]
    again, printed = run(forks, pretrain, *pretrain_flags(corpus, output_dir), *saves)
    assert "nothing is left to train" in printed
    assert_same_state(load_file(output_dir / "model.safetensors"), weights)
    assert again["eval_loss"] == metrics["eval_loss"]
    assert again["train_tokens"] == metrics["train_tokens"]


@pytest.mark.slow
def test_pretraining_saves_the_model_that_it_measured(corpus, pretrained, tmp_path):
    output_dir, metrics, _ = pretrained
    _, held_out = example_tools.corpus(str(corpus / "text.jsonl"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output_dir)
    sequences = example_tools.pack(held_out, tokenizer, 32)["input_ids"][:4]
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    assert finetune.token_loss(model, sequences)[0] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_pretraining_refuses_another_optimizer(corpus, tmp_path, monkeypatch):
    message = refused(pretrain, [*pretrain_flags(corpus, tmp_path), "--optim", "sgd"], monkeypatch)
    assert "--optim sgd: this trains with RotationMuon" in message


def test_pretraining_refuses_text_that_fills_no_sequence(corpus, tmp_path, monkeypatch):
    flags = [*pretrain_flags(corpus, tmp_path), "--seq_length", 100_000]
    assert "does not fill one sequence" in refused(pretrain, flags, monkeypatch)


def test_pretraining_refuses_data_without_text(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text('{"question": "a"}\n')
    flags = ["--data", tmp_path / "data.jsonl", "--output_dir", tmp_path]
    assert "no column `text`, but ['question']" in refused(pretrain, flags, monkeypatch)


def test_standard_library_is_held_out_by_whole_files():
    train, held_out = example_tools.corpus()
    assert len(held_out) == round((len(train) + len(held_out)) / 20)
    assert not set(train["text"]) & {text for text in held_out["text"] if text}


# The loop


@pytest.fixture
def loop(forks):
    return functools.partial(forks.run, EXAMPLES / "training_loop.py")


@pytest.fixture(scope="module")
def looped(forks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("loop")
    flags = "--max_steps", 5, "--save_steps", 2, "--merge_interval", 2, "--output_dir", directory / "run"
    finished = forks.run(EXAMPLES / "training_loop.py", *flags)
    assert finished.returncode == 0, finished.stderr
    return directory / "run", flags, finished.stdout


@pytest.mark.slow
def test_loop_saves_its_end_and_goes_no_further(loop, looped):
    directory, flags, printed = looped
    assert {path.name for path in directory.iterdir()} == {"step-2", "step-4", "step-5"}
    assert loop(*flags).stdout.splitlines() == printed.splitlines()[-1:]


@pytest.mark.slow
def test_loop_ignores_what_is_no_checkpoint_of_its_own(loop, looped):
    directory, flags, printed = looped
    for name in ("step-last", "step-9-old"):
        (directory / name).mkdir()
    assert loop(*flags).stdout.splitlines() == printed.splitlines()[-1:]


@pytest.mark.slow
def test_loop_refuses_the_directory_of_a_run_with_other_flags(loop, looped):
    _, flags, _ = looped
    finished = loop(*flags, "--seed", 1)
    assert finished.returncode == 1
    assert "'seed': 0" in finished.stderr and "choose another --output_dir" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("flag", ["--max_steps", "--save_steps", "--merge_interval", "--accumulation"])
def test_loop_refuses_counts_below_one(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training_loop.py", flag, "0"])
    with pytest.raises(SystemExit):
        training_loop.main()
    assert f"argument {flag}: invalid positive value: '0'" in capsys.readouterr().err


# The page


def test_readme_of_the_examples_shows_every_example_and_what_its_run_said():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.examples", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"({path.name})" in readme for path in EXAMPLES.glob("*.py"))
