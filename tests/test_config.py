"""What `POETConfig` accepts, what it refuses and how, and which layers of a model it ends up rotating."""

import copy
import json
import math
import pickle
import re
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from cases import FULLY, Case, OneLayer, TwoLayers, base_layer, wrap
from models import llama
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from poet_peft import POETConfig
from poet_peft.linear import Linear


# Arguments, and what the message has to say: the field with its value.
BAD = {
    "variant": ({"variant": "random"}, "variant='random'"),
    "orthogonal_map": ({"orthogonal_map": "expm"}, "orthogonal_map='expm'"),
    "bias": ({"bias": "lora_only"}, "bias='lora_only'"),
    "base_init": ({"base_init": "zeros"}, "base_init='zeros'"),
    "block_size-0": ({"block_size": 0}, "block_size=0"),
    "block_size-negative": ({"block_size": -1}, "block_size=-1"),
    "block_size-1": ({"block_size": 1}, "block_size=1"),
    "block_size-bool": ({"block_size": True}, "block_size=True"),
    "block_size-text": ({"block_size": "64"}, "block_size='64'"),
    "block_size-none": ({"block_size": None}, "block_size=None"),
    "block_size-fraction-of-block-stochastic": (
        {"block_size": 0.5},
        "block_size=0.5 must be an integer of at least 2 (a block of 1 cannot rotate); fractions of a dimension need "
        "variant='fully_stochastic'",
    ),
    "block_size-not-whole": ({"block_size": 33.7}, "block_size=33.7 must be an integer"),
    "block_size-whole-float": ({"block_size": 64.0}, "block_size=64.0 must be an integer"),
    "block_size-nan-of-block-stochastic": ({"block_size": math.nan}, "block_size=nan must be an integer"),
    "block_size-infinite": ({"block_size": math.inf, "variant": FULLY}, "block_size=inf"),
    "block_size-bool-fully-stochastic": ({"block_size": True, "variant": FULLY}, "block_size=True"),
    "block_size-numpy-bool": ({"block_size": np.True_}, "block_size=np.True_"),
    "block_size-fraction-above-1": (
        {"block_size": 33.7, "variant": FULLY},
        "block_size=33.7 must be an integer of at least 2 (features in a block, of which 1 cannot rotate), or a float "
        "in (0, 1]",
    ),
    "block_size-fraction-0": ({"block_size": 0.0, "variant": FULLY}, "block_size=0.0"),
    "block_size-fraction-negative": ({"block_size": -0.5, "variant": FULLY}, "block_size=-0.5"),
    "block_size-nan": ({"block_size": math.nan, "variant": FULLY}, "block_size=nan"),
    "block_size-1-fully-stochastic": ({"block_size": 1, "variant": FULLY}, "block_size=1"),
    "block_size_pattern": ({"block_size_pattern": {"q": 1}}, "block_size_pattern['q']=1"),
    "block_size_pattern-fraction": ({"block_size_pattern": {"q": 0.5}}, "block_size_pattern['q']=0.5"),
    "block_size_pattern-none": ({"block_size_pattern": None}, "block_size_pattern=None must be a dict {name: block"),
    "base_init_scale_pattern": (
        {"base_init": "normalized", "base_init_scale_pattern": {"q": 0}},
        "base_init_scale_pattern['q']=0",
    ),
    "base_init_scale_pattern-none": ({"base_init_scale_pattern": None}, "base_init_scale_pattern=None must be a dict"),
    "base_init_scale_pattern-alone": ({"base_init_scale_pattern": {"q": 2}}, "base_init_scale_pattern={'q': 2.0}"),
    "layers_to_transform-float": ({"layers_to_transform": [0, 1.5]}, "layers_to_transform[1]=1.5"),
    "layers_to_transform-negative": ({"layers_to_transform": -1}, "layers_to_transform=-1"),
    "layers_to_transform-all-linear": (
        {"layers_to_transform": [0], "target_modules": "all-linear"},
        "layers_to_transform=[0] selects among names, and target_modules='all-linear'",
    ),
    "layers_to_transform-text": ({"layers_to_transform": "0"}, "layers_to_transform='0'"),
    "train_rest-text": ({"train_rest": "false"}, "train_rest='false' must be True or False"),
    "memory_efficient-number": ({"memory_efficient": 1}, "memory_efficient=1 must be True or False"),
    "file_format-newer": ({"file_format": 99}, "file_format=99 is of a newer poet_peft"),
    "file_format-text": ({"file_format": "1"}, "file_format='1'"),
    "num_neumann_terms-0": ({"num_neumann_terms": 0}, "num_neumann_terms=0"),
    "num_neumann_terms-float": ({"num_neumann_terms": 3.0}, "num_neumann_terms=3.0"),
    "num_neumann_terms-bool": ({"num_neumann_terms": True}, "num_neumann_terms=True"),
    "merge_interval-negative": ({"merge_interval": -1}, "merge_interval=-1"),
    "merge_interval-float": ({"merge_interval": 1.5}, "merge_interval=1.5"),
    "merge_interval-none": ({"merge_interval": None}, "merge_interval=None"),
    "merge_interval-bool": ({"merge_interval": True}, "merge_interval=True"),
    "reinit_interval-negative": ({"merge_interval": 10, "reinit_interval": -10}, "reinit_interval=-10"),
    "reinit_interval-float": ({"merge_interval": 10, "reinit_interval": 10.0}, "reinit_interval=10.0"),
    "reinit_interval-no-multiple": ({"merge_interval": 10, "reinit_interval": 25}, "reinit_interval=25"),
    "reinit_interval-below": ({"merge_interval": 10, "reinit_interval": 5}, "reinit_interval=5"),
    "reinit_interval-without-folds": ({"reinit_interval": 5}, "reinit_interval=5"),
    "max_drift-0": ({"max_drift": 0}, "max_drift=0 must be a positive number"),
    "max_drift-nan": ({"max_drift": math.nan}, "max_drift=nan"),
    "max_drift-bool": ({"max_drift": True}, "max_drift=True"),
    "max_drift-text": ({"max_drift": "1%"}, "max_drift='1%'"),
    "adaptive_terms-none": ({"adaptive_terms": None}, "adaptive_terms=None must be True or False"),
    "seed-negative": ({"seed": -1}, "seed=-1"),
    "seed-numpy-negative": ({"seed": np.int64(-1)}, "seed=np.int64(-1)"),
    "seed-float": ({"seed": 0.5}, "seed=0.5"),
    "seed-bool": ({"seed": True}, "seed=True"),
    "seed-too-large": ({"seed": 2**63}, f"seed={2**63}"),
    "layers_pattern-alone": ({"layers_pattern": "blocks"}, "layers_pattern='blocks'"),
    "train_rest-and-modules_to_save": (
        {"train_rest": True, "modules_to_save": ["score"]},
        "modules_to_save=['score']",
    ),
    "keep_initial_weights-without-folds": ({"keep_initial_weights": True}, "keep_initial_weights=True"),
    "allow_requantize-without-folds": ({"allow_requantize": True}, "allow_requantize=True"),
    "keep_initial_weights-and-train_rest": (
        {"keep_initial_weights": True, "train_rest": True, "merge_interval": 10},
        "keep_initial_weights=True",
    ),
}

