"""Weights drawn for training from scratch: what defines each scheme, and that a plain baseline gets the same ones."""

import pytest
import torch
from cases import PLAIN, OneLayer, TwoLayers, base_layer, matrix, randomize, relative_error, wrap
from mixtures import moe, num_stacks, stack
from models import gpt2, llama
from test_attention import Attending

from poet_peft import POETConfig, merge_and_reinitialize
from poet_peft.experts import ParamWrapper
from poet_peft.initialization import initialize_base_weights
from poet_peft.layer import poet_layers
from poet_peft.weights.initial import SCHEMES, draw_weight


SHAPES = {"tall": (60, 20), "wide": (20, 60), "square": (30, 30), "one-output": (1, 12), "one-input": (12, 1)}
LARGE = (80, 70)

for_every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
for_every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def draw(shape, scheme, seed=0, module_name="model.layers.0.self_attn.q_proj"):
    return draw_weight(*shape, scheme, seed=seed, module_name=module_name)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def changed_base(model, before):
    """Names in the base model whose tensors a wrapped model has changed."""
    now = {name.replace(".base_layer.", "."): tensor for name, tensor in model.base_model.model.state_dict().items()}
    return {name for name, tensor in before.items() if not torch.equal(now[name], tensor)}


# The schemes


def test_there_are_five_schemes():
    assert set(SCHEMES) == {"normalized", "xavier", "standard", "uniform_spectrum", "mup"}


@for_every_shape
def test_mup_has_its_largest_singular_value(shape):
    largest = torch.linalg.svdvals(draw(shape, "mup").double())[0]
    assert float(largest) == pytest.approx(4 * (shape[0] / shape[1]) ** 0.5, rel=2e-2)


@for_every_shape
def test_mup_rows_have_equal_norms(shape):
    norms = torch.linalg.vector_norm(draw(shape, "mup").double(), dim=1)
    assert (norms / norms[0] - 1).abs().max() < 1e-6


def test_scale_is_a_factor_of_the_drawn_weights():
    plain, scaled = llama(), llama()
    initialize_base_weights(plain, "normalized")
    initialize_base_weights(scaled, "normalized", scale=0.5)
    for name, module in plain.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert torch.equal(scaled.model.get_submodule(name).weight, 0.5 * module.weight)


def test_poet_and_plain_baseline_are_scaled_alike():
    plain, pattern = llama(), {"q_proj|k_proj": 2.0}
    initialize_base_weights(plain, "mup", scale=0.5, scale_pattern=pattern, seed=3)
    scales = {"base_init_scale": 0.5, "base_init_scale_pattern": pattern}
    model = wrap(llama(), POETConfig.for_pretraining(block_size=16, base_init="mup", seed=3, **scales))
    assert not changed_base(model, state(plain))


def test_pattern_scales_the_layers_that_it_matches():
    plain, scaled = llama(), llama()
    initialize_base_weights(plain, "normalized", scale=3.0)
    initialize_base_weights(
        scaled, "normalized", scale=3.0, scale_pattern={"q_proj": 2.0, r"layers\.1\.mlp\.up_proj": 0.5}
    )
    for name, module in plain.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            factor = 2.0 if "q_proj" in name else 0.5 if name == "layers.1.mlp.up_proj" else 1.0
            assert torch.equal(scaled.model.get_submodule(name).weight, factor * module.weight)


@for_every_shape
@for_every_scheme
def test_weight_has_the_asked_shape_in_float32_on_the_cpu(scheme, shape):
    weight = draw(shape, scheme)
    assert (weight.shape, weight.dtype, weight.device.type) == (shape, torch.float32, "cpu")


@for_every_shape
def test_normalized_rows_have_unit_norm(shape):
    assert (torch.linalg.vector_norm(draw(shape, "normalized").double(), dim=1) - 1).abs().max() < 1e-6


def test_normalized_rows_point_everywhere():
    rows = draw(LARGE, "normalized")
    # The cosine of two random rows of 70 entries has a standard deviation of 0.12.
    assert (rows @ rows.T - torch.eye(80)).abs().max() < 0.7
    assert float(rows.mean().abs()) < 0.01


