"""What PEFT's tests load from the Hub, made here: tiny random models, an adapter, a tokenizer and a data set.

Each lies in a folder named as the repository. The libraries take a folder before they ask the Hub, so tests that run
inside the parent folder need no network.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BartConfig,
    BertConfig,
    CLIPTextConfig,
    ConvNextImageProcessor,
    DebertaConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    ResNetConfig,
    RobertaConfig,
    T5Config,
)


# A block of the default size, 64, does not fill a side.
_SIZES = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 128}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SCALE = {"initializer_range": 0.1}  # at the usual 0.02, outputs this small differ by less than the tests' tolerances
_GROUPED = {**_SIZES, **_IDS, **_SCALE, "num_key_value_heads": 2}
_ENCODER = {**_SIZES, **_SCALE, "pad_token_id": 0}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
_GPT = {"vocab_size": 512, "n_embd": 96, "n_layer": 2, "n_head": 4, "n_positions": 128, **_SCALE}
_GPT_IDS = {"bos_token_id": 1, "eos_token_id": 2}


def _opt(num_layers=2):
    sizes = {"vocab_size": 512, "hidden_size": 32, "word_embed_proj_dim": 96, "ffn_dim": 160, "num_attention_heads": 4}
    return OPTConfig(**sizes, num_hidden_layers=num_layers, max_position_embeddings=128, init_std=0.1, **_IDS)


def _bart():
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in _BART_SIDE.items()}
    return BartConfig(vocab_size=512, d_model=96, max_position_embeddings=128, init_std=0.1, **sides, **_IDS)


def _resnet():
    sizes = {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]}
    return ResNetConfig(**sizes, num_labels=3, layer_type="basic")


_BART_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 160}
_T5 = {"vocab_size": 512, "d_model": 96, "d_kv": 24, "d_ff": 160, "num_layers": 2, "num_heads": 4}
_T5_IDS = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}

_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 24}
# PEFT's tests give this one weights of size 1, which a wide model turns into outputs beyond their tolerances.
_LLAMA4 = {"hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "head_dim": 4}
_LLAMA4 |= {"num_experts_per_tok": 1, "moe_layers": [0, 1], "interleave_moe_layer_step": 1}

OPT = "peft-internal-testing/tiny-random-OPTForCausalLM"
RESNET = "peft-internal-testing/tiny-random-ResNetForImageClassification"

# Name on the Hub, class, configuration. A name keeps the head that it has there.
MODELS = {
    OPT: ("OPTForCausalLM", _opt),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", lambda: _opt(num_layers=12)),  # its layers are counted
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", lambda: GPT2Config(**_GPT, **_GPT_IDS)),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", lambda: GPT2Config(**_GPT, **_GPT_IDS)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        lambda: GPTJConfig(**_GPT, **_GPT_IDS, rotary_dim=4),
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", lambda: LlamaConfig(**_GROUPED)),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", lambda: LlamaConfig(**_GROUPED)),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        lambda: Llama4TextConfig(**{**_GROUPED, **_EXPERTS, **_LLAMA4}),
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOssForCausalLM",
        lambda: GptOssConfig(**_GROUPED, **_EXPERTS, sliding_window=64),
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", lambda: MistralConfig(**_GROUPED)),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", lambda: Qwen2Config(**_GROUPED)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        lambda: Gemma3TextConfig(**_GROUPED, head_dim=24, sliding_window=64),
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        lambda: T5Config(**_T5, **_T5_IDS),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _bart),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", lambda: BertConfig(**_ENCODER)),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", lambda: RobertaConfig(**_ENCODER)),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", lambda: DebertaConfig(**_ENCODER, **_DEBERTA)),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        lambda: DebertaV2Config(**_ENCODER, **_DEBERTA),
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        lambda: BertConfig(**_ENCODER),
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        lambda: RobertaConfig(**_ENCODER),
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        "CLIPTextModel",
        lambda: CLIPTextConfig(**_SIZES, initializer_range=0.1, **_IDS),
    ),
    RESNET: ("ResNetForImageClassification", _resnet),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        lambda: LlamaConfig(**_GROUPED, num_labels=1),
    ),
}


def make_models(folder):
    """Write everything into `folder`."""
    folder = Path(folder)
    transformers.utils.logging.disable_progress_bar()
    for name, (architecture, config) in MODELS.items():
        torch.manual_seed(0)
        getattr(transformers, architecture)(config()).save_pretrained(folder / name)
    LoraConfig(base_model_name_or_path=OPT).save_pretrained(folder / "peft-internal-testing/tiny-opt-lora-revision")
    _make_tokenizer(folder / OPT)
    _make_quotes(folder / "ybelkada/english_quotes_copy")
    ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder / RESNET)
    _make_image(folder / "huggingface/cats-image/test")


def _make_tokenizer(folder):
    words = sorted({word for row in _quotes() for word in row["quote"].split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special).save_pretrained(folder)


def _make_quotes(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in _quotes()))


def _quotes():
    """Sentences of made-up words, in the columns of the data set."""
    words = [first + second for first in ("ba", "ko", "li", "mu", "ze") for second in ("da", "no", "ri", "su")]
    return [
        {"quote": " ".join(words[(i * j) % 20] for j in range(1, 9)), "author": "nobody", "tags": ["made up"]}
        for i in range(1, 33)
    ]


def _make_image(folder):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
