"""The losses of forms of one fine-tuned adapter, on the task that it learned and on unrelated prose."""

import json
import math
import platform
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel

import poet_peft
from benchmarks.finetune_run import Arguments, load, read_prose

from .examples import example_tools, token_loss


MAX_LENGTH = 512
SETTINGS = ("learning_rate", "max_steps", "per_device_train_batch_size", "block_size", "variant", "seed")


class AdapterLosses:
    """Measures models on the texts of `finetune_run`, and writes the result file after each.

    Args:
        args: what a parser with `add_arguments` returns.
    """

    def __init__(self, args):
        self.adapter, self.out = args.adapter, Path(args.out)
        metrics = json.loads((Path(args.adapter) / "metrics.json").read_text())
        self.model_name = metrics["settings"]["model"]
        _, test = example_tools.read_texts(args.data, None, args.test_data, args.num_test_rows, Arguments.template)
        _, tokenizer = load(self.model_name)
        texts = [text + tokenizer.eos_token for text in test["text"]]
        self.held_out = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        prose = tokenizer(read_prose(None))["input_ids"][: args.num_prose_tokens]
        self.prose = [prose[i : i + MAX_LENGTH] for i in range(0, len(prose), MAX_LENGTH)]
        modules = torch, transformers, peft, poet_peft
        self.result = {
            "versions": {m.__name__: m.__version__ for m in modules} | {"python": platform.python_version()},
            "training": {name: metrics["settings"][name] for name in SETTINGS},
            "rows": [],
        }

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--adapter", required=True, help="the output_dir of a run of finetune_run")
        parser.add_argument("--data", required=True, help="JSON lines that it was trained on")
        parser.add_argument("--test_data", help="held-out JSON lines")
        parser.add_argument("--num_test_rows", type=int, default=32)
        parser.add_argument("--num_prose_tokens", type=int, default=4096)
        parser.add_argument("--out", required=True, help="JSON file to write")

    def base_model(self):
        return load(self.model_name)[0].eval()

    def load_adapter(self):
        return PeftModel.from_pretrained(self.base_model(), self.adapter).eval()

    @torch.no_grad()
    def add(self, model, **about):
        """Measure a model, and keep its losses in a row beside what is said about it."""
        loss, num_tokens = token_loss(model, self.held_out)
        prose_loss, num_prose_tokens = token_loss(model, self.prose)
        self.result |= {"eval_tokens": num_tokens, "prose_tokens": num_prose_tokens}
        row = {**about, "eval_loss": loss, "prose_perplexity": math.exp(prose_loss)}
        self.result["rows"].append(row)
        self.out.write_text(json.dumps(self.result, indent=2) + "\n")
        print(row, flush=True)