@pytest.mark.parametrize(
    ("scheme", "std"), [("xavier", (2 / sum(LARGE)) ** 0.5), ("standard", 0.02)], ids=["xavier", "standard"]
)
def test_gaussian_schemes_have_their_standard_deviation(scheme, std):
    weight = draw(LARGE, scheme).double()
    assert float(weight.std()) == pytest.approx(std, rel=0.05)
    assert float(weight.mean().abs()) < 0.05 * std
    # The fourth moment of a Gaussian.
    assert float((weight / std).pow(4).mean()) == pytest.approx(3, rel=0.15)


@for_every_shape
def test_uniform_spectrum_has_all_singular_values_one(shape):
    assert (torch.linalg.svdvals(draw(shape, "uniform_spectrum").double()) - 1).abs().max() < 1e-6


def test_uniform_spectrum_has_no_preferred_direction():
    """The factor of a QR decomposition has: its first diagonal entry is never positive."""
    entries = torch.stack([draw((4, 4), "uniform_spectrum", seed)[0, 0] for seed in range(200)])
    assert float(entries.mean().abs()) < 0.15


def test_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="'zeros' is unknown"):
        draw((4, 4), "zeros")


# The draw


@for_every_scheme
def test_same_arguments_give_the_same_weight(scheme):
    first = draw((12, 8), scheme)
    torch.manual_seed(99)
    assert torch.equal(draw((12, 8), scheme), first)


@for_every_scheme
def test_other_modules_and_seeds_get_other_weights(scheme):
    weight = draw((12, 8), scheme)
    assert not torch.equal(draw((12, 8), scheme, seed=1), weight)
    assert not torch.equal(draw((12, 8), scheme, module_name="model.layers.1.self_attn.q_proj"), weight)


@for_every_scheme
def test_drawing_does_not_move_the_global_generator(scheme):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw((12, 8), scheme)
    assert torch.equal(torch.get_rng_state(), before)


# Whole models


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
@for_every_scheme
def test_plain_model_gets_the_weights_of_the_rotated_one_bit_for_bit(scheme, build):
    plain = build()
    names = initialize_base_weights(plain, scheme, seed=5)
    model = wrap(build(seed=1), POETConfig(target_modules="all-linear", block_size=16, base_init=scheme, seed=5))
    targeted = model.base_model.targeted_module_names
    assert sorted(names) == sorted(targeted) == names
    for name in names:
        rotated = model.base_model.model.get_submodule(name).get_base_layer()
        assert torch.equal(plain.get_submodule(name).weight, rotated.weight)


@for_every_scheme
def test_only_the_targeted_weights_are_drawn(scheme):
    """Not the head, embeddings and norms."""
    plain = llama()
    before = state(plain)
    names = initialize_base_weights(plain, scheme)
    assert len(names) == 14
    assert changed(plain, before) == {f"{name}.weight" for name in names}
    assert not any("lm_head" in name for name in names)


def test_base_init_draws_only_the_targeted_weights():
    base = llama()
    before = state(base)
    model = wrap(base, POETConfig(target_modules=["q_proj"], block_size=16, base_init="normalized"))
    unwrapped = {
        name.replace(".base_layer", ""): tensor for name, tensor in model.base_model.model.state_dict().items()
    }
    different = {name for name, tensor in before.items() if not torch.equal(unwrapped[name], tensor)}
    assert different == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


def test_named_modules_are_drawn_and_no_others():
    model = TwoLayers()
    before = state(model)
    assert initialize_base_weights(model, "normalized", module_names=["second"]) == ["second"]
    assert changed(model, before) == {"second.weight"}


def test_weights_of_a_conv1d_are_drawn_as_out_by_in():
    model = TwoLayers()
    initialize_base_weights(model, "normalized", module_names=["first", "second"])
    for layer in (model.first, model.second):
        assert (torch.linalg.vector_norm(matrix(layer), dim=1) - 1).abs().max() < 1e-6


def test_unknown_scheme_changes_no_weight():
    model = TwoLayers()
    before = state(model)
    with pytest.raises(ValueError, match="'zeros' is unknown"):
        initialize_base_weights(model, "zeros", module_names=["first", "second"])
    assert changed(model, before) == set()


