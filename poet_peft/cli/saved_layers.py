"""What the rotated layers of an adapter file are called, and where in the file their tensors are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ..config import POETConfig
from ..maths.blocks import SideName
from ..state import AdapterState
from ..weights.layout import WeightLayout


_STATE = ".poet_state"
_WRAPPED = ".base_layer"
_STACKS = (WeightLayout.STACK, WeightLayout.TRANSPOSED_STACK)


class SavedLayer(NamedTuple):
    """A rotated layer in a file.

    Args:
        prefix: of the keys of its rotations and its state.
        state: of the adapter at this layer.
        sides: that are rotated, the output side first, as in `R W P`.
        weight_key: of its base weight, in a file that holds base weights.
    """

    prefix: str
    state: AdapterState
    sides: list[SideName]
    weight_key: str

    @property
    def is_stack(self) -> bool:
        """Whether it is one of `target_parameters`, as the stacked weights of experts are."""
        return self.state.layout in _STACKS


def saved_layers(
    keys: Collection[str], states: Mapping[str, AdapterState], config: POETConfig
) -> dict[str, SavedLayer]:
    """The rotated layers of a file by the names that a user knows them by, in the order of their numbers.

    A parameter of `target_parameters` has its name in the base model, and so have the two weights of an attention:
    `experts.down_proj`, `self_attn.in_proj_weight`, `self_attn.out_proj`.

    Args:
        keys: of the file.
        states: of the layers, by the prefix of their keys.
    """
    layers = {}
    for prefix, state in states.items():
        module = _name_in_base_model(prefix)
        name, weight = module, "weight"
        wrapped = f"{prefix}{_WRAPPED}"
        if state.layout in _STACKS:
            weight = _parameter_of(prefix, module, states, config) or weight
            name = f"{module}.{weight}" if weight != "weight" else _without_root(prefix)
            while f"{wrapped}{_STATE}" in keys:
                wrapped += _WRAPPED
        elif f"{wrapped}.out_proj{_STATE}" in keys or f"{wrapped}.in_proj_weight" in keys:
            weight = "in_proj_weight"
            name = f"{module}.{weight}"
        sides: list[SideName] = [side for side in ("R", "P") if f"{prefix}.poet_{side}.weight" in keys]
        layers[name] = SavedLayer(prefix, state, sides, f"{wrapped}.{weight}")
    return {name: layers[name] for name in sorted(layers, key=_by_number)}


def prefixes_of(keys: Collection[str]) -> list[str]:
    """The prefixes of the keys of all rotated layers, by the states that each of them has."""
    return [key.removesuffix(_STATE) for key in keys if key.endswith(_STATE)]


def _parameter_of(prefix: str, module: str, states: Mapping[str, AdapterState], config: POETConfig) -> str | None:
    """Which parameter of a module a wrapper rotates: the wrappers are nested, the first parameter's innermost.

    `config` has the parameters in their order in the module; see `check_target_parameters`. None where the file and
    the configuration do not fit each other.
    """
    nested = sorted(
        (other for other, state in states.items() if state.layout in _STACKS and _name_in_base_model(other) == module),
        key=len,
        reverse=True,
    )
    targets = [target.rpartition(".") for target in config.target_parameters or ()]
    names = [name for owner, _, name in targets if not owner or f".{module}".endswith(f".{owner}")]
    names = list(dict.fromkeys(names))
    return names[nested.index(prefix)] if len(names) == len(nested) else None


def _without_root(prefix: str) -> str:
    return prefix.removeprefix("base_model.model.")


def _name_in_base_model(prefix: str) -> str:
    return re.sub(rf"{re.escape(_WRAPPED)}(?=\.|$)", "", _without_root(prefix))


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
