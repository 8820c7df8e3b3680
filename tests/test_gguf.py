"""SmolLM2-135M-Instruct from its GGUF file: a real pretrained model trains, saves and is exported as any other.

transformers dequantizes the file as it loads it, but leaves its mark of a quantized model on the result, with which
Trainer refuses to train it and `save_pretrained` to write it.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from models import llama, logits, poet_config, smollm2, train, wrap
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
from transformers.utils.quantization_config import GgufConfig
from trl import SFTConfig, SFTTrainer

from poet_peft import POETConfig, poet_param_groups
from poet_peft.layer import poet_layers


TEXTS = ["The capital of France is Paris, and that of Italy is Rome.", "Water boils at a hundred degrees."]


def mark_as_gguf(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """What `from_pretrained(gguf_file=...)` does to a model whose architecture it dequantizes."""
    model.hf_quantizer = GgufHfQuantizer(GgufConfig("tiny.gguf"))
    model.hf_quantizer.preprocess_model(model)
    model.hf_quantizer.postprocess_model(model)
    return model


def marks(model: nn.Module) -> dict[str, object]:
    """Everything by which transformers takes the model for quantized."""
    return {
        "is_quantized": getattr(model, "is_quantized", False),
        "hf_quantizer": getattr(model, "hf_quantizer", None),
        "quantization_method": getattr(model, "quantization_method", None),
        "config": getattr(model.config, "quantization_config", None),
        "config._is_quantized": getattr(model.config, "_is_quantized", False),
    }


NO_MARKS = {
    "is_quantized": False,
    "hf_quantizer": None,
    "quantization_method": None,
    "config": None,
    "config._is_quantized": False,
}


# Tiny models with the marks


def test_wrapping_clears_the_marks():
    base = mark_as_gguf(llama())
    wrap(base)
    assert marks(base) == NO_MARKS


def test_loading_an_adapter_clears_the_marks(tmp_path):
    wrap(llama()).save_pretrained(tmp_path)
    base = mark_as_gguf(llama())
    PeftModel.from_pretrained(base, tmp_path)
    assert marks(base) == NO_MARKS


def test_adapter_inside_a_transformers_model_clears_the_marks():
    base = mark_as_gguf(llama())
    base.add_adapter(poet_config())
    assert marks(base) == NO_MARKS


def test_model_inside_another_module_loses_its_marks():
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = mark_as_gguf(llama())

    policy = Policy()
    get_peft_model(policy, poet_config(target_modules=["q_proj"]))
    assert marks(policy.language_model) == NO_MARKS


def test_refused_configuration_leaves_the_marks():
    """A model that is not wrapped is not touched."""
    base = mark_as_gguf(llama(tied=True))
    before = marks(base)
    with pytest.raises(ValueError, match="weight is shared"):
        wrap(base, target_modules=["lm_head"])
    assert marks(base) == before


def test_model_with_packed_weights_keeps_its_marks():
    base = mark_as_gguf(llama())
    before = marks(base)
    packed = torch.zeros(80, 27, dtype=torch.uint8)
    base.model.layers[1].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    wrap(base, target_modules=["q_proj"])
    assert marks(base) == before


@pytest.mark.parametrize(
    "quantization",
    [BitsAndBytesConfig(load_in_8bit=True), TorchAoConfig(Int8WeightOnlyConfig())],
    ids=["bitsandbytes", "torchao"],
)
def test_model_that_is_quantized_in_another_way_keeps_its_marks(quantization, tmp_path):
    """torchao's weights say that they are floating point."""
    llama().save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    before = marks(base)
    assert before["is_quantized"]
    wrap(base, target_modules=["q_proj"])
    assert marks(base) == before


def test_base_of_an_unwrapped_model_can_be_saved(tmp_path):
    plain = wrap(mark_as_gguf(llama())).unload()
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(llama()))


