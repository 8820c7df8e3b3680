"""Pretrain a small Llama from random weights with POET.

    python examples/pretrain.py                                                    # a few minutes on two CPU cores
    python examples/pretrain.py --save_strategy steps --resume_from_checkpoint true        # goes on where it stopped
    accelerate launch examples/pretrain.py --data allenai/c4 --data_config en --streaming --bf16 --max_steps 100000

Without --data it reads the source of the Python standard library. All flags of `TrainingArguments` work. `output_dir`
receives a plain transformers model, its card and `metrics.json`.
"""

import itertools
import math
from dataclasses import dataclass

import example_tools
import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg

import poet_peft


LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
# The best found for 400 steps of this model, see docs/pretraining.md; another model has those of the recipe.
INITIAL_SIZES = {"base_init_scale": 0.35, "base_init_scale_pattern": {"q_proj|k_proj": 3.0, "down_proj": 0.5}}
ANGLE = 0.04


@dataclass
class ExampleArguments:
    data: str | None = HfArg(default=None, help="JSON-lines file or name on the Hub, with a column `text`")
    data_config: str | None = None
    streaming: bool = False
    model_config: str | None = HfArg(default=None, help="config.json or name on the Hub; else a Llama of 4.2M")
    vocab_size: int = 2048
    seq_length: int = 256
    max_eval_sequences: int = 256
    block_size: int = 256
    merge_interval: int = HfArg(default=1, help="steps between folds; above 1 into new blocks, and AdamW trains them")
    angle: float | None = HfArg(
        default=None, help=f"radians by which a step turns the rotations; {ANGLE} for the Llama of 4.2M"
    )


def main():
    parser = transformers.HfArgumentParser((ExampleArguments, TrainingArguments))
    parser.set_defaults(output_dir="pretrain-output", max_steps=400, per_device_train_batch_size=4, learning_rate=2e-2)
    parser.set_defaults(weight_decay=0.01, adam_beta2=0.999, lr_scheduler_type="cosine_with_min_lr")
    parser.set_defaults(lr_scheduler_kwargs={"min_lr_rate": 0.01}, eval_strategy="steps", eval_steps=100)
    parser.set_defaults(logging_steps=10, save_strategy="no", report_to="none", hub_strategy="end")
    parser.set_defaults(include_num_input_tokens_seen=True, dataloader_pin_memory=torch.accelerator.is_available())
    args, train_args = parser.parse_args_into_dataclasses()
    if train_args.push_to_hub and train_args.hub_strategy != "end":
        raise SystemExit(f"pretrain.py: --hub_strategy {train_args.hub_strategy.value} would upload adapters: use end")
    if train_args.optim != parser.get_default("optim"):
        raise SystemExit(f"pretrain.py: --optim {train_args.optim.value}: this trains with RotationMuon")
    if args.angle is None and not args.model_config:
        args.angle = ANGLE
    try:
        chosen = {} if args.model_config else dict(INITIAL_SIZES)
        if args.merge_interval != 1:
            chosen["merge_interval"] = args.merge_interval
        config = poet_peft.POETConfig.for_pretraining(block_size=args.block_size, seed=train_args.seed, **chosen)
        shape = AutoConfig.from_pretrained(args.model_config) if args.model_config else LlamaConfig(**LLAMA)
    except (OSError, ValueError) as error:
        raise SystemExit(f"pretrain.py: {error}") from None
    texts = example_tools.corpus(args.data, args.data_config, args.streaming)
    tokenizer = example_tools.train_tokenizer(texts[0], args.vocab_size)
    train, held_out = (example_tools.pack(rows, tokenizer, args.seq_length) for rows in texts)
    held_out = list(itertools.islice(held_out, args.max_eval_sequences))
    if not held_out or next(iter(train), None) is None:
        raise SystemExit(f"pretrain.py: the text does not fill one sequence of --seq_length {args.seq_length}")

    transformers.set_seed(train_args.seed)
    shape.update({"vocab_size": len(tokenizer), "max_position_embeddings": max(1024, args.seq_length)})
    shape.update(dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id))
    model = AutoModelForCausalLM.from_config(shape)
    parameters = {"model": model.num_parameters()}
    model = peft.get_peft_model(model, config)
    parameters["trained"] = model.num_parameters(only_trainable=True)
    settings = {"lr": train_args.learning_rate, "angle": args.angle, "weight_decay": train_args.weight_decay}
    settings |= {"betas": (train_args.adam_beta1, train_args.adam_beta2), "eps": train_args.adam_epsilon}
    trainer = Trainer(
        model=model,
        args=train_args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
        optimizer_cls_and_kwargs=poet_peft.poet_optimizer(**settings),
        callbacks=[poet_peft.POETCallback()],
    )
    numbers = example_tools.train(trainer) | trainer.evaluate()
    numbers["eval_perplexity"] = math.exp(numbers["eval_loss"])
    trainer.log_metrics("all", numbers)
    trainer.model = model.merge_and_unload()
    trainer.save_model()  # a plain transformers model

    data = {"name": args.data or "Python standard library", "config": args.data_config, "source": "Its text, packed."}
    if args.data is None:
        data["source"] = "Source code of CPython, without its tests and its generated tables."
    held_out_data = data | {"split": "held out"}
    size = f"{len(held_out) * args.seq_length:,} tokens"
    evaluation = [
        {"metric": metric, "name": name, "value": numbers[f"eval_{metric}"], "data": held_out_data, "size": size}
        for metric, name in (("loss", "Cross-entropy (nats per token)"), ("perplexity", "Perplexity"))
    ]
    about = {"base_model": None, "data": data, "evaluation": evaluation, "parameters": parameters}
    example_tools.publish(trainer, "merged", config, args, **numbers, **about)


if __name__ == "__main__":
    main()
