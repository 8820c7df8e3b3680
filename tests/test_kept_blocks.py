"""The blocks that a rotation keeps between calls are never stale, whatever changes its parameters, and save work.

Every change below is made after calls that filled what is kept, and the next call has to be that of a fresh copy.
"""

import copy
import pickle
import threading

import pytest
import torch
from cases import PLAIN, Case, inputs, normal, randomize, relative_error, rotated
from models import llama, tokens, wrap
from torch import nn
from torch.utils.checkpoint import checkpoint

from poet_peft import merge_and_reinitialize
from poet_peft.maths.orthogonal import CayleyNeumann
from poet_peft.ops.paths import compute_path


CASE = Case("wide", 96, 64, block_size=16)


def x():
    return inputs(CASE, 200).requires_grad_()


def evaluate(layer, mode):
    """Output, and in training the gradients of one more micro-batch."""
    if mode == "inference":
        with torch.no_grad():
            return [layer(x())]
    y = layer(x())
    gradients = torch.autograd.grad(y.square().sum(), [rotation.weight for rotation in layer.rotations("default")])
    return [y.detach(), *gradients]


def is_filled(layer):
    return all(rotation._kept._values is not None for rotation in layer.rotations("default"))


def filled(mode):
    """A layer that keeps its blocks, with gradients as in the middle of an optimizer step."""
    model, layer = rotated(CASE, merge_interval=4)
    layer(x()).square().sum().backward()
    evaluate(layer, mode)
    assert is_filled(layer)
    return model, layer


def weight(layer):
    return layer.get_base_layer().weight


def optimizer_step(model, layer):
    torch.optim.SGD([rotation.weight for rotation in layer.rotations("default")], lr=1e-3).step()


def fused_optimizer_step(model, layer):
    """Moves no version counter."""
    torch.optim.AdamW([rotation.weight for rotation in layer.rotations("default")], lr=1e-2, fused=True).step()


def optimizer_step_past_the_counters(model, layer):
    """As compiled optimizers do, bitsandbytes' for one."""

    class PastTheCounters(torch.optim.Optimizer):
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.data[5] += 0.1

    PastTheCounters([rotation.weight for rotation in layer.rotations("default")], {}).step()


def smaller_state(layer):
    return {name: tensor * 0.9 for name, tensor in layer.state_dict().items() if tensor.is_floating_point()}


def load_state_dict(model, layer):
    layer.load_state_dict(smaller_state(layer), strict=False)


def load_state_dict_by_assignment(model, layer):
    layer.load_state_dict(smaller_state(layer), strict=False, assign=True)
    for rotation in layer.rotations("default"):
        rotation.weight.grad = torch.zeros_like(rotation.weight)


@torch.no_grad()
def edit_the_weight(model, layer):
    weight(layer)[3, 5] += 1


def edit_the_weight_through_data(model, layer):
    weight(layer).data.mul_(1.1)


def zero_most_columns_of_the_weight_through_data(model, layer):
    weight(layer).data[:, 16:] = 0


def write_the_weight_by_numpy(model, layer):
    weight(layer).detach().numpy()[5:9] *= -1


def swap_rows_of_the_weight_through_data(model, layer):
    weight(layer).data[[0, 1]] = weight(layer).data[[1, 0]]


def exchange_the_data_of_the_weight(model, layer):
    weight(layer).data = weight(layer).data * 1.1


def exchange_the_weight(model, layer):
    layer.get_base_layer().weight = nn.Parameter(weight(layer).detach() * 1.1, requires_grad=False)


@torch.no_grad()
def edit_a_rotation(model, layer):
    layer.poet_R["default"].weight[7] += 0.1


def edit_a_rotation_through_data(model, layer):
    layer.poet_P["default"].weight.data.mul_(0.5)


def edit_one_entry_of_a_rotation_through_data(model, layer):
    layer.poet_R["default"].weight.data[5] += 0.5


def write_a_rotation_by_numpy(model, layer):
    layer.poet_R["default"].weight.detach().numpy()[11:13] *= -1


def edit_the_index(model, layer):
    layer.poet_P["default"].redraw(seed=5, num_reinits=1)


def fold(model, layer):
    merge_and_reinitialize(model)
    randomize(model, 0.3, seed=50)


def fold_without_new_index(model, layer):
    merge_and_reinitialize(model, reinitialize=False)
    randomize(model, 0.3, seed=50)


def merge_and_unmerge_after_an_edit(model, layer):
    model.merge_adapter()
    model.unmerge_adapter()
    edit_a_rotation(model, layer)


def double(model, layer):
    model.double()
    model.float()
    edit_a_rotation_through_data(model, layer)


CHANGES = [
    optimizer_step,
    fused_optimizer_step,
    optimizer_step_past_the_counters,
    load_state_dict,
    load_state_dict_by_assignment,
    edit_the_weight,
    edit_the_weight_through_data,
    zero_most_columns_of_the_weight_through_data,
    write_the_weight_by_numpy,
    swap_rows_of_the_weight_through_data,
    exchange_the_data_of_the_weight,
    exchange_the_weight,
    edit_a_rotation,
    edit_a_rotation_through_data,
    edit_one_entry_of_a_rotation_through_data,
    write_a_rotation_by_numpy,
    edit_the_index,
    fold,
    fold_without_new_index,
    merge_and_unmerge_after_an_edit,
    double,
]


