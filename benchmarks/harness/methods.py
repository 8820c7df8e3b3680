"""The methods that are compared, by name, as adapters on a layer or a model.

full            the linear layers are trained themselves
frozen          they are not trained at all
lora-R          PEFT's LoRA of rank R
oft-B, boft-B   PEFT's OFT and BOFT with blocks of B
poet-B          POET with blocks of B; poet-fs-1/2 fully stochastic; with -efficient at the end memory_efficient=True
poet-ortho-B    POET with blocks of B, folded every step, RotationMuon; of whole models only
"""

import re
import warnings
from fractions import Fraction

import torch
from peft import BOFTConfig, LoraConfig, OFTConfig, get_peft_model
from torch import nn

from poet_peft import POETConfig

from .formulas import boft_flops, poet_flops


_NAME = re.compile(r"full|frozen|(lora|oft|boft)-(\d+)|poet-(?:(?:ortho-)?(\d+)|fs-(\d+/\d+))(-efficient)?")
_LR = 1e-5


def check_method(name):
    """The name itself, if it is one."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"unknown method {name!r}: full, frozen, lora-64, oft-64, boft-4, poet-64, poet-fs-1/2, ...")
    return name


def is_poet(method):
    return method.startswith("poet")


def folds_every_step(method):
    return method.startswith("poet-ortho")


def adapter_config(method, target_modules, poet=POETConfig, **poet_overrides):
    """PEFT's configuration of a method, None for "full" and "frozen"."""
    kind, size, block_size, fraction, efficient = _NAME.fullmatch(check_method(method)).groups()
    if is_poet(method):
        return poet(
            variant="fully_stochastic" if fraction else "block_stochastic",
            block_size=float(Fraction(fraction)) if fraction else int(block_size),
            memory_efficient=bool(efficient),
            target_modules=target_modules,
            **poet_overrides,
        )
    if kind == "lora":
        return LoraConfig(r=int(size), lora_alpha=int(size), target_modules=target_modules)
    if kind == "oft":
        return OFTConfig(oft_block_size=int(size), target_modules=target_modules)
    if kind == "boft":
        return BOFTConfig(boft_block_size=int(size), target_modules=target_modules)
    return None


def why_not(method, num_tokens, in_features, out_features, max_gflop):
    """Why a method is left out on a layer: its block size does not fit, or it needs too much; None if it is not."""
    kind, size, block_size, fraction, _ = _NAME.fullmatch(method).groups()
    if kind in ("oft", "boft") and in_features % int(size):
        return f"{size} does not divide {in_features}"
    shape = num_tokens, out_features, in_features
    if kind == "boft":
        flops = boft_flops(*shape)
    elif is_poet(method):
        sizes = [int(block_size or Fraction(fraction) * dim) for dim in (in_features, out_features)]
        flops = poet_flops(*shape, max(2, *sizes))
    else:
        return None
    return f"left out: {flops / 1e9:,.0f} GFLOP" if flops > 1e9 * max_gflop else None


class _OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def build_layer(method, in_features, out_features, device, dtype, seed=0):
    """A linear layer without bias as the method trains it, without PEFT's wrapper around it."""
    torch.manual_seed(seed)
    model = _OneLayer(nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype))
    config = adapter_config(method, ["layer"])
    if config is not None:
        with warnings.catch_warnings():  # BOFT's CUDA extension, which is not for CPUs
            warnings.filterwarnings("ignore", message="Failed to load the CUDA extension|Setting boft_n_butterfly")
            return get_peft_model(model, config).base_model.model.layer
    return model.layer.requires_grad_(method == "full")


def autocast(device, dtype):
    """What Trainer computes in where weights are in 16 bits: PEFT keeps the adapters' own parameters in fp32."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def adamw(groups):
    """The optimizer of every method. Its learning rate is too small to change what is measured."""
    return torch.optim.AdamW(groups, lr=_LR, fused=True)


def trainable(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
