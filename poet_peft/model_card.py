"""Model cards, filled from the `metrics.json` that a run wrote about itself. Nothing in them is typed by hand.

`metrics.json` is one JSON object. Keys beyond these may be there and are not read.

Required:
    method: "poet". Cards are for runs of this package's method only.
    task: "text-generation" or "text-classification", as the Hub calls them.
    base_model: name on the Hub (or path) of the pretrained model; null if the weights were random.
    data: what it was trained on, as a *data object*: `name` and `source` (a sentence: where it comes from and what was
        done to it), and where they exist `id` (of the data set on the Hub), `config`, `split`.
    config: the `POETConfig`, as `json_config(config)` gives it (what `adapter_config.json` holds).
    settings: hyperparameters under the names of `TrainingArguments` and of the example's flags, such as
        `learning_rate`, `poet_lr`, `max_steps`. The card shows those in `HYPERPARAMETERS` that are not null.
    parameters: `model` and `trained`, counts.
    versions: of `torch`, `transformers`, `peft` and `poet_peft`; more are welcome.
    evaluation: list of results, each with `metric` (the Hub's identifier, such as "perplexity"), `name` (to print),
        `value`, `data` (a data object), and where they exist `size` (such as "65,536 tokens") and `before` (the same
        metric of the model before this training).

Required for text-classification:
    labels: names of the classes, in the order of their indexes.

Optional; the card says "not measured" where one of these is missing, null or NaN:
    train_tokens, train_seconds, peak_memory_mb (of the process, or of the accelerator), hardware (`hardware()`),
    adapter_bytes (size of `adapter_model.safetensors`; not for merged models).

Optional:
    example_input: text that the card's snippet feeds to the model.
    limits: list of sentences about this run that its reader must know, such as how short it was.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData


if TYPE_CHECKING:
    from transformers import Trainer

from .config import POETConfig


KINDS = ("adapter", "merged")
AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
}
HYPERPARAMETERS = (
    "poet_lr",
    "learning_rate",
    "rotation_optimizer",
    "weight_decay",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seq_length",
    "max_length",
    "vocab_size",
    "bf16",
    "fp16",
    "seed",
)
METHOD_SETTINGS = (
    "variant",
    "block_size",
    "block_size_pattern",
    "orthogonal_map",
    "num_neumann_terms",
    "merge_interval",
    "reinit_interval",
    "base_init",
    "train_rest",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "bias",
    "seed",
)
_REQUIRED = {
    "method": 'write "poet"',
    "task": f"write one of {', '.join(map(repr, AUTO_CLASSES))}",
    "base_model": "write the name of the pretrained model, or null if the weights were random",
    "data": "write an object with the name and the source of the training data",
    "data.name": "write what the training data is called",
    "data.source": "write a sentence that says where the training data comes from",
    "config": "write json_config(config) of the POETConfig",
    "settings": "write the hyperparameters, such as learning_rate",
    "parameters": "write the counts 'model' and 'trained'",
    "parameters.model": "write the number of the model's parameters",
    "parameters.trained": "write the number of parameters that trained",
    "versions": "write the versions of torch, transformers, peft and poet_peft",
    "versions.torch": "write torch.__version__",
    "versions.transformers": "write transformers.__version__",
    "versions.peft": "write peft.__version__",
    "versions.poet_peft": "write poet_peft.__version__",
    "evaluation": "write a list of results; one that was not evaluated cannot have a card",
}
_REQUIRED_OF_RESULTS = {
    "metric": "write the Hub's identifier of the metric",
    "name": "write the metric's name as it is to be printed",
    "value": "write what was measured",
    "data": "write an object with the name and the source of the evaluation data",
    "data.name": "write what the evaluation data is called",
    "data.source": "write a sentence that says where the evaluation data comes from",
}


def create_model_card(
    metrics: Mapping[str, Any],
    repo_id: str,
    kind: Literal["adapter", "merged"],
    license: str | None = None,
    language: str | list[str] | None = None,
) -> ModelCard:
    """The model card of a run: what it trained, on what, how, with which result, and a snippet that loads it.

    `card.save(path)` and `card.push_to_hub(repo_id)` are huggingface_hub's; `PeftModel.push_to_hub` keeps a card that
    is already there, `Trainer.push_to_hub` only after `set_model_card`. Save the card after the model:
    PEFT's `save_pretrained` keeps the text of a card that it finds, but replaces its tags.

    Args:
        metrics: what the run wrote to `metrics.json`; see this module's docstring.
        repo_id: where the model will be, "user/name" on the Hub or a local directory. The snippet loads it from there.
        kind: "adapter" for what `PeftModel.save_pretrained` writes; "merged" for a plain transformers model, such as
            `merge_and_unload()` gives, which needs neither PEFT nor this package.
        license: of the model, as the Hub spells it. None leaves it unstated.
        language: ISO code or codes of the training text. None leaves it unstated.

    Raises:
        ValueError: a required key of `metrics` is missing or has a value that no card can be made of. Says which one
            and what belongs there.
    """
    _check(metrics, kind)
    name = repo_id.rstrip("/").rsplit("/", 1)[-1]
    task, data = metrics["task"], metrics["data"]
    card_data = ModelCardData(
        base_model=metrics["base_model"],
        datasets=[data["id"]] if data.get("id") else None,
        eval_results=[_eval_result(task, result) for result in metrics["evaluation"]],
        language=language,
        library_name="peft" if kind == "adapter" else "transformers",
        license=license,
        model_name=name,
        pipeline_tag=task,
        tags=["poet", "poet-peft"],
    )
    return ModelCard.from_template(
        card_data,
        template_str=_template(),
        name=name,
        kind=kind,
        metrics=metrics,
        snippet=_snippet(metrics, repo_id, kind),
        measured=_measured(metrics, kind),
        hyperparameters=_hyperparameters(metrics["settings"]),
        method_settings=_shown(metrics["config"], METHOD_SETTINGS),
        number=_number,
    )


def set_model_card(trainer: Trainer, card: ModelCard) -> None:
    """Let `trainer.push_to_hub()` upload `card`. Without this it writes a draft of its own over README.md."""

    def create_model_card(model_name: str | None = None, tags: str | Iterable[str] | None = None) -> None:
        if trainer.is_world_process_zero():
            more = [tags] if isinstance(tags, str) else tags or []
            card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *more]))
            card.save(Path(trainer.args.output_dir) / "README.md")

    trainer.create_model_card = create_model_card


def json_config(config: POETConfig) -> dict[str, Any]:
    """The configuration as JSON has it, sets sorted: the `config` of `metrics.json`."""
    return json.loads(json.dumps(config.to_dict(), default=sorted))


def hardware() -> str:
    """What this process computes on: the accelerator's name, or the number of CPU cores that it may use."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU ({platform.machine()}), {cores} cores, {torch.get_num_threads()} threads"


