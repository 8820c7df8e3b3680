"""What a run costs and how it was set up: memory, speed, learning rates, settings and versions."""

from __future__ import annotations

import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from transformers import TrainingArguments


_PACKAGES = "poet-peft", "peft", "torch", "transformers", "accelerate"
_SETTINGS = (
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "seed",
    "bf16",
    "fp16",
)


class Pace:
    """Steps and tokens a second since the last measurement, everything that happened in between included."""

    def __init__(self) -> None:
        self._last: tuple[float, int, int] | None = None

    def start(self, step: int, num_tokens: int = 0) -> None:
        """Begin to count at a step."""
        self._last = time.perf_counter(), step, num_tokens

    def rates(self, step: int, num_tokens: int = 0) -> dict[str, float]:
        """`steps_per_second` and, where tokens are counted, `tokens_per_second`; and begin anew.

        Args:
            step: the number of the step whose backward is done.
            num_tokens: all tokens so far, those of this step included; 0 = not counted.
        """
        last = self._last
        self.start(step, num_tokens)
        if last is None or step <= last[1]:
            return {}
        seconds = max(self._last[0] - last[0], 1e-9)
        rates = {"steps_per_second": (step - last[1]) / seconds}
        return rates | ({"tokens_per_second": (num_tokens - last[2]) / seconds} if num_tokens > last[2] else {})


def peak_memory() -> int | None:
    """Bytes: the most that tensors took on any CUDA device so far, or that the process took without one.

    None where the system does not say.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def learning_rates(optimizer: torch.optim.Optimizer | None) -> dict[str, float]:
    """The largest learning rate of the parameter groups of each name; groups without one are "group 0" and so on.

    The groups of `poet_param_groups` are "poet", whose rate is in radians a step for `RotationMuon`, "decay" and
    "no_decay".
    """
    rates: dict[str, float] = {}
    for number, group in enumerate([] if optimizer is None else optimizer.param_groups):
        name = str(group.get("name", f"group {number}"))
        rates[name] = max(rates.get(name, 0.0), float(group["lr"]))
    return rates


def versions() -> dict[str, str]:
    """Of Python and of the packages that make a difference, as far as they are installed."""
    return {"python": platform.python_version(), **installed(*_PACKAGES)}


def installed(*packages: str) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def unwrapped(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    """The optimizer that accelerate's wrapper has inside; any other as it is."""
    return getattr(optimizer, "optimizer", optimizer)


def description(args: TrainingArguments, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Any]:
    """For JSON: `settings` and `versions` of a run of Trainer."""
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    settings = {name: getattr(args, name, None) for name in _SETTINGS}
    settings |= {
        "optimizer": type(unwrapped(optimizer)).__name__,
        "device": args.device.type,
        "parameters": sum(number for number, _ in parameters),
        "trained parameters": sum(number for number, trains in parameters if trains),
    }
    kept = {name: value for name, value in settings.items() if value not in (None, False)}
    return {"settings": {k: getattr(v, "value", v) for k, v in kept.items()}, "versions": versions()}
