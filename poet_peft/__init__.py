"""POET as a PEFT tuner: training by learned orthogonal rotations of fixed weights, `W_eff = R W P`.

Importing this package registers the method with PEFT, silently.
"""

from .callback import POETCallback
from .config import POETConfig
from .errors import POETCheckpointError, POETMergeError, POETReferenceError
from .merging import MergeReport, merge_and_reinitialize
from .model import POETModel
from .model_card import create_model_card, set_model_card
from .muon import RotationMuon
from .optim import poet_param_groups
from .registration import register
from .resume import latest_checkpoint, verify_checkpoint


__version__ = "0.1.0"

__all__ = [
    "MergeReport",
    "POETCallback",
    "POETCheckpointError",
    "POETConfig",
    "POETMergeError",
    "POETModel",
    "POETReferenceError",
    "RotationMuon",
    "create_model_card",
    "latest_checkpoint",
    "merge_and_reinitialize",
    "poet_param_groups",
    "set_model_card",
    "verify_checkpoint",
]

register(POETConfig, POETModel)