def _template() -> str:
    """`model_cards/template.md`, which a wheel carries inside the package."""
    installed = resources.files(__package__) / "model_card_template.md"
    if installed.is_file():
        return installed.read_text("utf-8")
    return (Path(__file__).parents[1] / "model_cards" / "template.md").read_text("utf-8")


def _check(metrics: Mapping[str, Any], kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(map(repr, KINDS))}.")
    if metrics.get("method", "poet") != "poet":
        raise ValueError(
            f"metrics.json is of a run with method={metrics['method']!r}: cards are made for 'poet' only. Write the "
            "card of another method by hand."
        )
    _require(metrics, _REQUIRED, "")
    if metrics["task"] not in AUTO_CLASSES:
        raise ValueError(f"metrics.json: task={metrics['task']!r} is unknown; {_REQUIRED['task']}.")
    if metrics["config"].get("peft_type") != "POET":
        raise ValueError(
            f"metrics.json: config is of peft_type={metrics['config'].get('peft_type')!r}, not 'POET'; "
            f"{_REQUIRED['config']}."
        )
    if metrics["task"] == "text-classification" and not metrics.get("labels"):
        raise ValueError("metrics.json has no 'labels': write the names of the classes in the order of their indexes.")
    if not metrics["evaluation"]:
        raise ValueError(f"metrics.json: evaluation is empty; {_REQUIRED['evaluation']}.")
    for i, result in enumerate(metrics["evaluation"]):
        _require(result, _REQUIRED_OF_RESULTS, f"evaluation[{i}].")
        if not _is_number(result["value"]):
            raise ValueError(f"metrics.json: evaluation[{i}].value={result['value']!r} is not a finite number.")
    if kind == "adapter" and metrics["base_model"] is None:
        raise ValueError(
            "metrics.json: base_model is null, and an adapter cannot be loaded without the model that it belongs to; "
            "write the base model's name, or publish the merged model (kind='merged')."
        )


