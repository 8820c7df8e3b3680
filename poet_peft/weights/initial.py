"""Weights to start from when training from scratch. The spectrum a weight starts with is the one it keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor


SCHEMES = ("normalized", "xavier", "standard", "uniform_spectrum", "mup")

_MUP_ALPHA = 4.0


def draw_weight(out_features: int, in_features: int, scheme: str, *, seed: int, module_name: str) -> Tensor:
    """A random weight (out_features, in_features), fp32 on the CPU, the same for the same arguments on every process.

    Args:
        scheme: "normalized" (Gaussian with rows at unit norm), "xavier" (Gaussian, std `sqrt(2 / (in + out))`),
            "standard" (Gaussian, std 0.02) or "uniform_spectrum" (the orthogonal factor of a Gaussian: all singular
            values 1). POET, arXiv 2506.08001, table 5: C4 perplexity 25.37, 25.79, 26.22, 27.29.
    """
    digest = hashlib.sha256(f"poet/{seed}/{module_name}/base_init".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if scheme == "uniform_spectrum":
        tall = torch.randn(*sorted((out_features, in_features), reverse=True), generator=generator)
        Q, upper = torch.linalg.qr(tall)
        # Fixed signs make the factor uniformly distributed.
        weight = Q * upper.diagonal().sign()
        return weight if out_features >= in_features else weight.mT.contiguous()
    weight = torch.randn(out_features, in_features, generator=generator)
    if scheme in ("normalized", "mup"):
        weight = weight / torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        if scheme == "mup":
            weight *= _MUP_ALPHA * (out_features / in_features) ** 0.5 / _largest_singular_value(weight, generator)
        return weight
    if scheme == "xavier":
        return weight * (2 / (in_features + out_features)) ** 0.5
    if scheme == "standard":
        return weight * 0.02
    raise ValueError(f"scheme={scheme!r} is unknown; choose one of {', '.join(map(repr, SCHEMES))}.")


def _largest_singular_value(weight: Tensor, generator: torch.Generator) -> Tensor:
    """By power iteration, to about a thousandth: a decomposition of every layer of a large model takes minutes."""
    v = torch.randn(weight.shape[1], generator=generator)
    for _ in range(100):
        v = weight.mT @ (weight @ v)
        v /= torch.linalg.vector_norm(v)
    return torch.linalg.vector_norm(weight @ v)


def scale_of(module_name: str, scale: float, pattern: Mapping[str, float]) -> float:
    """The factor of a layer's weights: `scale`, times what `pattern` has for its name, as PEFT matches patterns."""
    return scale * pattern.get(get_pattern_key(pattern.keys(), module_name), 1.0)
