"""`merge_and_unload().save_pretrained()` writes a plain model, from which transformers alone computes the same."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from models import KINDS, PERIODIC, REGIMES, gpt2, llama, logits, tokens, train, wrap
from safetensors.torch import load_file, save_file
from torch import Tensor

from poet_peft import merge_and_reinitialize


class Export(NamedTuple):
    base: torch.nn.Module
    regime: str = "block_stochastic"
    tolerance: float = 1e-5
    overrides: dict = {}


def cases():
    """Base models and how they are trained, by name."""
    for regime in REGIMES:
        yield f"llama-untied-{regime}", Export(llama(), regime)
    for regime in KINDS:
        yield f"llama-tied-{regime}", Export(llama(tied=True), regime)
        yield f"gpt2-{regime}", Export(gpt2(), regime)
    for regime in ("block_stochastic", "periodic"):
        yield f"bfloat16-{regime}", Export(llama().bfloat16(), regime, 2e-2)
    yield "kept-initial-weights", Export(llama(), "periodic", overrides={"keep_initial_weights": True})


CASES = [name for name, _ in cases()]
# Runs where importing poet_peft or peft is an error, and writes the logits of every exported model.
LOADER = """
import sys
from pathlib import Path
sys.modules["poet_peft"] = sys.modules["peft"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
root = Path(sys.argv[1])
tokens = load_file(root / "tokens")["tokens"]
with torch.no_grad():
    logits = {path.name: AutoModelForCausalLM.from_pretrained(path).eval()(tokens).logits
              for path in root.iterdir() if path.is_dir()}
save_file(logits, root / "logits")
"""


class Exports(NamedTuple):
    root: Path
    expected: dict[str, Tensor]
    loaded: dict[str, Tensor]
    changed: dict[str, float]
    tolerance: dict[str, float]
    keys: dict[str, set[str]]


def relative_error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Every case trained, exported, and loaded again by one other process."""
    root = tmp_path_factory.mktemp("exports")
    expected, changed, tolerance, keys = {}, {}, {}, {}
    for name, case in cases():
        before = logits(case.base)
        case.base.save_pretrained(root / "base")
        keys[name] = set(load_file(root / "base" / "model.safetensors"))
        model = wrap(case.base, case.regime, **case.overrides)
        optimizer = train(model)
        if case.regime in PERIODIC:
            merge_and_reinitialize(model, optimizer)
            train(model, 2, optimizer)
        expected[name], tolerance[name] = logits(model), case.tolerance
        changed[name] = relative_error(expected[name], before)
        model.merge_and_unload().save_pretrained(root / name)
    save_file({"tokens": tokens()}, root / "tokens")
    subprocess.run([sys.executable, "-c", LOADER, str(root)], check=True, cwd=root, timeout=300)
    return Exports(root, expected, load_file(root / "logits"), changed, tolerance, keys)


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_computes_the_same_from_the_export(exports, name):
    assert relative_error(exports.loaded[name], exports.expected[name]) <= exports.tolerance[name]


@pytest.mark.parametrize("name", CASES)
def test_training_moved_the_model_beyond_the_tolerance(exports, name):
    """Without this, an export of the untrained weights would pass the test above."""
    assert exports.changed[name] > 5 * exports.tolerance[name]


@pytest.mark.parametrize("name", CASES)
def test_export_has_the_tensors_of_the_plain_model_and_no_others(exports, name):
    """Tied weights are stored once, as in the plain model."""
    assert set(load_file(exports.root / name / "model.safetensors")) == exports.keys[name]


@pytest.mark.parametrize("name", CASES)
def test_export_keeps_the_dtype_of_the_base_model(exports, name):
    dtypes = {tensor.dtype for tensor in load_file(exports.root / name / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16 if name.startswith("bfloat16") else torch.float32}


@pytest.mark.parametrize("name", CASES)
def test_export_leaves_no_adapter_files(exports, name):
    assert not list((exports.root / name).glob("adapter*"))


@pytest.mark.parametrize("regime", ["block_stochastic", "pretraining"])
def test_merged_model_stays_tied(regime):
    model = wrap(llama(tied=True), regime)
    train(model)
    merged = model.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("regime", REGIMES)
def test_merged_model_is_made_of_plain_modules(regime):
    merged = wrap(llama(), regime).merge_and_unload()
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in llama().named_modules()]
