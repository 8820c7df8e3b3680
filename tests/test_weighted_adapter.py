"""`add_weighted_adapter`: the weighted sum of rotations in the Lie algebra."""

import pytest
import torch
from cases import (
    FEW,
    PLAIN,
    TOLERANCE,
    Case,
    dense_rotation,
    for_few_float32_cases,
    in_float64,
    inputs,
    matrix,
    output_with,
    randomize,
    relative_error,
    rotated,
)
from models import assert_same_state, llama, llama_classifier, logits, poet_config, state, wrap
from peft import PeftModel
from peft.helpers import rescale_adapter_scale


def pair(case, theta=0.4, **overrides):
    """A model of one layer with the adapters `default` and `second`, and the layer."""
    model, layer = rotated(case)
    model.add_adapter("second", case.config(**overrides))
    randomize(model, theta)
    return model, layer


def active(model, name):
    model.set_adapter(name)
    return model


def log(G):
    """The generator of a rotation, by the eigenvectors of the rotation itself."""
    values, vectors = torch.linalg.eig(G)
    return (vectors @ torch.diag(values.log()) @ torch.linalg.inv(vectors)).real


def summed(case, dim, rotations, weights):
    logs = [w * log(dense_rotation(case, dim, rotations, name)) for name, w in weights.items()]
    return torch.matrix_exp(sum(logs))


orthogonal = in_float64(FEW - {"3-terms"} | {"exact-remainder"})


@orthogonal
def test_sum_is_the_exponential_of_the_sum_of_logarithms(case):
    model, layer = pair(case)
    weights = {"default": 0.7, "second": -0.4}
    model.base_model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    R = summed(case, case.out_features, layer.poet_R, weights)
    P = summed(case, case.in_features, layer.poet_P, weights)
    x = inputs(case, 5)
    expected = output_with(case, layer, x, R @ matrix(layer.get_base_layer()) @ P)
    assert relative_error(active(model, "sum")(x), expected) < 1e-11


@for_few_float32_cases
def test_average_of_an_adapter_with_itself_is_the_adapter(case):
    model, layer = rotated(case)
    x = inputs(case, 5)
    expected = model(x)
    model.base_model.add_weighted_adapter(["default", "default"], [0.3, 0.7], "mean")
    assert relative_error(active(model, "mean")(x), expected) < TOLERANCE[case.dtype]


@for_few_float32_cases
def test_one_adapter_with_a_weight_is_that_adapter_at_a_scale(case):
    if case.is_series:
        pytest.skip("a scaled series is stretched less than the series of a scaled rotation")
    model, layer = rotated(case)
    x = inputs(case, 5)
    with rescale_adapter_scale(model, 0.3), torch.no_grad():
        expected = model(x)
    model.base_model.add_weighted_adapter(["default"], [0.3], "part")
    assert relative_error(active(model, "part")(x), expected) < TOLERANCE[case.dtype]


def test_scales_of_the_adapters_count():
    model, layer = pair(PLAIN)
    layer.set_scale("second", 0.5)
    model.base_model.add_weighted_adapter(["default", "second"], [1, 1], "scaled")
    layer.set_scale("second", 1)
    model.base_model.add_weighted_adapter(["default", "second"], [1, 0.5], "weighted")
    for scaled, weighted in zip(layer.rotations("scaled"), layer.rotations("weighted"), strict=True):
        assert torch.equal(scaled.weight, weighted.weight)


def test_adapters_stay_as_they_are():
    model, _ = pair(PLAIN)
    before = state(model)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    assert_same_state(
        {name: tensor for name, tensor in state(model).items() if ".mean." not in name and not name.endswith(".mean")},
        before,
    )


def test_sum_is_neither_active_nor_trains():
    model, layer = pair(PLAIN)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    assert model.active_adapters == ["default"]
    assert not any(rotation.weight.requires_grad for rotation in layer.rotations("mean"))


def test_planes_are_those_of_the_adapters_whatever_was_drawn():
    model, layer = pair(PLAIN)
    with torch.no_grad():
        for name in ("default", "second"):
            for rotation in layer.rotations(name):
                rotation.index.copy_(rotation.index.flip(0))
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    for mean, first in zip(layer.rotations("mean"), layer.rotations("default"), strict=True):
        assert torch.equal(mean.index, first.index)


def test_sum_is_saved_and_loaded(tmp_path):
    model = wrap(llama(), adapter_name="first")
    model.add_adapter("second", poet_config())
    model.base_model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mean")
    expected = logits(active(model, "mean"))
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "mean")), expected)


OTHERS = {"seed": {"seed": 1}, "block_size": {"block_size": 4}, "variant": {"variant": "fully_stochastic"}}


@pytest.mark.parametrize("difference", OTHERS)
def test_adapters_of_other_planes_are_refused(difference):
    model, _ = pair(PLAIN, **OTHERS[difference])
    before = state(model)
    with pytest.raises(ValueError, match=r"'default' and 'second'.*'layer'.*side R.*set_adapter"):
        model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    assert_same_state(state(model), before)
    assert "mean" not in model.peft_config


def test_other_maps_are_refused_if_one_of_them_is_not_orthogonal():
    model, _ = pair(PLAIN, adaptive_terms=False)
    with pytest.raises(ValueError, match="other maps"):
        model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")


def test_maps_that_are_orthogonal_may_differ():
    model, _ = pair(PLAIN, orthogonal_map="cayley")
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")


def test_adapters_of_other_layers_are_refused():
    model = wrap(llama(), adapter_name="first")
    model.add_adapter("second", poet_config(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"k_proj': only one of them rotates it"):
        model.base_model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mean")


def test_adapters_with_trained_heads_are_refused():
    model = wrap(llama_classifier(), task_type="SEQ_CLS", adapter_name="first")
    with pytest.raises(ValueError, match=r"'first' also trains.*modules_to_save"):
        model.base_model.add_weighted_adapter(["first"], [0.5], "mean")


BAD = {
    "svd": ({"combination_type": "svd"}, "'svd'.*'linear'"),
    "taken": ({"adapter_name": "second"}, "'second' already"),
    "weights": ({"weights": [1.0]}, "2 adapters and 1 weights"),
    "none": ({"adapters": [], "weights": []}, "0 adapters and 0 weights"),
    "unknown": ({"adapters": ["default", "third"]}, "no adapter 'third', but 'default', 'second'"),
    "nan": ({"weights": [0.5, float("nan")]}, "nan of the adapter 'second'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused(bad):
    arguments, message = BAD[bad]
    model, _ = pair(PLAIN)
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(
            **{"adapters": ["default", "second"], "weights": [0.5, 0.5], "adapter_name": "mean", **arguments}
        )


def test_half_a_turn_is_refused():
    model, layer = rotated(Case("one-plane", 2, 2, block_size=2))
    with torch.no_grad():
        for rotation in layer.rotations("default"):
            rotation.weight.fill_(1.0)  # a quarter turn
    with pytest.raises(ValueError, match=r"side R of 'layer' by half a turn"):
        model.base_model.add_weighted_adapter(["default"], [2.0], "double")
    assert "double" not in model.peft_config
