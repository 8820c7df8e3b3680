"""What `poet-peft doctor` says: what is installed, what works here, and a self-test of one layer."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from peft import get_peft_model
from torch import Tensor, nn

from .. import POETConfig, __version__, hardware, merge_and_reinitialize
from ..layer import rotate_weight
from ..ops.paths import PATHS, compute_path
from ..pace import installed
from ..registration import check_owns_name


_DISTRIBUTION = "poet-peft"
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "numpy")
_OPTIONAL = ("trl", "datasets", "bitsandbytes", "torchao", "gguf", "hqq", "triton", "deepspeed")
_ENGINES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao.quantization", "gguf": "gguf"}
_SIZES = (48, 80)
_BLOCK_SIZE = 16


def doctor(with_compile: bool = False) -> dict[str, Any]:
    """Look at this installation and this machine.

    Args:
        with_compile: also compile a layer with `torch.compile`, which may take a minute.

    Returns:
        What JSON can hold. `checks` by name: "ok", or what is wrong. `conflicts`: versions that do not go together.
        `healthy`: no check failed that POET needs, and there are no conflicts.
    """
    started = time.perf_counter()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    checks: dict[str, str] = {}
    for name, check in _self_tests(device).items():
        checks[name] = _outcome(check)
    checks["torch.compile"] = _outcome(lambda: _check_compile(device)) if with_compile else _compiler()
    engines = {name: _outcome(lambda module=module: _import(module)) for name, module in _ENGINES.items()}
    conflicts = _conflicts()
    needed = [outcome for name, outcome in checks.items() if name != "torch.compile" or with_compile]
    return {
        "versions": {
            "poet_peft": __version__,
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
            **installed(*_LIBRARIES, *_OPTIONAL),
        },
        "devices": {
            "used": str(device),
            "hardware": hardware(),
            "threads": torch.get_num_threads(),
            "bf16": _outcome(lambda: _matmul(device, torch.bfloat16)),
            "fp16": _outcome(lambda: _matmul(device, torch.float16)),
            "environment": {key: os.environ[key] for key in sorted(os.environ) if key in _VARIABLES},
        },
        "checks": checks,
        "engines": engines,
        "conflicts": conflicts,
        "healthy": not conflicts and all(outcome == "ok" for outcome in needed),
        "seconds": round(time.perf_counter() - started, 1),
    }


_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "OMP_NUM_THREADS",
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "TORCHDYNAMO_DISABLE",
)


def _outcome(check: Callable[[], None]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check()
        except Exception as error:
            return " ".join(f"{type(error).__name__}: {error}".split())
    return "ok"


def _import(module: str) -> None:
    importlib.import_module(module)


def _conflicts() -> list[str]:
    """What is installed in a version that this package's requirements exclude, and what else is known not to go."""
    found = []
    for text in metadata.requires(_DISTRIBUTION) or [] if installed(_DISTRIBUTION) else []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name).get(requirement.name)
        if version is None:
            found.append(f"{requirement.name} is not installed; {requirement} is needed")
        elif not requirement.specifier.contains(Version(version), prereleases=True):
            found.append(f"{requirement.name} {version} is installed; {requirement} is needed")
    try:
        check_owns_name()
    except RuntimeError as error:
        found.append(str(error))
    return found


def _matmul(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.eye(4, device=device, dtype=dtype)
    if not torch.equal(x @ x, x):
        raise RuntimeError("a matrix product gives wrong numbers")


def _compiler() -> str:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    return f"not tried (C++ compiler: {compiler or 'none found'}); `poet-peft doctor --compile` tries it"


# The self-test of one layer


class _Model(nn.Module):
    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(*_SIZES)
        for parameter in self.layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / _SIZES[0] ** 0.5
        self.to(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _rotated(device: torch.device, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    config = POETConfig(target_modules=["layer"], block_size=_BLOCK_SIZE, **settings)
    model = get_peft_model(_Model(dtype, device), config)
    generator = torch.Generator().manual_seed(1)
    for rotation in _layer(model).rotations("default"):
        rotation.weight.data = (0.05 * torch.randn(rotation.weight.shape, generator=generator)).to(device)
    return model


def _layer(model: nn.Module) -> Any:
    return model.base_model.model.layer


def _inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(32, _SIZES[0], generator=torch.Generator().manual_seed(2)).to(device, dtype)


def _expected(model: nn.Module, x: Tensor) -> Tensor:
    """`R W P x + bias` in float64 on the CPU, by the reference."""
    layer = _layer(model)
    base = layer.get_base_layer()
    R, P = layer.sides(["default"])
    R, P = ([side._replace(index=side.index.cpu(), upper=side.upper.cpu().double(), kept=None) for side in sides]
            for sides in (R, P))  # fmt: skip
    weight = rotate_weight(base.weight.detach().cpu().double(), R, P)
    return nn.functional.linear(x.cpu().double(), weight, base.bias.detach().cpu().double())


def _check_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((actual.detach().cpu().double() - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise RuntimeError(f"relative error {error:.2g}, where {tolerance:.0e} is rounding")


def _self_tests(device: torch.device) -> dict[str, Callable[[], None]]:
    def forward(dtype: torch.dtype, tolerance: float) -> None:
        for path in PATHS:
            model, x = _rotated(device, dtype), _inputs(device, dtype)
            with compute_path(path):
                _check_close(model(x), _expected(model, x), tolerance)

    def gradient() -> None:
        gradients = []
        for path in PATHS:
            model = _rotated(device)
            with compute_path(path):
                model(_inputs(device)).square().sum().backward()
            gradients.append(torch.cat([r.weight.grad.flatten() for r in _layer(model).rotations("default")]))
        for actual in gradients[1:]:
            _check_close(actual, gradients[0].cpu().double(), 1e-4)

    def fold() -> None:
        model, x = _rotated(device, merge_interval=1), _inputs(device)
        expected = _expected(model, x)
        merge_and_reinitialize(model)
        if any(bool(rotation.weight.any()) for rotation in _layer(model).rotations("default")):
            raise RuntimeError("the rotations are not back at the identity")
        _check_close(model(x), expected, 1e-5)

    def merge() -> None:
        model, x = _rotated(device), _inputs(device)
        expected, before = _expected(model, x), _layer(model).get_base_layer().weight.detach().clone()
        model.merge_adapter()
        _check_close(model(x), expected, 1e-5)
        model.unmerge_adapter()
        if not torch.equal(_layer(model).get_base_layer().weight, before):
            raise RuntimeError("unmerge did not bring back the weight bit for bit")

    return {
        "forward, fp32": lambda: forward(torch.float32, 1e-5),
        "forward, bf16": lambda: forward(torch.bfloat16, 2e-2),
        "gradient": gradient,
        "fold": fold,
        "merge and unmerge": merge,
    }


def _check_compile(device: torch.device) -> None:
    model, x = _rotated(device), _inputs(device)
    _check_close(torch.compile(model)(x), _expected(model, x), 1e-5)
