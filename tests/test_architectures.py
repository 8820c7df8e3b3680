"""Every architecture trains, saves, reloads, merges, and is exported to a model that transformers alone loads."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import randomize
from models import minilm, tokens
from peft import OFTConfig, PeftModel, get_peft_model
from peft.tuners.oft.layer import OFTLayer
from peft.utils import TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from poet_peft import POETConfig, merge_and_reinitialize, poet_param_groups
from poet_peft.experts import ParamWrapper
from poet_peft.layer import POETLayer


# What these tiny models, and mixtures of experts, are told; test_config.py and the end of this file look at it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The block size is larger than the side"),
    pytest.mark.filterwarnings("ignore:.*leaves out "),
]


class Architecture(NamedTuple):
    build: Callable[[], PreTrainedModel]
    inputs: Callable[[], dict[str, Tensor]]
    num_layers_rotated: int  # by all-linear
    tied: bool = False
    generates: bool = True
    poet_lr: float = 2e-2


def causal():
    return {"input_ids": tokens(), "labels": tokens()}


def to_classify():
    return {"input_ids": tokens(), "labels": torch.tensor([0, 1])}


def seq2seq():
    return {"input_ids": tokens(), "labels": tokens(length=7, seed=2)}


def images():
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}


# 48 and 80 features: no power of two divides either beyond 16.
DECODER = {"vocab_size": 128, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GROUPED = {**DECODER, "intermediate_size": 80, "num_key_value_heads": 2}
ENCODER = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
T5_SIZES = {"vocab_size": 128, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4}
BART_SIZES = {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in
              (("layers", 1), ("attention_heads", 4), ("ffn_dim", 80))}  # fmt: skip


def t5(**overrides):
    return T5ForConditionalGeneration(T5Config(**T5_SIZES, decoder_start_token_id=0, pad_token_id=0, **overrides))


def bart():
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    sizes = {"vocab_size": 128, "d_model": 48, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(**sizes, **BART_SIZES, **special))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=3))


ARCHITECTURES = {
    "llama": Architecture(lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)), causal, 14),
    "qwen2": Architecture(
        lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED, tie_word_embeddings=True)), causal, 14, tied=True
    ),
    "gpt2": Architecture(
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=48, n_layer=2, n_head=4, n_positions=64)),
        causal,
        8,
        tied=True,
    ),
    "opt": Architecture(
        lambda: OPTForCausalLM(OPTConfig(**DECODER, ffn_dim=80, word_embed_proj_dim=32, max_position_embeddings=64)),
        causal,
        14,
        tied=True,
    ),
    "falcon": Architecture(  # linear layers of its own class, and outputs that are added to in place
        lambda: FalconForCausalLM(FalconConfig(**DECODER, bias=False, parallel_attn=True)), causal, 8, tied=True
    ),
    "bert": Architecture(
        lambda: BertForSequenceClassification(BertConfig(**ENCODER, vocab_size=128, num_labels=3)),
        to_classify,
        13,
        generates=False,
    ),
    "t5": Architecture(t5, seq2seq, 32, tied=True),
    "bart": Architecture(bart, seq2seq, 16, tied=True),
    "vit": Architecture(
        lambda: ViTForImageClassification(ViTConfig(**ENCODER, image_size=16, patch_size=8, num_labels=3)),
        images,
        12,
        generates=False,
    ),
    "mixtral": Architecture(mixtral, causal, 8),
    "minilm": Architecture(lambda: minilm()[0], to_classify, 37, generates=False, poet_lr=2e-3),
}
TINY = [name for name in ARCHITECTURES if name != "minilm"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRETRAINING = {"merge_interval": 2, "train_rest": True, "base_init": "normalized"}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}

for_every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
# In bfloat16 an nn.Linear, a Conv1D, layers that are kept in float32, and experts.
RUNS = [*((name, "float32") for name in ARCHITECTURES), *((n, "bfloat16") for n in ("llama", "gpt2", "t5", "mixtral"))]
for_every_run = pytest.mark.parametrize(("name", "dtype"), RUNS)
for_tied_architectures = pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.tied])
for_generating_architectures = pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.generates])


def build(name: str, dtype: str = "float32", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return ARCHITECTURES[name].build().to(DTYPES[dtype]).eval()


def poet(model: PreTrainedModel, **overrides: Any) -> PeftModel:
    return get_peft_model(model, POETConfig(**{"target_modules": "all-linear", "block_size": 16, **overrides}))


def inputs(name: str, dtype: str = "float32") -> dict[str, Tensor]:
    return {
        key: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
        for key, tensor in ARCHITECTURES[name].inputs().items()
    }


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits.clone()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def train(model: PeftModel, batch: dict[str, Tensor], num_steps: int = 4, poet_lr: float = 1e-2) -> list[float]:
    """The losses before every step."""
    optimizer = torch.optim.AdamW(poet_param_groups(model, lr=1e-3, poet_lr=poet_lr))
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Run(NamedTuple):
    """One architecture trained and exported. All tensors are logits on the training batch."""

    folder: Path
    losses: list[float]
    gradients: dict[str, float]
    rotations: set[str]
    before: Tensor
    trained: Tensor
    reloaded: Tensor
    merged: Tensor
    not_contiguous: list[str]
    stays_tied: bool


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[str, str], Run]:
    """Train, save, reload, merge and export an architecture, once however many tests look at it."""
    root = tmp_path_factory.mktemp("runs")

    @cache
    def train_and_export(name: str, dtype: str) -> Run:
        folder, batch = root / f"{name}-{dtype}", inputs(name, dtype)
        base = build(name, dtype)
        if ARCHITECTURES[name].generates:
            base.generation_config.max_new_tokens = 7
        before = logits(base, batch)
        base.save_pretrained(folder / "base")

        model = poet(base)
        losses = train(model, batch, poet_lr=ARCHITECTURES[name].poet_lr)
        gradients = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
        rotations = {n for n, _ in model.named_parameters() if ".poet_R." in n or ".poet_P." in n}
        trained = logits(model, batch)

        model.save_pretrained(folder / "adapter")
        reloaded = logits(PeftModel.from_pretrained(build(name, dtype), folder / "adapter").eval(), batch)
        plain = model.merge_and_unload()
        merged = logits(plain, batch)
        plain.save_pretrained(folder / "plain")
        if name in TINY:
            plain.save_pretrained(folder / "sharded", max_shard_size="20KB")
        save_file(batch, folder / "batch")
        not_contiguous = [n for n, tensor in plain.state_dict().items() if not tensor.is_contiguous()]
        head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
        stays_tied = head is not None and head.weight is embedding.weight
        return Run(folder, losses, gradients, rotations, before, trained, reloaded, merged, not_contiguous, stays_tied)

    return train_and_export


# Runs where importing poet_peft or peft is an error: writes the logits of every exported model.
LOADER = """
import json
import sys
from pathlib import Path
sys.modules["poet_peft"] = sys.modules["peft"] = None
import torch
import transformers
from safetensors.torch import load_file, save_file
for folder in map(Path, sys.argv[1:]):
    batch, logits = load_file(folder / "batch"), {}
    for export in ("plain", "sharded"):
        if (folder / export).is_dir():
            config = json.loads((folder / export / "config.json").read_text())
            model = getattr(transformers, config["architectures"][0]).from_pretrained(folder / export).eval()
            with torch.no_grad():
                logits[export] = model(**batch).logits.contiguous()
    save_file(logits, folder / "logits")