GOOD = {
    "defaults": {},
    "smallest-block": {"block_size": 2},
    "fraction": {"variant": FULLY, "block_size": 0.125},
    "whole": {"variant": FULLY, "block_size": 1.0},
    "fully-stochastic-integer": {"variant": FULLY, "block_size": 16},
    "one-term": {"num_neumann_terms": 1},
    "reinit-never": {"merge_interval": 10, "reinit_interval": 0},
    "reinit-multiple": {"merge_interval": 10, "reinit_interval": 50},
    "layers_pattern": {"layers_to_transform": 0, "layers_pattern": "blocks"},
    "largest-seed": {"seed": 2**63 - 1},
    "keep_initial_weights": {"merge_interval": 10, "keep_initial_weights": True},
    "allow_requantize": {"merge_interval": 10, "allow_requantize": True},
}

# Every field of the method away from its default in one of them, as far as they go together.
FILLED = {
    "periodic": {
        "variant": FULLY,
        "block_size": 0.25,
        "num_neumann_terms": 5,
        "orthogonal_map": "cayley",
        "merge_interval": 20,
        "reinit_interval": 40,
        "base_init": "xavier",
        "base_init_scale": 2.0,
        "base_init_scale_pattern": {"q_proj": 0.5},
        "keep_initial_weights": True,
        "memory_efficient": True,
        "compensated_folds": False,
        "max_drift": 0.5,
        "allow_requantize": True,
        "seed": 2**40 + 1,
        "init_weights": False,
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["experts.gate_up_proj"],
        "exclude_modules": ["up_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
        "modules_to_save": ["score"],
        "bias": "poet_only",
        "block_size_pattern": {"q_proj": 0.5, "v_proj": 8},
    },
    "train-rest": {
        "train_rest": True,
        "adaptive_terms": False,
        "block_size": 16,
        "target_modules": ["up_proj"],
        "layers_to_transform": 0,
    },
}
OWN_FIELDS = {field.name for field in fields(POETConfig)} - {field.name for field in fields(PeftConfig)}


def parametrize(name, table):
    return pytest.mark.parametrize(name, table.values(), ids=table)


def rotated_names(model):
    return [name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, Linear)]


