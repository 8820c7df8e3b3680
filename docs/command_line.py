"""Run the commands of command-line.md on a small run, and put what they print into the page.

    python docs/command_line.py            # rewrites the outputs in docs/command-line.md

Every block of the page that begins with `$ poet-peft` is run, in the order of the page, in a directory that has a base
model and a run of four steps with folds, on made-up words. What follows the command in the block is replaced.
"""

import contextlib
import io
import os
import re
import shlex
import tempfile
import warnings
from pathlib import Path

import tokenizers
import torch
import transformers
from peft import get_peft_model

import poet_peft
from poet_peft.cli import app


PAGE = Path(__file__).with_name("command-line.md")
BLOCK = re.compile(r"(?<=^```console\n)\$ (?P<command>poet-peft .+)\n(?P<output>(?:.*\n)*?)(?=^```$)", re.MULTILINE)
WORDS = ["the", "of", "and", "a", "to", "in", "is", "it", "that", "for", "<pad>"]


def make_base():
    """A Llama of two layers and its tokenizer, in the folder base."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained("base")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>").save_pretrained("base")


def train(output_dir, **settings):
    """Four steps with a checkpoint after every second one."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    model = get_peft_model(base, poet_peft.POETConfig(target_modules="all-linear", block_size=16, **settings))
    rows = torch.randint(len(WORDS) - 1, (32, 12), generator=torch.Generator().manual_seed(1))
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir, max_steps=4, save_steps=2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=poet_peft.poet_optimizer(lr=1e-3, poet_lr=1e-2),
        callbacks=[poet_peft.POETCallback()],
    )
    trainer.train()
    trainer.save_model()


def run(command):
    """What a command prints, on either stream, and then its exit code where that is not 0."""
    printed = io.StringIO()
    arguments = shlex.split(command)[1:]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            app.main(arguments)
        except SystemExit as end:
            code = end.code
    text = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines() if "it/s]" not in line)
    return text + (f"(exit code {code})\n" if code else "")


def outputs(page):
    """The page with the output of every command as it is here and now."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        before = Path.cwd()
        os.chdir(directory)
        try:
            make_base()
            for output_dir, settings in (("run", {}), ("run-with-folds", {"merge_interval": 2})):
                with contextlib.redirect_stdout(io.StringIO()):
                    train(output_dir, **settings)
            file = Path("run/checkpoint-2/adapter_model.safetensors")
            Path("damaged").mkdir()
            for name in ("adapter_config.json", file.name):
                content = (file.parent / name).read_bytes()
                Path("damaged", name).write_bytes(content if name != file.name else content[: len(content) // 2])
            return BLOCK.sub(lambda block: f"$ {block['command']}\n{run(block['command'])}", page)
        finally:
            os.chdir(before)


if __name__ == "__main__":
    PAGE.write_text(outputs(PAGE.read_text("utf-8")), "utf-8")
