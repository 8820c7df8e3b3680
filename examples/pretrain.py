"""Pretrain a small Llama from scratch with POET, or with AdamW on the same data, initial weights and schedule.

    python examples/pretrain.py                                           # POET, a few minutes on two CPU cores
    python examples/pretrain.py --poet_lr 0 --output_dir frozen           # control: the linear layers never learn
    python examples/pretrain.py --method adamw --output_dir adamw
    accelerate launch examples/pretrain.py --dataset allenai/c4 --dataset_config en --streaming --model_config 60m \\
        --vocab_size 32000 --per_device_train_batch_size 128 --max_steps 100000 --bf16
    python examples/pretrain.py --push_to_hub --hub_model_id user/name   # nothing is uploaded without --push_to_hub

Without flags it needs neither network nor data: it reads the source of the Python standard library that it runs on,
without its tests and its generated tables, and holds out 5 % of the files. All `TrainingArguments` flags work.
`output_dir` receives a plain transformers checkpoint, `metrics.json`, `loss.png` and, from POET, a model card.
"""

import hashlib
import itertools
import json
import math
import platform
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import datasets
import matplotlib
import peft
import torch
import transformers
from huggingface_hub import HfApi
from poet_peft.initialization import initialize_base_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.hf_argparser import HfArg

import poet_peft
from poet_peft import POETCallback, POETConfig, latest_checkpoint, poet_param_groups
from poet_peft.model_card import create_model_card, hardware, json_config


# Hidden size, intermediate size, layers, heads: the Llamas of the POET paper, and GaLore's 20m. Their names count a
# vocabulary of 32 000; with the default 2 048, 20m has 4.2 million parameters.
PRESETS = {
    "20m": (256, 688, 4, 4),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1.3b": (2048, 5461, 24, 32),
}
METHODS = {  # flags that belong to one method, and their defaults
    "poet": {"variant": "block_stochastic", "block_size": 256.0, "merge_interval": 200, "poet_lr": 1e-3},
    "adamw": {"matrix_lr": 1e-3},
}
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
END_OF_TEXT = "<|endoftext|>"


@dataclass
class ExampleArguments:
    method: Literal["poet", "adamw"] = "poet"
    base_init: str = HfArg(default="normalized", help="initial linear weights of both methods, see POETConfig")
    variant: str | None = HfArg(default=None, help="poet: block_stochastic or fully_stochastic")
    block_size: float | None = HfArg(default=None, help="poet: features, or below 1 a fraction of them")
    merge_interval: int | None = HfArg(default=None, help="poet: optimizer steps between folds; 0: never")
    poet_lr: float | None = HfArg(default=None, help="poet: learning rate of the rotations; 0 freezes them")
    matrix_lr: float | None = HfArg(default=None, help="adamw: learning rate of the linear layers but the head")
    model_config: str = HfArg(default="20m", help=f"{', '.join(PRESETS)}, or the path of a config JSON")
    vocab_size: int = 2048
    seq_length: int = 256
    text_files: list[str] | None = HfArg(default=None, help="read these files instead of the standard library")
    dataset: str | None = HfArg(default=None, help="read this Hugging Face data set (its train split) instead")
    dataset_config: str | None = None
    text_column: str = "text"
    streaming: bool = HfArg(default=False, help="tokenize the data set during training, in its own order")
    max_eval_sequences: int = HfArg(default=256, help="of the held-out text")


@dataclass
class TrainArguments(transformers.TrainingArguments):
    output_dir: str = "pretrain-output"
    max_steps: int = 400
    per_device_train_batch_size: int = 4
    learning_rate: float = HfArg(default=1e-2, help="of everything but the linear layers: embeddings, norms, head")
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine_with_min_lr"
    logging_first_step: bool = True
    logging_steps: float = 10
    eval_strategy: str = "steps"
    eval_steps: float = 100
    eval_on_start: bool = True
    save_strategy: str = "no"
    report_to: str = "none"
    hub_strategy: str = HfArg(default="end", help="only end: the plain model is uploaded once it is whole")
    use_cpu: bool = not torch.accelerator.is_available()  # what torchrun needs on CPUs
    dataloader_pin_memory: bool = torch.accelerator.is_available()
    include_num_input_tokens_seen: str = "all"


