"""POET as an adapter of axolotl: a plugin, for axolotl 0.19.

plugins:
  - poet_peft.integrations.axolotl.POETPlugin
adapter: poet
poet:                        # settings of POETConfig
  block_size: 32
  target_modules: all-linear
learning_rate: 1.0e-4        # of what else trains
poet_lr: 1.0e-3              # of the rotations; left out: learning_rate
poet_optimizer: adamw        # or rotation_muon, for which poet_lr is an angle in radians; see `poet_optimizer`
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel
from torch import nn

from .. import POETCallback, POETConfig, RotationMuon, poet_optimizer


_ADAPTER = "poet"
_OPTIMIZERS = {"adamw": torch.optim.AdamW, "rotation_muon": RotationMuon}


class POETArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    poet: dict[str, Any] | None = None
    poet_lr: float | None = None
    poet_optimizer: Literal["adamw", "rotation_muon"] | None = None


class POETPlugin(BasePlugin):
    """Adds `adapter: poet`, the optimizer that goes with it, and `POETCallback`."""

    def get_input_args(self) -> str:
        return f"{__name__}.{POETArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=_ADAPTER)]

    def load_adapter(
        self, model: nn.Module, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[nn.Module | None, POETConfig] | None:
        """The wrapped model and its configuration; None for adapters of another kind.

        Raises:
            ValueError: a setting below `poet:` that `POETConfig` refuses. Unknown ones raise TypeError.
        """
        if cfg.adapter != _ADAPTER:
            return None
        given = dict(cfg.poet or {}).items()
        settings = {name: dict(value) if isinstance(value, dict) else value for name, value in given}
        config = POETConfig(**{"task_type": "CAUSAL_LM", **settings})
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
        else:
            model = get_peft_model(model, config)
        return model, model.peft_config["default"]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        # axolotl 0.19 has a hook create_optimizer, and never calls it.
        if cfg.adapter != _ADAPTER:
            return
        args = trainer.args
        factory, settings = poet_optimizer(
            lr=args.learning_rate,
            poet_lr=args.learning_rate if cfg.poet_lr is None else cfg.poet_lr,
            weight_decay=args.weight_decay,
            optimizer_cls=_OPTIMIZERS[cfg.poet_optimizer] if cfg.poet_optimizer else None,
        )

        class Factory(factory):
            def __call__(self, model: nn.Module, training_args: Any = None, **settings: Any) -> torch.optim.Optimizer:
                return super().__call__(model, **settings)  # axolotl's trainer passes its arguments too

        trainer.optimizer_cls_and_kwargs = (Factory, settings)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [POETCallback()] if cfg.adapter == _ADAPTER else []