"""


@pytest.fixture(scope="module")
def alone(run) -> Callable[[str, str], dict[str, Tensor]]:
    """The logits that transformers computes from the exports in a process of its own."""

    @cache
    def load_all() -> None:
        folders = [str(run(name, dtype).folder) for name, dtype in RUNS]
        subprocess.run([sys.executable, "-c", LOADER, *folders], check=True, cwd=folders[0], timeout=300)

    def load(name: str, dtype: str) -> dict[str, Tensor]:
        load_all()
        return load_file(run(name, dtype).folder / "logits")

    return load


# Training


@for_every_architecture
def test_training_lowers_the_loss(run, name):
    losses = run(name, "float32").losses
    assert losses[-1] < losses[0]


@for_every_architecture
def test_rotations_and_nothing_else_get_gradients(run, name):
    gradients = run(name, "float32").gradients
    assert gradients.keys() == run(name, "float32").rotations
    assert all(norm > 0 for norm in gradients.values())


@for_every_run
def test_training_moves_the_outputs_beyond_the_tolerance(run, name, dtype):
    """Without this, an adapter or an export of the untrained model would pass the tests below."""
    assert relative_error(run(name, dtype).trained, run(name, dtype).before) > 2 * TOLERANCE[dtype]


@for_every_architecture
def test_a_fold_changes_no_output(name):
    model, batch = poet(build(name), merge_interval=4), inputs(name)
    train(model, batch, num_steps=2, poet_lr=2e-3)
    before = logits(model, batch)
    merge_and_reinitialize(model)
    assert relative_error(logits(model, batch), before) < 1e-5


# Save and reload


@for_every_run
def test_reloaded_adapter_computes_the_same(run, name, dtype):
    assert torch.equal(run(name, dtype).reloaded, run(name, dtype).trained)


@pytest.mark.parametrize("name", TINY)
def test_pretraining_checkpoint_reloads_onto_any_other_weights(name, tmp_path):
    """Everything that is not rotated trains too, in other places in every architecture, and has to be in the file."""
    model, batch = poet(build(name), **PRETRAINING), inputs(name)
    train(model, batch, num_steps=2)
    merge_and_reinitialize(model)
    train(model, batch, num_steps=2)
    model.save_pretrained(tmp_path)
    other = build(name, seed=1)
    assert relative_error(logits(other, batch), logits(model, batch)) > 0.1
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path).eval(), batch), logits(model, batch))


# Merge and export


@pytest.mark.parametrize("name", TINY)
def test_pretrained_model_is_exported(name, tmp_path):
    model, batch = poet(build(name), **PRETRAINING), inputs(name)
    train(model, batch)
    trained, model_class = logits(model, batch), type(model.get_base_model())
    model.merge_and_unload().save_pretrained(tmp_path)
    assert relative_error(logits(model_class.from_pretrained(tmp_path).eval(), batch), trained) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
def test_merged_model_generates_the_same_text(name):
    model = poet(build(name))
    randomize(model, theta=0.4)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    generated = model.generate(tokens(), **settings)
    assert not torch.equal(generated, build(name).generate(tokens(), **settings))
    assert torch.equal(model.merge_and_unload().generate(tokens(), **settings), generated)


@for_every_run
def test_merged_model_computes_the_same(run, name, dtype):
    assert relative_error(run(name, dtype).merged, run(name, dtype).trained) <= TOLERANCE[dtype]


@pytest.mark.slow
@for_every_run
def test_transformers_alone_computes_the_same_from_the_export(run, alone, name, dtype):
    assert relative_error(alone(name, dtype)["plain"], run(name, dtype).trained) <= TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [run for run in RUNS if run[0] in TINY])
def test_transformers_alone_computes_the_same_from_shards(run, alone, name, dtype):
    assert relative_error(alone(name, dtype)["sharded"], run(name, dtype).trained) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", TINY)
def test_shards_and_their_index_hold_every_tensor_once(run, name):
    folder = run(name, "float32").folder
    index = json.loads((folder / "sharded" / "model.safetensors.index.json").read_text())
    shards = sorted((folder / "sharded").glob("*.safetensors"))
    stored = [(key, shard.name) for shard in shards for key in load_file(shard)]
    assert len(shards) > 1
    assert sorted(stored) == sorted(index["weight_map"].items())
    assert {key for key, _ in stored} == set(load_file(folder / "base" / "model.safetensors"))


@for_every_run
def test_export_has_the_tensors_of_the_plain_model(run, name, dtype):
    """The same names, shapes and dtypes: tied weights are stored once, experts under the names of the Hub's files."""
    folder = run(name, dtype).folder

    def tensors(export):
        return {k: (t.shape, t.dtype) for k, t in load_file(folder / export / "model.safetensors").items()}

    assert tensors("plain") == tensors("base")


