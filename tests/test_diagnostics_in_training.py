"""`POETCallback(diagnostics_every=N)` in runs of transformers' Trainer."""

import json
import sqlite3
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from models import wrap
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import llama, trainer_of

from poet_peft import POETCallback
from poet_peft.diagnostics_file import read_diagnostics
from poet_peft.layer import poet_layers


FILE = "poet_diagnostics.jsonl"


def steps_of(folder):
    return [line["step"] for line in read_diagnostics(folder / FILE)]


@pytest.mark.parametrize("regime", ["block_stochastic", "periodic"])
def test_the_file_and_the_log_hold_every_measurement(regime, tmp_path):
    trainer = trainer_of(wrap(llama(), regime), tmp_path, POETCallback(diagnostics_every=2), max_steps=5)
    trainer.train()
    assert steps_of(tmp_path) == [2, 4]
    logged = [log["step"] for log in trainer.state.log_history if "poet/diagnostics/max_angle" in log]
    assert logged == [2, 4]


def test_a_fold_does_not_drop_what_was_measured_in_its_step(tmp_path):
    trainer = trainer_of(wrap(llama(), "periodic"), tmp_path, POETCallback(diagnostics_every=4), max_steps=4)
    trainer.train()
    log = trainer.state.log_history[3]
    assert log["poet/num_reinits"] and log["poet/diagnostics/max_angle"] > 0


def test_momentum_is_compared_with_the_gradient(tmp_path):
    trainer_of(wrap(llama()), tmp_path, POETCallback(diagnostics_every=3), max_steps=3).train()
    assert read_diagnostics(tmp_path / FILE)[0]["summary"]["momentum_cosine"] is not None


def test_a_resumed_run_continues_the_file(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer_of(wrap(llama()), tmp_path, POETCallback(diagnostics_every=1), **settings).train()
    resumed = trainer_of(wrap(llama()), tmp_path, POETCallback(diagnostics_every=2), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert steps_of(tmp_path) == [1, 2, 3, 4, 6]


def probed(folder):
    return [line["summary"].get("probe_cosine") for line in read_diagnostics(folder / FILE)]


@pytest.mark.parametrize("has_file", [True, False])
def test_a_resumed_run_goes_on_with_its_probes_if_the_checkpoint_has_them(has_file, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}

    def trainer():
        model = wrap(llama(), "periodic", merge_interval=2, init_weights=True)
        return trainer_of(model, tmp_path, POETCallback(diagnostics_every=1), **settings)

    trainer().train()
    whole = probed(tmp_path)
    file = tmp_path / "checkpoint-4" / "poet_probes.safetensors"
    if not has_file:
        file.unlink()
    with nullcontext() if has_file else pytest.warns(UserWarning, match="probe_cosine is not measured"):
        trainer().train(resume_from_checkpoint=str(file.parent))
    assert whole == sorted(whole, reverse=True) and whole[-1] < 1
    assert probed(tmp_path) == pytest.approx(whole) if has_file else probed(tmp_path) == [*whole[:4], None, None]


def test_a_new_run_begins_the_file_anew(tmp_path):
    for _ in range(2):
        trainer_of(wrap(llama()), tmp_path, POETCallback(diagnostics_every=2), max_steps=2).train()
    assert steps_of(tmp_path) == [2]


@pytest.mark.parametrize(
    ("what", "limits", "config"),
    [
        ("angle", {"max_angle": 1e-6}, {}),
        ("orthogonality error", {"max_orthogonality_error": 1e-12}, {}),
        ("spectral drift", {"max_drift": 1e-12}, {}),
        ("spectral drift", {}, {"max_drift": 1e-12}),
    ],
    ids=["angle", "orthogonality", "drift", "own drift"],
)
def test_a_layer_out_of_range_is_named_once(what, limits, config, tmp_path):
    callback = POETCallback(diagnostics_every=1, **limits)
    with pytest.warns(UserWarning, match=f"the {what} of '.*q_proj'") as caught:
        trainer_of(wrap(llama(), **config), tmp_path, callback, max_steps=2).train()
    assert sum(f"the {what} of" in str(w.message) and "q_proj" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("side", ["poet_R", "poet_P"])
def test_either_side_out_of_range_is_warned_of(side, tmp_path):
    model = wrap(llama(), init_weights=True)
    getattr(next(layer for _, layer in poet_layers(model)), side)["default"].weight.data.fill_(0.05)
    with pytest.warns(UserWarning, match="the angle of '.*q_proj' is .* at step 1, above"):
        trainer_of(model, tmp_path, POETCallback(diagnostics_every=1, max_angle=0.1), max_steps=1).train()


def test_measuring_changes_no_bit_of_the_training(tmp_path):
    weights = []
    for every in (0, 1):
        model = wrap(llama(), "periodic")
        trainer_of(model, tmp_path / str(every), POETCallback(diagnostics_every=every), max_steps=5).train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match="diagnostics_every=-1"):
        POETCallback(diagnostics_every=-1)


def test_memory_speed_rates_and_settings_are_in_the_file(tmp_path):
    settings = {"max_steps": 4, "include_num_input_tokens_seen": "all"}
    trainer_of(wrap(llama()), tmp_path, POETCallback(diagnostics_every=2), poet_lr=2e-2, **settings).train()
    first, second = read_diagnostics(tmp_path / FILE)
    assert first["learning_rates"]["poet"] == 2e-2 and first["peak_memory"] > 1e6
    for line in (first, second):  # a step has 4 sequences of 24 tokens
        assert line["tokens_per_second"] / line["steps_per_second"] == pytest.approx(4 * 24)
    assert first["settings"]["per_device_train_batch_size"] == 4 and "torch" in first["versions"]
    assert "settings" not in second


def test_speed_and_memory_are_in_the_log(tmp_path):
    trainer = trainer_of(wrap(llama()), tmp_path, POETCallback(diagnostics_every=2), max_steps=2)
    trainer.train()
    log = trainer.state.log_history[1]
    assert {f"poet/diagnostics/{name}" for name in ("steps_per_second", "peak_memory", "learning_rate/poet")} <= set(
        log
    )


def test_tensorboard_gets_every_measurement(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trainer_of(wrap(llama()), tmp_path / "run", max_steps=4, report_to=["tensorboard"])
    POETCallback(diagnostics_every=2).attach(trainer)
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    drawn = {
        tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"] if "diagnostics" in tag
    }
    for line in read_diagnostics(tmp_path / "run" / FILE):
        for name, value in line["summary"].items():
            points = drawn[f"train/poet/diagnostics/{name}"]
            assert (line["step"], pytest.approx(value, rel=1e-6)) in points and len(points) == 2


@pytest.mark.skipif(
    find_spec("trackio") is None, reason="trackio asks for pillow<13, which what else is tested has not"
)
def test_trackio_gets_every_measurement_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trainer = trainer_of(wrap(llama()), tmp_path / "run", max_steps=4, report_to=["trackio"], project="poet")
    POETCallback(diagnostics_every=2).attach(trainer)
    trainer.train()
    with sqlite3.connect(tmp_path / "trackio" / "poet.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by step")]
    kept = [row["train/poet/diagnostics/max_angle"] for row in rows if "train/poet/diagnostics/max_angle" in row]
    lines = read_diagnostics(tmp_path / "run" / FILE)
    assert kept == pytest.approx([line["summary"]["max_angle"] for line in lines]) and len(kept) == 2