# Inference keeps the same blocks, but for the inverses: one change of each tensor.
IN_INFERENCE = [optimizer_step, edit_the_weight_through_data, edit_a_rotation_through_data, edit_the_index, fold]


@pytest.mark.parametrize(
    ("change", "mode"),
    [*((change, "training") for change in CHANGES), *((change, "inference") for change in IN_INFERENCE)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_call_after_a_change_is_that_of_the_changed_parameters(change, mode):
    model, layer = filled(mode)
    before = evaluate(layer, mode)
    change(model, layer)
    actual = evaluate(layer, mode)
    expected = evaluate(copy.deepcopy(layer), mode)
    assert relative_error(actual[0], before[0]) > 1e-4, "the change has no effect, so the test could not fail"
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_dtype_of_the_layer_may_change(mode):
    _, layer = filled(mode)
    layer.double()
    y = layer(x().double())
    assert y.dtype == torch.float64


def test_every_adapter_keeps_its_own():
    model, layer = rotated(PLAIN)
    model.add_adapter("second", PLAIN.config(seed=1, init_weights=False))
    outputs = {}
    with torch.no_grad():
        for names in (["default"], ["second"], ["default", "second"], ["second", "default"], ["default"]):
            layer.set_adapter(names)
            y = layer(inputs(PLAIN, 9))
            assert torch.equal(y, copy.deepcopy(layer)(inputs(PLAIN, 9)))
            outputs[tuple(names)] = y
    assert relative_error(outputs["default", "second"], outputs["second", "default"]) > 0.01


# What it saves


@pytest.fixture
def mapped(monkeypatch):
    """Counts how often the map from parameters to blocks is computed."""
    count = []
    delta = CayleyNeumann.delta
    monkeypatch.setattr(CayleyNeumann, "delta", lambda *args: (count.append(1), delta(*args))[1])
    return count


def test_blocks_are_computed_once_for_all_micro_batches(mapped):
    _, layer = rotated(CASE)
    for _ in range(4):
        layer(x()).square().sum().backward()
    assert len(mapped) == 2


def test_blocks_are_computed_once_a_step_under_gradient_checkpointing(mapped):
    _, layer = rotated(CASE)
    for _ in range(3):
        checkpoint(layer, x(), use_reentrant=False).square().sum().backward()
    assert len(mapped) == 2


def test_blocks_are_computed_anew_after_every_optimizer_step(mapped):
    model, layer = rotated(CASE)
    for _ in range(3):
        layer(x()).square().sum().backward()
        optimizer_step(model, layer)
        model.zero_grad()
    assert len(mapped) == 6


def test_generation_computes_no_blocks_again(mapped):
    model = wrap(llama())
    with torch.no_grad():
        model(tokens())
    at_first = len(mapped)
    model.generate(tokens(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(mapped) == at_first > 0


def test_blocks_of_an_inference_get_their_inverses_in_training(mapped):
    _, layer = rotated(CASE)
    evaluate(layer, "inference")
    with compute_path("tangent"):
        layer(x()).square().sum().backward()
    assert len(mapped) == 2
    assert all(rotation._kept._values[2].inverses is not None for rotation in layer.rotations("default"))


def test_memory_efficient_computes_them_in_forward_and_in_backward(mapped):
    _, layer = rotated(CASE, memory_efficient=True)
    for _ in range(2):
        layer(x()).square().sum().backward()
    assert len(mapped) == 8


def test_nothing_of_the_weight_is_kept():
    _, layer = filled("training")
    sizes = [delta.numel() for r in layer.rotations("default") for delta in r._kept._values[2].deltas]
    assert max(sizes) < weight(layer).numel()


# Copies


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_empty_and_compute_the_same(copies):
    _, layer = filled("inference")
    copied = copies(layer)
    assert not is_filled(copied)
    with torch.no_grad():
        assert torch.equal(copied(x()), layer(x()))


def test_what_inference_mode_left_behind_can_train():
    _, layer = rotated(CASE)
    with torch.inference_mode():
        layer(x())
    assert is_filled(layer)
    trained = layer(x())
    trained.square().sum().backward()
    assert torch.equal(trained, copy.deepcopy(layer)(x()))


def test_threads_do_not_mix_their_values_up():
    """Two threads ask one keeper for the blocks of their own parameters, in turn."""
    rotation = rotated(PLAIN)[1].rotations("default")[0]
    wrong = []

    def ask(seed):
        side = rotation()._replace(upper=normal(rotation.weight.numel(), seed=seed))
        expected = side._replace(kept=None).blocks().deltas[0]
        for _ in range(500):
            if not torch.equal(side.blocks().deltas[0], expected):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