def test_weights_are_drawn_in_the_dtype_of_the_model():
    model = OneLayer(base_layer(PLAIN).bfloat16())
    initialize_base_weights(model, "normalized", module_names=["layer"])
    expected = draw_weight(PLAIN.out_features, PLAIN.in_features, "normalized", seed=0, module_name="layer")
    assert torch.equal(model.layer.weight, expected.bfloat16())


def test_weights_are_drawn_in_place():
    model = TwoLayers()
    before = model.first.weight, model.first.weight.data_ptr()
    initialize_base_weights(model, "normalized", module_names=["first"])
    assert model.first.weight is before[0]
    assert model.first.weight.data_ptr() == before[1]


@pytest.mark.parametrize(
    "config",
    [
        POETConfig(target_modules=["first", "second"], block_size=4),
        POETConfig(target_modules=["first", "second"], block_size=4, merge_interval=10, train_rest=True),
        POETConfig.for_pretraining(target_modules=["first", "second"], block_size=4, base_init=None),
    ],
    ids=["adapter", "periodic", "pretraining"],
)
def test_weights_are_left_alone_without_base_init(config):
    base = TwoLayers()
    before = state(base)
    model = wrap(base, config)
    assert changed_base(model, before) == set()


def test_uniform_spectrum_stays_uniform_in_training():
    config = POETConfig(
        target_modules=["first", "second"],
        block_size=4,
        base_init="uniform_spectrum",
        merge_interval=1,
        orthogonal_map="cayley",
    )
    model = wrap(TwoLayers(), config)
    for step in range(20):
        randomize(model, 0.4, seed=step)
        merge_and_reinitialize(model)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        assert (torch.linalg.svdvals(matrix(layer.get_base_layer())) - 1).abs().max() < 1e-5


def test_initial_weights_do_not_depend_on_how_many_layers_are_targeted():
    few, many = llama(), llama(seed=1)
    initialize_base_weights(few, "normalized", module_names=["model.layers.1.mlp.up_proj"])
    initialize_base_weights(many, "normalized")
    name = "model.layers.1.mlp.up_proj.weight"
    assert relative_error(few.state_dict()[name], many.state_dict()[name]) == 0


@pytest.mark.filterwarnings("ignore:.*were left out")
@pytest.mark.parametrize("settings", [{}, {"kdim": 6, "vdim": 6}], ids=["one-matrix", "three-matrices"])
def test_weights_are_drawn_of_the_attentions_that_are_rotated(settings):
    plain, base = (Attending(**settings) for _ in range(2))
    before = state(plain)
    initialize_base_weights(plain, "normalized", scale=0.5)
    model = wrap(
        base, POETConfig(target_modules="all-linear", block_size=4, base_init="normalized", base_init_scale=0.5)
    )
    merged = state(model.merge_and_unload())
    drawn = {"head.weight"} if settings else {"head.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert changed(plain, before) == drawn
    assert all(torch.equal(tensor, merged[name]) for name, tensor in state(plain).items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # out by in, and in by out
def test_every_expert_is_drawn_by_itself_and_alike_in_a_plain_model(name):
    plain = moe(name)
    names = initialize_base_weights(plain, "normalized", scale_pattern={"down_proj": 0.5}, seed=3)
    sizes = {"base_init_scale": 1.0, "base_init_scale_pattern": {"down_proj": 0.5}}
    config = POETConfig.for_pretraining(block_size=4, seed=3, **sizes)
    model = wrap(moe(name), config)
    stacks = [layer for _, layer in poet_layers(model) if isinstance(layer, ParamWrapper)]
    assert {layer.module_name for layer in stacks} < set(names) and len(stacks) == num_stacks(name)
    for layer in stacks:
        rows = torch.linalg.vector_norm(stack(layer), dim=-1)
        assert rows.flatten().tolist() == pytest.approx(
            [0.5 if "down_proj" in layer.module_name else 1.0] * rows.numel()
        )
        assert len({expert.norm().item() for expert in stack(layer)[:, 0, :1]}) > 1
        assert torch.equal(layer.base_parameter, plain.get_parameter(layer.module_name))