def block_sizes(model):
    """Of the output and the input side of every rotated layer, by name."""
    layers = {name: model.base_model.model.get_submodule(name) for name in rotated_names(model)}
    return {
        name: tuple(side["default"].partition.block_size for side in (layer.poet_R, layer.poet_P) if "default" in side)
        for name, layer in layers.items()
    }


def user_warnings(caught):
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


# Values


@parametrize("bad", BAD)
def test_bad_value_is_refused_by_field_and_value(bad):
    arguments, said = bad
    with pytest.raises(ValueError, match=re.escape(said)):
        POETConfig(**arguments)


@parametrize("arguments", GOOD)
def test_good_values_are_taken_as_they_are(arguments):
    config = POETConfig(**arguments)
    assert {name: getattr(config, name) for name in arguments} == arguments


NUMPY = {
    "block_size": (np.int64(32), 32),
    "num_neumann_terms": (np.int8(5), 5),
    "merge_interval": (np.uint16(10), 10),
    "reinit_interval": (np.int32(20), 20),
    "seed": (np.uint64(2**63 - 1), 2**63 - 1),
    "layers_to_transform": (np.arange(2), [0, 1]),
    "block_size_pattern": ({"q_proj": np.int64(8)}, {"q_proj": 8}),
    "max_drift": (np.float32(0.5), 0.5),
    "train_rest": (np.True_, True),
}


def test_numbers_of_numpy_are_saved_as_those_of_python(tmp_path):
    POETConfig(**{name: given for name, (given, _) in NUMPY.items()}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: saved[name] for name in NUMPY} == {name: expected for name, (_, expected) in NUMPY.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fraction_of_numpy_is_taken_for_one_of_python(dtype):
    block_size = POETConfig(variant=FULLY, block_size=dtype(0.25)).block_size
    assert (type(block_size), block_size) == (float, 0.25)


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("variant", "'block_stochastic', 'fully_stochastic'"),
        ("orthogonal_map", "'cayley_neumann', 'cayley'"),
        ("bias", "'none', 'all', 'poet_only'"),
        ("base_init", "'normalized', 'xavier', 'standard', 'uniform_spectrum'"),
    ],
)
def test_unknown_choice_is_answered_with_the_known_ones(field, choices):
    with pytest.raises(ValueError, match=re.escape(choices)):
        POETConfig(**{field: "other"})


