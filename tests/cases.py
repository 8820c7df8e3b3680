"""The table of cases that the layer tests share, and small builders around it.

Every builder draws from its own generator, so a test sees the same numbers whatever ran before it.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from poet_peft import POETConfig
from poet_peft.layer import POETLayer


# Beside nn.Linear, transformers' Conv1D and nn.Embedding: torch's convolutions, with every setting that one can have.
# By name: the class, the input channels, the arguments, the spatial size of an input. The weight as a matrix has
# in channels / groups * kernel columns.
CONVOLUTIONS = {
    "convolution1d": (nn.Conv1d, 3, {"kernel_size": 5, "padding": "same", "dilation": 2}, (7,)),
    "convolution2d": (nn.Conv2d, 3, {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "reflect"}, (5, 6)),
    "convolution3d": (nn.Conv3d, 2, {"kernel_size": 2, "stride": (1, 2, 1)}, (3, 4, 3)),
    "grouped": (nn.Conv2d, 4, {"kernel_size": 3, "groups": 2, "padding": (1, 0)}, (4, 5)),
    "depthwise": (nn.Conv1d, 6, {"kernel_size": 4, "groups": 6}, (9,)),
}
Kind = Literal[
    "linear", "conv1d", "embedding", "convolution1d", "convolution2d", "convolution3d", "grouped", "depthwise"
]


@dataclass(frozen=True)
class Case:
    """One rotated layer: its kind, its shape and how it is rotated."""

    name: str
    out_features: int = 16
    in_features: int = 24
    block_size: int | float = 8
    kind: Kind = "linear"
    bias: bool = True
    variant: str = "block_stochastic"
    orthogonal_map: str = "cayley_neumann"
    num_neumann_terms: int = 3
    adaptive_terms: bool = True
    dtype: torch.dtype = torch.float32

    def config(self, **overrides) -> POETConfig:
        settings = {
            "target_modules": ["layer"],
            "block_size": self.block_size,
            "variant": self.variant,
            "orthogonal_map": self.orthogonal_map,
            "num_neumann_terms": self.num_neumann_terms,
            "adaptive_terms": self.adaptive_terms,
        }
        return POETConfig(**{**settings, **overrides})

    @property
    def is_series(self) -> bool:
        """Whether the blocks are a series of fixed length, which is orthogonal for small rotations only."""
        return self.orthogonal_map == "cayley_neumann" and not self.adaptive_terms

    @property
    def uses_defaults_of_the_map(self) -> bool:
        return self.orthogonal_map == "cayley_neumann" and self.num_neumann_terms == 3 and self.adaptive_terms

    @property
    def is_linear(self) -> bool:
        """Whether the layer is a linear map of the last dimension, which any number of dimensions may precede."""
        return self.kind in ("linear", "conv1d")

    @property
    def float64(self) -> "Case":
        return replace(self, dtype=torch.float64)


FULLY = "fully_stochastic"

CASES = [
    Case("plain"),
    Case("no-bias", bias=False),
    Case("conv1d", kind="conv1d"),
    Case("tall", 40, 12, block_size=4),
    Case("remainder", 19, 22),
    Case("remainder-of-one", 17, 25),
    Case("conv1d-remainder", 19, 22, kind="conv1d"),
    Case("one-block", 12, 12, block_size=12),
    Case("blocks-of-two", 6, 4, block_size=2),
    Case("block-larger-than-a-side", 6, 20, block_size=16),
    Case("one-output", 1, 12, block_size=4),
    Case("one-input", 12, 1, block_size=4),
    Case("two-outputs-one-input", 2, 1, block_size=2),
    Case("fully-stochastic", variant=FULLY),
    Case("fully-stochastic-half", 14, 22, block_size=0.5, variant=FULLY),
    Case("fully-stochastic-all", 12, 9, block_size=1.0, variant=FULLY, bias=False),
    Case("fully-stochastic-one-output", 1, 16, block_size=0.25, variant=FULLY),
    Case("fully-stochastic-conv1d", variant=FULLY, kind="conv1d"),
    Case("exact", orthogonal_map="cayley"),
    Case("exact-remainder", 19, 22, orthogonal_map="cayley"),
    Case("exact-fully-stochastic", variant=FULLY, orthogonal_map="cayley"),
    Case("1-term", num_neumann_terms=1, adaptive_terms=False),
    Case("2-terms", num_neumann_terms=2, adaptive_terms=False),
    Case("3-terms", adaptive_terms=False),
    Case("5-terms-remainder", 19, 22, num_neumann_terms=5, adaptive_terms=False),
    Case("7-terms", num_neumann_terms=7, adaptive_terms=False),
    Case("float64", dtype=torch.float64),
    Case("float64-conv1d-remainder", 19, 22, kind="conv1d", dtype=torch.float64),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("bfloat16-conv1d-remainder", 19, 22, kind="conv1d", dtype=torch.bfloat16),
    Case("bfloat16-exact-fully-stochastic", variant=FULLY, orthogonal_map="cayley", dtype=torch.bfloat16),
    Case("float16", dtype=torch.float16),
    Case("float16-no-bias-remainder", 19, 22, bias=False, dtype=torch.float16),
    Case("convolution1d", 16, 15, block_size=4, kind="convolution1d"),
    Case("convolution2d-remainder", 19, 27, kind="convolution2d"),
    Case("convolution2d-exact", 16, 27, kind="convolution2d", orthogonal_map="cayley"),
    Case("convolution3d-fully-stochastic", 12, 16, 0.5, kind="convolution3d", variant=FULLY, bias=False),
    Case("convolution-of-one-output", 1, 27, kind="convolution2d"),
    Case("grouped", 16, 18, block_size=4, kind="grouped"),
    Case("grouped-fully-stochastic", 16, 18, block_size=4, kind="grouped", variant=FULLY),
    Case("depthwise", 6, 4, block_size=2, kind="depthwise"),
    Case("embedding", 20, 30, kind="embedding"),
    Case("embedding-fully-stochastic", 12, 30, block_size=0.5, kind="embedding", variant=FULLY),
    Case("bfloat16-convolution2d", 16, 27, kind="convolution2d", dtype=torch.bfloat16),
    Case("bfloat16-embedding", 20, 30, kind="embedding", dtype=torch.bfloat16),
    Case("float16-grouped", 16, 18, block_size=4, kind="grouped", dtype=torch.float16),
    Case("float16-embedding", 20, 30, kind="embedding", dtype=torch.float16),
]

PLAIN = CASES[0]

# Ways to train a model of other layers than linear ones.
TRAINING_REGIMES = {
    "adapter": {},
    "folds": {"merge_interval": 2},
    "fold-every-step": {"merge_interval": 1, "reinit_interval": 0},
    "fully-stochastic-folds": {"merge_interval": 2, "variant": "fully_stochastic", "block_size": 0.5},
    "bf16-folds": {"merge_interval": 2, "dtype": torch.bfloat16},
}

# One of each kind that has code of its own: for properties that the sizes, the series and the dtype do not bear on.
FEW = {
    "plain",
    "conv1d-remainder",
    "fully-stochastic-half",
    "one-output",
    "3-terms",
    "bfloat16",
    "float16-no-bias-remainder",
    "convolution2d-remainder",
    "grouped",
    "embedding",
    "bfloat16-convolution2d",
}

# Largest ||y - y_exact|| / ||y_exact|| of one layer.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def for_cases(keep: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Run a test for every case of the table that `keep` lets through."""
    kept = [case for case in CASES if keep(case)]
    return pytest.mark.parametrize("case", kept, ids=[case.name for case in kept])


