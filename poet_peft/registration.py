"""The one place that touches PEFT's enum and mappings, and the class that `rescale_adapter_scale` looks for."""

from __future__ import annotations

import warnings

import peft
import peft.helpers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


_NAME = "POET"


def ensure_peft_type() -> PeftType:
    """Return `PeftType.POET`, adding it to PEFT's enum on the first call.

    An enum cannot be subclassed once it has members, so the member is built by hand: the same attributes that
    `EnumType` gives a member of a `str` enum, which keeps lookup by value, iteration, comparison and pickling intact.
    """
    if _NAME in PeftType.__members__:
        return PeftType[_NAME]
    member = str.__new__(PeftType, _NAME)
    member._name_ = _NAME
    member._value_ = _NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, _NAME, member)
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    return member


def _config_cls_of_peft() -> type | None:
    """The configuration class of a method called POET that PEFT itself ships, None if there is none."""
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(ensure_peft_type())
    is_ours = config_cls is None or config_cls.__module__.partition(".")[0] == __package__
    return None if is_ours else config_cls


def _name_is_taken(config_cls: type) -> str:
    return (
        f"peft {peft.__version__} has its own method called POET, which is kept: poet_peft is not registered. Use "
        f"PEFT's configuration class, {config_cls.__module__}.{config_cls.__qualname__}, or a version of peft without "
        "it."
    )


def check_owns_name() -> None:
    """Raise RuntimeError if the name POET in PEFT is not this package's."""
    theirs = _config_cls_of_peft()
    if theirs is not None:
        raise RuntimeError(_name_is_taken(theirs))


def register(config_cls: type, model_cls: type) -> None:
    """Make POET known to PEFT. Silent, and safe to call again.

    If PEFT itself has a method called POET, PEFT's own is kept and a warning says so.
    """
    peft_type = ensure_peft_type()
    theirs = _config_cls_of_peft()
    if theirs is not None:
        warnings.warn(_name_is_taken(theirs))
        return
    _make_scalable(model_cls.tuner_layer_cls)
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    else:
        register_peft_method(name=_NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)


def _make_scalable(layer_cls: type) -> None:
    """Let `peft.helpers.rescale_adapter_scale` scale layers of this class beside LoRA's, which it looks for by class.

    The name is used there for one `isinstance` alone, which takes a tuple as well.
    """
    known = peft.helpers.LoraLayer
    classes = known if isinstance(known, tuple) else (known,)
    if layer_cls not in classes:
        peft.helpers.LoraLayer = (*classes, layer_cls)