def test_defaults_are_a_pure_adapter():
    config = POETConfig()
    assert (config.variant, config.block_size) == ("block_stochastic", 64)
    assert (config.orthogonal_map, config.num_neumann_terms) == ("cayley_neumann", 3)
    assert (config.merge_interval, config.base_init, config.train_rest) == (0, None, False)
    assert not config.changes_base_weights


def test_for_pretraining_has_its_values():
    config = POETConfig.for_pretraining()
    assert (config.target_modules, config.block_size, config.base_init) == ("all-linear", 256, "normalized")
    assert (config.merge_interval, config.reinit_interval, config.train_rest) == (1, 0, True)
    assert config.changes_base_weights


@pytest.mark.parametrize(
    ("layer", "scale"),
    [("self_attn.q_proj", 1.05), ("self_attn.o_proj", 0.7), ("mlp.up_proj", 0.7), ("mlp.down_proj", 0.35)],
)
def test_for_pretraining_sizes_initial_weights_by_the_kind_of_layer(layer, scale):
    assert POETConfig.for_pretraining().base_init_scale_of(f"model.layers.0.{layer}") == pytest.approx(scale)


@pytest.mark.parametrize("overrides", [{"recipe": "paper"}, {"merge_interval": 10}, {"base_init": "mup"}])
def test_for_pretraining_otherwise_leaves_sizes_to_the_scheme(overrides):
    config = POETConfig.for_pretraining(**overrides)
    assert (config.base_init_scale, config.base_init_scale_pattern) == (1.0, {})


def test_for_pretraining_by_the_papers_recipe_has_its_values():
    config = POETConfig.for_pretraining(recipe="paper")
    assert (config.target_modules, config.block_size, config.base_init) == ("all-linear", 256, "normalized")
    assert (config.merge_interval, config.reinit_interval, config.train_rest) == (400, None, True)


def test_for_pretraining_refuses_an_unknown_recipe():
    with pytest.raises(ValueError, match="recipe='official' is unknown"):
        POETConfig.for_pretraining(recipe="official")


def test_merge_interval_of_its_own_leaves_the_recipes_intervals():
    config = POETConfig.for_pretraining(merge_interval=10)
    assert (config.merge_interval, config.reinit_interval) == (10, None)


@pytest.mark.parametrize(("recipe", "merge_interval"), [("ortho", 1), ("paper", 400)])
def test_merge_interval_of_the_recipe_changes_nothing(recipe, merge_interval):
    assert POETConfig.for_pretraining(recipe, merge_interval=merge_interval) == POETConfig.for_pretraining(recipe)


def test_scale_of_initial_weights_that_are_not_drawn_is_refused():
    with pytest.raises(ValueError, match="base_init_scale=2.0"):
        POETConfig(base_init_scale=2)


def test_for_pretraining_takes_overrides():
    config = POETConfig.for_pretraining(block_size=32, merge_interval=10, base_init=None, seed=4)
    assert (config.block_size, config.merge_interval, config.base_init, config.seed) == (32, 10, None, 4)
    assert (config.target_modules, config.train_rest) == ("all-linear", True)


def test_for_pretraining_refuses_what_the_constructor_refuses():
    with pytest.raises(ValueError, match="block_size=1"):
        POETConfig.for_pretraining(block_size=1)


@pytest.mark.parametrize(
    ("merge_interval", "reinit_interval", "steps"),
    [(10, None, [10, 20, 30, 40]), (10, 20, [20, 40]), (10, 0, []), (0, None, [])],
)
def test_reinitializations_come_with_every_so_many_folds(merge_interval, reinit_interval, steps):
    config = POETConfig(merge_interval=merge_interval, reinit_interval=reinit_interval)
    assert [step for step in range(10, 50, 10) if config.reinitializes_at(step)] == steps


# Files


