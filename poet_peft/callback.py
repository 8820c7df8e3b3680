"""`POETCallback`: logs of folds, and the clip ramp after them, in transformers' Trainer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .diagnostics import MAX_ANGLE, MAX_ORTHOGONALITY_ERROR, Diagnostics, LayerDiagnostics, diagnose
from .diagnostics_file import DIAGNOSTICS_FILE, append_diagnostics, read_diagnostics
from .fold import MergeReport, check_can_fold, check_foldable
from .layer import POETLayer, poet_layers
from .pace import Pace, description, learning_rates, peak_memory, unwrapped
from .probing import PROBES_FILE, load_probes, save_probes, start_probing
from .schedule import take_report
from .weights.sharded import check_checkpoints_hold_folds, check_sharding, clip_grad_norm


class POETCallback(TrainerCallback):
    """Logs what folds did, tightens the gradient clip after them, and refuses at the start what would fail later.

    Folds need no callback: they follow the optimizer's steps. They happen before Trainer logs, evaluates and saves, so
    that what these see of a step is the folded model.

    The log entry of a fold, or the next one, carries `poet/num_reinits`, `poet/orthogonality_error`,
    `poet/max_rotation_angle`, `poet/spectral_drift`, `poet/requantization_error` and `poet/states_reset`: in
    `trainer_state.json` and on the console, and with `attach` in whatever `report_to` names.

    After a reinitialisation the gradient clip is tightened for `clip_ramp_steps` steps: it starts at
    `max_grad_norm / (clip_ramp_steps + 1)` and grows back linearly. Without a `max_grad_norm` there is no ramp.

    With `diagnostics_every=N`, the model is measured right before the update of every N-th step, so that the rotations
    are those since the last fold: into the log under `poet/diagnostics/...`, and layer by layer into
    `poet_diagnostics.jsonl` in the output folder. A resumed run continues the file. A layer that leaves its range is
    warned of once, by name. Rotations that are folded after every step are the identity then, and have no angle; what
    all folds so far have turned is in `probe_cosine`, which checkpoints keep in `poet_probes.safetensors`. With the
    measures come steps and tokens a second (tokens with `include_num_input_tokens_seen`), the peak memory in bytes
    and the learning rates of the groups.

    Args:
        clip_ramp_steps: optimizer steps with a tightened clip after each reinitialisation; 0 = none.
        diagnostics_every: optimizer steps between measurements, see `diagnose`; 0 = none.
        exact_diagnostics: measure with decompositions. Slow.
        max_angle: radians, warned of above.
        max_orthogonality_error: warned of above; the largest entry of `|G^T G - I|`.
        max_drift: warned of above; None = the adapter's own `max_drift`.

    Attributes:
        last_report: the `MergeReport` of the latest fold, None before the first.

    Raises:
        ValueError: at the start of training, if the model has no trainable POET layer, the optimizer does not hold the
            rotations, or either is sharded in a way that folds cannot write to (FSDP1, DeepSpeed).
        POETFoldError: at the start of training, if a layer cannot be folded: a second adapter on it, one merged.
    """

    def __init__(
        self,
        clip_ramp_steps: int = 10,
        diagnostics_every: int = 0,
        *,
        exact_diagnostics: bool = False,
        max_angle: float = MAX_ANGLE,
        max_orthogonality_error: float = MAX_ORTHOGONALITY_ERROR,
        max_drift: float | None = None,
    ) -> None:
        for name, value in {"clip_ramp_steps": clip_ramp_steps, "diagnostics_every": diagnostics_every}.items():
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative.")
        self.clip_ramp_steps = clip_ramp_steps
        self.diagnostics_every = diagnostics_every
        self.exact_diagnostics = exact_diagnostics
        self.max_angle = max_angle
        self.max_orthogonality_error = max_orthogonality_error
        self.max_drift = max_drift
        self._warned: set[tuple[str, str]] = set()
        self.last_report: MergeReport | None = None
        self._pending: dict[str, float] = {}
        self._pace = Pace()
        self._description: dict[str, Any] = {}
        self._merge_interval = 0

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
        trained = _trained_adapters(model)
        if not trained:
            raise ValueError(
                "POETCallback found no trainable POET layer in the model: pass peft_config=POETConfig(...) to the "
                "trainer, or wrap the model with get_peft_model first."
            )
        periodic = [(layer, adapter) for layer, adapter in trained if layer.is_periodic(adapter)]
        for layer, adapter in periodic:
            check_foldable(layer, adapter)
        if periodic:
            check_checkpoints_hold_folds()
            check_can_fold(optimizer, [r.weight for layer, adapter in periodic for r in layer.rotations(adapter)])
            interval = min(layer.poet_config[adapter].merge_interval for layer, adapter in periodic)
            self._merge_interval = interval
            if 0 < state.max_steps < interval:
                warnings.warn(
                    f"training ends after {state.max_steps} steps, before the first fold (merge_interval={interval}): "
                    "nothing will be folded. Lower merge_interval, or pass merge_interval=0 for a pure adapter."
                )

        if self.diagnostics_every:
            self._pace.start(state.global_step, int(state.num_input_tokens_seen))
            self._description = description(args, optimizer, model)
            self._start_probing(model, args, state, periodic)
            if state.is_world_process_zero:
                _drop_lines_after(Path(args.output_dir) / DIAGNOSTICS_FILE, state.global_step)

    def _start_probing(
        self, model: nn.Module, args: TrainingArguments, state: TrainerState, periodic: list[tuple[POETLayer, str]]
    ) -> None:
        start_probing(model)
        if state.global_step and any(layer.state(adapter).num_folds for layer, adapter in periodic):
            path = _checkpoint(args, state) / PROBES_FILE
            if not load_probes(model, path):
                warnings.warn(
                    f"{path} is not there, so the vectors that were turned since training began are lost: "
                    "probe_cosine is not measured. Resume in the output_dir of the run to keep it."
                )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        folder = _checkpoint(args, state)
        if self.diagnostics_every and state.is_world_process_zero and folder.is_dir():
            save_probes(model, folder / PROBES_FILE)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if 0 < state.max_steps <= state.global_step:
            # transformers makes one more step when it resumes a finished run.
            warnings.warn(
                f"the run was finished already, after {state.global_step} of {state.max_steps} steps: the model is "
                "left as it is. To train on, raise max_steps."
            )
            model.zero_grad(set_to_none=True)
            return
        fraction = min(self._clip_fraction(layer, adapter) for layer, adapter in _trained_adapters(model))
        if fraction < 1 and args.max_grad_norm:
            clip_grad_norm(model.parameters(), fraction * args.max_grad_norm)
        step = state.global_step + 1
        if self.diagnostics_every and step % self.diagnostics_every == 0:
            self._measure(model, optimizer, args, state, step)

    def _measure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        args: TrainingArguments,
        state: TrainerState,
        step: int,
    ) -> None:
        optimizer = unwrapped(optimizer)
        diagnostics = diagnose(model, exact=self.exact_diagnostics, optimizer=optimizer)
        rates = self._pace.rates(step, int(state.num_input_tokens_seen))
        if state.is_world_process_zero:
            path = Path(args.output_dir) / DIAGNOSTICS_FILE
            append_diagnostics(diagnostics.as_dict(), path, step, optimizer, **rates, **self._description)
            self._description = {}
        numbers = diagnostics.summary() | rates | {"peak_memory": peak_memory()}
        numbers |= {f"learning_rate/{name}": rate for name, rate in learning_rates(optimizer).items()}
        self._pending |= {f"poet/diagnostics/{name}": value for name, value in numbers.items() if value is not None}
        self._warn(model, diagnostics, step)

    def _warn(self, model: nn.Module, diagnostics: Diagnostics, step: int) -> None:
        own = {
            (layer.module_name, adapter): config.max_drift
            for _, layer in poet_layers(model)
            for adapter, config in layer.poet_config.items()
        }
        for layer in diagnostics.layers:
            drift = own[layer.name, layer.adapter] if self.max_drift is None else self.max_drift
            for what, value, limit in self._ranges(layer, drift):
                if value <= limit or (layer.name, what) in self._warned:
                    continue
                self._warned.add((layer.name, what))
                warnings.warn(
                    f"the {what} of {layer.name!r} is {value:.3g} at step {step}, above {limit:.3g}. Lower the "
                    "learning rate of the rotations, or shorten merge_interval."
                )

    def _ranges(self, layer: LayerDiagnostics, max_drift: float) -> list[tuple[str, float, float]]:
        return [
            ("spectral drift", layer.spectral_drift, max_drift),
            *(("angle", side.max_angle, self.max_angle) for side in layer.sides),
            *(("orthogonality error", s.orthogonality_error, self.max_orthogonality_error) for s in layer.sides),
        ]

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        report = take_report(optimizer)
        if report is None:
            return
        self.last_report = report
        self._pending |= _as_logs(report)
        # Logged with the step itself, unless folds come more often than logs.
        control.should_log |= self._merge_interval >= state.logging_steps

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

    def _clip_fraction(self, layer: POETLayer, adapter: str) -> float:
        """The part of `max_grad_norm` that holds for the next optimizer step."""
        interval = layer.poet_config[adapter].steps_between_reinits
        step = layer.state(adapter).num_steps
        if not interval or step < interval:
            return 1.0
        return min(1.0, (step % interval + 1) / (self.clip_ramp_steps + 1))


def _trained_adapters(model: nn.Module) -> list[tuple[POETLayer, str]]:
    return [
        (layer, adapter)
        for _, layer in poet_layers(model)
        for adapter in layer.poet_config
        if any(rotation.weight.requires_grad for rotation in layer.rotations(adapter))
    ]


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _as_logs(report: MergeReport) -> dict[str, float]:
    return {
        "poet/num_reinits": report.num_reinits,
        "poet/orthogonality_error": report.orthogonality_error,
        "poet/max_rotation_angle": report.max_rotation_angle,
        "poet/spectral_drift": report.spectral_drift,
        "poet/requantization_error": report.requantization_error,
        "poet/states_reset": report.num_states_reset,
    }


def _drop_lines_after(path: Path, step: int) -> None:
    """A resumed run measures again what a crash left behind its checkpoint."""
    if path.exists():
        kept = [line for line in read_diagnostics(path) if line["step"] <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
