"""What an adapter's scale trades: the loss of the task against that of unrelated prose, at scales from 0 to 1.

    python -m benchmarks.finetune_run --data gsm8k/train.jsonl --test_data gsm8k/test.jsonl --method poet \
        --max_steps 12 --learning_rate 3.4e-3 --output_dir dial-adapter
    python -m benchmarks.dial --adapter dial-adapter --data gsm8k/train.jsonl --test_data gsm8k/test.jsonl \
        --out benchmarks/results/dial.json

The texts are those of `finetune_run`. Writes the file after every scale.
"""

import argparse
import json
import math
import platform
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel
from peft.helpers import rescale_adapter_scale

import poet_peft
from benchmarks.finetune_run import Arguments, load, read_prose
from benchmarks.harness.examples import example_tools, token_loss


MAX_LENGTH = 512
SETTINGS = ("learning_rate", "max_steps", "per_device_train_batch_size", "block_size", "variant", "seed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="the output_dir of a run of finetune_run")
    parser.add_argument("--data", required=True, help="JSON lines that it was trained on")
    parser.add_argument("--test_data", help="held-out JSON lines")
    parser.add_argument("--num_test_rows", type=int, default=32)
    parser.add_argument("--num_prose_tokens", type=int, default=4096)
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--out", required=True, help="JSON file to write")
    args = parser.parse_args()

    metrics = json.loads((Path(args.adapter) / "metrics.json").read_text())
    _, test = example_tools.read_texts(args.data, None, args.test_data, args.num_test_rows, Arguments.template)
    model, tokenizer = load(metrics["settings"]["model"])
    texts = [text + tokenizer.eos_token for text in test["text"]]
    held_out = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    prose = tokenizer(read_prose(None))["input_ids"][: args.num_prose_tokens]
    prose = [prose[i : i + MAX_LENGTH] for i in range(0, len(prose), MAX_LENGTH)]
    model = PeftModel.from_pretrained(model, args.adapter).eval()

    modules = torch, transformers, peft, poet_peft
    result = {
        "versions": {m.__name__: m.__version__ for m in modules} | {"python": platform.python_version()},
        "training": {name: metrics["settings"][name] for name in SETTINGS},
        "rows": [],
    }
    for scale in args.scales:
        with rescale_adapter_scale(model, scale), torch.no_grad():
            loss, num_tokens = token_loss(model, held_out)
            prose_loss, num_prose_tokens = token_loss(model, prose)
        result |= {"eval_tokens": num_tokens, "prose_tokens": num_prose_tokens}
        row = {"scale": scale, "eval_loss": loss, "prose_perplexity": math.exp(prose_loss)}
        result["rows"].append(row)
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
