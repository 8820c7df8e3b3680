"""What `poet-peft merge` does: an adapter and its base model become a plain transformers model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from .. import create_model_card
from ..errors import POETCheckpointError
from ..layer import poet_layers
from . import Refused
from .saved import SavedAdapter, open_adapter, open_tensors, read_metrics


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest ||merged - adapter|| / ||adapter|| of the logits: each merged weight is rounded once to this dtype.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_NUM_TOKENS = (2, 16)
_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def merge(
    path: Path,
    out: Path,
    base: str | None = None,
    dtype: str | None = None,
    push_to_hub: str | None = None,
    progress: bool = False,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Merge the adapter in `path` into its base model, and save the result in `out` as a plain transformers model,
    with tokenizer, generation configuration and model card.

    Layers are merged one after the other, in fp32, so that beside the model and the adapter only one layer's weights
    exist twice.
    Before anything is written, the logits of the merged model are compared with those of the adapter on random tokens.

    Args:
        base: name or directory of the base model; None = the one that the adapter's configuration names.
        dtype: of the saved weights: "float32", "bfloat16" or "float16"; None = the base model's.
        push_to_hub: repository to upload `out` to.
        progress: show a bar on stderr.
        scale: every plane is turned by so many times its angle, see `dial`. Only rotations are scaled; what else the
            adapter trained is merged as it is.

    Returns:
        What JSON can hold: where the model is, its size, and `relative_error`, how far its logits are from the
        adapter's.

    Raises:
        FileExistsError: `out` is not empty.
        POETCheckpointError: the adapter is damaged, names no base model, or the merged model gives other logits.
        Refused: an unknown dtype, a weight that the rotations cannot be merged into, a model without tokens, or an
            adapter that cannot be scaled.
    """
    if dtype is not None and dtype not in DTYPES:
        raise Refused(f"--dtype {dtype} is unknown; choose one of {', '.join(DTYPES)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty: pass a new directory.")
    adapter = open_adapter(path)
    base = base or adapter.config.base_model_name_or_path
    if not base:
        raise POETCheckpointError(f"{path} does not name its base model: pass it with --base.")
    model, loading = _load_base(base, adapter, dtype)
    held_dtype = _dtype_of_held_weights(adapter)
    saved_dtype = DTYPES.get(dtype or "", held_dtype or model.dtype)
    # The weights in a file may have a residual, which only fp32 can take in.
    working_dtype = torch.promote_types(model.dtype, torch.float32 if held_dtype else saved_dtype)
    tokenizer = _load_tokenizer(adapter.directory, base, loading)
    if not adapter.config.target_parameters:  # which have no such forward
        # Blocks that are kept from one forward to the next may take as much as the weights.
        adapter.config.memory_efficient = True
    peft_model = PeftModel.from_pretrained(model.to(working_dtype), str(adapter.directory), config=adapter.config)
    peft_model.eval()
    if scale != 1:
        _set_scale(peft_model, scale)
    tokens = _random_tokens(model)
    expected = _logits(peft_model, tokens)
    try:
        merged = peft_model.merge_and_unload(progressbar=progress, safe_merge=True)
    except ValueError as error:
        raise Refused(str(error)) from error
    _check(merged, tokens, expected, working_dtype)
    merged = merged.to(saved_dtype)
    error = _check(merged, tokens, expected, saved_dtype)
    _save(merged, tokenizer, _card(adapter, base, push_to_hub or str(out), scale), out)
    if push_to_hub:
        HfApi().create_repo(push_to_hub, exist_ok=True)
        HfApi().upload_folder(repo_id=push_to_hub, folder_path=out, commit_message="Upload the merged model")
    return {
        "path": str(out),
        "base_model": base,
        "dtype": str(saved_dtype).removeprefix("torch."),
        "num_layers": len(adapter.layers),
        "scale": scale,
        "num_unscaled_values": adapter.num_other_values() if scale != 1 else 0,
        "num_parameters": merged.num_parameters(),
        "bytes": sum(file.stat().st_size for file in out.iterdir()),
        "relative_error": error,
        "tolerance": _TOLERANCE[saved_dtype],
        "pushed_to": push_to_hub,
    }


def _set_scale(model: nn.Module, scale: float) -> None:
    try:
        for _, layer in poet_layers(model):
            for name in layer.active_adapters:
                layer.set_scale(name, scale)
    except ValueError as error:
        raise Refused(str(error)) from error


