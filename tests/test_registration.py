"""PEFT knows POET like a method of its own; importing twice is silent; a POET that PEFT ships itself is kept."""

import copy
import importlib
import json
import pickle
import subprocess
import sys
import warnings
from enum import Enum

import pytest
from cases import PLAIN, rotated
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import poet_peft
from poet_peft import POETConfig, POETModel
from poet_peft.registration import ensure_peft_type, register


POET = ensure_peft_type()


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
    assert vars(POET).keys() == vars(lora).keys()
    assert POET.__objclass__ is lora.__objclass__
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


# In a fresh interpreter, where poet_peft is not imported yet

FRESH = f"""
import pickle, random, sys
import numpy, peft, torch, transformers

def random_state():
    return torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), repr(random.getstate())

before = random_state()
with capture() as said:
    import poet_peft
found["said"] = said
found["trainer_is_imported"] = "transformers.trainer" in sys.modules
found["random_state_is_kept"] = random_state() == before
found["pickle_is_known"] = pickle.loads({pickle.dumps(POET)!r}) is peft.PeftType.POET

# As in a notebook that drops the modules and imports them again.
old = poet_peft.POETConfig
for name in [name for name in sys.modules if name.partition(".")[0] == "poet_peft"]:
    del sys.modules[name]
with capture() as said:
    import poet_peft
found["said_again"] = said
base = torch.nn.Sequential(torch.nn.Linear(8, 8))
model = peft.get_peft_model(base, poet_peft.POETConfig(target_modules=["0"], block_size=4))
found["new_classes_are_used"] = poet_peft.POETConfig is not old and type(model.base_model) is poet_peft.POETModel
"""

WITH_A_POET_OF_PEFTS_OWN = """
from dataclasses import dataclass
from peft import PeftConfig, PeftType
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

mappings = PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
theirs = TheirConfig, TheirModel, TheirModel.prefix
for mapping, value in zip(mappings, theirs):
    mapping[member] = value

with capture() as said:
    import poet_peft
found["said"] = said
found["member_is_kept"] = PeftType("POET") is member and list(PeftType).count(member) == 1
found["mappings_are_kept"] = all(mapping[member] is value for mapping, value in zip(mappings, theirs))
try:
    poet_peft.POETConfig()
    found["our_configuration"] = "made"
except RuntimeError as error:
    found["our_configuration"] = str(error)
"""

# Runs the program that stands below it, and writes what that puts into `found` into a file.
HARNESS = """
import contextlib, io, json, sys, warnings

found = {}

@contextlib.contextmanager
def capture():
    said = []
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *rest: said.append(f"{category.__name__}: {message}")
        warnings.simplefilter("always", UserWarning)
        yield said
    said += stream.getvalue().splitlines()

exec(sys.argv[2])
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


def in_fresh_interpreter(program, directory):
    command = [sys.executable, "-c", HARNESS, directory / "found.json", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=directory)
    assert result.returncode == 0, result.stderr
    return json.loads((directory / "found.json").read_text())


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return in_fresh_interpreter(FRESH, tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def beside_pefts_own(tmp_path_factory):
    return in_fresh_interpreter(WITH_A_POET_OF_PEFTS_OWN, tmp_path_factory.mktemp("beside"))


def test_import_says_nothing(fresh):
    assert fresh["said"] == []


def test_import_does_not_import_trainer(fresh):
    """Which takes longer than all the rest."""
    assert not fresh["trainer_is_imported"]


def test_import_does_not_move_the_global_generators(fresh):
    assert fresh["random_state_is_kept"]


def test_pickled_member_is_known_after_the_import(fresh):
    assert fresh["pickle_is_known"]


def test_modules_imported_anew_say_nothing(fresh):
    assert fresh["said_again"] == []


def test_modules_imported_anew_are_the_registered_ones(fresh):
    assert fresh["new_classes_are_used"]


def test_method_that_peft_ships_itself_keeps_its_name(beside_pefts_own):
    assert beside_pefts_own["member_is_kept"]


def test_method_that_peft_ships_itself_keeps_its_classes(beside_pefts_own):
    assert beside_pefts_own["mappings_are_kept"]


def test_method_that_peft_ships_itself_gives_one_warning(beside_pefts_own):
    (warning,) = beside_pefts_own["said"]
    assert warning.startswith("UserWarning: ")
    assert "has its own method called POET, which is kept" in warning


def test_our_configuration_is_refused_beside_a_method_that_peft_ships_itself(beside_pefts_own):
    assert "Use PEFT's configuration class, __main__.TheirConfig" in beside_pefts_own["our_configuration"]