@for_every_architecture
def test_merged_weights_are_contiguous(run, name):
    assert run(name, "float32").not_contiguous == []


@for_tied_architectures
def test_merged_model_stays_tied(run, name):
    assert run(name, "float32").stays_tied


@for_generating_architectures
def test_export_keeps_the_generation_config(run, name):
    exported = json.loads((run(name, "float32").folder / "plain" / "generation_config.json").read_text())
    assert exported["max_new_tokens"] == 7


@for_every_architecture
def test_export_keeps_the_config(run, name):
    folder = run(name, "float32").folder
    plain, base = (json.loads((folder / export / "config.json").read_text()) for export in ("plain", "base"))
    assert plain == base


# Targets


def rotated(model: PeftModel) -> set[str]:
    """Names of the layers; experts, which are no layers, are not among them."""
    modules = model.base_model.model.named_modules()
    return {name for name, module in modules if isinstance(module, POETLayer) and not isinstance(module, ParamWrapper)}


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ("gpt2", "vit")])
def test_default_targets_are_those_of_peft_oft(name):
    oft = get_peft_model(build(name), OFTConfig(oft_block_size=8))
    layers = {n for n, m in oft.base_model.model.named_modules() if isinstance(m, OFTLayer)}
    assert rotated(poet(build(name), target_modules=None)) == layers != set()


