"""What an adapter file holds; every loader gives back the model that was saved, and a bad file changes nothing."""

import functools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from models import (
    ADAPTERS,
    KINDS,
    PERIODIC,
    REGIMES,
    assert_same_state,
    bert_classifier,
    llama,
    llama_classifier,
    logits,
    poet_config,
    state,
    train,
    wrap,
)
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from poet_peft import POETCheckpointError, POETConfig, merge_and_reinitialize


PREFIX = "base_model.model."
LAYERS = [
    f"model.layers.{i}.{block}_proj"
    for i in range(2)
    for block in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]
ROTATION_KEYS = {
    f"{PREFIX}{layer}.{tensor}"
    for layer in LAYERS
    for tensor in ("poet_R.weight", "poet_R.index", "poet_P.weight", "poet_P.index", "poet_state")
}
BASE_KEYS = {f"{PREFIX}{layer}.base_layer.weight" for layer in LAYERS}
REST_KEYS = {f"{PREFIX}{name}" for name in llama().state_dict() if name.removesuffix(".weight") not in LAYERS}
LAYER = f"{PREFIX}{LAYERS[4]}"  # the one that most tests edit


def trained(regime, tied=False, adapter_name="default", **overrides):
    """A model whose every trainable tensor has moved; a periodic one has been folded and has rotated since."""
    model = wrap(llama(tied), regime, adapter_name, **overrides)
    optimizer = train(model)
    if regime in PERIODIC:
        merge_and_reinitialize(model, optimizer)
        train(model, 2, optimizer)
    return model.eval()


def tensors_of(directory):
    return load_file(directory / "adapter_model.safetensors")


class Saved(NamedTuple):
    base: Path
    adapter: Path
    logits: Tensor

    def load_base(self):
        return AutoModelForCausalLM.from_pretrained(self.base)


