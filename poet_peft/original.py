"""Whether the original model, from before all training, is still to be had: for `disable_adapter`, `unload`, `delete`.

Folds and `train_rest` change the base model itself. What then asks for the original model is refused, with the ways
out, instead of being given another one: a reference for DPO or GRPO would be wrong, and nothing would show it.
"""

from __future__ import annotations

import sys

from .errors import POETReferenceError


_SEPARATE_COPY = "a separate copy of the model as reference (in TRL: ref_model=...)"


class OriginalModel:
    """The part of a rotated layer that answers for the original model."""

    def check_original_available(self, operation: str) -> None:
        """Refuse an operation that needs the weights from before training, if they are gone.

        Raises:
            POETReferenceError: names the module and the ways out.
        """
        ways_out = f"{_SEPARATE_COPY}, or training without folds (merge_interval=0, train_rest=False)"
        if any(config.train_rest for config in self.poet_config.values()):
            raise POETReferenceError(
                f"{operation} cannot give the original model: train_rest=True trains parameters outside the rotated "
                f"layers. Ways out: {ways_out}."
            )
        folds = max((self.state(name).num_folds for name in self.poet_config), default=0)
        if folds and self.poet_initial_weight is None:
            raise POETReferenceError(
                f"{operation} cannot give the original model: the rotations of {self.module_name!r} were folded into "
                f"its weight {folds} times. Ways out: POETConfig(keep_initial_weights=True), {ways_out}."
            )

    def check_can_be_disabled(self) -> None:
        """Refuse to disable adapters where the original model is gone, or will be gone in the midst of training.

        What is asked for a reference at every step, as by TRL, is refused at the first one.

        Raises:
            POETReferenceError: names the module and the ways out.
        """
        self.check_original_available("disable_adapter")
        folds_ahead = self.poet_initial_weight is None and any(
            self.is_periodic(name) and rotation.weight.requires_grad
            for name in self.poet_config
            for rotation in self.rotations(name)
        )
        if folds_ahead and _is_in_a_training_step():
            raise POETReferenceError(
                f"disable_adapter gives the original model only until the first fold, and {self.module_name!r} is "
                "being trained with folds (merge_interval > 0). Ways out: POETConfig(keep_initial_weights=True), "
                f"{_SEPARATE_COPY}, or merge_interval=0."
            )

    def check_deletable(self, adapter_name: str) -> None:
        """Refuse to delete an adapter whose folds cannot be taken back.

        Raises:
            POETReferenceError: names the module and the ways out.
        """
        if not self.has_adapter(adapter_name):
            return
        if self.poet_config[adapter_name].train_rest or self.state(adapter_name).num_folds:
            self.check_original_available("delete_adapter")


def _is_in_a_training_step() -> bool:
    """Whether a Trainer is calling. A flag that it sets would outlive a run that is interrupted."""
    trainer = sys.modules.get("transformers.trainer")
    frame = sys._getframe() if trainer is not None else None
    while frame is not None:
        if frame.f_code.co_name == "training_step" and isinstance(frame.f_locals.get("self"), trainer.Trainer):
            return True
        frame = frame.f_back
    return False