def is_linear(case: Case) -> bool:
    return case.is_linear


def is_float32(case: Case) -> bool:
    return case.dtype == torch.float32


def for_few_cases(keep: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Run a test for those of the few cases that `keep` lets through."""
    return for_cases(lambda case: case.name in FEW and keep(case))


def in_float64(names: Iterable[str] | None = None) -> pytest.MarkDecorator:
    """Run a test in float64 for the table's float32 cases, or for those with these names."""
    kept = [case for case in CASES if is_float32(case) and (names is None or case.name in names)]
    return pytest.mark.parametrize("case", [case.float64 for case in kept], ids=[case.name for case in kept])


for_every_case = for_cases()
LINEAR = [case.name for case in CASES if case.is_linear]
OTHERS = [case.name for case in CASES if not case.is_linear]
# Without the maps, of which nothing but their blocks matters to a path, and without float64.
for_every_shape = for_cases(
    lambda case: case.is_linear and case.uses_defaults_of_the_map and case.dtype != torch.float64
)
for_few = for_few_cases()
for_few_linear_cases = for_few_cases(is_linear)
for_few_float32_cases = for_few_cases(is_float32)
for_float64_cases = in_float64()
for_few_float64_cases = in_float64(FEW)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same in every dtype up to rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class TwoLayers(nn.Module):
    """12 -> 20 -> 10, an `nn.Linear` and a `Conv1D`."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.first = base_layer(Case("first", 20, 12), seed)
        self.second = base_layer(Case("second", 10, 20, kind="conv1d"), seed + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def base_layer(case: Case, seed: int = 1) -> nn.Module:
    """The layer to be rotated, with random weight and bias."""
    if case.kind == "conv1d":
        layer = Conv1D(case.out_features, case.in_features)
    elif case.kind == "embedding":
        layer = nn.Embedding(case.in_features, case.out_features)
    elif case.kind in CONVOLUTIONS:
        cls, channels, settings, _ = CONVOLUTIONS[case.kind]
        layer = cls(channels, case.out_features, bias=case.bias, **settings)
    else:
        layer = nn.Linear(case.in_features, case.out_features, bias=case.bias)
    with torch.no_grad():
        layer.weight.copy_(normal(*layer.weight.shape, seed=seed) / case.in_features**0.5)
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(normal(case.out_features, seed=seed + 100))
    return layer.to(case.dtype)


def rotated(case: Case, *, theta: float = 0.4, **config_overrides) -> tuple[PeftModel, POETLayer]:
    """A model of one rotated layer, and the layer. The rotations turn by up to about `2 atan(theta)`."""
    model = wrap(OneLayer(base_layer(case)), case.config(**config_overrides))
    randomize(model, theta)
    return model, model.base_model.model.layer


def wrap(model: nn.Module, config: POETConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The block size is larger than the side")
        return get_peft_model(model, config)


@torch.no_grad()
def randomize(model: nn.Module, theta: float, seed: int = 10) -> None:
    """Give all rotations random parameters, with a largest singular value of `Q` of about `theta`."""
    for layer in model.modules():
        if isinstance(layer, POETLayer):
            for rotation in (rotation for name in layer.poet_config for rotation in layer.rotations(name)):
                std = theta / (2 * rotation.partition.block_size**0.5)
                rotation.weight.copy_(std * normal(rotation.weight.numel(), seed=seed))
                seed += 1


def inputs(case: Case, *leading: int, seed: int = 20) -> Tensor:
    """A random input of the layer, shape (*leading, in_features); (*leading, channels, *size) of a convolution; tokens
    (*leading) of an embedding."""
    if case.kind == "embedding":
        return torch.randint(case.in_features, leading, generator=torch.Generator().manual_seed(seed))
    if case.kind in CONVOLUTIONS:
        _, channels, _, size = CONVOLUTIONS[case.kind]
        return normal(*leading, channels, *size, seed=seed, dtype=case.dtype)
    return normal(*leading, case.in_features, seed=seed, dtype=case.dtype)


def with_gradient(x: Tensor) -> Tensor:
    """An input that asks for a gradient, unless it consists of tokens."""
    return x.requires_grad_() if x.is_floating_point() else x


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a base layer as (out, in) in float64."""
    weight = layer.weight.detach().double()
    return weight.T if isinstance(layer, Conv1D | nn.Embedding) else weight.flatten(1)


def dense_rotation(case: Case, dim: int, rotations: nn.ModuleDict, adapter: str = "default") -> Tensor:
    """One side's `R` or `P` as a float64 matrix (dim, dim), built entry by entry from its definition.

    This is the specification that the package is tested against; it uses nothing of the package's maths.
    """
    dense = torch.eye(dim, dtype=torch.float64)
    if adapter not in rotations:
        return dense
    features = rotations[adapter].index.tolist()
    parameters = iter(rotations[adapter].weight.detach().double().tolist())
    num_groups = 2 if case.kind == "grouped" and dim == case.out_features else 1
    b = len(features) // num_groups if case.variant == FULLY else case.block_size
    for block in (features[start : start + b] for start in range(0, len(features), b)):
        Q = torch.zeros(len(block), len(block), dtype=torch.float64)
        for i in range(len(block)):
            for j in range(i + 1, len(block)):
                Q[i, j] = next(parameters)
                Q[j, i] = -Q[i, j]
        identity = torch.eye(len(block), dtype=torch.float64)
        if not case.is_series:
            G = (identity + Q) @ torch.linalg.inv(identity - Q)
        else:
            series = sum(torch.linalg.matrix_power(Q, power) for power in range(case.num_neumann_terms + 1))
            G = (identity + Q) @ series
        for i, row in enumerate(block):
            for j, column in enumerate(block):
                dense[row, column] = G[i, j]
    assert next(parameters, None) is None, "the rotation has parameters that no block uses"
    return dense


def dense_weight(case: Case, layer: POETLayer, *adapters: str) -> Tensor:
    """`R_n ... R_1 W P_1 ... P_n` in float64, from the definition."""
    weight = matrix(layer.get_base_layer())
    for adapter in adapters or ("default",):
        R = dense_rotation(case, case.out_features, layer.poet_R, adapter)
        P = dense_rotation(case, case.in_features, layer.poet_P, adapter)
        weight = R @ weight @ P
    return weight


def dense_output(case: Case, layer: POETLayer, x: Tensor, *adapters: str) -> Tensor:
    """`R W P x + bias` in float64, from the definition; of a convolution what torch's own gives with that weight."""
    return output_with(case, layer, x, dense_weight(case, layer, *adapters))


@torch.no_grad()
def output_with(case: Case, layer: POETLayer, x: Tensor, weight: Tensor) -> Tensor:
    """What the base layer gives with another weight (out, in), in float64."""
    if case.kind == "embedding":
        return weight.T[x]
    if case.kind in CONVOLUTIONS:
        base = copy.deepcopy(layer.get_base_layer()).double()
        base.weight.copy_(weight.view(base.weight.shape))
        return base(x.double())
    bias = layer.get_base_layer().bias
    y = x.double() @ weight.T
    return y if bias is None else y + bias.detach().double()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`||actual - expected|| / ||expected||`; 0 for two empty tensors."""
    assert actual.shape == expected.shape
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    return float(difference / torch.linalg.vector_norm(expected.detach().double()).clamp_min(1e-300))
