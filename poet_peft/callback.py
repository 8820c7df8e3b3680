"""`POETCallback`: the folds of POET inside transformers' Trainer and everything built on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import POETConfig
from .merging import MergeReport, merge_and_reinitialize
from .model import poet_layers
from .optim import check_can_fold, rotation_parameters
from .sharding import check_checkpoints_hold_folds, check_sharding, clip_grad_norm


class POETCallback(TrainerCallback):
    """Folds the rotations every `POETConfig.merge_interval` optimizer steps and reinitialises with them.

    The fold happens at the end of the step, before Trainer logs, evaluates and saves: what these see of a step is the
    folded model. Steps are counted by `state.global_step`, less those that a gradient scaler skipped; both are in a
    checkpoint, so a resumed run goes on where the saved one stood.

    The log entry of a fold, or the next one, carries `poet/epoch`, `poet/orthogonality_error`,
    `poet/max_rotation_angle`, `poet/spectral_drift`, `poet/requantization_error` and `poet/states_reset`: in
    `trainer_state.json` and on the console, and with `attach` in whatever `report_to` names.

    After a reinitialisation the gradient clip is tightened for `clip_ramp_steps` steps: it starts at
    `max_grad_norm / (clip_ramp_steps + 1)` and grows back linearly. Without a `max_grad_norm` there is no ramp.

    Args:
        clip_ramp_steps: optimizer steps with a tightened clip after each reinitialisation; 0 = none.

    Attributes:
        last_report: the `MergeReport` of the latest fold, None before the first.

    Raises:
        ValueError: at the start of training, if the model has no trainable POET layer, the optimizer does not hold the
            rotations, or either is sharded in a way that folds cannot write to (FSDP1, DeepSpeed).
        POETMergeError: at the start of training, if a layer cannot be folded: a second adapter on it, one merged.
    """

    def __init__(self, clip_ramp_steps: int = 10) -> None:
        if clip_ramp_steps < 0:
            raise ValueError(f"clip_ramp_steps={clip_ramp_steps} must not be negative.")
        self.clip_ramp_steps = clip_ramp_steps
        self.last_report: MergeReport | None = None
        self._pending: dict[str, float] = {}
        self._num_skipped_steps = 0

    def attach(self, trainer: Trainer) -> POETCallback:
        """Put this callback first in a trainer, so that what it logs reaches the reporting callbacks too.

        Trainer runs those that `report_to` names before the ones that it is given as `callbacks`. To be used instead
        of `callbacks=[POETCallback()]`, or beside it: `POETCallback().attach(trainer)`.
        """
        handler = trainer.callback_handler
        handler.callbacks = [self, *(other for other in handler.callbacks if not isinstance(other, POETCallback))]
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        check_sharding(model)
        rotations = rotation_parameters(model)
        if not any(parameter.requires_grad for parameter in rotations):
            raise ValueError(
                "POETCallback found no trainable POET layer in the model: pass peft_config=POETConfig(...) to the "
                "trainer, or wrap the model with get_peft_model first."
            )
        if _config(model).merge_interval:
            check_checkpoints_hold_folds()
            check_can_fold(optimizer, rotations)
            for _, layer in poet_layers(model):
                for adapter_name in layer.poet_schedule:
                    layer.check_foldable(adapter_name)
                # What is asked for a reference (by TRL, say) at any step is refused at the first one.
                layer._folds_ahead = True
        self._num_skipped_steps = max(
            layer.num_skipped_steps(name) for _, layer in poet_layers(model) for name in layer.poet_schedule
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        fraction = self._clip_fraction(_config(model), self._steps_done(state))
        if fraction < 1 and args.max_grad_norm:
            clip_grad_norm(model.parameters(), fraction * args.max_grad_norm)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        config = _config(model)
        if getattr(optimizer, "step_was_skipped", False):  # by a gradient scaler, says accelerate's wrapper
            self._num_skipped_steps += 1
            for _, layer in poet_layers(model):
                for adapter_name in layer.poet_schedule:
                    layer.count_skipped_step(adapter_name)
            return
        step = self._steps_done(state)
        if config.merge_interval and step % config.merge_interval == 0:
            self.last_report = merge_and_reinitialize(model, optimizer, reinitialize=config.reinitializes_at(step))
            self._pending = _as_logs(self.last_report)
            # Logged with the step itself, unless folds come more often than logs.
            control.should_log |= config.merge_interval >= state.logging_steps

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        for _, layer in poet_layers(model):
            layer._folds_ahead = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and self._pending and "loss" in logs:
            logs.update(self._pending)
            state.log_history[-1].update(self._pending)
            self._pending = {}

    def _steps_done(self, state: TrainerState) -> int:
        """Optimizer steps that happened: Trainer counts the skipped ones too."""
        return state.global_step - self._num_skipped_steps

    def _clip_fraction(self, config: POETConfig, step: int) -> float:
        """The part of `max_grad_norm` that holds for the optimizer step after `step` completed ones."""
        interval = config.merge_interval if config.reinit_interval is None else config.reinit_interval
        if not interval or step < interval:
            return 1.0
        return min(1.0, (step % interval + 1) / (self.clip_ramp_steps + 1))


def _config(model: nn.Module) -> POETConfig:
    _, layer = next(poet_layers(model))
    configs = getattr(model, "peft_config", {})
    return next(configs[name] for name in layer.active_adapters if name in configs)


def _as_logs(report: MergeReport) -> dict[str, float]:
    return {
        "poet/epoch": report.epoch,
        "poet/orthogonality_error": report.orthogonality_error,
        "poet/max_rotation_angle": report.max_rotation_angle,
        "poet/spectral_drift": report.spectral_drift,
        "poet/requantization_error": report.requantization_error,
        "poet/states_reset": report.num_states_reset,
    }
