"""POET layers against the reference in float64, on any device."""

import copy

import torch
from peft import get_peft_model

from poet_peft import POETConfig
from poet_peft.ops import paths, reference

from .methods import trainable


TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2}
PATHS = "input_centric", "weight_centric", "tangent"
FOLDED_EVERY_STEP = {"block_size": 16, "merge_interval": 1, "reinit_interval": 0}


def check_layers(device):
    """POET layers by every path against the reference in float64: output, gradients by input and rotations."""
    rows = []
    for dtype, settings, num_tokens, path in (
        (dtype, settings, num_tokens, path)
        for dtype in ("float32", "bfloat16")
        for settings in (
            {"block_size": 16},
            {"block_size": 16, "memory_efficient": True},
            {"block_size": 0.5, "variant": "fully_stochastic"},
            FOLDED_EVERY_STEP,
        )
        for num_tokens in (5, 300)
        for path in PATHS
    ):
        rotated = poet_layer(72, 56, device, getattr(torch, dtype), settings)
        exact = copy.deepcopy(rotated).double()
        x, grad = (randn(num_tokens, size, device=device, dtype=getattr(torch, dtype)) for size in (72, 56))
        with paths.compute_path(path):
            actual = outputs_and_gradients(rotated, rotated, x, grad)
        expected = outputs_and_gradients(exact, by_reference(exact), x.double(), grad.double())
        error = max(map(relative_error, actual, expected))
        case = f"N={num_tokens} {settings} {dtype}"
        rows.append({"path": path, "case": case, "error": error, "ok": error < TOLERANCE[dtype]})
    return rows


def poet_layer(in_features, out_features, device, dtype, settings):
    """A linear layer with rotations, which are the identity only if they are folded after every step."""
    model = torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype))
    config = POETConfig(target_modules=["0"], **settings)
    config.init_weights = config.folds_every_step
    return get_peft_model(model, config).base_model.model[0]


def by_reference(rotated):
    def forward(x):
        R, P = ([(side["default"].index, side["default"]().deltas())] for side in (rotated.poet_R, rotated.poet_P))
        return reference.poet_linear(x, rotated.base_layer.weight, rotated.base_layer.bias, R, P)

    return forward


def outputs_and_gradients(rotated, forward, x, grad):
    x = x.detach().requires_grad_()
    y = forward(x)
    return y, *torch.autograd.grad(y, [x, *trainable(rotated)], grad)


def relative_error(actual, expected):
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    return float(difference / torch.linalg.vector_norm(expected.detach().double()).clamp_min(1e-300))


def randn(*shape, device, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
