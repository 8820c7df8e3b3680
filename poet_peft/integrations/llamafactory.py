"""POET as a plugin of LLaMA-Factory's second engine (`USE_V1=1`), for LLaMA-Factory 0.9.5.

    python -m poet_peft.integrations.llamafactory sft config.yaml

is `llamafactory-cli sft config.yaml` with these two names known, where `config.yaml` has

    peft_config:
      name: poet
      block_size: 32               # settings of POETConfig
    optim_config:
      name: poet_optimizer         # a name of its own: LLaMA-Factory has one table of names for all kinds of plugins
      lr: 1.0e-4
      poet_lr: 1.0e-3
      optimizer: adamw             # or rotation_muon, for which poet_lr is an angle in radians; see `poet_optimizer`

The first engine, without `USE_V1=1`, accepts lora, oft, freeze and full, and has no way to add to them. LLaMA-Factory
starts several processes with a script of its own, in which nothing is registered: start them with
`torchrun -m poet_peft.integrations.llamafactory` instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from .. import POETConfig, RotationMuon, poet_optimizer


ADAPTER_NAME = "poet"
OPTIMIZER_NAME = "poet_optimizer"
_OPTIMIZERS = {"adamw": torch.optim.AdamW, "rotation_muon": RotationMuon}


def register() -> None:
    """Make the adapter and its optimizer known to LLaMA-Factory, in this process."""
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin
    from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin

    PeftPlugin(ADAPTER_NAME).register()(wrap_model)
    OptimizerPlugin(OPTIMIZER_NAME).register()(make_optimizer)


def wrap_model(model: nn.Module, config: Mapping[str, Any], is_train: bool = False) -> nn.Module:
    """The model with a POET adapter: a new one, or the one in `adapter_name_or_path`.

    Args:
        config: `peft_config`: settings of `POETConfig`, beside `name` and `adapter_name_or_path`.

    Raises:
        ValueError, TypeError: a setting that `POETConfig` refuses, or does not have; or a new adapter for inference.
    """
    settings = {key: value for key, value in config.items() if key not in ("name", "adapter_name_or_path")}
    path = config.get("adapter_name_or_path")
    if path:
        if not isinstance(path, str):
            if len(path) != 1:
                raise ValueError(f"adapter_name_or_path={path!r}: POET loads one adapter. Merge the others first.")
            path = path[0]
        return PeftModel.from_pretrained(model, path, is_trainable=is_train)
    if not is_train:
        raise ValueError("a new POET adapter changes nothing in inference: set adapter_name_or_path in peft_config.")
    defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    return get_peft_model(model, POETConfig(**{**defaults, **settings}))


def make_optimizer(model: nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of `optim_config`: `lr` for what else trains, `poet_lr` for rotations.

    Raises:
        ValueError: a key that is missing or unknown, or an unknown optimizer.
    """
    settings = {key: value for key, value in config.items() if key != "name"}
    kind = settings.pop("optimizer", None)
    if kind is not None and kind not in _OPTIMIZERS:
        raise ValueError(f"optim_config: optimizer={kind!r} is unknown; choose one of {', '.join(_OPTIMIZERS)}.")
    if "poet_lr" not in settings:
        raise ValueError("optim_config has no poet_lr, the learning rate of the rotations.")
    unknown = settings.keys() - {"lr", "poet_lr", "weight_decay"}
    if unknown:
        raise ValueError(f"optim_config: {', '.join(sorted(unknown))} is unknown; choose lr, poet_lr, weight_decay.")
    # YAML reads 1e-3 without a point as text.
    rates = {key: float(value) for key, value in settings.items()}
    factory, keywords = poet_optimizer(**{"lr": rates["poet_lr"], **rates}, optimizer_cls=_OPTIMIZERS.get(kind))
    return factory()(model, **keywords)


if __name__ == "__main__":
    from llamafactory.v1.launcher import launch

    register()
    launch()