def _load_base(base: str, adapter: SavedAdapter, dtype: str | None) -> tuple[PreTrainedModel, dict[str, str]]:
    """The base model, and what its tokenizer has to be loaded with as well."""
    task = getattr(adapter.config.task_type, "value", adapter.config.task_type)
    auto_class = getattr(transformers, _TASKS.get(task, "AutoModelForCausalLM"))
    folder = Path(base)
    if folder.is_dir():
        gguf = sorted(folder.glob("*.gguf"))
        if gguf and not (folder / "config.json").is_file():
            loading = {"gguf_file": gguf[0].name}
            return auto_class.from_pretrained(base, dtype=DTYPES.get(dtype or "", torch.float32), **loading), loading
        has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*"))
        if adapter.config.train_rest and not has_weights:
            # Everything is in the adapter's file: the base model is its architecture.
            return auto_class.from_config(AutoConfig.from_pretrained(base)), {}
    metrics = read_metrics(adapter.directory) or {}
    labels = {"num_labels": len(metrics["labels"])} if task == "SEQ_CLS" and metrics.get("labels") else {}
    return auto_class.from_pretrained(base, dtype="auto", **labels), {}


def _load_tokenizer(directory: Path, base: str, loading: dict[str, str]) -> Any:
    """The tokenizer that was saved beside the adapter, else the base model's; None where neither has one."""
    for place, more in ((str(directory), {}), (base, loading)):
        if place == str(directory) and not (directory / "tokenizer_config.json").is_file():
            continue
        try:
            return AutoTokenizer.from_pretrained(place, **more)
        except (OSError, ValueError):
            continue
    return None


def _dtype_of_held_weights(adapter: SavedAdapter) -> torch.dtype | None:
    with open_tensors(adapter.file) as tensors:
        return adapter.dtype_of_base_weights(tensors)


def _random_tokens(model: PreTrainedModel) -> Tensor:
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if not vocabulary:
        raise Refused(
            f"{type(model).__name__} has no vocabulary, so its outputs cannot be compared on random tokens. Merge it "
            "in Python: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(directory)."
        )
    return torch.randint(vocabulary, _NUM_TOKENS, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(input_ids=tokens.to(model.device), attention_mask=torch.ones_like(tokens, device=model.device))
    return output[0].float()


def _check(model: PreTrainedModel, tokens: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """How far the logits are from those of the adapter, relative to their norm. Refuses more than rounding."""
    error = float((_logits(model, tokens) - expected).norm() / expected.norm())
    if not error <= _TOLERANCE[dtype]:
        raise POETCheckpointError(
            f"the logits of the merged model are {error:.2g} of their size from the adapter's, more than rounding to "
            f"{str(dtype).removeprefix('torch.')} explains: nothing was written. Try --dtype float32; if that fails "
            "too, please report it."
        )
    return error


def _save(model: PreTrainedModel, tokenizer: Any, card: ModelCard, out: Path) -> None:
    """Whole or not at all: a directory that is there holds everything."""
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        card.save(partial / "README.md")
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _card(adapter: SavedAdapter, base: str, repo_id: str, scale: float) -> ModelCard:
    """The card of the run that wrote the adapter, if it left its `metrics.json`; else one that says what is known.

    The numbers of a run are those of scale 1.
    """
    metrics = read_metrics(adapter.directory)
    if scale == 1 and metrics is not None and metrics.get("method") == "poet":
        return create_model_card(metrics, repo_id, kind="merged")
    name = repo_id.rstrip("/").rsplit("/", 1)[-1]
    named = base if not os.path.isdir(base) else None
    data = ModelCardData(base_model=named, library_name="transformers", model_name=name, tags=["poet", "poet-peft"])
    config = adapter.config
    settings = {
        key: getattr(config, key) for key in ("variant", "block_size", "merge_interval", "base_init", "train_rest")
    }
    if scale == 1:
        reason = (
            "The adapter came without a `metrics.json`, so this card does not say what it was trained on, and it "
            "states no evaluation."
        )
    else:
        reason = (
            f"Every plane is turned by {scale:g} times the angle that was trained. What the adapter reached as "
            "trained is not what this model does, so this card states no evaluation."
        )
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"{f'`{named}`' if named else 'A model'}, trained with [POET](https://arxiv.org/abs/2506.08001) and "
        "`poet_peft`, then merged: the rotations are in the weights. A plain transformers model; neither PEFT nor "
        f"poet_peft is needed to load it.\n\n{reason}\n\n```json\n{json.dumps(settings, indent=2)}\n```\n"
    )
