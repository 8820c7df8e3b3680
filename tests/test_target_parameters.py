"""Which parameters are rotated by name, what "all-linear" adds to them, and what it leaves out or refuses."""

import json
import re
import warnings

import pytest
import torch
from cases import relative_error
from mixtures import EXPERTS, config, moe
from models import logits, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from test_attention import Attending
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from poet_peft import POETConfig
from poet_peft.cli import inspection, merging
from poet_peft.experts import ParamWrapper
from poet_peft.layer import poet_layers


# One family of each layout: (num_experts, out, in), (num_experts, in, out) with biases, the same without a word of its
# class, and modules of one stack each.
LAYOUTS = {
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS,
    "llama4": EXPERTS,
    "jetmoe": ["input_linear.weight", "output_linear.weight"],
}
# Those that are not rotated: matrices outside linear layers, and a linear layer that returns more than one tensor.
ROUTERS = {
    "mixtral": "model.layers.*.mlp.gate.weight",
    "gpt_oss": "model.layers.*.mlp.router.weight",
    "llama4": "model.layers.*.feed_forward.router",
}
for_every_layout = pytest.mark.parametrize("name", LAYOUTS)


def all_linear(base, **overrides):
    """The model, and what making it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = get_peft_model(base, POETConfig(**{"target_modules": "all-linear", "block_size": 4, **overrides}))
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return model, [text for text in texts if not text.startswith("The block size is larger than the side")]


def rotated_stacks(model):
    return {layer.module_name for _, layer in poet_layers(model) if isinstance(layer, ParamWrapper)}


def stacks_of(name):
    return {n for n, p in moe(name).named_parameters() if p.dim() == 3}


# What "all-linear" reaches


@for_every_layout
def test_all_linear_rotates_all_stacks_and_writes_their_names_into_the_configuration(name):
    model, _ = all_linear(moe(name))
    assert rotated_stacks(model) == stacks_of(name)
    assert sorted(model.peft_config["default"].target_parameters) == sorted(LAYOUTS[name])


@for_every_layout
def test_every_rotation_of_all_linear_trains(name):
    model, _ = all_linear(moe(name), init_weights=False)
    input_ids = tokens(batch=4, length=24)
    model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in trainable.items() if p.grad is None or not p.grad.any()} == set()


@for_every_layout
def test_saved_adapter_of_all_linear_is_loaded_inspected_and_merged(name, tmp_path):
    moe(name).save_pretrained(tmp_path / "base")
    base = type(moe(name)).from_pretrained(tmp_path / "base").eval()
    model, _ = all_linear(base, init_weights=False)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(saved["target_parameters"]) == sorted(LAYOUTS[name])

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="The block size is larger than the side")
        loaded = PeftModel.from_pretrained(moe(name), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    about = inspection.inspect(tmp_path / "adapter")
    assert (about["problem"], about["num_layers"]) == (None, len(list(poet_layers(model))))
    assert merging.merge(tmp_path / "adapter", tmp_path / "merged")["relative_error"] < 1e-5
    merged = type(moe(name)).from_pretrained(tmp_path / "merged").eval()
    assert relative_error(logits(merged), expected) < 1e-5


def test_second_adapter_of_all_linear_has_the_same_stacks():
    model, _ = all_linear(moe("mixtral"))
    model.add_adapter("second", POETConfig(target_modules="all-linear", block_size=4, init_weights=False))
    stacks = [layer for _, layer in poet_layers(model) if isinstance(layer, ParamWrapper)]
    assert [list(layer.poet_config) for layer in stacks] == [["default", "second"]] * len(stacks_of("mixtral"))


class ExpertsOfOneWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 8, 8))


def test_name_that_linear_layers_share_is_written_out_until_they_do_not():
    base = nn.ModuleDict(
        {"a": nn.ModuleDict({"fc": ExpertsOfOneWeight()}), "b": nn.ModuleDict({"fc": nn.Linear(8, 8)})}
    )
    model, _ = all_linear(base)
    assert model.peft_config["default"].target_parameters == ["a.fc.weight"]


# What "all-linear" leaves out


@pytest.mark.parametrize("word", ["all-linear", "All-Linear"])
@pytest.mark.parametrize("name", ROUTERS)
def test_router_that_is_left_out_is_named_with_the_way_out(name, word):
    _, (message,) = all_linear(moe(name), target_modules=word)
    assert message.startswith(f"target_modules={word!r} leaves out {ROUTERS[name]}")
    assert message.endswith(
        "of type Llama4Router, which returns something else than `W x + bias`."
        if name == "llama4"
        else "name it in target_parameters."
    )


def test_router_that_returns_more_than_a_linear_layer_is_refused_by_name():
    with pytest.raises(TypeError, match="'model.layers.0.feed_forward.router' of type Llama4Router.*exclude_modules"):
        all_linear(moe("llama4"), target_modules=["router"])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ROUTERS])
def test_nothing_is_said_where_nothing_is_left_out(name):
    assert all_linear(moe(name))[1] == []


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"memory_efficient": True}, "memory_efficient=True .*gradient checkpointing of the model.$"),
        ({"memory_efficient": True, "train_rest": True}, "memory_efficient=True .*It trains in full.$"),
    ],
    ids=str,
)
def test_experts_that_no_configuration_of_this_kind_rotates_are_named_with_the_way_out(overrides, match):
    model, (message,) = all_linear(moe("mixtral"), **overrides)
    assert re.search(match, message)
    assert all(f"model.layers.*.mlp.experts.{name}" in message for name in ("gate_up_proj", "down_proj"))
    assert rotated_stacks(model) == set()


@pytest.mark.parametrize("obstacle", ["packed", "prime"])
def test_stack_that_cannot_be_rotated_is_named_with_the_way_out_and_the_others_are_rotated(obstacle):
    base = moe("mixtral", intermediate_size=7) if obstacle == "prime" else moe("mixtral")
    if obstacle == "packed":
        for layer in base.model.layers:
            packed = layer.mlp.experts.down_proj.to(torch.uint8)
            layer.mlp.experts.down_proj = nn.Parameter(packed, requires_grad=False)
    model, messages = all_linear(base)
    assert model.peft_config["default"].target_parameters == ["experts.gate_up_proj"]
    assert rotated_stacks(model) == {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)}
    (message,) = [message for message in messages if "gate.weight" not in message]
    assert message.startswith("target_modules='all-linear' leaves out model.layers.*.mlp.experts.down_proj: ")
    assert re.search(
        {"packed": "dtype is torch.uint8.*dequantized", "prime": "7.*block_size_pattern"}[obstacle], message
    )


def test_experts_that_are_excluded_or_trained_in_full_are_left_alone():
    for overrides in ({"exclude_modules": ["experts", "gate"]}, {"modules_to_save": ["mlp"]}):
        model, messages = all_linear(moe("mixtral"), **overrides)
        assert (rotated_stacks(model), messages) == (set(), [])


def test_target_parameters_of_the_user_stay_as_they_are():
    model, messages = all_linear(moe("mixtral"), target_parameters=[])
    assert (rotated_stacks(model), messages) == (set(), [])
    model, (message,) = all_linear(moe("mixtral"), target_parameters=["experts.down_proj"])
    assert model.peft_config["default"].target_parameters == ["experts.down_proj"]
    assert "does not reach expert weights" in message
    assert "experts.gate_up_proj" in message and "gate.weight" in message and "down_proj" not in message


def test_default_targets_name_the_experts_that_they_do_not_reach():
    _, (message,) = all_linear(moe("mixtral"), target_modules=None)
    assert message.startswith("target_modules=None does not reach expert weights")
    assert "model.layers.*.mlp.experts.gate_up_proj" in message


def test_biases_of_experts_are_not_taken_for_weights():
    _, (message,) = all_linear(moe("gpt_oss"), target_parameters=["experts.down_proj"])
    assert "gate_up_proj" in message and "bias" not in message


# What is named


def test_explicit_targets_that_all_match_are_silent():
    assert all_linear(moe("mixtral"), target_modules=["q_proj", "o_proj"])[1] == []


def test_size_of_blocks_by_the_name_of_a_stack_is_silent():
    model, messages = all_linear(moe("jetmoe"), block_size_pattern={"mlp.input_linear.weight": 2})
    assert messages == []
    sizes = {layer.module_name: layer.poet_P["default"].partition.block_size for _, layer in poet_layers(model)}
    assert {name for name, size in sizes.items() if size == 2} == {
        f"model.layers.{i}.mlp.input_linear.weight" for i in range(2)
    }


@pytest.mark.parametrize("expert_names", [["gate_up_proj"], ["w1", "w2", "w3"]], ids=["parameter", "before-5"])
def test_expert_names_that_match_no_module_are_named_in_a_warning(expert_names):
    """`w1` and the like were the names of Mixtral's linear layers before transformers 5."""
    _, (message,) = all_linear(moe("mixtral"), target_modules=["q_proj", *expert_names])
    assert f"match no module and were ignored: {expert_names}" in message
    assert "model.layers.*.mlp.experts.gate_up_proj" in message