@parametrize("arguments", FILLED)
def test_every_field_survives_the_file(arguments, tmp_path):
    config = POETConfig(**arguments)
    config.save_pretrained(tmp_path)
    for cls in (POETConfig, PeftConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is POETConfig
        assert {name: getattr(loaded, name) for name in OWN_FIELDS} == {
            name: getattr(config, name) for name in OWN_FIELDS
        }


def test_every_field_is_away_from_its_default_in_a_file_test():
    """Otherwise the test above could not miss a field that is not saved."""
    defaults = POETConfig()
    filled = {name for arguments in FILLED.values() for name in arguments}
    assert filled == OWN_FIELDS
    for arguments in FILLED.values():
        config = POETConfig(**arguments)
        assert all(getattr(config, name) != getattr(defaults, name) for name in arguments)


COPIES = {
    "replace": lambda config: replace(config, block_size=8),
    "dict": lambda config: POETConfig(**config.to_dict()),
    "json": lambda config: POETConfig(**json.loads(json.dumps(config.to_dict(), default=sorted))),
}


@parametrize("copied", COPIES)
@pytest.mark.parametrize("is_from_file", [False, True], ids=["made", "loaded"])
def test_configuration_made_from_another_is_a_new_one(copied, is_from_file, tmp_path):
    config = POETConfig(target_modules=["q_proj"], base_init="normalized")
    if is_from_file:
        config.save_pretrained(tmp_path)
        config = POETConfig.from_pretrained(tmp_path)
    assert not copied(config).is_from_file


@pytest.mark.parametrize("cls", [POETConfig, PeftConfig])
@parametrize(
    "kept", {"as-read": lambda c: c, "deepcopy": copy.deepcopy, "pickle": lambda c: pickle.loads(pickle.dumps(c))}
)
def test_configuration_that_was_read_is_known_as_such(cls, kept, tmp_path):
    config = POETConfig(block_size=8)
    config.save_pretrained(tmp_path)
    assert kept(cls.from_pretrained(tmp_path)).is_from_file
    assert not config.is_from_file


def test_file_format_is_in_the_file_only(tmp_path):
    POETConfig(block_size=8).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["file_format"] == 1
    assert "file_format" not in POETConfig.from_pretrained(tmp_path).to_dict()


def test_file_without_a_format_is_read(tmp_path):
    config = POETConfig(block_size=8)
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({name: v for name, v in json.loads(path.read_text()).items() if name != "file_format"}))
    assert PeftConfig.from_pretrained(tmp_path) == config


# Block sizes in a model


def test_block_larger_than_a_side_is_clipped_with_one_warning_that_names_the_modules():
    with pytest.warns(UserWarning) as caught:
        model = get_peft_model(TwoLayers(), POETConfig(target_modules=["first", "second"], block_size=16))
    (message,) = user_warnings(caught)
    # first is 12 -> 20, second 20 -> 10.
    assert "'first' input side, 16 to 12" in message
    assert "'second' output side, 16 to 10" in message
    assert "'first' output" not in message
    assert "'second' input" not in message
    assert block_sizes(model) == {"first": (16, 12), "second": (10, 16)}


def test_block_that_fits_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(TwoLayers(), POETConfig(target_modules=["first", "second"], block_size=10))


def test_fully_stochastic_block_larger_than_a_side_is_refused_by_module():
    base = TwoLayers()
    with pytest.raises(ValueError, match="'first'.*block_size=16 .*12 features.*input side"):
        get_peft_model(base, POETConfig(target_modules=["first", "second"], block_size=16, variant=FULLY))
    assert_untouched(base, TwoLayers())


def test_fraction_is_of_each_side():
    model = wrap(TwoLayers(), POETConfig(target_modules=["first", "second"], block_size=0.5, variant=FULLY))
    assert block_sizes(model) == {"first": (10, 6), "second": (5, 10)}


def test_block_size_pattern_sets_the_layers_that_it_matches():
    pattern = {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 4}
    config = POETConfig(target_modules="all-linear", block_size=16, block_size_pattern=pattern)
    for name, sizes in block_sizes(wrap(llama(), config)).items():
        expected = 8 if "q_proj" in name else 4 if name == "model.layers.1.mlp.up_proj" else 16
        assert sizes == (expected, expected), name


