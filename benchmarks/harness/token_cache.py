"""Texts as token ids, kept in a folder that git ignores, so that a run starts in seconds."""

import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .results import UNKEPT


VOCAB_SIZE = 2048
SEQ_LENGTH = 256
NUM_HELD_OUT = 256


@dataclass(frozen=True)
class Tokens:
    """Sequences of token ids, and what a model has to know of the tokenizer.

    Attributes:
        train, held_out: int64, (sequences, length).
        vocab_size: number of tokens.
        eos_token_id: the token between two texts.
    """

    train: Tensor
    held_out: Tensor
    vocab_size: int
    eos_token_id: int


def read_tokens(data, gsm8k=None, cache=UNKEPT / "tokens"):
    """The token ids of "stdlib", the Python standard library, or of "gsm8k".

    Args:
        gsm8k: folder with GSM8K's `train.jsonl` and `test.jsonl`; only for "gsm8k".

    Raises:
        SystemExit: data that is unknown, or whose files are not there.
    """
    if data == "stdlib":
        source = platform.python_version()
    elif data == "gsm8k":
        source = hashlib.sha256(b"".join(path.read_bytes() for path in _gsm8k_files(gsm8k))).hexdigest()[:12]
    else:
        raise SystemExit(f"data {data!r} is unknown: stdlib or gsm8k")
    path = Path(cache) / f"{data}-{source}-{VOCAB_SIZE}-{SEQ_LENGTH}.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save(_tokenize(data, gsm8k), temporary)
        temporary.replace(path)
    kept = torch.load(path)
    return Tokens(kept["train"].long(), kept["held_out"].long(), kept["vocab_size"], kept["eos_token_id"])


def _gsm8k_files(folder):
    if folder is None:
        raise SystemExit("gsm8k needs --gsm8k FOLDER, with train.jsonl and test.jsonl of GSM8K")
    files = [Path(folder) / name for name in ("train.jsonl", "test.jsonl")]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise SystemExit(f"--gsm8k {folder}: {', '.join(missing)} is not there")
    return files


def _tokenize(data, gsm8k):
    from .examples import example_tools  # imports all that the examples need

    if data == "stdlib":
        train, held_out = example_tools.corpus()
    else:
        train, held_out = map(_problems, _gsm8k_files(gsm8k))
    tokenizer = example_tools.train_tokenizer(train, VOCAB_SIZE)
    packed = [example_tools.pack(rows, tokenizer, SEQ_LENGTH) for rows in (train, held_out)]
    sequences = [torch.tensor([row["input_ids"] for row in rows], dtype=torch.int16) for rows in packed]
    return {
        "train": sequences[0],
        "held_out": sequences[1][:NUM_HELD_OUT],
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }


def _problems(path):
    from datasets import Dataset

    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return Dataset.from_dict({"text": [f"{row['question']}\n{row['answer']}" for row in rows]})
