"""What a layer keeps between forwards is never stale, whatever changes its parameters, and saves the work it is for.

Every change below is made after a forward that filled the cache, and the next forward has to be that of a layer which
never kept anything.
"""

import copy
import pickle
import threading

import pytest
import torch
from cases import PLAIN, Case, inputs, normal, randomize, relative_error, rotated
from models import adamw, llama, step, tokens, wrap
from torch import nn
from torch.utils.checkpoint import checkpoint

import poet_peft.cache
import poet_peft.ops.prepared
from poet_peft import merge_and_reinitialize
from poet_peft.cache import ParameterCache
from poet_peft.layer import Linear


CASE = Case("wide", 96, 64, block_size=16)
MODES = ["inference", "later-micro-batch"]
for_modes = pytest.mark.parametrize("mode", MODES)


def x():
    return inputs(CASE, 200).requires_grad_()


def gradients(layer):
    return [rotation.weight.grad.clone() for rotation in layer.rotations("default")]


def evaluate(layer, mode):
    """Output, and in training the gradients that one more micro-batch adds."""
    if mode == "inference":
        with torch.no_grad():
            return [layer(x())]
    before = gradients(layer)
    y = layer(x())
    y.square().sum().backward()
    return [y.detach(), *(after - b for after, b in zip(gradients(layer), before, strict=True))]


def filled(mode):
    """A layer whose cache is full, with gradients as in the middle of an optimizer step."""
    model, layer = rotated(CASE, merge_interval=4)
    layer(x()).square().sum().backward()
    evaluate(layer, mode)
    assert layer._cache._values is not None
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


def exchange_the_data_of_the_weight(model, layer):
    weight(layer).data = weight(layer).data * 1.1


def exchange_the_weight(model, layer):
    layer.get_base_layer().weight = nn.Parameter(weight(layer).detach() * 1.1, requires_grad=False)


@torch.no_grad()
def edit_a_rotation(model, layer):
    layer.poet_R["default"].weight[7] += 0.1


def edit_a_rotation_through_data(model, layer):
    layer.poet_P["default"].weight.data.mul_(0.5)


def edit_the_index(model, layer):
    layer.poet_P["default"].redraw(seed=5, epoch=1)


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
    exchange_the_data_of_the_weight,
    exchange_the_weight,
    edit_a_rotation,
    edit_a_rotation_through_data,
    edit_the_index,
    fold,
    fold_without_new_index,
    merge_and_unmerge_after_an_edit,
    double,
]


@for_modes
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_forward_after_a_change_is_that_of_the_changed_parameters(change, mode):
    model, layer = filled(mode)
    before = evaluate(layer, mode)
    change(model, layer)
    actual = evaluate(layer, mode)
    layer._cache.clear()
    expected = evaluate(layer, mode)
    assert relative_error(actual[0], before[0]) > 1e-4, "the change has no effect, so the test could not fail"
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(actual, expected, strict=True))


@for_modes
def test_dtype_of_the_layer_may_change(mode):
    _, layer = filled(mode)
    layer.double()
    y = layer(x().double())
    assert y.dtype == torch.float64


def test_optimizer_of_ones_own_is_noticed_at_the_first_micro_batch():
    """Written through `.data` with one entry changed, it moves no counter, and no sample need show it."""
    _, layer = filled("later-micro-batch")
    rotation = layer.poet_R["default"]
    rotation.weight.data[5] += 0.5
    for each in layer.rotations("default"):
        each.weight.grad = None
    y = layer(x())
    layer._cache.clear()
    assert torch.equal(y, layer(x()))


def test_active_adapters_are_part_of_what_is_kept():
    model, layer = rotated(PLAIN)
    model.add_adapter("second", PLAIN.config(seed=1, init_weights=False))
    outputs = {}
    with torch.no_grad():
        for names in (["default"], ["second"], ["default", "second"], ["second", "default"], ["default"]):
            layer.set_adapter(names)
            y = layer(inputs(PLAIN, 9))
            layer._cache.clear()
            assert torch.equal(y, layer(inputs(PLAIN, 9)))
            outputs[tuple(names)] = y
    assert relative_error(outputs["default", "second"], outputs["second", "default"]) > 0.01