def _require(values: Mapping[str, Any], required: Mapping[str, str], prefix: str) -> None:
    for path, remedy in required.items():
        found: Any = values
        for key in path.split("."):
            if not isinstance(found, Mapping) or key not in found:
                raise ValueError(f"metrics.json has no {prefix + path!r}: {remedy}.")
            found = found[key]


def _eval_result(task: str, result: Mapping[str, Any]) -> EvalResult:
    data = result["data"]
    return EvalResult(
        task_type=task,
        dataset_type=data.get("id") or re.sub(r"[^a-z0-9]+", "-", data["name"].lower()).strip("-"),
        dataset_name=data["name"],
        dataset_config=data.get("config"),
        dataset_split=data.get("split"),
        metric_type=result["metric"],
        metric_name=result["name"],
        metric_value=result["value"],
    )


def _snippet(metrics: Mapping[str, Any], repo_id: str, kind: str) -> str:
    auto_class, text = AUTO_CLASSES[metrics["task"]], metrics.get("example_input", "The")
    classifies = metrics["task"] == "text-classification"
    if kind == "adapter":
        labels = f", id2label={dict(enumerate(metrics['labels']))!r}" if classifies else ""
        base = json.dumps(metrics["base_model"])
        lines = [
            "import poet_peft  # teaches PEFT the name POET; without it loading fails with KeyError: 'POET'",
            "from peft import PeftModel",
            f"from transformers import {auto_class}, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({base})",
            f"model = {auto_class}.from_pretrained({base}{labels})",
            f"model = PeftModel.from_pretrained(model, {json.dumps(repo_id)})",
        ]
    else:
        lines = [
            f"from transformers import {auto_class}, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(repo_id)})",
            f"model = {auto_class}.from_pretrained({json.dumps(repo_id)})",
        ]
    lines += ["", f'inputs = tokenizer({json.dumps(text)}, return_tensors="pt")']
    if classifies:
        lines += [
            "label = model(**inputs).logits.argmax(-1).item()",
            "print(model.config.id2label[label])",
        ]
    else:
        lines += [
            "output = model.generate(**inputs, max_new_tokens=64)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    return "\n".join(lines)


def _measured(metrics: Mapping[str, Any], kind: str) -> dict[str, str]:
    formats = {
        "train_tokens": ("training tokens", "{:,}"),
        "train_seconds": ("training time", "{:,.0f} s"),
        "peak_memory_mb": ("peak memory", "{:,.0f} MB"),
        "hardware": ("hardware", "{}"),
        "adapter_bytes": ("adapter file", "{:,} bytes"),
    }
    if kind == "merged":
        del formats["adapter_bytes"]
    return {
        label: "not measured" if _is_missing(metrics.get(key)) else text.format(metrics[key])
        for key, (label, text) in formats.items()
    }


def _hyperparameters(settings: Mapping[str, Any]) -> dict[str, str]:
    unused = "num_train_epochs" if settings.get("max_steps", -1) > 0 else "max_steps"  # as Trainer decides
    return _shown(settings, [key for key in HYPERPARAMETERS if key != unused])


def _shown(settings: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    return {key: _text(settings[key]) for key in keys if settings.get(key) not in (None, [], {})}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Any) -> str:
    # PEFT writes sets of module names as lists, in another order each time.
    text = ", ".join(sorted(map(str, value))) if isinstance(value, list) else str(value)
    return text.replace("|", r"\|")  # ends a table's cell otherwise, as in a regular expression of module names


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
