"""`POETCallback` in real runs of transformers' Trainer: tiny models, a few steps, real text."""

import argparse
import functools
import math
from pathlib import Path
from typing import NamedTuple

import models
import pytest
import torch
from models import ADAPTERS, PERIODIC, assert_same_state, logits, poet_config, state, wrap
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from poet_peft import MergeReport, POETCallback, POETConfig, RotationMuon, poet_optimizer, poet_param_groups
from poet_peft.layer import poet_layers
from poet_peft.optim import rotation_parameters


LENGTH = 24


def llama(seed=0):
    """Of one layer: 7 linear layers with 14 rotations."""
    return models.llama(seed=seed, num_hidden_layers=1)


@functools.cache
def text(num_sequences=64, first=0):
    """The source of a module of the standard library as bytes, one token a byte."""
    source = [byte for byte in Path(argparse.__file__).read_bytes() if byte < 128]
    starts = range(first * LENGTH, (first + num_sequences) * LENGTH, LENGTH)
    return [{"input_ids": source[i : i + LENGTH], "labels": source[i : i + LENGTH]} for i in starts]


def trainer_of(model, directory, *callbacks, lr=3e-3, poet_lr=1e-2, make_optimizer=torch.optim.AdamW, **arguments):
    settings = {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "data_seed": 0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model,
        TrainingArguments(str(directory), **{**settings, **arguments}),
        train_dataset=text(),
        eval_dataset=text(16, first=64),
        callbacks=list(callbacks),
        optimizers=(make_optimizer(poet_param_groups(model, lr=lr, poet_lr=poet_lr)), None),
    )