# What it saves


@pytest.fixture
def built(monkeypatch):
    """Counts the effective weights that are built."""
    count = []
    build = poet_peft.ops.prepared.effective_weight
    for module in (poet_peft.ops.prepared, poet_peft.cache):
        monkeypatch.setattr(module, "effective_weight", lambda *args: (count.append(1), build(*args))[1])
    return count


def test_effective_weight_is_built_once_for_all_micro_batches(built):
    _, layer = rotated(CASE)
    for _ in range(4):
        layer(x()).square().sum().backward()
    assert len(built) == 1


def test_effective_weight_is_built_once_a_step_under_gradient_checkpointing(built):
    _, layer = rotated(CASE)
    for _ in range(3):
        checkpoint(layer, x(), use_reentrant=False).square().sum().backward()
    assert len(built) == 1


def test_effective_weight_is_built_anew_after_every_optimizer_step(built):
    model, layer = rotated(CASE)
    for _ in range(3):
        layer(x()).square().sum().backward()
        optimizer_step(model, layer)
        model.zero_grad()
    assert len(built) == 3


def test_generation_builds_every_effective_weight_once(built):
    model = wrap(llama())
    num_layers = sum(isinstance(module, Linear) for module in model.modules())
    model.generate(tokens(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(built) == num_layers


def test_memory_efficient_builds_in_forward_and_in_backward(built):
    _, layer = rotated(CASE, memory_efficient=True)
    for _ in range(2):
        layer(x()).square().sum().backward()
    assert len(built) == 4


def test_micro_batches_give_the_gradients_of_single_ones():
    model = wrap(llama())
    kept, anew = [], []
    for gradients_of, clears in ((kept, False), (anew, True)):
        model.zero_grad()
        for seed in range(3):
            if clears:
                for module in model.modules():
                    if isinstance(module, Linear):
                        module._cache.clear()
            input_ids = tokens(seed=seed)
            model(input_ids=input_ids, labels=input_ids).loss.backward()
        gradients_of += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(kept, anew, strict=True))


# When it lets go


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_change_of_mode_frees_it(mode):
    model, layer = rotated(CASE)
    model.train(not mode)
    with torch.no_grad():
        layer(x())
    model.train(mode)
    assert layer._cache._values is None


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_empty_and_compute_the_same(copies):
    _, layer = filled("inference")
    copied = copies(layer)
    assert copied._cache._values is None
    with torch.no_grad():
        assert torch.equal(copied(x()), layer(x()))


def test_replicas_of_data_parallel_share_no_cache():
    _, layer = filled("inference")
    assert layer._replicate_for_data_parallel()._cache is not layer._cache


def test_what_inference_mode_left_behind_can_train():
    _, layer = rotated(CASE)
    with torch.inference_mode():
        y = layer(x())
    trained = layer(x())
    trained.square().sum().backward()
    assert torch.equal(y, trained)


def test_threads_do_not_mix_their_values_up():
    """Two threads ask one cache for values of their own tensors, in turn."""
    cache = ParameterCache()
    wrong = []

    def ask(tensor):
        for _ in range(2000):
            value = cache.values([tensor], ()).get("value", tensor.clone)
            if not torch.equal(value, tensor):
                wrong.append(value)

    threads = [threading.Thread(target=ask, args=(normal(3, seed=seed),)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_training_with_accumulation_ends_as_without_a_cache(monkeypatch):
    states = []
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(Linear, "_can_keep_weight", lambda *_: False)
        model = wrap(llama(), "pretraining")
        optimizer = adamw(model)
        for number in range(4):
            input_ids = tokens(seed=number)
            model(input_ids=input_ids, labels=input_ids).loss.backward()
            step(model, optimizer, seed=10 + number)
            merge_and_reinitialize(model, optimizer)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
