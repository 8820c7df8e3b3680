"""Folds follow the optimizer, any of torch's, in any loop; nothing that would undo or miss one passes in silence."""

import copy
import warnings

import bitsandbytes
import pytest
import torch
from cases import TwoLayers, normal, randomize, wrap
from models import adamw, assert_same_state, llama, logits, state, step, tokens
from models import wrap as wrap_llama
from torch import nn
from transformers import Trainer, TrainingArguments

from poet_peft import POETCallback, POETConfig, POETFoldError, merge_and_reinitialize, poet_param_groups
from poet_peft.layer import poet_layers


def folds(model):
    """The number of folds, which all layers must agree on."""
    (number,) = {layer.state("default").num_folds for _, layer in poet_layers(model)}
    return number


def steps(model):
    (number,) = {layer.state("default").num_steps for _, layer in poet_layers(model)}
    return number


def periodic(**overrides):
    return wrap_llama(llama(), "periodic", **{"merge_interval": 2, **overrides})


OPTIMIZERS = {
    "adamw": adamw,
    "foreach": lambda model: adamw(model, foreach=True),
    "fused": lambda model: adamw(model, fused=True),
    "sgd": lambda model: torch.optim.SGD(poet_param_groups(model, lr=0.1, poet_lr=0.1), momentum=0.9),
    "adafactor": lambda model: torch.optim.Adafactor(poet_param_groups(model, lr=1e-3, poet_lr=1e-3)),
    "bitsandbytes": lambda model: bitsandbytes.optim.AdamW8bit(poet_param_groups(model, lr=1e-3, poet_lr=1e-3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rotations_are_folded_after_every_second_step(name):
    model = periodic()
    optimizer = OPTIMIZERS[name](model)
    seen = []
    for seed in range(5):
        step(model, optimizer, seed=seed)
        seen.append(folds(model))
    assert seen == [0, 1, 1, 2, 2]


def test_a_fold_changes_no_output_and_leaves_fresh_optimizer_state():
    model = periodic(merge_interval=3)
    optimizer = adamw(model)
    for seed in range(2):
        step(model, optimizer, seed=seed)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    unfolded = copy.deepcopy(model)
    adamw(unfolded).load_state_dict(optimizer.state_dict())
    optimizer.step()
    rotations = [r.weight for _, layer in poet_layers(model) for r in layer.rotations("default")]
    assert folds(model) == 1
    assert not any(rotation.any() for rotation in rotations)
    assert not any(rotation in optimizer.state for rotation in rotations)


def test_the_explicit_fold_does_what_the_due_one_does():
    """The same steps, once with a fold that is due and once with the call, end in the same bits."""
    models = [periodic(merge_interval=2), periodic(merge_interval=100)]
    for model in models:
        optimizer = adamw(model)
        for seed in range(4):
            step(model, optimizer, seed=seed)
            if steps(model) % 2 == 0 and model is models[1]:
                merge_and_reinitialize(model, optimizer)
    assert_same_state(models[0].state_dict(), models[1].state_dict())


def test_copies_and_pickles_of_a_model_fold_too():
    model = copy.deepcopy(periodic())
    optimizer = adamw(model)
    for seed in range(2):
        step(model, optimizer, seed=seed)
    assert folds(model) == 1


def test_steps_of_other_models_are_not_counted():
    model, other = periodic(), periodic()
    optimizer = adamw(other)
    for seed in range(3):
        step(other, optimizer, seed=seed)
    assert (steps(model), folds(model)) == (0, 0)


def test_a_step_without_any_gradient_is_not_counted():
    model = periodic()
    adamw(model).step()
    assert steps(model) == 0


def test_a_step_that_a_scaler_skipped_is_not_counted():
    model = periodic()
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for seed, scale in ((0, 1.0), (1, float("inf")), (2, 1.0)):
        input_ids = tokens(seed=seed)
        scaler.scale(model(input_ids=input_ids, labels=input_ids).loss * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert (steps(model), folds(model)) == (2, 1)


def test_a_step_that_a_fused_optimizer_skipped_is_not_counted():
    """The scaler calls it in any case, and hands over what it found."""
    model = periodic()
    optimizer = adamw(model, fused=True)
    for found in (0.0, 1.0):
        input_ids = tokens()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.found_inf = torch.tensor(found)
        optimizer.grad_scale = None
        optimizer.step()
    assert steps(model) == 1


def test_a_closure_is_one_step():
    model = periodic()
    optimizer = torch.optim.LBFGS([r.weight for _, layer in poet_layers(model) for r in layer.rotations("default")])

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    assert steps(model) == 1


def test_a_compiled_step_is_followed_by_its_fold():
    model = wrap(TwoLayers(), POETConfig(target_modules=["first", "second"], block_size=4, merge_interval=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, capturable=False)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    for seed in range(2):
        model(normal(5, 12, seed=seed)).square().sum().backward()
        compiled()
        optimizer.zero_grad()
    assert folds(model) == 1


# Several optimizers


def two_optimizers(model):
    sides = {"R": [], "P": []}
    for _, layer in poet_layers(model):
        for rotation in layer.rotations("default"):
            sides[rotation.side].append(rotation.weight)
    return [torch.optim.AdamW(parameters, lr=1e-2) for parameters in sides.values()]


def test_two_optimizers_that_hold_a_side_each_make_one_step_together():
    model = periodic()
    optimizers = two_optimizers(model)
    for seed in range(2):
        input_ids = tokens(seed=seed)
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    assert (steps(model), folds(model)) == (2, 1)
    assert all(not optimizer.state for optimizer in optimizers), "the state of both sides starts anew"


# Trainer, without and with the callback


def run(model, directory, callbacks=(), max_steps=6, resume=None, **arguments):
    settings = {
        "output_dir": str(directory),
        "max_steps": max_steps,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=32)]
    args = TrainingArguments(**{**settings, **arguments})
    optimizer = adamw(model)
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_folds_without_a_callback(tmp_path):
    model = periodic()
    run(model, tmp_path)
    assert folds(model) == 3


def test_two_callbacks_fold_once(tmp_path):
    models = [periodic(), periodic()]
    for model, number in zip(models, (1, 2), strict=True):
        run(model, tmp_path, [POETCallback() for _ in range(number)])
        assert folds(model) == 3


def test_a_second_run_goes_on_in_phase(tmp_path):
    model = periodic(merge_interval=4)
    run(model, tmp_path, max_steps=3)
    run(model, tmp_path, max_steps=1)
    assert (steps(model), folds(model)) == (4, 1)


def test_a_run_that_ends_before_its_first_fold_says_so(tmp_path):
    with pytest.warns(UserWarning, match="training ends after 3 steps, before the first fold"):
        run(periodic(merge_interval=4), tmp_path, [POETCallback()], max_steps=3)


def test_resuming_a_finished_run_leaves_its_model_alone(tmp_path):
    model = periodic()
    run(model, tmp_path, [POETCallback()], save_strategy="steps", save_steps=3)
    before = state(model)
    again = periodic(seed=5)
    with pytest.warns(UserWarning, match="finished already, after 6 of 6 steps"):
        run(again, tmp_path, [POETCallback()], resume=str(tmp_path / "checkpoint-6"))
    assert_same_state(again.state_dict(), before)


# What must not pass in silence


class Masters(torch.optim.Optimizer):
    """Keeps fp32 copies and writes them back, as mixed-precision and offloading optimizers do."""

    def __init__(self, parameters, hides):
        super().__init__(parameters, {"lr": 0.1})
        masters = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.write = lambda: masters
        if not hides:
            self.masters = masters

    @torch.no_grad()
    def step(self, closure=None):
        for parameter, master in zip(self.param_groups[0]["params"], self.write(), strict=True):
            if parameter.grad is not None:
                master.add_(parameter.grad.sign(), alpha=-1e-3)
                parameter.copy_(master)


def train_with_masters(merge_interval, hides):
    model = wrap(
        TwoLayers(), POETConfig(target_modules=["first", "second"], block_size=4, merge_interval=merge_interval)
    )
    optimizer = Masters([p for p in model.parameters() if p.requires_grad], hides)
    for _ in range(merge_interval + 1):
        model(normal(5, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("merge_interval", [1, 3])
def test_an_optimizer_with_copies_of_its_own_is_refused_before_the_first_fold(merge_interval):
    with pytest.raises(POETFoldError, match="Masters keeps its own copy of the rotations"):
        train_with_masters(merge_interval, hides=False)


def test_an_optimizer_that_undoes_a_fold_is_refused_at_the_step_after_it():
    with pytest.raises(POETFoldError, match="Masters keeps its own copy of the rotations"):
        train_with_masters(10, hides=True)


def test_an_optimizer_that_is_none_of_torchs_is_named_when_the_adapter_is_saved(tmp_path):
    model = periodic(init_weights=True)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    with torch.no_grad():
        for _, layer in poet_layers(model):
            for rotation in layer.rotations("default"):
                rotation.weight.sub_(rotation.weight.grad, alpha=0.1)
    with pytest.warns(UserWarning, match="no step of a torch optimizer .* was seen"):
        model.save_pretrained(tmp_path)


def test_a_trained_adapter_is_saved_without_a_warning(tmp_path):
    model = periodic(init_weights=True)
    step(model, adamw(model))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the rotations of")
        model.save_pretrained(tmp_path)


class ReadsTheWeight(nn.Module):
    """Its second layer is never called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(TwoLayers(seed) for seed in (1, 3))
        self.name = "weight"

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer.first(x)) @ getattr(layer.second, self.name)
            x = nn.functional.pad(x, (0, 2))
        return x


def reads_the_weight(**overrides):
    config = POETConfig(target_modules=["first", "second"], block_size=4, merge_interval=1, **overrides)
    return wrap(ReadsTheWeight(), config)


def test_rotations_without_gradient_are_named_after_the_first_step():
    model = reads_the_weight()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(normal(5, 12)).square().sum().backward()
    with pytest.warns(UserWarning, match=r"no gradient in the first optimizer step: layers\.\*\.second \(P\)"):
        optimizer.step()


def test_rotations_that_never_had_a_gradient_are_not_folded():
    model = reads_the_weight()
    randomize(model, 0.2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(normal(5, 12)).square().sum().backward()
    with pytest.raises(POETFoldError, match=r"'layers\.0\.second' never had a gradient"), pytest.warns(UserWarning):
        optimizer.step()


class Experts(nn.Module):
    """Only the first one is used."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(TwoLayers(seed) for seed in (1, 3))

    def forward(self, x):
        return self.experts[0](x)


def test_experts_without_tokens_are_no_alarm():
    model = wrap(Experts(), POETConfig(target_modules=["first", "second"], block_size=4, merge_interval=1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(normal(5, 12)).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert folds(model) == 1


# Saved and loaded


def test_steps_are_counted_on_from_a_loaded_adapter(tmp_path):
    model = periodic(merge_interval=4)
    optimizer = adamw(model)
    for seed in range(3):
        step(model, optimizer, seed=seed)
    model.save_pretrained(tmp_path)
    loaded = periodic(merge_interval=4, seed=9)
    loaded.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    step(loaded, adamw(loaded))
    assert (steps(loaded), folds(loaded)) == (4, 1)
