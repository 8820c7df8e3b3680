"""What a row of PEFT's test tables about OFT becomes for POET.

PEFT's tables hold configuration classes with keyword arguments beside them, or finished configurations. A twin is the
same row for POET, once for every variant; a row about another method has none. In most files POET stands beside OFT,
and beside LoRA where no other method can do what is tested, as for all rows about `nn.MultiheadAttention`.
"""

import re
from dataclasses import MISSING, fields

from peft import BOFTConfig, LoraConfig, OFTConfig, PeftConfig

from poet_peft import POETConfig


# A twin is made from the first of these methods that a table has, by the method that the file stands beside.
METHODS = {"OFT": (OFTConfig, BOFTConfig), "LoRA": (LoraConfig,)}

# Models of PEFT's tables that no method has rows for but LoRA, whose rows then have twins beside OFT's.
_MODELS_OF_LORA = {"MHA"}

# What POET sets besides in the twins of one row; `block_size` only where the row says nothing about it.
VARIANTS = {"": {}, "fully stochastic": {"variant": "fully_stochastic", "block_size": 0.5}}

# Arguments that mean the same in POET.
_SHARED = {
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "inference_mode",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "target_modules",
    "target_parameters",
    "task_type",
}
# Arguments that POET has nothing for: the twin is the row without them.
_WITHOUT_COUNTERPART = {
    "block_share",
    "boft_block_num",
    "boft_dropout",
    "boft_n_butterfly_factor",
    "coft",
    "eps",
    "fan_in_fan_out",
    "lora_alpha",
    "lora_dropout",
    "module_dropout",
}
_RENAMED = {"init_lora_weights": "init_weights"}
# PEFT's toy models have layers of 10 input features, where OFT's r blocks have 10 // r.
_TOY_FEATURES = 10


def poet_arguments(arguments, settings=None):
    """Keyword arguments of POETConfig for those of OFT, BOFT or LoRA.

    Args:
        arguments: keyword arguments of the other method.
        settings: those of POETConfig that hold where `arguments` say nothing about them.

    Raises:
        KeyError: an argument that nobody has decided about yet.
    """
    arguments = {_RENAMED.get(name, name): value for name, value in arguments.items()}
    translated = dict(settings or {})
    num_blocks = arguments.pop("r", 0) if "oft_block_size" in arguments else 0
    if "r" in arguments:
        del arguments["r"]  # LoRA's rank
    block_size = arguments.pop("oft_block_size", 0) or arguments.pop("boft_block_size", 0)
    if block_size:
        translated["block_size"] = block_size
    elif num_blocks:
        is_one_block = translated.get("variant") == "fully_stochastic"
        translated["block_size"] = 1 / num_blocks if is_one_block else max(2, _TOY_FEATURES // num_blocks)
    if not arguments.pop("use_cayley_neumann", True):
        translated["orthogonal_map"] = "cayley"
    if "num_cayley_neumann_terms" in arguments:
        translated["num_neumann_terms"] = arguments.pop("num_cayley_neumann_terms")
    for name, value in arguments.items():
        if name in _SHARED:
            translated[name] = value
        elif name not in _WITHOUT_COUNTERPART:
            raise KeyError(f"no counterpart in POET is known for the argument {name!r}: add it to {__name__}.")
    if translated.get("bias") in ("oft_only", "boft_only", "lora_only"):
        translated["bias"] = "poet_only"
    return translated


def methods(value):
    """The configuration classes in a row, at any depth."""
    if isinstance(value, type) and issubclass(value, PeftConfig):
        return {value}
    if isinstance(value, PeftConfig):
        return {type(value)}
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, list | tuple | type({}.values())):
        return set().union(*(methods(part) for part in value))
    return set()


def twins(rows, ids=None, beside="OFT"):
    """Rows for POET in place of those about the first of METHODS that the table has.

    Args:
        rows: values of a `pytest.mark.parametrize`, each a value or a tuple of them.
        ids: their names, or None.
        beside: the method whose rows get a twin, a key of METHODS.

    Returns:
        The rows and their names, without repetitions; None if no row names a configuration.
    """
    rows = list(rows)
    found = [methods(row) for row in rows]
    if not any(found):
        return None
    method = next((method for method in METHODS[beside] if any(method in present for present in found)), None)
    new_rows, new_ids = [], []
    for i, (row, present) in enumerate(zip(rows, found, strict=True)):
        own = LoraConfig if _is_of_lora(row, present) else method
        if own is None or present != {own}:
            continue
        varies = isinstance(row, list | tuple) and any(isinstance(value, dict) for value in row)
        for variant, settings in VARIANTS.items() if varies else [("", {})]:
            twin = _twin(row, own, settings)
            name = ids[i] if ids else _name(row)
            same = [_without_name(twin) == _without_name(other) for other in new_rows]
            if not any(same):
                new_rows.append(twin)
                new_ids.append(" ".join(filter(None, [_renamed(name), variant])))
    return new_rows, [_distinct(name, new_ids[:i]) for i, name in enumerate(new_ids)]


def _is_of_lora(row, present):
    values = row if isinstance(row, list | tuple) else ()
    return present == {LoraConfig} and any(value in _MODELS_OF_LORA for value in values if isinstance(value, str))


def _twin(value, method, settings):
    if value is method:
        return POETConfig
    if isinstance(value, method):
        return POETConfig(**poet_arguments(_given(value), settings))
    if isinstance(value, list | tuple):
        has_class = method in value
        return type(value)(
            poet_arguments(part, settings) if has_class and isinstance(part, dict) else _twin(part, method, settings)
            for part in value
        )
    return _renamed(value) if isinstance(value, str) else value


def _given(config):
    """The arguments in which a configuration differs from its defaults."""
    defaults = {
        field.name: field.default_factory() if field.default is MISSING else field.default
        for field in fields(config)
        if field.init and (field.default is not MISSING or field.default_factory is not MISSING)
    }
    derived = {"peft_type", "peft_version", "auto_mapping"}
    return {
        name: getattr(config, name)
        for name, default in defaults.items()
        if name not in derived and getattr(config, name) != default
    }


def _renamed(text):
    """A row's name with POET's in place of the method's."""
    text = re.sub(r"\b(b?oft|lora)\b", "poet", text)
    return re.sub(r"\b(B?OFT|LoRA|Lora)(?=\b|Config)", "POET", text)


def _name(row):
    values = row if isinstance(row, list | tuple) else [row]
    names = [value for value in values if isinstance(value, str)]
    return names[0] if names else "POET"


def _without_name(row):
    """What makes a row a case of its own: all but its name."""
    if isinstance(row, list | tuple) and row and isinstance(row[0], str):
        return row[1:]
    return row


def _distinct(name, taken):
    return name if name not in taken else f"{name} {taken.count(name) + 1}"