def parse_arguments():
    parser = transformers.HfArgumentParser((ExampleArguments, TrainArguments))
    args, train_args = parser.parse_args_into_dataclasses()
    for method, defaults in METHODS.items():
        for name, default in defaults.items():
            given = getattr(args, name)
            if method == args.method:
                setattr(args, name, default if given is None else given)
            elif given is not None:
                raise ValueError(f"--{name} {given} belongs to --method {method}, and this is --method {args.method}")
    if args.dataset and args.text_files:
        raise ValueError(f"--dataset {args.dataset} and --text_files were both given: choose one")
    if args.vocab_size < 257:
        raise ValueError(f"--vocab_size {args.vocab_size} is too small: 256 bytes and {END_OF_TEXT} make 257")
    if train_args.push_to_hub and args.method != "poet":
        raise ValueError(f"--push_to_hub needs --method poet: there is no model card for --method {args.method}")
    if train_args.push_to_hub and train_args.hub_strategy != "end":
        raise ValueError(
            f"--hub_strategy {train_args.hub_strategy.value} would mix adapter files with the plain model: use end"
        )
    if train_args.lr_scheduler_type == "cosine_with_min_lr" and not train_args.lr_scheduler_kwargs:
        train_args.lr_scheduler_kwargs = {"min_lr_rate": 0.01}
    return args, train_args


def digest(text):
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


