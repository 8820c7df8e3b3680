"""`metrics.json`, what a run writes about itself: what a model card needs of it, and the check that it is there.

It is one JSON object. Keys beyond these may be there and are not read.

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
        metric of the model before this training; null or NaN if it was not measured).

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

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple


TASKS = ("text-generation", "text-classification")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _is_labels(value: Any) -> bool:
    is_index = [isinstance(label, int) for label in value] if isinstance(value, list | tuple) else []
    return bool(is_index) and (all(is_index) or _is_texts(value))


class _Kind(NamedTuple):
    name: str
    includes: Callable[[Any], bool]


_TEXT = _Kind("text", _is_text)
_TEXTS = _Kind("list of texts", _is_texts)
_LABELS = _Kind("list of texts or integers", _is_labels)
_NUMBER = _Kind("number", _is_number)
_FINITE = _Kind("finite number", lambda value: _is_number(value) and math.isfinite(value))
_OBJECT = _Kind("object", lambda value: isinstance(value, Mapping))
_LIST = _Kind("list", lambda value: isinstance(value, list | tuple))


class _Key(NamedTuple):
    """What a key must hold, and what to do if it does not. `optional`: it may be missing or null."""

    kind: _Kind
    remedy: str
    optional: bool = False


def _data_keys(whose: str) -> dict[str, _Key]:
    return {
        "data": _Key(_OBJECT, f"write an object with the name and the source of the {whose} data"),
        "data.name": _Key(_TEXT, f"write what the {whose} data is called"),
        "data.source": _Key(_TEXT, f"write a sentence that says where the {whose} data comes from"),
        "data.id": _Key(_TEXT, "write the name of the data set on the Hub, or leave it out", optional=True),
        "data.config": _Key(_TEXT, "write the name of its configuration, or leave it out", optional=True),
        "data.split": _Key(_TEXT, "write the name of its split, or leave it out", optional=True),
    }


def _measured(what: str) -> _Key:
    return _Key(_NUMBER, f"write {what}, or null if it was not measured", optional=True)


_KEYS = {
    "method": _Key(_TEXT, 'write "poet"'),
    "task": _Key(_TEXT, f"write one of {', '.join(map(repr, TASKS))}"),
    "base_model": _Key(_TEXT, "write the name of the pretrained model, or null if the weights were random"),
    **_data_keys("training"),
    "config": _Key(_OBJECT, "write json_config(config) of the POETConfig"),
    "settings": _Key(_OBJECT, "write the hyperparameters, such as learning_rate"),
    "parameters": _Key(_OBJECT, "write the counts 'model' and 'trained'"),
    "parameters.model": _Key(_FINITE, "write the number of the model's parameters"),
    "parameters.trained": _Key(_FINITE, "write the number of parameters that trained"),
    "versions": _Key(_OBJECT, "write the versions of torch, transformers, peft and poet_peft"),
    "versions.torch": _Key(_TEXT, "write torch.__version__"),
    "versions.transformers": _Key(_TEXT, "write transformers.__version__"),
    "versions.peft": _Key(_TEXT, "write peft.__version__"),
    "versions.poet_peft": _Key(_TEXT, "write poet_peft.__version__"),
    "evaluation": _Key(_LIST, "write a list of results; one that was not evaluated cannot have a card"),
    "labels": _Key(_LABELS, "write the names of the classes in the order of their indexes", optional=True),
    "train_tokens": _measured("the number of tokens that it was trained on"),
    "train_seconds": _measured("the seconds that training took"),
    "peak_memory_mb": _measured("the peak memory in MB"),
    "adapter_bytes": _measured("the size of the adapter's file in bytes"),
    "hardware": _Key(_TEXT, "write what hardware() returns, or null", optional=True),
    "example_input": _Key(_Kind("text", lambda value: isinstance(value, str)), "write a text, or leave it out", True),
    "limits": _Key(_TEXTS, "write a list of sentences, or leave it out", optional=True),
}
_KEYS_OF_RESULTS = {
    "metric": _Key(_TEXT, "write the Hub's identifier of the metric"),
    "name": _Key(_TEXT, "write the metric's name as it is to be printed"),
    "value": _Key(_FINITE, "write what was measured"),
    **_data_keys("evaluation"),
    "size": _Key(_TEXT, 'write a text such as "65,536 tokens", or leave it out', optional=True),
    "before": _measured("the same metric before this training"),
}
_MISSING = object()


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Check that a card can be made of what a run wrote.

    Raises:
        TypeError: `metrics` is no mapping.
        ValueError: a key is missing or has a value of another kind. Names it, and what belongs there.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"metrics={metrics!r} is a {type(metrics).__name__}, not the object that a run wrote to metrics.json; "
            "pass json.loads(Path('metrics.json').read_text())."
        )
    if metrics.get("method", "poet") != "poet":
        raise ValueError(
            f"metrics.json is of a run with method={metrics['method']!r}: cards are made for 'poet' only. Write the "
            "card of another method by hand."
        )
    _check_keys(metrics, _KEYS, "")
    if metrics["task"] not in TASKS:
        raise ValueError(f"metrics.json: task={metrics['task']!r} is unknown; {_KEYS['task'].remedy}.")
    if metrics["config"].get("peft_type") != "POET":
        raise ValueError(
            f"metrics.json: config is of peft_type={metrics['config'].get('peft_type')!r}, not 'POET'; "
            f"{_KEYS['config'].remedy}."
        )
    if metrics["task"] == "text-classification" and not metrics.get("labels"):
        raise ValueError(f"metrics.json has no 'labels': {_KEYS['labels'].remedy}.")
    if not metrics["evaluation"]:
        raise ValueError(f"metrics.json: evaluation is empty; {_KEYS['evaluation'].remedy}.")
    for i, result in enumerate(metrics["evaluation"]):
        _check_keys(result, _KEYS_OF_RESULTS, f"evaluation[{i}].")


def _check_keys(values: Any, keys: Mapping[str, _Key], prefix: str) -> None:
    for path, (kind, remedy, optional) in keys.items():
        found = values
        for key in path.split("."):
            found = found.get(key, _MISSING) if isinstance(found, Mapping) else _MISSING
        is_null = found is None and (optional or path == "base_model")
        if is_null or (found is _MISSING and optional):
            continue
        if found is _MISSING:
            raise ValueError(f"metrics.json has no {prefix + path!r}: {remedy}.")
        if not kind.includes(found):
            raise ValueError(f"metrics.json: {prefix}{path}={found!r} is no {kind.name}; {remedy}.")