class Recorder(TrainerCallback):
    """What a callback behind `POETCallback` sees of the model at the end of every step."""

    def __init__(self):
        self.folds, self.epochs, self.weights = [], [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        layers = [layer for _, layer in poet_layers(model)]
        (folds,) = {layer.state("default").num_folds for layer in layers}
        (epochs,) = {layer.state("default").num_reinits for layer in layers}
        self.folds.append(folds)
        self.epochs.append(epochs)
        self.weights.append(layers[3].get_base_layer().weight.detach().clone())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What a `Recorder` saw of a run of 10 steps, by regime, accumulation and intervals."""

    @functools.cache
    def run(regime, accumulation, **intervals):
        recorder = Recorder()
        model = wrap(llama(), regime, **intervals)
        directory = tmp_path_factory.mktemp("recorded")
        trainer_of(model, directory, POETCallback(), recorder, gradient_accumulation_steps=accumulation).train()
        return recorder

    return run


# Learning


@pytest.mark.parametrize(
    "overrides",
    [{"block_size": 16}, {"variant": "fully_stochastic", "block_size": 0.5}],
    ids=["block_stochastic", "fully_stochastic"],
)
def test_training_from_scratch_lowers_the_loss(tmp_path, overrides):
    config = POETConfig.for_pretraining(**{"block_size": 16, "merge_interval": 10, **overrides})
    trainer = trainer_of(get_peft_model(llama(), config), tmp_path, POETCallback(), max_steps=40)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5


@pytest.mark.parametrize("regime", ["block_stochastic", "periodic"])
def test_rotations_alone_lower_the_loss(tmp_path, regime):
    model = get_peft_model(llama(), poet_config(regime, init_weights=True))
    trainer = trainer_of(model, tmp_path, POETCallback(), lr=0.0, poet_lr=2e-2, max_steps=15)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.05


@pytest.mark.parametrize("regime", ADAPTERS)
def test_fine_tuning_leaves_the_base_weights_as_they_were(tmp_path, regime):
    model = wrap(llama(), regime)
    trainer_of(model, tmp_path, POETCallback(), max_steps=5).train()
    after = {
        n.replace(".base_layer", ""): t for n, t in model.get_base_model().state_dict().items() if ".poet_" not in n
    }
    assert_same_state(after, llama().state_dict())


def test_callback_changes_nothing_without_a_merge_interval(tmp_path):
    models = [wrap(llama()) for _ in range(2)]
    for model, callbacks in zip(models, ([], [POETCallback()]), strict=True):
        trainer_of(model, tmp_path, *callbacks, max_steps=5).train()
    assert_same_state(models[1].state_dict(), models[0].state_dict())


def test_training_in_bfloat16_autocast_lowers_the_loss(tmp_path):
    config = POETConfig.for_pretraining(block_size=16, merge_interval=10)
    trainer = trainer_of(get_peft_model(llama(), config), tmp_path, POETCallback(), max_steps=30, bf16=True)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.4


# When folds happen


@pytest.mark.parametrize(("regime", "accumulation"), [("periodic", 1), ("pretraining", 1), ("pretraining", 2)])
def test_folds_happen_exactly_at_multiples_of_merge_interval(recorded, regime, accumulation):
    folds = recorded(regime, accumulation, merge_interval=3).folds
    assert folds == [step // 3 for step in range(1, 11)]


def test_base_weights_change_at_folds_and_at_no_other_step(recorded):
    weights = recorded("pretraining", 1, merge_interval=3).weights
    changed = [not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False)]
    assert changed == [step % 3 == 0 for step in range(2, 11)]


@pytest.mark.parametrize(
    ("reinit_interval", "accumulation", "epochs"),
    [
        (None, 1, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]),
        (4, 1, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]),
        (4, 2, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]),
        (0, 1, [0] * 10),
    ],
)
def test_reinitialisations_happen_at_multiples_of_reinit_interval(recorded, reinit_interval, accumulation, epochs):
    recorder = recorded("pretraining", accumulation, merge_interval=2, reinit_interval=reinit_interval)
    assert recorder.epochs == epochs


def test_folds_do_not_depend_on_reinitialisations(recorded):
    folds = recorded("pretraining", 1, merge_interval=2, reinit_interval=4).folds
    assert folds == [step // 2 for step in range(1, 11)]


def test_folds_happen_in_a_model_with_transformers_own_adapter(tmp_path):
    recorder = Recorder()
    model = llama()
    model.add_adapter(poet_config("pretraining"))
    trainer_of(model, tmp_path, POETCallback(), recorder).train()
    assert recorder.folds == [step // 4 for step in range(1, 11)]


def test_last_report_is_of_the_latest_fold(tmp_path):
    callback = POETCallback()
    assert callback.last_report is None
    trainer_of(wrap(llama(), "pretraining"), tmp_path, callback).train()
    assert isinstance(callback.last_report, MergeReport)
    assert (callback.last_report.num_layers, callback.last_report.num_reinits) == (7, 2)


class Reporter(TrainerCallback):
    """Stands where the callbacks that `report_to` names stand: before those that the trainer is given."""

    def __init__(self):
        self.logs = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.setdefault(state.global_step, {}).update(logs)


FOLD_KEYS = {
    "poet/num_reinits",
    "poet/orthogonality_error",
    "poet/max_rotation_angle",
    "poet/spectral_drift",
    "poet/requantization_error",
    "poet/states_reset",
}


@pytest.mark.parametrize(
    ("merge_interval", "logged_at"),
    [(4, {4: 1, 8: 2}), (2, {3: 1, 6: 3, 9: 4})],
    ids=["rarer than logs", "more often"],
)
def test_log_history_has_each_fold_at_its_own_step_or_the_next_log(tmp_path, merge_interval, logged_at):
    model = wrap(llama(), "periodic", merge_interval=merge_interval)
    trainer = trainer_of(model, tmp_path, POETCallback(), logging_steps=3)
    trainer.train()
    logged = {
        entry["step"]: entry["poet/num_reinits"] for entry in trainer.state.log_history if "poet/num_reinits" in entry
    }
    assert logged == logged_at


def test_attached_callback_reports_folds_to_the_callbacks_that_report(tmp_path):
    model = wrap(llama(), "periodic", merge_interval=4)
    reporter = Reporter()
    trainer = trainer_of(model, tmp_path, reporter, logging_steps=3)
    POETCallback().attach(trainer)
    trainer.train()
    assert {step for step, logs in reporter.logs.items() if logs.keys() >= FOLD_KEYS} == {4, 8}


def test_attaching_takes_the_place_of_a_callback_that_was_given(tmp_path):
    model = wrap(llama(), "periodic", merge_interval=4)
    trainer = trainer_of(model, tmp_path, POETCallback())
    POETCallback().attach(trainer)
    trainer.train()
    assert {layer.state("default").num_folds for _, layer in poet_layers(model)} == {2}


def test_optimizer_state_of_the_rotations_starts_anew_with_every_fold(tmp_path):
    callback = POETCallback()
    trainer = trainer_of(wrap(llama(), "pretraining"), tmp_path, callback, max_steps=9)
    trainer.train()
    assert callback.last_report.num_states_reset == 14
    steps = {int(trainer.optimizer.state[parameter]["step"]) for parameter in rotation_parameters(trainer.model)}
    assert steps == {1}


def test_model_without_poet_is_refused(tmp_path):
    model = llama()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    with pytest.raises(ValueError, match="get_peft_model"):
        Trainer(model, arguments, train_dataset=text(), callbacks=[POETCallback()]).train()


def test_frozen_adapter_is_refused(tmp_path):
    model = wrap(llama())
    model.set_adapter("default", inference_mode=True)
    model.get_input_embeddings().weight.requires_grad_(True)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    with pytest.raises(ValueError, match="no trainable POET layer"):
        Trainer(model, arguments, train_dataset=text(), callbacks=[POETCallback()]).train()


# The gradient clip

CLIP = 0.01  # far below the gradients' norm, so that the clip is what the optimizer sees


def norms_seen_by_the_optimizer(model, directory, callback, **arguments):
    norms = []

    def record(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))))

    trainer = trainer_of(model, directory, callback, **arguments)
    trainer.optimizer.register_step_pre_hook(record)
    trainer.train()
    return norms


@pytest.mark.parametrize(
    ("ramp", "intervals", "accumulation", "fractions"),
    [
        (2, {"merge_interval": 4}, 1, [1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3, 2 / 3]),
        (2, {"merge_interval": 4}, 2, [1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3, 2 / 3]),
        (0, {"merge_interval": 4}, 1, [1] * 10),
        (5, {"merge_interval": 4}, 1, [1, 1, 1, 1, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 1 / 6, 2 / 6]),
        (2, {"merge_interval": 2, "reinit_interval": 6}, 1, [1, 1, 1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1]),
        (2, {"merge_interval": 2, "reinit_interval": 0}, 1, [1] * 10),
    ],
    ids=["ramp", "accumulation", "none", "longer than the interval", "folds between", "no reinitialisation"],
)
def test_clip_is_tight_after_a_reinitialisation_and_grows_back(tmp_path, ramp, intervals, accumulation, fractions):
    norms = norms_seen_by_the_optimizer(
        wrap(llama(), "pretraining", **intervals),
        tmp_path,
        POETCallback(clip_ramp_steps=ramp),
        max_grad_norm=CLIP,
        gradient_accumulation_steps=accumulation,
    )
    assert norms == pytest.approx([fraction * CLIP for fraction in fractions], rel=1e-3)


def test_clip_is_that_of_the_layer_reinitialised_last(tmp_path):
    model = wrap(llama(), "pretraining", merge_interval=4)
    next(layer for _, layer in poet_layers(model)).advance("default", num_steps=4)
    norms = norms_seen_by_the_optimizer(model, tmp_path, POETCallback(2), max_grad_norm=CLIP, max_steps=1)
    assert norms == pytest.approx([CLIP / 3], rel=1e-3)


def test_default_ramp_is_ten_steps(tmp_path):
    model = wrap(llama(), "pretraining", merge_interval=2, reinit_interval=2)
    norms = norms_seen_by_the_optimizer(model, tmp_path, POETCallback(), max_grad_norm=CLIP, max_steps=3)
    assert norms[2] == pytest.approx(CLIP / 11, rel=1e-3)


def test_gradients_below_the_clip_are_left_alone(tmp_path):
    norms = norms_seen_by_the_optimizer(wrap(llama(), "pretraining"), tmp_path, POETCallback(), max_grad_norm=1e4)
    expected = norms_seen_by_the_optimizer(wrap(llama(), "pretraining"), tmp_path, POETCallback(0), max_grad_norm=1e4)
    assert norms == expected


def test_there_is_no_ramp_without_a_clip(tmp_path):
    norms = norms_seen_by_the_optimizer(wrap(llama(), "pretraining"), tmp_path, POETCallback(), max_grad_norm=0.0)
    assert min(norms) > CLIP


def test_negative_ramp_is_refused():
    with pytest.raises(ValueError, match="clip_ramp_steps=-1"):
        POETCallback(clip_ramp_steps=-1)


# Checkpoints


class Run(NamedTuple):
    directory: Path | None
    state: dict
    history: list


def model_of(regime, base_seed=0, **overrides):
    regime, _, dtype = regime.partition("-")
    return wrap(llama(seed=base_seed).to(getattr(torch, dtype or "float32")), regime, **overrides)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Whole runs with a checkpoint after every step, by regime."""

    @functools.cache
    def run(regime):
        directory = tmp_path_factory.mktemp(regime)
        every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        trainer = trainer_of(model_of(regime), directory, POETCallback(2), **every_step)
        trainer.train()
        return Run(directory, state(trainer.model), trainer.state.log_history)

    return run


@pytest.fixture(scope="module")
def resumed(uninterrupted, tmp_path_factory):
    """Runs that went on from a checkpoint of the whole one, in a model of which as much as possible differs: the seeds
    of the trainer and of POET, and in pretraining all weights. The order of the data is the same."""

    @functools.cache
    def run(regime, step):
        model = model_of(regime, base_seed=9 if regime == "pretraining" else 0, seed=5)
        trainer = trainer_of(model, tmp_path_factory.mktemp(regime), POETCallback(2), seed=7)
        trainer.train(resume_from_checkpoint=str(uninterrupted(regime).directory / f"checkpoint-{step}"))
        return Run(None, state(trainer.model), trainer.state.log_history)

    return run


def losses(log_history):
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log_history if "loss" in entry]


