"""Tiny mixtures of experts, whose stacked weights no linear layer holds, and their rotations by definition."""

import pytest
import torch
import transformers
from cases import randomize
from models import tokens
from peft import get_peft_model

from poet_peft import POETConfig, RotationMuon, poet_param_groups


SIZES = {
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "head_dim": 8,
}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", FOUR),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "head_dim": 4,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", FOUR),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 24,
            "interleave_moe_layer_step": 1,
        },
    ),
}
# Experts in modules of one weight each, which are called one after the other.
OTHERS = {
    "jetmoe": (
        "JetMoeForCausalLM",
        "JetMoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_attention_heads": 4},
    )
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
for_every_model = pytest.mark.parametrize("name", MODELS)
for_both_variants = pytest.mark.parametrize("variant", ["block_stochastic", "fully_stochastic"])


def moe(name, dtype=torch.float32, **overrides):
    cls, config_cls, settings = {**MODELS, **OTHERS}[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_cls)(**{**SIZES, **settings, **overrides})
    model = getattr(transformers, cls)(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".experts." in parameter_name:  # some are made without values
                parameter.copy_(torch.randn(parameter.shape) / 4)
    return model.to(dtype).eval()


def config(**overrides):
    settings = {"target_modules": [], "target_parameters": EXPERTS, "block_size": 4}
    return POETConfig(**{**settings, **overrides})


def rotated(name, theta=0.4, dtype=torch.float32, **overrides):
    model = get_peft_model(moe(name, dtype), config(**overrides))
    randomize(model, theta)
    return model


def train(model, optimizer, seeds):
    for seed in seeds:
        input_ids = tokens(seed=seed)
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model, muon=False):
    if muon:
        return RotationMuon(poet_param_groups(model, lr=1e-2, angle=0.05))
    return torch.optim.AdamW(poet_param_groups(model, lr=1e-2, poet_lr=2e-2))


def dense_rotation(layer, side, dim):
    """`R_e` or `P_e` of all experts in float64, (num_experts, dim, dim), entry by entry from the definition."""
    rotation = getattr(layer, f"poet_{side}")["default"]
    num_experts = rotation.partition.groups
    features, parameters = rotation.index.tolist(), iter(rotation.weight.detach().double().tolist())
    dense = torch.eye(dim, dtype=torch.float64).repeat(num_experts, 1, 1)
    b = rotation.partition.block_size
    for block in (features[start : start + b] for start in range(0, len(features), b)):
        experts = {feature // dim for feature in block}
        assert len(experts) == 1
        Q = torch.zeros(b, b, dtype=torch.float64)
        for i in range(b):
            for j in range(i + 1, b):
                Q[i, j] = next(parameters)
                Q[j, i] = -Q[i, j]
        identity = torch.eye(b, dtype=torch.float64)
        G = (identity + Q) @ torch.linalg.inv(identity - Q)
        rows = torch.tensor([feature % dim for feature in block])
        dense[experts.pop(), rows[:, None], rows] = G
    assert next(parameters, None) is None
    return dense


def stack(layer):
    """(num_experts, out, in) in float64."""
    weight = layer.base_parameter.detach().double()
    return layer.weight_layout.as_matrix(weight)


def dense_weight(layer):
    W = stack(layer)
    return dense_rotation(layer, "R", W.shape[1]) @ W @ dense_rotation(layer, "P", W.shape[2])


def num_stacks(name):
    return 2 if name == "deepseek_v3" else 4  # whose first layer is dense


def route():
    """Arguments of a mixture's experts: five tokens, their two experts each, and the weights of these."""
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    return hidden, torch.tensor([[0, 2], [1, 2], [3, 0], [2, 1], [0, 3]]), torch.full((5, 2), 0.5)