@pytest.mark.parametrize("target", ["experts", "gate"])
def test_experts_and_routers_as_targets_are_refused(target):
    with pytest.raises(TypeError, match=rf"cannot rotate 'model.layers.0.mlp.{target}' of type Mixtral"):
        all_linear(moe("mixtral"), target_modules=[target])


# Refusals


class ExpertsThatReadForThemselves(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = ExpertsOfOneWeight()

    def forward(self, x):
        return x @ self.mlp.weight[0]


def test_parameter_that_another_module_computes_with_is_refused_or_left_out():
    match = "'a.mlp.weight': ExpertsThatReadForThemselves computes with it .*Take it out"
    with pytest.raises(ValueError, match=match):
        get_peft_model(nn.ModuleDict({"a": ExpertsThatReadForThemselves()}), config(target_parameters=["mlp.weight"]))
    base = nn.ModuleDict({"a": ExpertsThatReadForThemselves(), "b": nn.Linear(8, 8)})
    model, (message,) = all_linear(base)
    assert message.startswith("target_modules='all-linear' leaves out a.mlp.weight: ExpertsThatReadForThemselves")
    assert rotated_stacks(model) == set()


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.vector = nn.Parameter(torch.zeros(8))
        self.inner.stack = nn.Parameter(torch.zeros(3, 8, 8))
        self.inner.odd = nn.Parameter(torch.zeros(3, 7, 8))
        self.inner.packed = nn.Parameter(torch.zeros(3, 8, 8, dtype=torch.uint8), requires_grad=False)
        self.linear = nn.Linear(8, 8)
        self.other = nn.Module()
        self.other.tied = self.inner.twin = nn.Parameter(torch.zeros(3, 8, 8))


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("inner.vector", r"'inner.vector': its shape is \(8,\).*Take it out"),
        ("inner.odd", "'inner.odd': no block of 2 to 4 features divides a group of 7, but 7 does.*block_size_pattern"),
        ("inner.packed", "'inner.packed': its dtype is torch.uint8.*dequantized"),
        ("linear.weight", "'linear.weight': it is the weight of a layer .*target_modules"),
        ("inner.twin", "'inner.twin': it is shared by .*'other.tied'.*Take it out"),
        ("inner.missing", "match no parameter: .'inner.missing'"),
    ],
)
def test_parameter_is_refused_by_name_with_a_way_out(target, match):
    with pytest.raises(ValueError, match=match):
        get_peft_model(Bare(), config(target_parameters=[target]))