def save(directory, model, tied=False, adapter_name="default"):
    """Write a base model and an adapter trained on it."""
    if not (directory / "base").exists():
        llama(tied).save_pretrained(directory / "base")
    model.peft_config[adapter_name].base_model_name_or_path = str(directory / "base")
    model.save_pretrained(directory / "adapter")
    adapter = directory / "adapter" / ("" if adapter_name == "default" else adapter_name)
    return Saved(directory / "base", adapter, logits(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Trained models on disk, written once. Not to be changed: `edited` gives copies."""

    @functools.cache
    def save_trained(regime, tied=False, adapter_name="default"):
        model = trained(regime, tied, adapter_name)
        return save(tmp_path_factory.mktemp("saved"), model, tied, adapter_name)

    return save_trained


@pytest.fixture
def edited(saved, tmp_path):
    """A saved model with an edit of its tensors or of its adapter_config.json."""

    def edit(regime, edit_tensors=None, tied=False, **config):
        original = saved(regime, tied)
        copy = tmp_path / "edited"
        shutil.copytree(original.adapter, copy)
        if edit_tensors is not None:
            tensors = tensors_of(copy)
            edit_tensors(tensors)
            save_file(tensors, copy / "adapter_model.safetensors")
        path = copy / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return original._replace(adapter=copy)

    return edit


# Every loader gives back the model


def _load_with_transformers(saved):
    model = saved.load_base()
    model.load_adapter(str(saved.adapter))
    return model


def _load_by_injection(saved, low_cpu_mem_usage=False):
    config = POETConfig.from_pretrained(saved.adapter)
    model = inject_adapter_in_model(config, saved.load_base(), low_cpu_mem_usage=low_cpu_mem_usage)
    set_peft_model_state_dict(model, load_peft_weights(saved.adapter), low_cpu_mem_usage=low_cpu_mem_usage)
    return model.eval()


def _load_over_a_live_adapter(saved):
    torch.manual_seed(5)
    model = get_peft_model(saved.load_base(), POETConfig.from_pretrained(saved.adapter))
    model.load_adapter(saved.adapter, "default")
    return model


LOADERS = {
    "PeftModel": lambda saved: PeftModel.from_pretrained(saved.load_base(), saved.adapter),
    "PeftModel_low_memory": lambda saved: PeftModel.from_pretrained(
        saved.load_base(), saved.adapter, low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda saved: AutoPeftModelForCausalLM.from_pretrained(saved.adapter),
    "AutoModel": lambda saved: AutoModelForCausalLM.from_pretrained(saved.adapter),
    "transformers_load_adapter": _load_with_transformers,
    "inject": _load_by_injection,
    "inject_low_memory": functools.partial(_load_by_injection, low_cpu_mem_usage=True),
    "over_a_live_adapter": _load_over_a_live_adapter,
}
each_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
each_kind = pytest.mark.parametrize("regime", KINDS)
each_tie = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


# Tying matters to the regimes in so far as embeddings are in the file.
each_regime_and_some_tied = pytest.mark.parametrize(
    ("regime", "tied"), [*((regime, False) for regime in REGIMES), ("block_stochastic", True), ("pretraining", True)]
)
each_kind_and_some_tied = pytest.mark.parametrize(
    ("regime", "tied"), [*((regime, False) for regime in KINDS), ("pretraining", True)]
)


@each_regime_and_some_tied
def test_saved_models_differ_from_their_base_models(saved, regime, tied):
    """Without this, a loader that loads nothing would pass the tests below."""
    case = saved(regime, tied)
    assert not torch.allclose(case.logits, logits(case.load_base()), rtol=1e-2, atol=1e-2)


@each_kind_and_some_tied
@each_loader
def test_loaded_model_gives_bit_equal_logits(saved, load, tied, regime):
    case = saved(regime, tied)
    assert torch.equal(logits(load(case)), case.logits)


@pytest.mark.parametrize("regime", ["fully_stochastic", "exact_cayley"])
@pytest.mark.parametrize("loader", ["PeftModel", "AutoModel"])
def test_loaded_model_of_every_variant_and_map_gives_bit_equal_logits(saved, loader, regime):
    case = saved(regime)
    assert torch.equal(logits(LOADERS[loader](case)), case.logits)


@pytest.mark.parametrize("regime", ["block_stochastic", "pretraining"])
@each_loader
def test_tied_model_stays_tied_after_loading(saved, load, regime, request):
    by_transformers = {"AutoModel", "transformers_load_adapter"} & set(request.node.callspec.id.split("-"))
    if by_transformers and regime == "pretraining":
        reason = "transformers' loader makes a new parameter for each name in the file, and calls no hook of a tuner"
        request.applymarker(pytest.mark.xfail(reason=reason))
    model = load(saved(regime, tied=True))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@each_kind
@pytest.mark.parametrize("load", ["PeftModel_low_memory", "inject_low_memory"])
def test_loaded_model_has_nothing_left_on_the_meta_device(saved, load, regime):
    model = LOADERS[load](saved(regime))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


# Names that are also our prefix, or a part of the keys that the file holds.
NAMES = ["poet", "weight", "index", "model", "poet_R"]
each_memory = pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_memory"])


@pytest.mark.parametrize(("name", "low_cpu_mem_usage"), [*((name, False) for name in NAMES), ("poet_R", True)])
def test_adapter_loads_under_any_name(saved, name, low_cpu_mem_usage):
    case = saved("pretraining")
    model = PeftModel.from_pretrained(
        case.load_base(), case.adapter, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(model), case.logits)


@pytest.mark.parametrize("name", NAMES)
def test_file_does_not_depend_on_the_name_it_was_trained_under(saved, name):
    actual, expected = (tensors_of(saved("pretraining", adapter_name=n).adapter) for n in (name, "default"))
    assert_same_state(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_under_any_name(saved, name):
    case = saved("block_stochastic")
    model = case.load_base()
    model.load_adapter(str(case.adapter), adapter_name=name)
    assert torch.equal(logits(model), case.logits)


PAIRS = [("a", "ab"), ("ab", "a"), ("default", "poet"), ("default", "model"), ("default", "weight"), ("a", "index")]


def two_adapters(first, second):
    model = wrap(llama(), "block_stochastic", first, rotation_seed=1)
    model.add_adapter(second, poet_config("fully_stochastic"))
    return model


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_each_of_two_adapters_saves_and_loads_by_itself(tmp_path, names, which):
    model = two_adapters(*names)
    model.set_adapter(names[which])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    adapter = tmp_path / ("" if names[which] == "default" else names[which])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), adapter)), expected)


def test_only_selected_adapters_are_saved(tmp_path):
    model = two_adapters("a", "ab")
    model.save_pretrained(tmp_path, selected_adapters=["ab"])
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"ab"}


def test_selected_adapter_is_saved_whole(tmp_path):
    two_adapters("a", "ab").save_pretrained(tmp_path, selected_adapters=["a"])
    assert tensors_of(tmp_path / "a").keys() == ROTATION_KEYS


@pytest.mark.parametrize("names", PAIRS[:3], ids="+".join)
@each_memory
def test_second_adapter_loaded_beside_another_gives_bit_equal_logits(saved, names, low_cpu_mem_usage):
    first, second = saved("block_stochastic"), saved("fully_stochastic")
    model = PeftModel.from_pretrained(first.load_base(), first.adapter, adapter_name=names[0])
    model.load_adapter(second.adapter, names[1], low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter(names[1])
    assert torch.equal(logits(model), second.logits)


@pytest.mark.parametrize("names", PAIRS[:3], ids="+".join)
def test_loading_a_second_adapter_leaves_the_first_as_it_is(saved, names):
    first, second = saved("block_stochastic"), saved("fully_stochastic")
    model = PeftModel.from_pretrained(first.load_base(), first.adapter, adapter_name=names[0])
    model.load_adapter(second.adapter, names[1])
    assert torch.equal(logits(model), first.logits)


@each_kind
def test_file_saved_by_transformers_loads_again(saved, tmp_path, regime):
    case = saved(regime)
    _load_with_transformers(case).save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(case.load_base(), tmp_path)), case.logits)


def test_torch_format_loads_again(saved, tmp_path):
    case = saved("periodic")
    PeftModel.from_pretrained(case.load_base(), case.adapter).save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(logits(PeftModel.from_pretrained(case.load_base(), tmp_path)), case.logits)


@pytest.mark.parametrize("regime", ["block_stochastic", "periodic"])
@each_memory
def test_bfloat16_model_loads_bit_equal(tmp_path, regime, low_cpu_mem_usage):
    model = wrap(llama().bfloat16(), regime)
    optimizer = train(model)
    if regime == "periodic":
        merge_and_reinitialize(model, optimizer)
        train(model, 2, optimizer)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))


@each_memory
def test_resized_embeddings_load_bit_equal(tmp_path, low_cpu_mem_usage):
    base, other = llama(), llama()
    for model in (base, other):
        model.resize_token_embeddings(132, mean_resizing=False)
    model = wrap(base)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("regime", ["block_stochastic", "periodic"])
@each_memory
def test_modules_to_save_load_bit_equal(tmp_path, regime, low_cpu_mem_usage):
    model = wrap(llama_classifier(), regime, modules_to_save=["score"])
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama_classifier(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("bias", ["all", "poet_only"])
@pytest.mark.parametrize("regime", ["block_stochastic", "periodic"])
def test_trained_biases_load_bit_equal(tmp_path, regime, bias):
    model = wrap(llama(attention_bias=True), regime, bias=bias)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(attention_bias=True), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


# What a file holds


@pytest.mark.parametrize(("regime", "tied"), [*((regime, False) for regime in ADAPTERS), ("block_stochastic", True)])
def test_adapter_file_holds_rotations_and_nothing_else(saved, tied, regime):
    assert tensors_of(saved(regime, tied).adapter).keys() == ROTATION_KEYS


@pytest.mark.parametrize("regime", ADAPTERS)
def test_adapter_file_is_small(saved, regime):
    """Its floats are the trainable parameters; its integers at most one per feature, and a few per layer."""
    tensors = tensors_of(saved(regime).adapter).values()
    model = wrap(llama(), regime)
    num_features = sum(sum(model.get_submodule(PREFIX + layer).base_layer.weight.shape) for layer in LAYERS)
    assert sum(t.numel() for t in tensors if t.is_floating_point()) == model.get_nb_trainable_parameters()[0]
    assert sum(t.numel() for t in tensors if not t.is_floating_point()) <= num_features + 9 * len(LAYERS)


@pytest.mark.parametrize("folds", [0, 1, 2])
@each_tie
def test_periodic_file_always_holds_the_base_weights(tmp_path, tied, folds):
    model = wrap(llama(tied), "periodic")
    for _ in range(folds):
        merge_and_reinitialize(model, train(model, 1))
    model.save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    assert tensors.keys() == ROTATION_KEYS | BASE_KEYS
    assert_same_state({key: tensors[key] for key in BASE_KEYS}, {key: model.state_dict()[key] for key in BASE_KEYS})


RESIDUAL_KEYS = {f"{PREFIX}{layer}.poet_residual" for layer in LAYERS}


@pytest.mark.parametrize(
    ("regime", "compensated_folds", "keys"),
    [
        ("block_stochastic", True, ROTATION_KEYS),
        ("periodic", True, ROTATION_KEYS | BASE_KEYS | RESIDUAL_KEYS),
        ("periodic", False, ROTATION_KEYS | BASE_KEYS),
    ],
)
def test_bfloat16_file_holds_what_folds_cut_off(tmp_path, regime, compensated_folds, keys):
    wrap(llama().bfloat16(), regime, compensated_folds=compensated_folds).save_pretrained(tmp_path)
    assert tensors_of(tmp_path).keys() == keys


@each_tie
def test_file_of_drawn_base_weights_holds_them_without_folds(tmp_path, tied):
    model = wrap(llama(tied), "block_stochastic", base_init="normalized")
    model.save_pretrained(tmp_path)
    assert tensors_of(tmp_path).keys() == ROTATION_KEYS | BASE_KEYS


@pytest.mark.parametrize("regime", ["pretraining", "block_stochastic"])
@each_tie
def test_file_with_train_rest_holds_everything_that_trains(tmp_path, tied, regime):
    model = wrap(llama(tied), regime, train_rest=True)
    train(model)
    model.save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    base_keys = BASE_KEYS if regime == "pretraining" else set()
    assert tensors.keys() == ROTATION_KEYS | base_keys | REST_KEYS
    assert_same_state({key: tensors[key] for key in REST_KEYS}, {key: model.state_dict()[key] for key in REST_KEYS})


@each_kind
def test_file_does_not_depend_on_an_active_merge(saved, tmp_path, regime):
    """Saved while merged, the rotations would be applied twice."""
    model = trained(regime)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert_same_state(tensors_of(tmp_path), tensors_of(saved(regime).adapter))


# Going back, and going on


@pytest.mark.parametrize("regime", PERIODIC)
def test_checkpoint_from_before_a_fold_restores_a_folded_model_exactly(tmp_path, regime):
    """What Trainer's load_best_model_at_end does."""
    model = wrap(llama(), regime)
    optimizer = train(model, 2)
    model.save_pretrained(tmp_path)
    before = state(model)
    merge_and_reinitialize(model, optimizer)
    train(model, 2, optimizer)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same_state(model.state_dict(), before)


def _finish(model):
    """Two more folds, by an optimizer without state."""
    for seed in range(2):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        train(model, 1 + seed, optimizer)
        merge_and_reinitialize(model, optimizer)
    return model


def _resume_in_a_model_of_another_seed(case, regime):
    """Everything that the file should bring is different before: permutations, and in pretraining all weights."""
    base = llama(seed=9) if regime == "pretraining" else case.load_base()
    model = get_peft_model(base, poet_config(regime, seed=7))
    model.load_adapter(case.adapter, "default", is_trainable=True)
    return model


def _resume_from_pretrained(case, regime):
    return PeftModel.from_pretrained(case.load_base(), case.adapter, is_trainable=True)


@pytest.mark.parametrize("regime", PERIODIC)
@pytest.mark.parametrize("resume", [_resume_from_pretrained, _resume_in_a_model_of_another_seed])
@pytest.mark.filterwarnings("ignore:base_init:UserWarning")
def test_resumed_model_folds_to_the_same_weights(saved, resume, regime):
    uninterrupted = _finish(trained(regime))
    resumed = _finish(resume(saved(regime), regime))
    assert_same_state(resumed.state_dict(), uninterrupted.state_dict())


@pytest.mark.parametrize("compensated_folds", [False, True])
def test_resumed_bfloat16_model_folds_to_the_same_weights(tmp_path, compensated_folds):
    model = wrap(llama().bfloat16(), "periodic", compensated_folds=compensated_folds)
    merge_and_reinitialize(model, train(model, 2))
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(llama().bfloat16(), tmp_path, is_trainable=True)
    assert_same_state(_finish(resumed).state_dict(), _finish(model).state_dict())


@pytest.mark.parametrize("regime", PERIODIC)
def test_loading_a_checkpoint_to_train_on_warns_of_nothing(saved, recwarn, regime):
    case = saved(regime)
    PeftModel.from_pretrained(case.load_base(), case.adapter, is_trainable=True)
    assert [str(w.message) for w in recwarn if w.category is UserWarning] == []


# Bad files


def _delete(key):
    return lambda tensors: tensors.pop(key)


def _add(key, shape):
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


def _cut(key):
    return lambda tensors: tensors.update({key: tensors[key][:-1].clone()})


def _cast(key, dtype):
    return lambda tensors: tensors.update({key: tensors[key].to(dtype)})


def _set(key, position, value):
    def edit(tensors):
        tensors[key][position] = value(tensors[key])

    return edit


def _swap(key, other):
    return lambda tensors: tensors.update({key: tensors[other], other: tensors[key]})


INDEX, SCHEDULE, WEIGHT = f"{LAYER}.poet_P.index", f"{LAYER}.poet_state", f"{LAYER}.poet_P.weight"
BASE_WEIGHT, EMBEDDING = f"{LAYER}.base_layer.weight", f"{PREFIX}model.embed_tokens.weight"
# What is wrong with the file: the regime, the edit, and what the error must name.
BAD_FILES = {
    "rotation missing": ("block_stochastic", _delete(WEIGHT), LAYERS[4]),
    "index missing": ("block_stochastic", _delete(INDEX), LAYERS[4]),
    "schedule missing": ("block_stochastic", _delete(SCHEDULE), LAYERS[4]),
    "rotation of a layer the model lacks": (
        "block_stochastic",
        _add(f"{PREFIX}model.layers.7.self_attn.q_proj.poet_R.weight", 360),
        "layers.7.self_attn.q_proj",
    ),
    "unknown tensor": ("block_stochastic", _add(f"{PREFIX}model.head.weight", 4), "model.head.weight"),
    "tensor of the base model outside the regime": (
        "block_stochastic",
        _add(f"{PREFIX}model.norm.weight", 48),
        "model.norm.weight",
    ),
    "rotation too short": ("block_stochastic", _cut(WEIGHT), LAYERS[4]),
    "index too short": ("block_stochastic", _cut(INDEX), LAYERS[4]),
    "schedule too short": ("block_stochastic", _cut(SCHEDULE), LAYERS[4]),
    "rotation of integers": ("block_stochastic", _cast(WEIGHT, torch.int32), LAYERS[4]),
    "index of floats": ("block_stochastic", _cast(INDEX, torch.float32), LAYERS[4]),
    "base weight of integers": ("periodic", _cast(BASE_WEIGHT, torch.int32), LAYERS[4]),
    "index edited": ("block_stochastic", _set(INDEX, 0, lambda index: index[1]), LAYERS[4]),
    "index reordered": ("block_stochastic", _set(INDEX, slice(None), lambda index: index.flip(0)), LAYERS[4]),
    "index of another layer": ("block_stochastic", _swap(INDEX, INDEX.replace("gate", "up")), LAYERS[4]),
    "seed edited": ("block_stochastic", _set(SCHEDULE, 0, lambda schedule: 5), LAYERS[4]),
    "epoch edited": ("periodic", _set(SCHEDULE, 1, lambda schedule: 0), LAYERS[4]),
    "epoch beyond the folds": ("periodic", _set(SCHEDULE, 2, lambda schedule: 0), LAYERS[4]),
    "base weight missing": ("periodic", _delete(BASE_WEIGHT), LAYERS[4]),
    "all base weights missing": ("periodic", lambda tensors: [tensors.pop(key) for key in BASE_KEYS], "base_layer"),
    "base weight cut": ("periodic", _cut(BASE_WEIGHT), LAYERS[4]),
    "base weight in an adapter": ("block_stochastic", _add(BASE_WEIGHT, (80, 48)), LAYERS[4]),
    "trained embedding missing": ("pretraining", _delete(EMBEDDING), "embed_tokens"),
    "trained embedding cut": ("pretraining", _cut(EMBEDDING), "embed_tokens"),
    "trained norm missing": ("pretraining", _delete(f"{PREFIX}model.norm.weight"), "model.norm"),
}
each_bad_file = pytest.mark.parametrize(("regime", "edit", "named"), BAD_FILES.values(), ids=BAD_FILES)


@each_bad_file
def test_bad_file_is_refused_and_changes_nothing(edited, regime, edit, named):
    case = edited(regime, edit)
    model = wrap(llama(), regime, rotation_seed=3)
    before = state(model)
    with pytest.raises(POETCheckpointError, match=named):
        model.load_adapter(case.adapter, "default")
    assert_same_state(model.state_dict(), before)


# One for each thing that is checked, against tensors of the meta device where the adapter's own are meant.
CHECKED_WITH_LITTLE_MEMORY = [
    "rotation missing",
    "unknown tensor",
    "rotation too short",
    "index of floats",
    "index edited",
    "epoch beyond the folds",
    "base weight missing",
    "base weight cut",
    "base weight in an adapter",
    "trained embedding missing",
]


@pytest.mark.parametrize("bad", CHECKED_WITH_LITTLE_MEMORY)
def test_bad_file_is_refused_by_low_memory_loading(edited, bad):
    regime, edit, named = BAD_FILES[bad]
    case = edited(regime, edit)
    with pytest.raises(POETCheckpointError, match=named):
        PeftModel.from_pretrained(case.load_base(), case.adapter, low_cpu_mem_usage=True)


@each_memory
def test_bad_file_leaves_the_base_weights_of_a_new_model_alone(edited, low_cpu_mem_usage):
    case = edited("periodic", _delete(WEIGHT))
    model = case.load_base()
    before = state(model)
    with pytest.raises(POETCheckpointError):
        PeftModel.from_pretrained(model, case.adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    after = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if ".poet_" not in name}
    assert_same_state(after, before)


def test_bad_state_dict_is_refused_by_an_injected_model(edited):
    case = edited("block_stochastic", _cut(WEIGHT))
    model = inject_adapter_in_model(poet_config(), case.load_base())
    before = state(model)
    with pytest.raises(POETCheckpointError, match=LAYERS[4]):
        set_peft_model_state_dict(model, load_peft_weights(case.adapter))
    assert_same_state(model.state_dict(), before)


# Nothing reads the index of one block of all features. Before the release of 0.1.0 it was drawn, and read.
_reorder = _set(INDEX, slice(None), lambda index: index.flip(0))
IN_ANOTHER_ORDER = "own order.*the version that wrote it"


def test_file_of_one_block_in_another_order_is_refused(tmp_path):
    wrap(llama(), block_size=80).save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    _reorder(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(POETCheckpointError, match=IN_ANOTHER_ORDER):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_state_dict_of_one_block_in_another_order_is_refused():
    model = wrap(llama(), block_size=80)
    tensors = model.state_dict()
    index = INDEX.replace(".index", ".default.index")
    with pytest.raises(RuntimeError, match=IN_ANOTHER_ORDER):
        model.load_state_dict({**tensors, index: tensors[index].flip(0)})


def test_different_values_for_a_tied_weight_are_refused(edited):
    """As in the file of a model that was not tied: either value would be wrong."""

    def untie(tensors):
        tensors[f"{PREFIX}lm_head.weight"] = tensors[EMBEDDING] + 1

    case = edited("pretraining", untie, tied=True)
    with pytest.raises(POETCheckpointError, match="lm_head"):
        PeftModel.from_pretrained(case.load_base(), case.adapter)


@pytest.mark.parametrize(
    ("regime", "config", "named"),
    [
        (
            "block_stochastic",
            {"block_size": 8},
            r"block size of the output side, 16 in the file and 8 in the model \(.*layers\.0",
        ),
        (
            "block_stochastic",
            {"block_size": 32},
            r"block size of the output side, 16 in the file and 32 in the model \(.*layers\.0",
        ),
        ("block_stochastic", {"variant": "fully_stochastic"}, r"layers\.0\..*poet_P.*index"),
        ("block_stochastic", {"num_neumann_terms": 5}, "num_neumann_terms.*3 in the file and 5 in the model"),
        ("block_stochastic", {"adaptive_terms": False}, "adaptive_terms, 1 in the file and 0 in the model"),
        ("exact_cayley", {"orthogonal_map": "cayley_neumann"}, "orthogonal_map.*0 in the file and 3 in the model"),
        ("block_stochastic", {"target_modules": ["q_proj"]}, r"layers\.0\.mlp\.down_proj"),
        ("block_stochastic", {"merge_interval": 4}, r"layers\.0\.mlp\.down_proj\.base_layer"),
        ("block_stochastic", {"train_rest": True}, "lm_head"),
        ("periodic", {"merge_interval": 0}, r"layers\.0\.mlp\.down_proj\.base_layer"),
        ("pretraining", {"train_rest": False}, "input_layernorm"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_config_that_contradicts_the_file_is_refused(edited, regime, config, named):
    case = edited(regime, **config)
    with pytest.raises(POETCheckpointError, match=named):
        PeftModel.from_pretrained(case.load_base(), case.adapter)


@each_kind
def test_loading_over_a_merged_adapter_is_refused_and_changes_nothing(saved, regime):
    model = wrap(llama(), regime, rotation_seed=3)
    model.merge_adapter()
    before = state(model)
    with pytest.raises(POETCheckpointError, match="unmerge_adapter"):
        model.load_adapter(saved(regime).adapter, "default")
    assert_same_state(model.state_dict(), before)


@each_memory
def test_folded_checkpoint_is_refused_beside_another_adapter(saved, low_cpu_mem_usage):
    first, folded = saved("block_stochastic"), saved("periodic")
    model = PeftModel.from_pretrained(first.load_base(), first.adapter, adapter_name="first")
    with pytest.raises(POETCheckpointError, match="first"):
        model.load_adapter(folded.adapter, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), first.logits)


@each_memory
def test_periodic_checkpoint_with_the_same_base_weights_loads_beside_another_adapter(
    saved, tmp_path, low_cpu_mem_usage
):
    first = saved("block_stochastic")
    unfolded = wrap(llama(), "periodic")
    unfolded.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(first.load_base(), first.adapter, adapter_name="first")
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(unfolded))


def test_checkpoint_with_train_rest_is_refused_beside_another_adapter(saved):
    first, pretrained = saved("block_stochastic"), saved("pretraining")
    model = PeftModel.from_pretrained(first.load_base(), first.adapter, adapter_name="first")
    with pytest.raises(ValueError, match="train_rest"):
        model.load_adapter(pretrained.adapter, "second")
    assert torch.equal(logits(model), first.logits)


def test_state_dict_taken_from_a_live_model_loads_into_another(saved):
    case = saved("periodic")
    source = PeftModel.from_pretrained(case.load_base(), case.adapter)
    target = wrap(case.load_base(), "periodic", rotation_seed=3)
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert torch.equal(logits(target.eval()), case.logits)


def test_rotations_stay_in_fp32_when_transformers_loads_them_into_a_bfloat16_model(saved):
    base = llama().to(torch.bfloat16)
    base.load_adapter(str(saved("block_stochastic").adapter))
    rotations = {name: p for name, p in base.named_parameters() if ".poet_R." in name or ".poet_P." in name}
    expected = load_file(saved("block_stochastic").adapter / "adapter_model.safetensors")
    assert {p.dtype for p in rotations.values()} == {torch.float32}
    name = "model.layers.0.self_attn.q_proj.poet_R.default.weight"
    assert torch.equal(rotations[name], expected["base_model.model." + name.replace(".default", "")])


def test_file_with_other_biases_is_refused_by_that_setting(tmp_path):
    wrap(bert_classifier(), bias="all").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bias": "none"}))
    with pytest.raises(POETCheckpointError, match="do not belong into it with .*bias='none'"):
        PeftModel.from_pretrained(bert_classifier(), tmp_path)