def test_block_size_pattern_mixes_fractions_and_integers():
    config = POETConfig(
        target_modules=["first", "second"], variant=FULLY, block_size=0.5, block_size_pattern={"first": 4}
    )
    assert block_sizes(wrap(TwoLayers(), config)) == {"first": (4, 4), "second": (5, 10)}


@pytest.mark.parametrize("setting", ["block_size_pattern", "base_init_scale_pattern"])
def test_pattern_that_matches_nothing_warns_by_key(setting):
    pattern = {setting: {"first": 4, "frist": 4, "ond": 4}}
    config = POETConfig(target_modules=["first", "second"], block_size=5, base_init="normalized", **pattern)
    with pytest.warns(UserWarning, match=rf"{setting}.*\['frist', 'ond'\]") as caught:
        get_peft_model(TwoLayers(), config)
    assert len(user_warnings(caught)) == 1


def test_clipping_follows_the_block_size_pattern():
    config = POETConfig(target_modules=["first", "second"], block_size=16, block_size_pattern={"first": 4})
    with pytest.warns(UserWarning, match="'second' output side") as caught:
        get_peft_model(TwoLayers(), config)
    assert "'first'" not in user_warnings(caught)[0]


# Targets


def test_all_linear_leaves_out_the_head():
    names = rotated_names(wrap(llama(), POETConfig.for_pretraining(block_size=16)))
    assert len(names) == 14
    assert all(name.startswith("model.layers.") for name in names)


def test_first_layer_can_be_chosen():
    config = POETConfig(target_modules=["q_proj", "up_proj"], layers_to_transform=0, block_size=16)
    assert rotated_names(wrap(llama(), config)) == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]


def test_layers_are_chosen_by_their_pattern():
    model = nn.ModuleDict({name: nn.ModuleList([TwoLayers(), TwoLayers()]) for name in ("blocks", "others")})
    config = POETConfig(target_modules=["first"], layers_to_transform=[1], layers_pattern="blocks", block_size=4)
    assert rotated_names(wrap(model, config)) == ["blocks.1.first"]


def test_excluded_modules_are_left_out():
    config = POETConfig(target_modules=["first", "second"], exclude_modules=["second"], block_size=4)
    assert rotated_names(wrap(TwoLayers(), config)) == ["first"]


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="third"):
        get_peft_model(TwoLayers(), POETConfig(target_modules=["third"]))


# Layers that cannot be rotated


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.embedding = nn.EmbeddingBag(8, 8)
        self.convolution = nn.ConvTranspose2d(4, 4, 1)
        self.attention = nn.MultiheadAttention(8, 2)


