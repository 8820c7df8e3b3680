"""POET as a PEFT tuner: training by learned orthogonal rotations of fixed weights, `W_eff = R W P`.

Importing this package registers the method with PEFT, silently.
"""

from .config import POETConfig
from .errors import POETCheckpointError, POETFoldError, POETReferenceError
from .files.training_checkpoints import latest_checkpoint, verify_checkpoint
from .fold import MergeReport, merge_and_reinitialize
from .initialization import initialize_base_weights
from .model import POETModel
from .model_card import create_model_card, hardware, json_config, set_model_card
from .optim import AngleLaw, poet_optimizer, poet_param_groups
from .registration import register
from .rotation_muon import RotationMuon
from .schedule import follow_optimizers
from .workarounds import clear_leftover_gguf_flags


__version__ = "0.1.0"

__all__ = [
    "AngleLaw",
    "MergeReport",
    "POETCallback",
    "POETCheckpointError",
    "POETConfig",
    "POETFoldError",
    "POETModel",
    "POETReferenceError",
    "RotationMuon",
    "clear_leftover_gguf_flags",
    "create_model_card",
    "hardware",
    "initialize_base_weights",
    "json_config",
    "latest_checkpoint",
    "merge_and_reinitialize",
    "poet_optimizer",
    "poet_param_groups",
    "set_model_card",
    "verify_checkpoint",
]

register(POETConfig, POETModel)
follow_optimizers()


def __getattr__(name: str) -> object:
    # Imports Trainer, which takes longer than all the rest.
    if name == "POETCallback":
        from .callback import POETCallback

        return POETCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
