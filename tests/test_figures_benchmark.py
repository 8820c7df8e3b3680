"""What training does to weights, by `benchmarks.figures`: its measures along a run, and its page and pictures."""

import json
from dataclasses import replace

import models
import pytest
import torch
from torch import nn

from benchmarks import figures
from benchmarks.harness.quality_run import Run, measure
from benchmarks.harness.token_cache import Tokens
from benchmarks.report import figures as report
from benchmarks.report import figures_data, figures_plots
from poet_peft.layer import poet_layers
from poet_peft.maths.measures import hyperspherical_energy


ADAMW = Run("adamw", lr=1e-2, matrix_lr=1e-3, size="tiny", steps=4)


# Measures


def test_measures_of_a_known_weight():
    layer = nn.Linear(33, 33, bias=False)
    layer.weight.data = torch.diag(torch.arange(1.0, 34.0))
    found = figures.measures(layer)
    assert found["singular_values"] == pytest.approx(list(range(33, 0, -2)))
    assert found["stable_rank"] == pytest.approx(sum(n**2 for n in range(34)) / 33**2)
    assert found["energy"] == pytest.approx(2**-0.5)  # orthogonal rows
    layer.weight.data = torch.eye(33)
    assert figures.measures(layer)["entropy"] == pytest.approx(1.0)


def test_rotated_layer_is_measured_as_the_model_computes_with_it():
    model = models.wrap(models.llama(num_hidden_layers=1))
    _, layer = next(poet_layers(model))
    found, base = figures.measures(layer), figures.measures(layer.get_base_layer())
    W = layer.rotated_weight(["default"]).detach().double()
    assert found["energy"] == pytest.approx(float(hyperspherical_energy(W)), rel=1e-6) != base["energy"]
    assert found["singular_values"] == pytest.approx(base["singular_values"], rel=1e-4)
    assert 0 < found["probe_R"] < 1 and 0 < found["probe_P"] < 1


def test_layers_have_one_name_with_and_without_adapters_and_none_is_the_head():
    plain = [name for name, _ in figures.linear_layers(models.llama())]
    rotated = [name for name, _ in figures.linear_layers(models.wrap(models.llama()))]
    assert plain == rotated and len(plain) == 14 and "lm_head" not in plain


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    train, held_out = (torch.randint(0, 64, (n, 16), generator=generator) for n in (32, 8))
    return Tokens(train, held_out, vocab_size=64, eos_token_id=0)


@pytest.mark.parametrize("method", ["adamw", "poet-paper"])
def test_recorder_follows_a_run(tokens, monkeypatch, method):
    monkeypatch.setattr(figures, "EVERY", 2)
    record = figures.Recorder()
    measure(replace(ADAMW, method=method), tokens, record)
    assert record.steps == [0, 2, 4]
    for layer in record.layers.values():
        first, _, last = layer["singular_values"]
        keeps = first[:-1] == pytest.approx(last[:-1], rel=1e-3)
        assert keeps == (method == "poet-paper")
        if method == "poet-paper":
            assert layer["probe_R"][0] == 1 > layer["probe_R"][1] > layer["probe_R"][2]


def test_coverage_is_whole_and_even_with_blocks_and_grows_with_index_sets(monkeypatch):
    monkeypatch.setattr(figures, "NUM_SETS", 4)
    blocks, half, _, eighth = figures.coverage().values()
    assert blocks == {"covered": [1.0] * 4, "spread": [0.0] * 4}
    assert half["covered"][0] == 1 - 0.5**2 and eighth["covered"][0] == pytest.approx(1 - 0.875**2, rel=1e-4)
    for values in (half, eighth):
        assert values["covered"] == sorted(values["covered"]) and values["spread"] == sorted(values["spread"])[::-1]


# Page and pictures


def result(method, largest, probes):
    """Of two layers of each kind, measured at the start and the end."""
    spectra = [[top, *[1.0] * 15, 0.1] for top in largest]
    layer = {"singular_values": spectra, "entropy": [0.9, 0.8], "stable_rank": [5.0, 4.0], "energy": [0.7, 0.71]}
    layer |= {"probe_R": [1.0, 0.9], "probe_P": [1.0, 0.8]} if probes else {}
    places = [
        f"self_attn.{kind}" if kind in ("q_proj", "k_proj", "v_proj", "o_proj") else f"mlp.{kind}"
        for kind in figures_data.KINDS
    ]
    return {
        "run": replace(ADAMW, method=method).__dict__,
        "loss": 3.5,
        "steps": [0, 20],
        "layers": {f"model.layers.{number}.{place}": layer for number in (0, 1) for place in places},
        "train_curve": [[10, 5.0], [20, 4.0]],
        "held_out_curve": [[10, 5.0], [20, 4.0]],
        "parameters": {"model": 4_200_000},
        "tokens": 80_000,
        "hardware": "one core",
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder with two of the three runs."""
    monkeypatch.setattr(figures_data, "RESULTS", tmp_path)
    for method, largest in (("adamw", (2.0, 6.0)), ("poet-paper", (2.0, 2.0002))):
        (tmp_path / f"{method}.json").write_text(json.dumps(result(method, largest, probes=method != "adamw")))
    parts = {f"fully stochastic, 1/{n}": {"covered": [0.5, 1.0], "spread": [1.0, 1 / n]} for n in (2, 4, 8)}
    (tmp_path / "coverage.json").write_text(json.dumps(parts))
    return tmp_path


def test_page_says_what_the_runs_show(results):
    page = report.section()
    assert "3.500 with AdamW and 3.500 with POET, the paper's recipe" in page
    assert "the paper's recipe changes none by more than 0.01 %" in page
    assert "AdamW multiplies the largest of the query and key projections by 3.0" in page
    assert "| `q_proj` | 2.00 → 6.00 | 1.00 → 1.00 | 6.0 | 2.00 → 2.00 |" in page
    assert "end at 0.90 and 0.80 with POET, the paper's recipe for the two sides" in page
    assert "need 2 index sets for 99 %" in page and "by 50 % of its mean with 1/2, and by 12 % with 1/8" in page


def test_page_names_the_run_that_is_not_measured(results):
    assert 'Not measured yet: POET, recipe "ortho".' in report.section()


def test_page_without_adamw_says_nothing_of_it(results):
    (results / "adamw.json").unlink()
    page = report.section()
    assert "Not measured yet: AdamW and" in page and "POET keeps what the initial weights gave it" in page
    assert not any("AdamW" in text_of(figures_data.read()) for *_, text_of in list(report.FIGURES.values())[2:5])


def test_every_picture_of_the_page_is_drawn_of_the_runs(results):
    pictures = figures_plots.shown()
    assert [f"figures/{name}" in report.section() for name in pictures] == [True] * len(report.FIGURES)
    for picture in pictures.values():
        figure = figures_plots.draw(picture)
        assert all(panel.lines for panel in figure.axes)


def test_without_results_there_are_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(figures_data, "RESULTS", tmp_path)
    assert figures_plots.shown() == {}