@pytest.mark.parametrize("targets", [["experts.down_proj"], ["experts.gate_up_proj", "experts.down_proj"]], ids=len)
def test_other_parameters_than_those_of_another_adapter_are_refused(targets):
    """Wrappers are nested, and a file has the keys of the nesting that it was saved from."""
    model = get_peft_model(moe("mixtral"), config(target_parameters=["experts.gate_up_proj"]))
    match = "'default' rotates model.layers.0.mlp.experts.gate_up_proj, and target_parameters names .*down_proj.*same"
    with pytest.raises(ValueError, match=match):
        model.add_adapter("second", config(target_parameters=targets))


def test_memory_efficient_experts_are_refused():
    with pytest.raises(ValueError, match="'inner.stack': memory_efficient=True .*gradient checkpointing"):
        get_peft_model(Bare(), config(target_parameters=["inner.stack"], memory_efficient=True))


def test_experts_with_the_adapter_of_another_method_are_refused():
    base = get_peft_model(moe("mixtral"), LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    with pytest.raises(ValueError, match="experts.down_proj': .*another method .ParamWrapper.*Merge that one first"):
        get_peft_model(base.base_model.model, config(target_parameters=["experts.down_proj"]))


def test_one_name_instead_of_a_list_is_refused():
    with pytest.raises(TypeError, match="target_parameters='experts.down_proj' must be a list"):
        POETConfig(target_parameters="experts.down_proj")


@pytest.fixture
def mesh(tmp_path):
    """Of this process alone: a weight that is split over it counts as split."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize(
    ("base", "parameter", "targets"),
    [
        (lambda: moe("mixtral"), "model.layers.0.mlp.experts.down_proj", {}),
        (Attending, "attention.in_proj_weight", {"target_modules": ["attention"], "target_parameters": None}),
        (Attending, "head.weight", {"target_modules": ["head"], "target_parameters": None}),
    ],
    ids=["experts", "attention", "linear"],
)
def test_weight_that_is_split_by_tensor_parallelism_is_refused_by_name(base, parameter, targets, mesh):
    model = base()
    owner, _, name = parameter.rpartition(".")
    weight = distribute_tensor(model.get_parameter(parameter).detach(), mesh, [Shard(0)])
    setattr(model.get_submodule(owner), name, nn.Parameter(weight))
    named = parameter if "experts" in parameter else owner
    with pytest.raises(ValueError, match=f"'{named}'.* split by tensor parallelism .*fsdp_size"):
        get_peft_model(model, config(**targets))