each_checkpoint = pytest.mark.parametrize("step", [6, 8], ids=["between_folds", "at_a_fold"])


@pytest.mark.parametrize("regime", ["block_stochastic", *PERIODIC, "periodic-bfloat16"])
@each_checkpoint
def test_resumed_run_ends_bit_equal(uninterrupted, resumed, regime, step):
    assert_same_state(resumed(regime, step).state, uninterrupted(regime).state)


@pytest.mark.parametrize("regime", ["block_stochastic", *PERIODIC])
@each_checkpoint
def test_resumed_run_logs_the_same_losses_and_gradient_norms(uninterrupted, resumed, regime, step):
    assert losses(resumed(regime, step).history) == losses(uninterrupted(regime).history)


def test_resumed_run_ends_bit_equal_with_the_default_order_of_the_data(tmp_path):
    def trainer():
        arguments = {"data_seed": None, "save_strategy": "steps", "save_steps": 5}
        return trainer_of(wrap(llama(), "pretraining"), tmp_path, POETCallback(), **arguments)

    whole, rest = trainer(), trainer()
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same_state(rest.model.state_dict(), whole.model.state_dict())


def files(run, step):
    return load_file(run.directory / f"checkpoint-{step}" / "adapter_model.safetensors")


@pytest.mark.parametrize("regime", PERIODIC)
@pytest.mark.parametrize("step", [3, 4, 5])
def test_checkpoint_of_a_step_knows_the_folds_up_to_it(uninterrupted, regime, step):
    tensors = files(uninterrupted(regime), step)
    schedules = {tuple(tensor.tolist()[:3]) for name, tensor in tensors.items() if name.endswith("poet_state")}
    assert schedules == {(0, step // 4, step // 4)}


@pytest.mark.parametrize("regime", PERIODIC)
@pytest.mark.parametrize("step", [3, 4, 5])
def test_only_the_checkpoint_of_a_fold_step_has_identity_rotations(uninterrupted, regime, step):
    weights = [tensor for name, tensor in files(uninterrupted(regime), step).items() if ".poet_" in name]
    rotations = [tensor for tensor in weights if tensor.is_floating_point()]
    assert any(tensor.any() for tensor in rotations) == (step != 4)


@pytest.mark.parametrize("regime", PERIODIC)
def test_evaluation_of_a_fold_step_sees_the_folded_model(tmp_path, regime):
    model = wrap(llama(), regime)
    trainer = trainer_of(model, tmp_path, POETCallback(), max_steps=6, eval_strategy="steps", eval_steps=1)
    seen = []

    def record(layer, args):
        if not layer.training:
            seen.append((trainer.state.global_step, layer.state("default").num_folds))

    layer = next(layer for _, layer in poet_layers(model))
    layer.register_forward_pre_hook(record)
    trainer.train()
    assert sorted(set(seen)) == [(step, step // 4) for step in range(1, 7)]


@pytest.mark.parametrize("regime", PERIODIC)
@pytest.mark.parametrize("step", [3, 4])
def test_checkpoint_is_the_model_that_was_evaluated(uninterrupted, tmp_path, regime, step):
    run = uninterrupted(regime)
    (logged,) = [e["eval_loss"] for e in run.history if e["step"] == step and "eval_loss" in e]
    model = PeftModel.from_pretrained(llama(), run.directory / f"checkpoint-{step}", is_trainable=True)
    assert trainer_of(model, tmp_path).evaluate()["eval_loss"] == logged


class Unlearning(TrainerCallback):
    """Goes up the gradient from a step on."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        for group in optimizer.param_groups:
            group["maximize"] = state.global_step >= self.after


@pytest.mark.parametrize("regime", ["exact_cayley", *PERIODIC])
def test_load_best_model_at_end_gives_the_model_with_the_best_loss(tmp_path, regime):
    """The best model is from before the fold of step 4, the last one from after it."""
    trainer = trainer_of(
        wrap(llama(), regime),
        tmp_path,
        POETCallback(),
        Unlearning(after=3),
        max_steps=7,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    by_step = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert min(by_step, key=by_step.get) == 3
    assert trainer.evaluate()["eval_loss"] == by_step[3]


@pytest.mark.parametrize("regime", PERIODIC)
def test_saved_model_computes_what_the_trained_one_does(tmp_path, regime):
    trainer = trainer_of(wrap(llama(), regime), tmp_path, POETCallback(), max_steps=6)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "final", is_trainable=True)
    assert trainer_of(loaded, tmp_path).evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_loss_of_every_step_is_finite(tmp_path):
    trainer = trainer_of(wrap(llama(), "pretraining", merge_interval=1), tmp_path, POETCallback(), poet_lr=0.1)
    trainer.train()
    assert all(math.isfinite(loss) for _, loss, _ in losses(trainer.state.log_history))


class Raising(TrainerCallback):
    """Ends a run from within its second step."""

    def __init__(self, error):
        self.error = error

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError()], ids=["interrupt", "out_of_memory"])
def test_adapter_can_be_disabled_after_a_run_that_ended_before_its_first_fold(tmp_path, error):
    original = logits(llama())
    model = wrap(llama(), "periodic")
    with pytest.raises(type(error)):
        trainer_of(model, tmp_path, POETCallback(), Raising(error)).train()
    with model.eval().disable_adapter():
        torch.testing.assert_close(logits(model), original, rtol=0, atol=0)


# The factory


FACTORY = {"lr": 3e-3, "poet_lr": 1e-2, "weight_decay": 0.1}


def run_of_factory(directory, by_hand, resume=None):
    model = model_of("pretraining")
    args = trainer_of(wrap(llama()), directory, max_steps=9, save_strategy="steps", save_steps=4).args
    if by_hand:
        groups = poet_param_groups(model, **FACTORY)
        made = {"optimizers": (torch.optim.AdamW(groups, betas=(0.9, 0.95)), None)}
    else:
        made = {"optimizer_cls_and_kwargs": poet_optimizer(**FACTORY, betas=(0.9, 0.95))}
    trainer = Trainer(model, args, train_dataset=text(), **made)
    trainer.train(resume_from_checkpoint=resume)
    return state(model)


@pytest.fixture(scope="module")
def run_by_hand(tmp_path_factory):
    return run_of_factory(tmp_path_factory.mktemp("by-hand"), by_hand=True)


def test_factory_trains_as_groups_and_optimizer_made_by_hand(run_by_hand, tmp_path):
    assert_same_state(run_of_factory(tmp_path, by_hand=False), run_by_hand)


def test_run_of_the_factory_resumes_bit_equal(run_by_hand, tmp_path):
    run_of_factory(tmp_path / "first", by_hand=False)
    resumed = run_of_factory(tmp_path / "second", by_hand=False, resume=str(tmp_path / "first" / "checkpoint-4"))
    assert_same_state(resumed, run_by_hand)


def test_factory_makes_any_optimizer_of_the_groups(tmp_path):
    model = model_of("block_stochastic")
    factory, kwargs = poet_optimizer(lr=1e-3, poet_lr=2e-3, optimizer_cls=RotationMuon, momentum=0.8)
    optimizer = factory()(model, **kwargs)
    assert isinstance(optimizer, RotationMuon)
    assert {group["name"]: (group["lr"], group["momentum"]) for group in optimizer.param_groups} == {
        "poet": (2e-3, 0.8)
    }


@pytest.mark.parametrize("optimizer_cls", [torch.nn.Linear, "adamw", torch.optim.lr_scheduler.LambdaLR])
def test_factory_refuses_what_is_no_optimizer(optimizer_cls):
    with pytest.raises(TypeError, match="optimizer_cls=.* must be a subclass of torch.optim.Optimizer"):
        poet_optimizer(lr=1e-3, poet_lr=1e-3, optimizer_cls=optimizer_cls)