class Shared(nn.Module):
    """Two linear layers of one weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight


def assert_untouched(model, fresh):
    """The model is as if `get_peft_model` had never been called on it."""
    assert [(name, type(m)) for name, m in model.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in fresh.parameters()]
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("embedding", "EmbeddingBag"),
        ("convolution", "ConvTranspose2d"),
        ("attention.out_proj", "NonDynamicallyQuantizableLinear"),
    ],
)
def test_unsupported_layer_is_refused_by_name_and_type(target, kind):
    base = Zoo()
    with pytest.raises(TypeError, match=f"'{target}' of type {kind}"):
        get_peft_model(base, POETConfig(target_modules=["linear", target], block_size=4))
    assert_untouched(base, Zoo())


def test_refused_model_can_be_wrapped_afterwards():
    base = Zoo()
    with pytest.raises(TypeError):
        get_peft_model(base, POETConfig(target_modules=["linear", "embedding"], block_size=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base, POETConfig(target_modules=["linear"], block_size=4))
    assert rotated_names(model) == ["linear"]


def test_refused_second_adapter_leaves_the_first_alone():
    model = wrap(Zoo(), POETConfig(target_modules=["linear"], block_size=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TypeError, match="embedding"):
        model.add_adapter("second", POETConfig(target_modules=["linear", "embedding"], block_size=4))
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("target", ["one", "two"])
def test_shared_weight_is_refused_by_both_names(target):
    base = Shared()
    with pytest.raises(ValueError, match=r"shared.*'one\.weight'.*'two\.weight'"):
        get_peft_model(base, POETConfig(target_modules=[target], block_size=4))
    assert_untouched(base, Shared())


def test_tied_head_is_refused_by_both_names():
    base = llama(tied=True)
    with pytest.raises(ValueError, match=r"'lm_head'.*shared.*'model\.embed_tokens\.weight'.*'lm_head\.weight'"):
        get_peft_model(base, POETConfig(target_modules=["q_proj", "lm_head"], block_size=16))
    assert_untouched(base, llama(tied=True))


def test_model_with_a_tied_head_can_be_rotated_elsewhere():
    assert len(rotated_names(wrap(llama(tied=True), POETConfig(target_modules="all-linear", block_size=16)))) == 14


@pytest.mark.parametrize("shape", [(1, 12), (12, 1)], ids=["one-output", "one-input"])
@pytest.mark.parametrize("variant", ["block_stochastic", FULLY])
def test_side_of_one_feature_has_no_rotation(shape, variant):
    model = wrap(
        OneLayer(base_layer(Case("thin", *shape))), POETConfig(target_modules=["layer"], block_size=4, variant=variant)
    )
    layer = model.base_model.model.layer
    assert [rotation.side for rotation in layer.rotations("default")] == ["P" if shape[0] == 1 else "R"]


def test_layer_of_one_input_and_one_output_is_left_as_it_is_with_a_warning():
    base = nn.ModuleDict({"scale": nn.Linear(1, 1), "linear": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match="'scale' has one input and one output feature") as caught:
        model = get_peft_model(base, POETConfig(target_modules=["scale", "linear"], block_size=4))
    assert len(user_warnings(caught)) == 1
    assert rotated_names(model) == ["linear"]
    assert type(model.base_model.model["scale"]) is nn.Linear


# Weights drawn anew


@parametrize("copied", {"as-made": lambda config: config, **COPIES})
def test_base_init_on_a_model_that_came_from_somewhere_warns(copied):
    base = llama()
    base.name_or_path = "someone/pretrained"
    config = copied(POETConfig(target_modules=["q_proj"], block_size=8, base_init="normalized"))
    with pytest.warns(UserWarning, match="base_init='normalized' throws away.*'someone/pretrained'"):
        get_peft_model(base, config)


def test_loading_an_adapter_with_base_init_is_silent(tmp_path):
    base = llama()
    get_peft_model(base, POETConfig(target_modules=["q_proj"], block_size=8, base_init="normalized")).save_pretrained(
        tmp_path
    )
    base = llama()
    base.name_or_path = "someone/pretrained"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize(
    ("base_init", "name"), [("normalized", ""), (None, "someone/pretrained")], ids=["from-scratch", "not-drawn"]
)
def test_base_init_is_silent_otherwise(base_init, name):
    base = llama()
    base.name_or_path = name
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(base, POETConfig(target_modules=["q_proj"], block_size=16, base_init=base_init))


def test_base_init_is_refused_for_a_second_adapter():
    model = wrap(TwoLayers(), POETConfig(target_modules=["first"], block_size=4))
    with pytest.raises(ValueError, match="base_init='normalized'"):
        model.add_adapter("second", POETConfig(target_modules=["second"], block_size=4, base_init="normalized"))


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_train_rest_is_refused_beside_another_adapter(first):
    model = wrap(TwoLayers(), POETConfig(target_modules=["first"], block_size=4, train_rest=first))
    with pytest.raises(ValueError, match="train_rest=True"):
        model.add_adapter("second", POETConfig(target_modules=["second"], block_size=4, train_rest=not first))