class Again(torch.utils.data.IterableDataset):
    """What a generator function yields, as often as it is iterated over."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __iter__(self):
        return self.function(*self.arguments)


def dataset_texts(rows, column, held_out):
    for row in rows:
        if (int.from_bytes(digest(row[column]), "big") % 20 == 0) == held_out:
            yield row[column]


def read_texts(args):
    """Training texts and held-out texts. Which is which depends on names (files) or contents (data sets) only."""
    if args.dataset:
        rows = datasets.load_dataset(args.dataset, args.dataset_config, split="train", streaming=args.streaming)
        columns = list(next(iter(rows)))
        if args.text_column not in columns:
            raise ValueError(
                f"{args.dataset} has no column {args.text_column!r}: --text_column can be one of {columns}"
            )
        return [Again(dataset_texts, rows, args.text_column, held_out) for held_out in (False, True)]
    if args.text_files:
        files = {path: Path(path) for path in sorted(set(args.text_files))}
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.py"))}
        files = {name: path for name, path in files.items() if not NOT_READ & set(Path(name).parts)}
        if not files:
            raise ValueError(f"no Python source under {root}: pass --text_files or --dataset")
    texts = {name: path.read_text("utf-8", "replace") for name, path in files.items()}
    if len(texts) < 20:  # too few to hold out a twentieth of the files: the end of each one instead
        cuts = [(text, len(text) * 19 // 20) for text in texts.values()]
        return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]
    held_out = set(sorted(texts, key=digest)[: round(len(texts) / 20)])
    return [t for name, t in texts.items() if name not in held_out], [texts[name] for name in sorted(held_out)]


def train_tokenizer(texts, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def pack(texts, tokenizer, seq_length):
    """Sequences of `seq_length` tokens from texts joined by end-of-text tokens; an incomplete last one is dropped."""
    texts, tokens = iter(texts), []
    while some := list(itertools.islice(texts, 256)):
        for ids in tokenizer(some)["input_ids"]:
            tokens += ids + [tokenizer.eos_token_id]
        num_full = len(tokens) // seq_length * seq_length
        for ids in torch.tensor(tokens[:num_full]).view(-1, seq_length):
            yield {"input_ids": ids, "labels": ids}
        tokens = tokens[num_full:]


def build_model(args, tokenizer):
    if args.model_config in PRESETS:
        names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
        settings = dict(zip(names, PRESETS[args.model_config], strict=True))
    elif Path(args.model_config).is_file():
        settings = json.loads(Path(args.model_config).read_text())
    else:
        raise ValueError(f"--model_config {args.model_config}: neither one of {', '.join(PRESETS)} nor a JSON file")
    config = AutoConfig.for_model(settings.pop("model_type", "llama"), **settings)
    config.vocab_size = len(tokenizer)
    config.max_position_embeddings = max(1024, args.seq_length)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig.from_model_config(config)
    return model


def linear_weights(model):
    head = model.get_output_embeddings()
    return [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def adamw_groups(model, lr, matrix_lr, weight_decay):
    """The groups of `poet_param_groups`, with the linear layers in the place of their rotations."""
    linear, head = linear_weights(model), model.get_output_embeddings().weight
    others = {id(p) for p in [*linear, head]}
    return [
        {"params": linear, "lr": matrix_lr, "weight_decay": weight_decay},
        {"params": [head], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in others], "lr": lr, "weight_decay": 0.0},
    ]


def peak_memory_mb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def describe(args, metrics):
    """What the model card needs to know beside what was measured; see poet_peft/model_card.py."""
    if args.dataset:
        source = f"Column `{args.text_column}` of the Hub's data set `{args.dataset}`."
        data = {"name": args.dataset, "id": args.dataset, "config": args.dataset_config, "split": "train"}
        chosen = "5 % of the rows, chosen by a hash of their text"
    elif args.text_files:
        names = sorted({Path(path).name for path in args.text_files})
        data, source = {"name": f"{len(set(args.text_files))} text files"}, f"Local files: {', '.join(names)}."
        chosen = "5 % of the text: whole files, or the end of each one if they are fewer than 20"
    else:
        data = {"name": "Python standard library"}
        source = f"Source code of CPython {metrics['versions']['python']}, without its tests and its generated tables."
        chosen = "5 % of the files, chosen by a hash of their names"
    held_out = data | {"split": "held out", "source": f"{source} Held out of training: {chosen}."}
    size = f"{metrics['eval_tokens']:,} tokens"
    per_parameter = metrics["train_tokens"] / metrics["parameters"]["model"]
    return {
        "task": "text-generation",
        "base_model": None,
        "data": data | {"source": source},
        "evaluation": [
            {"metric": metric, "name": name, "value": metrics[f"eval_{metric}"], "data": held_out, "size": size}
            for metric, name in (("loss", "Cross-entropy (nats per token)"), ("perplexity", "Perplexity"))
        ],
        "limits": [f"Trained on {per_parameter:.2g} tokens per parameter. Compute-optimal training takes about 20."],
    }


def plot(log, final_loss, title, path):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key, label, style in ("loss", "training", "-"), ("eval_loss", "held-out text", "o-"):
        points = [(entry["num_input_tokens_seen"], entry[key]) for entry in log if key in entry]
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    axes.axhline(final_loss, color="gray", linestyle="--", linewidth=1, label=f"held-out text, end: {final_loss:.3f}")
    axes.set(xlabel="training tokens", ylabel="cross-entropy (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    start = time.perf_counter()
    args, train_args = parse_arguments()
    texts, held_out_texts = read_texts(args)
    tokenizer = train_tokenizer(itertools.islice(texts, 50_000), args.vocab_size)
    held_out = list(itertools.islice(pack(held_out_texts, tokenizer, args.seq_length), args.max_eval_sequences))
    train_set = Again(pack, texts, tokenizer, args.seq_length)
    if not args.streaming:
        train_set = list(train_set)
    if not held_out or next(iter(train_set), None) is None:
        raise ValueError(
            f"the text does not fill one sequence of --seq_length {args.seq_length}: pass more or lower it"
        )

    transformers.set_seed(train_args.seed)
    model = build_model(args, tokenizer)
    num_total = model.num_parameters()
    num_rest = num_total - sum(p.numel() for p in linear_weights(model))
    lr, decay = train_args.learning_rate, train_args.weight_decay
    method_config = None
    if args.method == "poet":
        config = POETConfig.for_pretraining(
            variant=args.variant,
            block_size=args.block_size if args.block_size < 1 else int(args.block_size),
            merge_interval=args.merge_interval,
            base_init=args.base_init,
            seed=train_args.seed,
        )
        method_config = json_config(config)
        model = peft.get_peft_model(model, config)
        groups = poet_param_groups(model, lr=lr, poet_lr=args.poet_lr, weight_decay=decay)
    else:
        initialize_base_weights(model, args.base_init, seed=train_args.seed)
        groups = adamw_groups(model, lr, args.matrix_lr, decay)
    num_trained = model.num_parameters(only_trainable=True)

    optimizer_cls, optimizer_kwargs = Trainer.get_optimizer_cls_and_kwargs(train_args, model)
    trainer = Trainer(
        model=model,
        args=train_args,
        train_dataset=train_set,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
        optimizers=(optimizer_cls(groups, **optimizer_kwargs), None),
    )
    resume = train_args.resume_from_checkpoint
    if resume in ("True", "true"):
        resume = latest_checkpoint(train_args.output_dir) if args.method == "poet" else True
    if args.method == "poet":
        POETCallback().attach(trainer)
    train_output = trainer.train(resume_from_checkpoint=resume)
    loss = trainer.evaluate()["eval_loss"]
    memory = peak_memory_mb()

    plain = model.merge_and_unload() if args.method == "poet" else model
    output_dir = Path(train_args.output_dir)
    if trainer.is_world_process_zero():
        plain.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
    trainer.accelerator.wait_for_everyone()
    reloaded = AutoModelForCausalLM.from_pretrained(output_dir)
    reloaded_loss = Trainer(model=reloaded, args=train_args, eval_dataset=held_out).evaluate()["eval_loss"]
    if not math.isclose(loss, reloaded_loss, rel_tol=1e-3):
        raise RuntimeError(f"{output_dir} evaluates to {reloaded_loss}, the trained model to {loss}")
    if not trainer.is_world_process_zero():
        return

    metrics = {
        "method": args.method,
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss),
        "eval_loss_reloaded": reloaded_loss,
        "eval_tokens": len(held_out) * args.seq_length,
        "train_loss": train_output.training_loss,
        "train_tokens": trainer.state.num_input_tokens_seen,
        "parameters": {"model": num_total, "trained": num_trained, "trained_in_linear_layers": num_trained - num_rest},
        "peak_memory_mb": memory,
        "train_seconds": train_output.metrics["train_runtime"],
        "seconds": time.perf_counter() - start,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, poet_peft)}
        | {"python": platform.python_version()},
        "hardware": hardware(),
        "config": method_config,
        "settings": asdict(args) | train_args.to_sanitized_dict(),
        "log": trainer.state.log_history,
    }
    metrics |= describe(args, metrics)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
    if args.method == "poet":
        create_model_card(metrics, trainer.hub_model_id or str(output_dir), "merged").save(output_dir / "README.md")
    title = f"{args.method}, {num_total / 1e6:.1f}M parameters, {num_trained / 1e6:.1f}M trained"
    plot(trainer.state.log_history, loss, title, output_dir / "loss.png")

    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    prompt = held_out[0]["input_ids"][None, :16].to(reloaded.device)
    sample = reloaded.generate(prompt, max_new_tokens=64, do_sample=True, temperature=0.7)
    print(f"""
--- sample of the reloaded checkpoint, after {tokenizer.decode(prompt[0])!r}
{tokenizer.decode(sample[0, 16:])}
---
method        {args.method}
parameters    {num_total:,}, trained {num_trained:,}, of them in the linear layers {num_trained - num_rest:,}
training      {metrics["train_tokens"]:,} tokens, {metrics["seconds"]:.0f} s in all, peak memory {memory:,.0f} MB
validation    loss {loss:.4f}, perplexity {math.exp(loss):.2f} on {metrics["eval_tokens"]:,} held-out tokens
written to    {output_dir}""")
    if train_args.push_to_hub:
        commit = HfApi(token=train_args.hub_token).upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=output_dir,
            commit_message="Pretrained with POET",
            revision=train_args.hub_revision,
            ignore_patterns=["checkpoint-*"],
        )
        print(f"uploaded to   {commit.repo_url}")


if __name__ == "__main__":
    main()