def test_default_targets_of_gpt2_are_those_of_the_table_of_peft_oft():
    """PEFT's OFT itself refuses the Conv1D that its table names."""
    assert TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING["gpt2"] == ["c_attn"]
    layers = rotated(poet(build("gpt2"), target_modules=None))
    assert layers == {f"transformer.h.{i}.attn.c_attn" for i in range(2)}


def test_architecture_without_default_targets_asks_for_them():
    """PEFT's OFT has none for ViT either."""
    with pytest.raises(ValueError, match="specify `target_modules`"):
        poet(build("vit"), target_modules=None)


@for_every_architecture
def test_all_linear_rotates_all_linear_layers_but_the_head(name):
    model = build(name)
    head = model.get_output_embeddings() or getattr(model, "classifier", None)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    assert rotated(poet(model)) == linear
    assert len(linear) == ARCHITECTURES[name].num_layers_rotated


@pytest.mark.parametrize("name", ["bert", "vit", "minilm"])
def test_classifier_can_be_trained_in_full_and_reloads(name, tmp_path):
    model, batch = poet(build(name), modules_to_save=["classifier"]), inputs(name)
    assert "classifier" not in rotated(model)
    before = model.base_model.model.classifier.weight.detach().clone()
    train(model, batch)
    assert not torch.equal(model.base_model.model.classifier.weight, before)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert torch.equal(logits(reloaded, batch), logits(model, batch))


@pytest.mark.parametrize("name", ["bert", "minilm"])
def test_task_of_classification_leaves_the_head_to_peft(name):
    model = poet(build(name), task_type="SEQ_CLS")
    head = model.base_model.model.classifier
    assert isinstance(head, ModulesToSaveWrapper)
    before = head.weight.detach().clone()
    train(model, inputs(name))
    merged = model.merge_and_unload().classifier.weight
    assert torch.equal(merged, head.weight)
    assert not torch.equal(merged, before)


@for_tied_architectures
def test_head_that_is_tied_to_the_embedding_is_refused(name):
    model = build(name)
    head = next(n for n, module in model.named_modules() if module is model.get_output_embeddings())
    with pytest.raises(ValueError, match=f"'{head}': its weight is shared"):
        poet(model, target_modules=[head])


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "opt", "bert"])
def test_biases_train_and_reload_if_asked_for(name, tmp_path):
    model, batch = poet(build(name), bias="poet_only"), inputs(name)
    train(model, batch)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert any(key.endswith(".bias") for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(reloaded, batch), logits(model, batch))


# Kept in fp32 by transformers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_t5_in_16_bits_keeps_the_layers_that_transformers_loads_in_fp32(dtype, tmp_path):
    """`wo` overflows in fp16, so transformers keeps it in fp32 there, rotated or not, and again after an export."""
    build("t5").save_pretrained(tmp_path / "base")
    base = T5ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=dtype).eval()
    dtypes = {n: p.dtype for n, p in base.named_parameters()}
    assert {d for n, d in dtypes.items() if ".wo." in n} == {torch.float32 if dtype == torch.float16 else dtype}
    model, batch = poet(base), inputs("t5")
    train(model, batch, num_steps=2)
    trained = logits(model, batch)

    plain = model.merge_and_unload()
    assert {n: p.dtype for n, p in plain.named_parameters()} == dtypes
    plain.save_pretrained(tmp_path / "plain")
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "plain", dtype=dtype).eval()
    assert {n: p.dtype for n, p in loaded.named_parameters()} == dtypes
    assert relative_error(logits(loaded, batch), trained) <= 2e-2


# What making a PEFT model warns of


def warnings_of(build: Callable[[], PreTrainedModel], **config: Any) -> list[str]:
    """What making a PEFT model warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        poet(build(), block_size=2, **config)
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def test_dense_model_is_silent():
    assert warnings_of(ARCHITECTURES["llama"].build, target_modules="all-linear") == []
    assert warnings_of(ARCHITECTURES["llama"].build, target_modules=None) == []


@pytest.mark.parametrize("name", ["falcon", "gpt2", "llama", "mixtral", "opt", "qwen2"])
def test_sizes_of_the_pretraining_recipe_know_the_names_of_layers(name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="base_init_scale_pattern")
        get_peft_model(ARCHITECTURES[name].build(), POETConfig.for_pretraining(block_size=2))


def test_names_that_match_no_module_are_named_in_a_warning():
    (message,) = warnings_of(ARCHITECTURES["llama"].build, target_modules=["q_proj", "query"])
    assert message == "target_modules has names that match no module and were ignored: ['query']."
