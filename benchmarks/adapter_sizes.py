"""Measures adapter files at about equal parameter counts, on SmolLM2-135M's shapes with all linear layers adapted.

python -m benchmarks.adapter_sizes   # writes benchmarks/results/adapter-sizes.json

The base model has random weights: an adapter's size does not depend on them. Adapters are fp32, as PEFT makes them.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors import safe_open

import poet_peft
from poet_peft import POETConfig


SHAPES = {  # https://huggingface.co/HuggingFaceTB/SmolLM2-135M
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
ADAPTERS = {
    "LoRA, r = 24": LoraConfig(r=24, target_modules="all-linear"),
    "OFT, b = 96": OFTConfig(r=0, oft_block_size=96, target_modules="all-linear"),
    "POET block-stochastic, b = 48": POETConfig(block_size=48, target_modules="all-linear"),
    "POET fully stochastic, b = 185": POETConfig(
        variant="fully_stochastic", block_size=185, target_modules="all-linear"
    ),
}
OUT = Path(__file__).parent / "results" / "adapter-sizes.json"


def measure(config):
    model = get_peft_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES)), config)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        path = Path(directory) / "adapter_model.safetensors"
        by_dtype = Counter()
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, not a dict
                tensor = file.get_tensor(key)
                by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
        size = path.stat().st_size
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "trained": trained,
        "bytes": size,
        "bytes_per_parameter": round(size / trained, 3),
        "bytes_by_dtype": dict(by_dtype),
        "bytes_of_header": size - sum(by_dtype.values()),
    }


def main():
    sizes = {name: measure(config) for name, config in ADAPTERS.items()}
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft, poet_peft)}
    OUT.write_text(json.dumps({"model": SHAPES, "adapters": sizes, "versions": versions}, indent=1) + "\n")
    for name, size in sizes.items():
        print(f"{name:32} {size['trained']:>10,} parameters {size['bytes']:>11,} bytes")


if __name__ == "__main__":
    main()