def test_periodic_training_is_exported(tmp_path):
    model = wrap(mark_as_gguf(llama()), "pretraining")
    train(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


# The real model


class Run(NamedTuple):
    """SmolLM2 trained by Trainer and exported; the losses and logits are those of `TEXTS`."""

    folder: Path
    loss_before: float
    loss_after: float
    before: Tensor
    trained: Tensor
    reloaded: Tensor
    unloaded: Tensor
    marks: dict[str, object]
    alone: Tensor
    report: dict[str, object]


LOADER = """
import json
import sys
from pathlib import Path
sys.modules["poet_peft"] = sys.modules["peft"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder / "plain").eval()
tokenizer = AutoTokenizer.from_pretrained(folder / "plain")
with torch.no_grad():
    logits = model(**load_file(folder / "batch")).logits
save_file({"logits": logits}, folder / "logits")
report = {
    "is_quantized": getattr(model, "is_quantized", False),
    "quantization_config": hasattr(model.config, "quantization_config"),
    "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    "token_ids": tokenizer("The capital").input_ids,
}
(folder / "report.json").write_text(json.dumps(report))
"""


class Pretrained(NamedTuple):
    model: LlamaForCausalLM
    two_layers: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def pretrained():
    """SmolLM2 as transformers loads it, and a copy of it with the first two of its 30 layers."""
    model, tokenizer = smollm2()
    layers = model.model.layers
    model.model.layers = layers[:2]
    two_layers = copy.deepcopy(model)
    two_layers.config.num_hidden_layers = 2
    model.model.layers = layers
    return Pretrained(model, two_layers, tokenizer)


@pytest.fixture(scope="module")
def run(pretrained, tmp_path_factory):
    """Train three steps by Trainer, save, unload, reload, merge, export, and load by transformers alone."""
    folder = tmp_path_factory.mktemp("smollm2")
    base, tokenizer = pretrained.model, pretrained.tokenizer
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    save_file(batch, folder / "batch")

    @torch.no_grad()
    def evaluate(model):
        output = model.eval()(**batch)
        return output.loss.item(), output.logits.clone()

    loss_before, before = evaluate(base)
    model = get_peft_model(base, POETConfig(block_size=64))
    settings = {"max_steps": 3, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), lr_scheduler_type="constant", **settings)
    optimizer = torch.optim.AdamW(poet_param_groups(model, lr=1e-3, poet_lr=1e-3))
    samples = [{key: tensor[i] for key, tensor in batch.items()} for i in range(len(TEXTS))]
    trainer = Trainer(model, arguments, train_dataset=samples, optimizers=(optimizer, None))
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    loss_after, trained = evaluate(model)

    base = model.unload()
    _, unloaded = evaluate(base)
    model = PeftModel.from_pretrained(base, folder / "adapter")
    _, reloaded = evaluate(model)
    plain = model.merge_and_unload()
    plain.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    subprocess.run([sys.executable, "-c", LOADER, str(folder)], check=True, cwd=folder, timeout=300)
    alone = load_file(folder / "logits")["logits"]
    report = json.loads((folder / "report.json").read_text())
    return Run(folder, loss_before, loss_after, before, trained, reloaded, unloaded, marks(plain), alone, report)


def relative_error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.slow
def test_the_model_is_pretrained(run):
    """A uniform guess over its vocabulary has a loss of 10.8."""
    assert run.loss_before < 4


@pytest.mark.slow
def test_trainer_lowers_the_loss(run):
    assert run.loss_after < 0.9 * run.loss_before


@pytest.mark.slow
def test_adapter_file_is_small_and_reloads_to_the_same(run):
    assert (run.folder / "adapter" / "adapter_model.safetensors").stat().st_size < 20e6
    assert torch.equal(run.reloaded, run.trained)


@pytest.mark.slow
def test_unload_gives_the_original(run):
    assert torch.equal(run.unloaded, run.before)


@pytest.mark.slow
def test_transformers_alone_computes_the_same_from_the_export(run):
    assert relative_error(run.alone, run.trained) <= 1e-5
    assert relative_error(run.before, run.trained) > 1e-2


@pytest.mark.slow
def test_exported_model_is_not_taken_for_quantized(run):
    assert run.marks == NO_MARKS
    assert not run.report["is_quantized"]
    assert not run.report["quantization_config"]
    assert "quantization_config" not in json.loads((run.folder / "plain" / "config.json").read_text())


@pytest.mark.slow
def test_exported_head_is_tied_and_stored_once(run):
    assert run.report["tied"]
    assert "lm_head.weight" not in load_file(run.folder / "plain" / "model.safetensors")


@pytest.mark.slow
def test_exported_tokenizer_works(run):
    assert run.report["token_ids"] == [504, 3575]


@pytest.mark.slow
def test_trl_trains_the_model_with_a_poet_config(pretrained, tmp_path):
    settings = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "max_length": 16}
    trainer = SFTTrainer(
        pretrained.two_layers,
        SFTConfig(str(tmp_path), bf16=False, **settings),
        train_dataset=Dataset.from_dict({"text": TEXTS * 4}),
        processing_class=pretrained.tokenizer,
        peft_config=POETConfig(block_size=64),
    )
    trainer.train()
    layers = [layer for _, layer in poet_layers(trainer.model)]
    assert len(layers) == 4
    assert marks(trainer.model.get_base_model()) == NO_MARKS
    assert all(rotation.weight.abs().max() > 0 for layer in layers for rotation in layer.rotations("default"))
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "plain")
