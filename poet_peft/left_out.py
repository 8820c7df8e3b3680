"""The targeted layers, what is left out where PEFT and not the user chooses them, and the warnings that name it."""

from __future__ import annotations

import re
import warnings

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers import PreTrainedModel

from .attention import reach_attention
from .config import POETConfig
from .obstacles import without_indexes
from .other_linear import returns_something_else
from .targets import RETURNS_ELSE, chosen_by_peft, is_all_linear, parameter_names, readers_as_text, rotated_parameters
from .uncalled import reader_of


# The tasks with which PEFT trains heads in full: how the names of transformers' classes end, and those of the heads.
_TASKS = {
    "SEQ_CLS": ("ForSequenceClassification", ("classifier", "score")),
    "TOKEN_CLS": ("ForTokenClassification", ("classifier", "score")),
    "QUESTION_ANS": ("ForQuestionAnswering", ("qa_outputs",)),
}


def settle_targets(
    model: nn.Module, config: POETConfig, requested: set[str] | str | None
) -> list[tuple[str, nn.Module]]:
    """Names and modules of the targeted layers.

    Where PEFT would choose them and some are left out, `config` then names the others one by one, so that what is
    injected next, and what a saved adapter is loaded into, are the same layers.

    Args:
        requested: `target_modules` as the user wrote it.
    """
    config = _maybe_include_all_linear_layers(config, model)
    if is_all_linear(requested):
        reach_attention(model, config)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if name and not name.startswith(inside) and check_target_module_exists(config, name)
    ]
    attentions = tuple(f"{name}." for name, module in targets if isinstance(module, nn.MultiheadAttention))
    targets = [(name, module) for name, module in targets if not name.startswith(attentions)]
    kept = _leave_out(model, config, requested, targets)
    if len(kept) == len(targets):
        return targets
    config.target_modules = {name for name, _ in kept}
    # A name also stands for longer ones that end in it.
    left_out = {name for name, _ in targets} - config.target_modules
    matched = {name for name in left_out if check_target_module_exists(config, name)}
    if matched and isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([f"(?:{config.exclude_modules})", *map(re.escape, sorted(matched))])
    elif matched:
        config.exclude_modules = {*(config.exclude_modules or ()), *matched}
    return kept


def _leave_out(
    model: nn.Module, config: POETConfig, requested: set[str] | str | None, targets: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    """The targets without those that must not be rotated, where PEFT and not the user chose them.

    That is the output head, which PEFT finds only if it knows the task, layers that share their weight with another
    module, subclasses of linear layers that return something else, as some routers do, and layers whose weight is read
    by another module, which never calls them. A warning names them, except for heads and shared weights that
    `train_rest` trains in full anyway.

    Args:
        config: with `target_modules` as PEFT wrote it out.
        requested: `target_modules` as the user wrote it. None and "all-linear" leave the choice to PEFT.
        targets: names and modules of the layers that `config` matches.
    """
    if not chosen_by_peft(requested):
        return targets
    if requested is not None:  # PEFT lists the linear layers, and takes a name for the end of longer ones as well
        targets = [(name, module) for name, module in targets if name in config.target_modules]
    targets = [(name, module) for name, module in targets if not _is_saved_in_full(name, config)]
    heads = _output_heads(model, targets)
    if heads and not config.train_rest:
        warnings.warn(
            f"target_modules={requested!r} leaves out the output head, which is not trained: {', '.join(heads)}. To "
            f"train and save it in full, pass modules_to_save={heads}{_task_hint(model, config, heads)}."
        )
    targets = [(name, module) for name, module in targets if name not in heads]
    shared = _shared_weights(model, targets)
    if shared and not config.train_rest:
        tied = "; ".join(f"{name} (shared by {', '.join(owners)})" for name, owners in shared.items())
        warnings.warn(
            f"target_modules={requested!r} leaves out layers that share their weight, since a rotation of one would "
            f"change the other: {tied}."
        )
    targets = [(name, module) for name, module in targets if name not in shared]
    readers = {name: reader for name, _ in targets if (reader := reader_of(model, name))}
    if readers:
        warnings.warn(
            f"target_modules={requested!r} leaves out layers whose rotations would not train: "
            f"{readers_as_text(readers)}."
        )
    targets = [(name, module) for name, module in targets if name not in readers]
    others = {name: type(module).__name__ for name, module in targets if returns_something_else(module)}
    if others:
        warnings.warn(
            f"target_modules={requested!r} leaves out {', '.join(without_indexes(sorted(others)))} of type "
            f"{', '.join(sorted(set(others.values())))}, {RETURNS_ELSE}."
        )
    return [(name, module) for name, module in targets if name not in others]


def _output_heads(model: nn.Module, targets: list[tuple[str, nn.Module]]) -> list[str]:
    """Names of the targets that give labels, scores or tokens: outside the base model, and as wide as these are."""
    if not isinstance(model, PreTrainedModel):
        return []
    num_labels = getattr(model.config, "num_labels", 2)
    # One score of a choice, two ends of a span, all labels, all labels and "none of them", all tokens.
    widths = {1, 2, num_labels, num_labels + 1, getattr(model.config, "vocab_size", None)}

    def is_outside(name: str) -> bool:
        if model.base_model is model:
            return "." not in name
        return not name.startswith(f"{model.base_model_prefix}.")

    return [name for name, layer in targets if is_outside(name) and getattr(layer, "out_features", None) in widths]


def _shared_weights(model: nn.Module, targets: list[tuple[str, nn.Module]]) -> dict[str, list[str]]:
    """All names of the weights of targets that have several."""
    owners = parameter_names(model)
    names = {name: max((owners.get(id(w), []) for w in rotated_parameters(layer)), key=len) for name, layer in targets}
    return {name: found for name, found in names.items() if len(found) > 1}


def _is_saved_in_full(name: str, config: POETConfig) -> bool:
    """Whether PEFT trains a layer as one of `modules_to_save`, to which it adds the heads of some tasks."""
    saved = [*(config.modules_to_save or ()), *_TASKS.get(config.task_type, ("", ()))[1]]
    return any(re.search(rf"{re.escape(module)}($|\.)", name) for module in saved)


def _task_hint(model: nn.Module, config: POETConfig, heads: list[str]) -> str:
    """`, or task_type=...` if PEFT would then train these heads."""
    for task, (kind, names) in _TASKS.items():
        if type(model).__name__.endswith(kind) and {head.partition(".")[0] for head in heads} <= set(names):
            return f", or task_type={task!r}"
    return ""
