"""One pretraining run as `examples/pretrain.py` does it, by POET, by AdamW, or with linear layers that never learn.

    python -m benchmarks.pretrain --output_dir poet
    python -m benchmarks.pretrain --output_dir frozen --poet_lr 0                       # control
    python -m benchmarks.pretrain --output_dir adamw --method adamw --matrix_lr 1e-3
    python -m benchmarks.tables --keep pretrain-poet-42 poet

All methods have the same data, initial weights and schedule. All flags of `TrainingArguments` work. `output_dir`
receives `metrics.json` and `loss.png`. Without --data it trains on the source of the Python standard library.
"""

import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg

import poet_peft
from benchmarks.harness.examples import example_tools
from benchmarks.harness.llama import PRESETS
from poet_peft import POETConfig


METHODS = {  # flags that belong to one method, and their defaults
    "poet": {"variant": "block_stochastic", "block_size": 256.0, "merge_interval": 200, "poet_lr": 1e-3},
    "adamw": {"matrix_lr": 1e-3},
}


@dataclass
class Arguments:
    method: Literal["poet", "adamw"] = "poet"
    base_init: str = HfArg(default="normalized", help="initial linear weights of both methods, see POETConfig")
    variant: str | None = HfArg(default=None, help="poet: block_stochastic or fully_stochastic")
    block_size: float | None = HfArg(default=None, help="poet: features, or below 1 a fraction of them")
    merge_interval: int | None = HfArg(default=None, help="poet: optimizer steps between folds; 0: never")
    adaptive_terms: bool = HfArg(default=True, help="poet: False is the paper's series")
    poet_lr: float | None = HfArg(default=None, help="poet: learning rate of the rotations; 0 freezes them")
    matrix_lr: float | None = HfArg(default=None, help="adamw: learning rate of the linear layers but the head")
    model_config: str = HfArg(default="20m", help=", ".join(PRESETS))
    vocab_size: int = 2048
    seq_length: int = 256
    max_eval_sequences: int = HfArg(default=256, help="of the held-out text")
    data: str | None = HfArg(default=None, help="JSON-lines file or name on the Hub, with a column `text`")
    data_config: str | None = None
    streaming: bool = False


def parse_arguments():
    parser = transformers.HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(output_dir="pretrain-output", max_steps=400, per_device_train_batch_size=4)
    parser.set_defaults(learning_rate=1e-2, weight_decay=0.01, lr_scheduler_type="cosine_with_min_lr")
    parser.set_defaults(lr_scheduler_kwargs={"min_lr_rate": 0.01}, logging_first_step=True, logging_steps=10)
    parser.set_defaults(eval_strategy="steps", eval_steps=100, eval_on_start=True, save_strategy="no")
    parser.set_defaults(report_to="none", include_num_input_tokens_seen=True)
    parser.set_defaults(dataloader_pin_memory=torch.accelerator.is_available())
    args, train_args = parser.parse_args_into_dataclasses()
    for method, defaults in METHODS.items():
        for name, default in defaults.items():
            given = getattr(args, name)
            if method == args.method:
                setattr(args, name, default if given is None else given)
            elif given is not None:
                parser.error(f"--{name} {given} belongs to --method {method}, and this is --method {args.method}")
    return args, train_args


def read_data(args):
    """The tokenizer, training sequences and held-out sequences."""
    train_texts, held_out_texts = example_tools.corpus(args.data, args.data_config, args.streaming)
    tokenizer = example_tools.train_tokenizer(train_texts, args.vocab_size)
    train, held_out = (example_tools.pack(t, tokenizer, args.seq_length) for t in (train_texts, held_out_texts))
    return tokenizer, train, list(islice(held_out, args.max_eval_sequences))


def build_model(args, tokenizer):
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    sizes = dict(zip(names, PRESETS[args.model_config], strict=True))
    length = max(1024, args.seq_length)
    config = LlamaConfig(**sizes, **special, vocab_size=len(tokenizer), max_position_embeddings=length)
    return LlamaForCausalLM(config)


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


def plot(log, final_loss, title, path):
    import matplotlib

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
    tokenizer, train, held_out = read_data(args)
    transformers.set_seed(train_args.seed)
    model = build_model(args, tokenizer)
    num_total = model.num_parameters()
    num_rest = num_total - sum(p.numel() for p in linear_weights(model))
    lr, decay = train_args.learning_rate, train_args.weight_decay
    method_config = None
    if args.method == "poet":
        config = POETConfig.for_pretraining(
            variant=args.variant,
            block_size=int(args.block_size) if args.block_size.is_integer() else args.block_size,
            merge_interval=args.merge_interval,
            adaptive_terms=args.adaptive_terms,
            base_init=args.base_init,
            seed=train_args.seed,
        )
        method_config = poet_peft.json_config(config)
        model = peft.get_peft_model(model, config)
        groups = poet_peft.poet_param_groups(model, lr=lr, poet_lr=args.poet_lr, weight_decay=decay)
    else:
        poet_peft.initialize_base_weights(model, args.base_init, seed=train_args.seed)
        groups = adamw_groups(model, lr, args.matrix_lr, decay)
    num_trained = model.num_parameters(only_trainable=True)

    optimizer_cls, settings = Trainer.get_optimizer_cls_and_kwargs(train_args)
    trainer = Trainer(
        model=model,
        args=train_args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
        optimizers=(optimizer_cls(groups, **settings), None),
        callbacks=[poet_peft.POETCallback()] if args.method == "poet" else [],
    )
    trained = example_tools.train(trainer)
    loss = trainer.evaluate()["eval_loss"]
    metrics = {
        "method": args.method,
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss),
        "eval_tokens": len(held_out) * args.seq_length,
        "train_loss": trained.get("train_loss"),
        "train_tokens": trainer.state.num_input_tokens_seen,
        "parameters": {"model": num_total, "trained": num_trained, "trained_in_linear_layers": num_trained - num_rest},
        "peak_memory_mb": peak_memory_mb(),
        "train_seconds": trained.get("train_runtime"),
        "seconds": time.perf_counter() - start,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, poet_peft)}
        | {"python": platform.python_version()},
        "hardware": poet_peft.hardware(),
        "config": method_config,
        "settings": asdict(args) | train_args.to_sanitized_dict(),
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        output_dir = Path(train_args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
        title = f"{args.method}, {num_total / 1e6:.1f}M parameters, {num_trained / 1e6:.1f}M trained"
        plot(trainer.state.log_history, loss, title, output_dir / "loss.png")
        print(f"{args.method}: held-out loss {loss:.4f}, {metrics['seconds']:.0f} s, written to {output_dir}")


if __name__ == "__main__":
    main()
