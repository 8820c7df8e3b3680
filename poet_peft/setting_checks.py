"""The values of settings: what each may be, and what is said of one that is not. Each takes the setting's name."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np


def check_is_dict(name: str, value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} must be a dict {{name: {what}}}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}.")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name}={value!r} must be at most {maximum}.")
    return int(value)


def positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not value > 0:
        raise ValueError(f"{name}={value!r} must be a positive number.")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r} must be True or False.")
    return bool(value)


def size_of_blocks(name: str, value: Any, variant: str) -> int | float:
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if is_integer and value >= 2:
        return int(value)
    is_fraction = isinstance(value, Real) and not isinstance(value, Integral)
    if variant == "fully_stochastic":
        if is_fraction and 0 < value <= 1:
            return float(value)
        raise ValueError(
            f"{name}={value!r} must be an integer of at least 2 (features in a block, of which 1 cannot rotate), or a "
            "float in (0, 1] (a fraction of each dimension)."
        )
    hint = "; fractions of a dimension need variant='fully_stochastic'" if is_fraction else ""
    raise ValueError(f"{name}={value!r} must be an integer of at least 2 (a block of 1 cannot rotate){hint}.")


def layer_indexes(value: Any) -> list[int] | int | None:
    if value is None:
        return None
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [integer(f"layers_to_transform[{i}]", index, minimum=0) for i, index in enumerate(value)]
    return integer("layers_to_transform", value, minimum=0)
