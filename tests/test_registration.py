"""PEFT knows POET like a method of its own; importing twice is silent; a POET that PEFT ships itself is kept."""

import copy
import importlib
import json
import pickle
import subprocess
import sys
import textwrap
import warnings
from enum import Enum

import pytest
from cases import PLAIN, OneLayer, base_layer, rotated
from peft import PeftConfig, PeftType, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import poet_peft
from poet_peft import POETConfig, POETModel
from poet_peft.registration import ensure_peft_type, register


POET = ensure_peft_type()


def python(code, *options):
    """Run a program in a fresh interpreter, in which poet_peft can be imported but is not yet."""
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# The member of the enum


@pytest.mark.parametrize(
    "trip",
    [
        lambda member: PeftType(member.value),
        lambda member: PeftType[member.name],
        lambda member: PeftType.POET,
        lambda member: pickle.loads(pickle.dumps(member)),
        copy.copy,
        copy.deepcopy,
        lambda member: next(other for other in PeftType if other == member),
        lambda member: PeftType.__members__["POET"],
        lambda member: PeftType(json.loads(json.dumps(member))),
    ],
    ids=["value", "name", "attribute", "pickle", "copy", "deepcopy", "iteration", "members", "json"],
)
def test_member_comes_back_as_itself(trip):
    assert trip(POET) is POET


def test_member_is_like_those_of_the_enum():
    lora = PeftType.LORA
    assert type(POET) is type(lora) is PeftType
    assert isinstance(POET, str) and isinstance(POET, Enum)
    assert (POET.name, POET.value) == ("POET", "POET")
    assert str(POET) == str(lora).replace("LORA", "POET")
    assert repr(POET) == repr(lora).replace("LORA", "POET")
    assert json.dumps({"peft_type": POET}) == json.dumps({"peft_type": "POET"})
    assert POET == "POET" and hash(POET) == hash("POET")
    assert POET in PeftType


def test_member_is_there_once():
    members = list(PeftType)
    assert members.count(POET) == 1
    assert len(members) == len(PeftType) == len(PeftType.__members__)


def test_other_members_are_as_before():
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="NOT_A_METHOD"):
        PeftType("NOT_A_METHOD")


# PEFT's mappings


def test_peft_maps_the_name_to_our_classes():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[POET] is POETConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[POET] is POETModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[POET] == POETModel.prefix == "poet_"


def test_configuration_is_found_by_its_type():
    assert isinstance(get_peft_config({"peft_type": "POET", "block_size": 8}), POETConfig)


def test_configuration_file_is_found_by_its_type(tmp_path):
    POETConfig(block_size=8).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "POET"
    assert isinstance(PeftConfig.from_pretrained(tmp_path), POETConfig)


def test_configuration_survives_pickle():
    config = pickle.loads(pickle.dumps(PLAIN.config()))
    assert config == PLAIN.config()
    assert config.peft_type is POET


def test_wrapped_model_is_a_poet_model():
    model, _ = rotated(PLAIN)
    assert type(model.base_model) is POETModel


# Again


def test_registering_again_is_silent_and_changes_nothing():
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register(POETConfig, POETModel)
        register(POETConfig, POETModel)
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before


@pytest.mark.parametrize(
    "module", [poet_peft, importlib.import_module("poet_peft.registration")], ids=lambda m: m.__name__
)
def test_reloading_is_silent_and_changes_nothing(module, capsys):
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(module)
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before
    assert tuple(capsys.readouterr()) == ("", "")


def test_everything_imported_anew_works():
    """As in a notebook that drops the modules and imports them again: the new classes are the registered ones."""
    result = python(
        """
        import sys, torch, peft, poet_peft
        old = poet_peft.POETConfig
        for name in [name for name in sys.modules if name.partition(".")[0] == "poet_peft"]:
            del sys.modules[name]
        import poet_peft
        assert poet_peft.POETConfig is not old
        base = torch.nn.Sequential(torch.nn.Linear(8, 8))
        model = peft.get_peft_model(base, poet_peft.POETConfig(target_modules=["0"], block_size=4))
        assert type(model.base_model) is poet_peft.POETModel
        """,
        "-W",
        "error::UserWarning",
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_import_prints_nothing():
    result = python("import poet_peft", "-W", "error::UserWarning")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_import_reads_no_random_numbers():
    result = python(
        """
        import random, numpy, torch, peft, transformers
        torch.manual_seed(0); numpy.random.seed(0); random.seed(0)
        before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
        import poet_peft
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (numpy.random.get_state()[1].tolist(), random.getstate()) == before[1:]
        """
    )
    assert result.returncode == 0, result.stderr


def test_pickled_member_is_known_after_the_import():
    result = python(
        f"""
        import pickle, poet_peft
        from peft import PeftType
        assert pickle.loads({pickle.dumps(POET)!r}) is PeftType.POET
        """
    )
    assert result.returncode == 0, result.stderr


# A PEFT that has its own POET

PEFT_WITH_ITS_OWN_POET = """
import warnings
from dataclasses import dataclass
import torch
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel

member = str.__new__(PeftType, "POET")
member._name_ = member._value_ = "POET"
member._sort_order_ = len(PeftType)
type.__setattr__(PeftType, "POET", member)
PeftType._member_names_.append("POET")
PeftType._member_map_["POET"] = PeftType._value2member_map_["POET"] = member

@dataclass
class TheirConfig(PeftConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.POET

class TheirModel(LoraModel):
    prefix = "their_poet_"

PEFT_TYPE_TO_CONFIG_MAPPING[member] = TheirConfig
PEFT_TYPE_TO_TUNER_MAPPING[member] = TheirModel
PEFT_TYPE_TO_PREFIX_MAPPING[member] = TheirModel.prefix

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import poet_peft
caught = [warning for warning in caught if issubclass(warning.category, UserWarning)]
"""


def test_method_that_peft_ships_itself_is_kept():
    result = python(
        PEFT_WITH_ITS_OWN_POET
        + """
assert PeftType("POET") is member and list(PeftType).count(member) == 1
assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is TheirConfig
assert PEFT_TYPE_TO_TUNER_MAPPING[member] is TheirModel
assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "their_poet_"
assert TheirConfig().peft_type is member
"""
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_method_that_peft_ships_itself_gives_one_warning():
    result = python(
        PEFT_WITH_ITS_OWN_POET
        + """
assert len(caught) == 1, [str(warning.message) for warning in caught]
assert "has its own method called POET" in str(caught[0].message)
"""
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_our_configuration_says_that_it_is_not_registered():
    result = python(
        PEFT_WITH_ITS_OWN_POET
        + """
try:
    poet_peft.POETConfig()
except RuntimeError as error:
    assert "PEFT's configuration class" in str(error)
else:
    raise AssertionError("POETConfig() was made for a method of another package")
"""
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_configuration_and_model_are_ours_again_after_their_dummy():
    """The subprocesses above must not touch this process."""
    assert type(get_peft_model(OneLayer(base_layer(PLAIN)), PLAIN.config()).base_model) is POETModel
