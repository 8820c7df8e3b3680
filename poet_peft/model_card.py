"""Model cards, filled from the `metrics.json` that a run wrote about itself. Nothing in them is typed by hand.

What `metrics.json` holds is described in `poet_peft.metrics`.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .config import POETConfig
from .metrics import check_metrics


if TYPE_CHECKING:
    from transformers import Trainer


# How to get this package: in the README, the documentation and every card of an adapter.
INSTALL = "run `pip install .` in a checkout of poet-peft's repository; it is not on PyPI yet"
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
    "base_init_scale",
    "base_init_scale_pattern",
    "train_rest",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "bias",
    "seed",
)


def create_model_card(
    metrics: Mapping[str, Any],
    repo_id: str | os.PathLike[str],
    kind: Literal["adapter", "merged"],
    license: str | None = None,
    language: str | list[str] | None = None,
) -> ModelCard:
    """The model card of a run: what it trained, on what, how, with which result, and a snippet that loads it.

    `card.save(path)` and `card.push_to_hub(repo_id)` are huggingface_hub's; `PeftModel.push_to_hub` keeps a card that
    is already there, `Trainer.push_to_hub` only after `set_model_card`. Save the card after the model:
    PEFT's `save_pretrained` keeps the text of a card that it finds, but replaces its tags.

    Args:
        metrics: what the run wrote to `metrics.json`; see `poet_peft.metrics`. Its texts are shown as they are:
            Markdown and HTML in them have no effect, and line breaks are spaces.
        repo_id: where the model will be, "user/name" on the Hub or a local directory. The snippet loads it from there.
        kind: "adapter" for what `PeftModel.save_pretrained` writes; "merged" for a plain transformers model, such as
            `merge_and_unload()` gives, which needs neither PEFT nor this package.
        license: of the model, as the Hub spells it. None leaves it unstated.
        language: ISO code or codes of the training text. None leaves it unstated.

    Raises:
        TypeError: `metrics` is no mapping.
        ValueError: a required key of `metrics` is missing or has a value that no card can be made of. Says which one
            and what belongs there.
    """
    check_metrics(metrics)
    _check_place(repo_id, kind, metrics)
    repo_id = os.fspath(repo_id)
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
        install=INSTALL,
        metrics=metrics,
        snippet=_snippet(metrics, repo_id, kind),
        measured=_measured(metrics, kind),
        hyperparameters=_hyperparameters(metrics["settings"]),
        method_settings=_shown(metrics["config"], METHOD_SETTINGS),
        number=_number,
        text=_text,
        code=_code,
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


def _check_place(repo_id: Any, kind: Any, metrics: Mapping[str, Any]) -> None:
    if not isinstance(repo_id, str | os.PathLike) or not os.fspath(repo_id).strip("/. "):
        raise ValueError(
            f"repo_id={repo_id!r} does not name a model; pass 'user/name' on the Hub, or the directory that holds it."
        )
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(map(repr, KINDS))}.")
    if kind == "adapter" and metrics["base_model"] is None:
        raise ValueError(
            "metrics.json: base_model is null, and an adapter cannot be loaded without the model that it belongs to; "
            "write the base model's name, or publish the merged model (kind='merged')."
        )


def _eval_result(task: str, result: Mapping[str, Any]) -> EvalResult:
    data = result["data"]
    return EvalResult(
        task_type=task,
        dataset_type=data.get("id") or re.sub(r"[^a-z0-9]+", "-", data["name"].lower()).strip("-") or "unnamed",
        dataset_name=data["name"],
        dataset_config=data.get("config"),
        dataset_split=data.get("split"),
        metric_type=result["metric"],
        metric_name=result["name"],
        metric_value=_plain(result["value"]),
    )


def _string(text: str) -> str:
    """A string as Python's source has it, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _snippet(metrics: Mapping[str, Any], repo_id: str, kind: str) -> str:
    auto_class = AUTO_CLASSES[metrics["task"]]
    text = "The" if metrics.get("example_input") is None else metrics["example_input"]
    classifies = metrics["task"] == "text-classification"
    if kind == "adapter":
        labels = f", id2label={dict(enumerate(metrics['labels']))!r}" if classifies else ""
        base = _string(metrics["base_model"])
        lines = [
            "import poet_peft  # teaches PEFT the name POET; without it loading fails with KeyError: 'POET'",
            "from peft import PeftModel",
            f"from transformers import {auto_class}, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({base})",
            f"model = {auto_class}.from_pretrained({base}{labels})",
            f"model = PeftModel.from_pretrained(model, {_string(repo_id)})",
        ]
    else:
        lines = [
            f"from transformers import {auto_class}, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({_string(repo_id)})",
            f"model = {auto_class}.from_pretrained({_string(repo_id)})",
        ]
    lines += ["", f'inputs = tokenizer({_string(text)}, return_tensors="pt")']
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
    # PEFT writes sets of module names as lists, in another order each time.
    return {
        key: ", ".join(sorted(map(str, value))) if isinstance(value, list) else str(value)
        for key in keys
        if (value := settings.get(key)) not in (None, [], {})
    }


def _is_missing(value: Any) -> bool:
    return value is None or value != value  # NaN


def _plain(value: Any) -> int | float:
    return int(value) if isinstance(value, Integral) else float(value)


def _number(value: Any) -> str:
    if _is_missing(value):
        return "not measured"
    return f"{value:,}" if isinstance(value, Integral) else f"{value:.4g}"


def _text(value: Any) -> str:
    """A text on one line of Markdown, in a table or not, in which nothing is taken for markup."""
    text = " ".join(str(value).split())
    # Backslashes, underscores and ampersands only where they would mean something, so that the source reads well.
    text = re.sub(r"\\(?=[!-/:-@\[-`{-~]|$)|[`*<>\[\]~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)", r"\\\g<0>", text)
    text = re.sub(r"^(\d*)([#+=-]|(?<=\d)[.)](?=\s|$))", r"\1\\\2", text)  # a heading or a list
    return text.replace("|", "&#124;")  # the next cell of a table


def _code(value: Any) -> str:
    """A text as code on one line of Markdown, in a table or not."""
    text = " ".join(str(value).split())
    if "|" in text:  # ends a table's cell even between backticks
        escaped = re.sub(r"[^\w\s.,:;/()=-]|_", lambda match: f"&#{ord(match[0])};", text)
        return f"<code>{escaped}</code>"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{fence}{padding}{text}{padding}{fence}"
