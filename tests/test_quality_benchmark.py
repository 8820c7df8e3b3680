"""The pretraining comparison: its search, its run files, its runs, and what is said about them."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, _zeropower_via_newtonschulz

from benchmarks import quality
from benchmarks.harness import quality_run
from benchmarks.harness.coordinate_search import Choice, Rate, Unmeasured, search
from benchmarks.harness.llama import kinds_of_layers, targeted_layers
from benchmarks.harness.quality_methods import METHODS, build, newton_schulz_of_muon
from benchmarks.harness.quality_run import BATCH_SIZE, Run, _train, batches, measure, repeats_a_pair, schedule
from benchmarks.harness.run_files import claimed, read_result, write_result
from benchmarks.harness.token_cache import Tokens
from benchmarks.report import quality as report
from benchmarks.report import quality_runs
from benchmarks.report.quality_names import name_of


START = Run("adamw", lr=1e-2, matrix_lr=1e-3, size="tiny", steps=4)
LATE = {"variant.max_angle": 0.024}


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    train, held_out = (torch.randint(0, 64, (n, 16), generator=generator) for n in (32, 8))
    return Tokens(train, held_out, vocab_size=64, eos_token_id=0)


# The search


def bowl(best_matrix_lr, best_lr):
    """Losses that are lowest at these rates, and lower without decay."""

    def losses_of(runs):
        return [
            abs(math.log2(run.matrix_lr / best_matrix_lr)) + abs(math.log2(run.lr / best_lr)) + run.weight_decay
            for run in runs
        ]

    return losses_of


RATES = [Rate("matrix_lr"), Rate("lr")]


@pytest.mark.parametrize(("matrix_lr", "lr"), [(1e-3, 1e-2), (8e-3, 1e-2), (2.5e-4, 4e-2)])
def test_search_ends_at_the_best_rates(matrix_lr, lr):
    best = search(START, RATES, bowl(matrix_lr, lr))
    assert (best.matrix_lr, best.lr) == (matrix_lr, lr)


def test_search_measures_both_neighbours_of_the_best_rate():
    measured = set()

    def losses_of(runs):
        measured.update(run.matrix_lr for run in runs)
        return bowl(4e-3, 1e-2)(runs)

    search(START, [Rate("matrix_lr")], losses_of)
    assert {2e-3, 4e-3, 8e-3} <= measured


def test_search_takes_the_best_choice():
    choice = Choice(({"weight_decay": 0.0}, {"weight_decay": 0.1}))
    assert search(START, [*RATES, choice], bowl(1e-3, 1e-2)).weight_decay == 0.0


def test_search_stops_at_what_is_not_measured_and_names_it():
    def losses_of(runs):
        raise Unmeasured(runs)

    with pytest.raises(Unmeasured) as caught:
        search(START, [Rate("lr")], losses_of)
    assert sorted(run.lr for run in caught.value.runs) == [5e-3, 1e-2, 2e-2]


def test_search_passes_over_runs_that_diverged():
    def losses_of(runs):
        return [math.inf if run.lr > 1e-2 else loss for run, loss in zip(runs, bowl(1e-3, 8e-2)(runs), strict=True)]

    assert search(START, [Rate("lr")], losses_of).lr == 1e-2


def test_search_without_an_end_is_an_error():
    with pytest.raises(ValueError, match="lr of .* has no best value"):
        search(START, [Rate("lr")], lambda runs: [-run.lr for run in runs])


# Run files


def test_result_is_read_as_it_was_written(tmp_path):
    write_result(tmp_path / "run.json", {"loss": 1.5, "run": {"lr": 0.1}})
    assert read_result(tmp_path / "run.json") == {"loss": 1.5, "run": {"lr": 0.1}}


def test_run_without_a_file_has_no_result(tmp_path):
    assert read_result(tmp_path / "run.json") is None


def test_run_is_claimed_by_one_process_at_a_time(tmp_path):
    code = f"""
from pathlib import Path
from benchmarks.harness.run_files import claimed
with claimed(Path({str(tmp_path / "run.json")!r})) as is_mine:
    print(is_mine)
"""
    with claimed(tmp_path / "run.json") as is_mine:
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (is_mine, other.stdout) == (True, "False\n")


def test_finished_run_is_not_claimed(tmp_path):
    write_result(tmp_path / "run.json", {})
    with claimed(tmp_path / "run.json") as is_mine:
        assert not is_mine


def test_claim_is_given_up_at_its_end(tmp_path):
    for _ in range(2):
        with claimed(tmp_path / "run.json") as is_mine:
            assert is_mine


# Runs


def test_run_of_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="^method='sgd' is unknown"):
        Run("sgd", lr=1.0)


def test_settings_of_a_run_are_in_its_name():
    changes = [{"lr": 0.5}, {"seed": 1}, {"weight_decay": 0.5}, {"warmup": 0.5}, {"betas": (0.5, 0.5)}]
    changes += [{"options": {"config.block_size": 8}}, {"options": {"config.block_size_pattern": {"a|b": 8}}}]
    changes += [{"steps": 5}, {"base_init": "usual"}, {"matrix_lr": None}]
    assert len({START.name, *(replace(START, **change).name for change in changes)}) == len(changes) + 1


def test_runs_of_many_settings_have_names_of_files():
    names = {replace(START, options={"config.block_size_pattern": {"a" * 250: size}}).name for size in (8, 16)}
    assert len(names) == 2 and max(map(len, names)) <= 250


def test_run_is_read_back_from_its_result(tokens):
    run = replace(START, steps=1, options={"optimizer.momentum": 0.5}, method="muon")
    assert Run(**json.loads(json.dumps(measure(run, tokens)["run"]))) == run


def test_learning_rate_rises_linearly_and_falls_to_a_hundredth():
    run = replace(START, steps=100, warmup=0.1)
    assert [schedule(step, run) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert schedule(100, run) == pytest.approx(0.01)


def test_methods_see_the_same_batches(tokens):
    first, second = (list(batches(tokens.train, replace(START, method=m))) for m in ("adamw", "muon"))
    assert torch.equal(torch.stack(first), torch.stack(second))


def test_every_sequence_comes_once_before_any_comes_again(tokens):
    num = len(tokens.train) // BATCH_SIZE
    seen = torch.cat(list(batches(tokens.train, replace(START, steps=num))))
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, tokens.train.tolist()))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, tokens):
    matrix_lr = None if method == "frozen" else 1e-2
    run = replace(START, method=method, matrix_lr=matrix_lr, steps=30)
    if method.startswith("poet"):
        run = replace(run, options={"config.block_size": 16})
    result = measure(run, replace_train(tokens))
    assert result["loss"] < math.log(64) - 0.02


@pytest.mark.parametrize("base_init", ["usual", "normalized"])
def test_initial_weights_of_a_baseline_are_scaled_by_layer(base_init, tokens):
    run = replace(START, base_init=base_init)
    options = {"init.scale": 2.0, "init.scale_pattern": {"q_proj": 3.0}}
    plain, scaled = (build(r, tokens)[0].model.layers[0].self_attn for r in (run, replace(run, options=options)))
    torch.testing.assert_close(scaled.q_proj.weight, 6 * plain.q_proj.weight)
    torch.testing.assert_close(scaled.v_proj.weight, 2 * plain.v_proj.weight)


@pytest.mark.parametrize("gains", ["layer", "output"])
def test_gains_train(gains, tokens):
    """Beyond what the rotations and the rest learn, which a learning rate of 0 leaves out."""
    run = replace(START, method="poet-ortho", options={"variant.gains": gains}, lr=0.1, matrix_lr=0.0)
    model, (optimizer,) = build(run, tokens)
    layer = targeted_layers(model)[0]
    model(input_ids=tokens.train[:4], labels=tokens.train[:4]).loss.backward()
    optimizer.step()
    assert layer.gain.shape == (() if gains == "layer" else (layer.out_features,))
    assert layer.gain.abs().min() > 0


def test_angles_follow_the_kind_of_layer(tokens):
    options = {"variant.angles": {"q_proj|k_proj": 0.5}}
    _, (optimizer,) = build(replace(START, method="poet-ortho", options=options, matrix_lr=0.02), tokens)
    groups = [group for group in optimizer.param_groups if group["name"] == "poet"]
    counts = Counter(group["radians"] for group in groups for _ in group["params"])
    assert counts.keys() == {0.01, 0.02}
    assert counts[0.02] / counts[0.01] == 5 / 2


def test_angles_follow_a_power_of_the_schedule(tokens):
    last = schedule(1, replace(START, steps=2))
    for power in (1, 2):
        options = {"variant.angle_power": power}
        run = replace(START, method="poet-ortho", options=options, matrix_lr=0.02, lr=1e-3, steps=2)
        model, (optimizer,) = build(run, tokens)
        _train(run, tokens, model, [optimizer], lambda model, step: None)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"poet": 0.02 * last**power, "decay": 1e-3 * last, "no_decay": 1e-3 * last})


@pytest.mark.parametrize(("options", "last"), [({}, 0.024 * schedule(1, replace(START, steps=2))), (LATE, 0.024)])
def test_angle_law_is_cut_before_the_schedule_or_in_every_step(options, last, tokens):
    run = replace(START, method="poet-ortho", matrix_lr=None, lr=0.5, steps=2, options=options)
    model, (optimizer,) = build(run, tokens)
    _train(run, tokens, model, [optimizer], lambda model, step: None)
    rates = [group["lr"] for group in optimizer.param_groups if "blocks" in group]
    assert rates == pytest.approx([last] * len(rates))


@pytest.mark.parametrize(("pattern", "of_queries"), [({}, 1.0), ({"q_proj": 0.5}, 0.5)])
def test_weights_grow_with_the_angles_of_the_steps(pattern, of_queries, tokens):
    options = {"variant.growth": 2.0, "variant.growth_pattern": pattern}
    run = replace(START, method="poet-ortho", options=options, matrix_lr=0.02, steps=3)
    model, (optimizer,) = build(run, tokens)
    before = [layer.base_layer.weight.norm() for layer in targeted_layers(model)]
    _train(run, tokens, model, [optimizer], lambda model, step: None)
    sizes = {1.0: 1.0, 0.5: 1.0}
    for step in range(run.steps):
        sizes = {share: size + 2.0 * share * 0.02 * schedule(step, run) for share, size in sizes.items()}
    kinds = kinds_of_layers(model)
    expected = [sizes[of_queries if kind == "q_proj" else 1.0] for kind in kinds]
    grown = [layer.base_layer.weight.norm() / old for layer, old in zip(targeted_layers(model), before, strict=True)]
    assert torch.stack(grown).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("options", "power"), [({}, 1), ({"variant.shrinking": 0.5}, 0.5)])
def test_angles_shrink_as_weights_grow(options, power, tokens):
    run = replace(START, method="poet-ortho", options={"variant.growth": 2.0, **options}, matrix_lr=0.02, steps=2)
    model, (optimizer,) = build(run, tokens)
    _train(run, tokens, model, [optimizer], lambda model, step: None)
    (rate,) = {group["lr"] for group in optimizer.param_groups if "blocks" in group}
    assert rate == pytest.approx(0.02 * schedule(1, run) / (1 + 2.0 * 0.02) ** power)


def test_growing_weights_keep_the_shape_of_their_spectra(tokens):
    run = replace(START, method="poet-ortho", options={"variant.growth": 50.0}, matrix_lr=0.02)
    assert measure(run, tokens)["drift"]["relative"] < 1e-3


def initial_weights(spectra, tokens):
    """A weight as the recipe draws it, and the same one with other spectra."""
    runs = [replace(START, method="poet-ortho", options=o) for o in ({}, {"variant.spectra": spectra})]
    return [targeted_layers(build(run, tokens)[0])[0].base_layer.weight for run in runs]


@pytest.mark.parametrize(("spectra", "largest"), [("equal", 1.0), ("decaying", 2.0)])
def test_spectra_have_the_norm_of_the_weights(spectra, largest, tokens):
    weight, changed = initial_weights(spectra, tokens)
    values = torch.linalg.svdvals(changed)
    assert changed.norm().item() == pytest.approx(weight.norm().item(), rel=1e-5)
    assert (values[0] / values[3]).item() == pytest.approx(largest, rel=1e-4)


def test_floored_spectra_have_no_small_values(tokens):
    before, after = initial_weights("floored", tokens)
    values, floored = torch.linalg.svdvals(before), torch.linalg.svdvals(after)
    assert after.norm().item() == pytest.approx(before.norm().item(), rel=1e-5)
    smallest = 0.5 * values.square().mean().sqrt()
    assert values[-1] < smallest
    assert (floored[-1] / floored[0]).item() == pytest.approx((smallest / values[0]).item(), rel=1e-4)


def replace_train(tokens):
    """Sequences that repeat one token, which is quickly learned."""
    rows = torch.arange(64).repeat_interleave(16).reshape(64, 16)
    return Tokens(rows[:32], rows[:8], tokens.vocab_size, tokens.eos_token_id)


@pytest.mark.parametrize("method", ["poet-ortho", "poet-paper", "frozen"])
def test_singular_values_are_measured_where_the_method_keeps_them(method, tokens):
    matrix_lr = None if method == "frozen" else 1e-2
    assert measure(replace(START, method=method, matrix_lr=matrix_lr), tokens)["drift"]["relative"] < 1e-3


@pytest.mark.parametrize("method", ["adamw", "muon", "galore"])
def test_size_of_the_spectra_is_measured_where_weights_are_trained(method, tokens):
    spectra = measure(replace(START, method=method, matrix_lr=1.0), tokens)["spectra"]
    model, _ = build(START, tokens)
    weights = [layer.weight for name, layer in model.named_modules() if name.endswith("up_proj")]
    rms = sum((weight.square().sum() / min(weight.shape)).sqrt().item() for weight in weights) / len(weights)
    at_start, at_end = spectra["up_proj"]["rms"]
    assert at_start == pytest.approx(rms, abs=1e-4)
    assert at_end > 1.1 * at_start


def test_tokens_that_repeat_a_pair_of_their_own_sequence():
    sequences = torch.tensor([[1, 2, 1, 2, 1, 3, 3, 3], [2, 1, 4, 4, 5, 6, 7, 8]])
    expected = torch.tensor([[0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(repeats_a_pair(sequences), expected)


def test_loss_of_repeated_pairs_and_of_the_others_make_up_that_of_all(tokens, monkeypatch):
    monkeypatch.setattr(quality_run, "HELD_OUT_LOG", START.steps)
    held_out = tokens.held_out % 4
    result = measure(START, replace(tokens, held_out=held_out))
    ((_, repeated, others),) = result["repeat_curve"]
    share = repeats_a_pair(held_out).float().mean().item()
    assert repeated != pytest.approx(others, abs=1e-3)
    assert share * repeated + (1 - share) * others == pytest.approx(result["loss"], abs=1e-3)


def test_diverged_run_ends_without_a_loss(tokens):
    result = measure(replace(START, lr=1e4, steps=50), tokens)
    assert result["loss"] is None
    assert result["diverged"] < 50


def test_gradients_and_state_of_adamw_are_three_numbers_for_each_weight(tokens):
    result = measure(START, tokens)
    assert result["gradient_bytes"] == 4 * result["parameters"]["linear"]
    assert result["optimizer_bytes"] == 8 * result["parameters"]["linear"]


def test_state_of_galore_is_two_moments_in_its_subspace_and_the_subspace(tokens):
    run = replace(START, method="galore", options={"optimizer.rank": 4})
    shapes = [layer.weight.shape for layer in targeted_layers(build(run, tokens)[0])]
    expected = sum(4 * (2 * max(shape) + min(shape)) for shape in shapes)
    assert measure(run, tokens)["optimizer_bytes"] == 4 * expected


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_orthogonalisation_of_muon_is_torchs_but_for_rounding(shape):
    assert _zeropower_via_newtonschulz is not newton_schulz_of_muon
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    settings = (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5, 1e-7
    ours, theirs = newton_schulz_of_muon(grad, *settings), _zeropower_via_newtonschulz(grad, *settings)
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0.06)


def test_changed_parts_differ_from_the_run_in_that_part():
    best = quality.STARTS["poet-ortho"]
    assert best.name not in {quality.changed(best, part).name for part in quality.PARTS.values()}


# What is said about them


def result(method="adamw", loss=1.0, losses=(0.9, 1.1), **changes):
    run = Run(**{"method": method, "lr": 1e-2, "matrix_lr": 1e-3, **changes})
    content = {"run": run.__dict__ | {"betas": list(run.betas)}, "family": run.family, "loss": loss}
    return content | {"losses": list(losses), "tokens": 1000}


def test_difference_is_that_of_the_same_sequences():
    """The sequences' own differences cancel: only what the method changes is left."""
    runs, baseline = [result(losses=(1.0, 5.0, 9.0))], [result(losses=(1.5, 5.5, 9.5))]
    assert quality_runs.difference(runs, baseline) == (pytest.approx(-0.5), pytest.approx(0.0))


def test_error_of_a_difference_has_the_part_of_the_seeds():
    runs = [result(seed=seed, losses=[seed, seed]) for seed in (1, 2)]
    baseline = [result(seed=seed, losses=[0.0, 0.0]) for seed in (1, 2)]
    mean, error = quality_runs.difference(runs, baseline, of_seeds=0.3)
    assert (mean, error) == (pytest.approx(1.5), pytest.approx(0.3))


def test_deviation_of_seeds_is_that_of_all_settings_together():
    runs = [result(method, steps=steps) for method in ("muon", "poet-ortho") for steps in (400, 1600)]
    runs += [result(seed=seed, loss=loss, steps=1600) for seed, loss in ((1, 0.0), (2, 1.0), (3, 2.0))]
    runs += [result(seed=seed, loss=loss, lr=2e-2, steps=1600) for seed, loss in ((1, 0.0), (2, 4.0))]
    assert quality_runs.deviation(runs) == (pytest.approx((10 / 3) ** 0.5), 3)


def test_mean_has_the_error_that_the_deviation_of_seeds_gives_it():
    runs = [result(seed=seed, loss=loss) for seed, loss in enumerate((1.0, 1.0, 2.0, 2.0))]
    assert report.mean_text(runs, of_seeds=0.2) == "1.500 ± 0.100"


def test_deviation_of_seeds_is_unknown_with_one_of_each():
    assert (
        quality_runs.deviation([result(m, steps=n) for m in ("adamw", "muon", "poet-ortho") for n in (4, 8)]) is None
    )


def test_runs_of_different_seeds_have_no_difference():
    assert quality_runs.difference([result(seed=1)], [result(seed=2)]) is None


def test_rate_is_bracketed_by_worse_ones_on_both_sides():
    runs = [result(loss=1.0)]
    runs += [result(loss=2.0, **{field: value}) for field, value in [("lr", 5e-3), ("lr", 2e-2), ("matrix_lr", 5e-4)]]
    assert not quality_runs.is_bracketed(runs)
    assert quality_runs.is_bracketed([*runs, result(loss=2.0, matrix_lr=2e-3)])


@pytest.mark.parametrize(
    ("losses", "text"),
    [((2.0, 1.0, 2.0), "0.001"), ((1.01, 1.0, 2.0), "≤ 0.0005 – 0.001"), ((2.0, 1.0, 1.01), "0.001 – 0.002 ≤")],
)
def test_range_of_rates_near_the_best_says_where_it_goes_on(losses, text):
    runs = [result(loss=loss, matrix_lr=rate) for loss, rate in zip(losses, (5e-4, 1e-3, 2e-3), strict=True)]
    assert report.range_text(sorted(runs, key=quality_runs.loss_of), "matrix_lr") == text


def test_final_runs_are_those_of_the_longest_with_equal_settings():
    runs = [result(steps=400), *(result(steps=1600, seed=seed) for seed in (42, 43))]
    assert quality_runs.final_runs(runs) == {}  # of one method
    runs += [result(method, steps=1600) for method in ("muon", "poet-ortho")]
    assert [run["run"]["seed"] for run in quality_runs.final_runs(runs)["adamw"]] == [42, 43]


def test_settings_of_final_runs_are_chosen_by_the_mean_of_the_most_seeds():
    runs = [result(method, steps=1600) for method in ("muon", "poet-ortho")] + [result(steps=400)]
    runs += [result(seed=42, loss=1.0, steps=1600), result(seed=43, loss=2.0, steps=1600)]
    runs += [result(seed=42, loss=1.2, lr=2e-2, steps=1600), result(seed=43, loss=1.2, lr=2e-2, steps=1600)]
    runs += [result(seed=42, loss=0.5, lr=4e-2, steps=1600)]
    assert [run["loss"] for run in quality_runs.final_runs(runs)["adamw"]] == [1.2, 1.2]


def test_variants_are_no_final_runs_but_listed_among_the_settings():
    runs = [result(method, steps=steps) for method in ("adamw", "muon", "poet-ortho") for steps in (400, 1600)]
    runs += [
        result("poet-ortho", seed=seed, steps=1600, loss=0.5, options={"variant.gains": "layer"}) for seed in (1, 2)
    ]
    assert quality_runs.final_runs(runs).keys() == {"adamw", "muon", "poet-ortho"}
    first, *others = report.long_settings_table(runs).splitlines()[2:]
    assert first.startswith('| POET, recipe "ortho" | 0.500 | 2 |') and "gains layer" in first
    assert len(others) == 3


@pytest.mark.parametrize(("losses", "text"), [((None, None), "diverged"), ((1.0, None), "1 of 2 diverged")])
def test_diverged_long_runs_are_named(losses, text):
    runs = [result(seed=seed, loss=loss, steps=1600) for seed, loss in zip((42, 43), losses, strict=True)]
    assert report.mean_text(runs) == text


def test_summary_has_the_long_runs_of_every_size(monkeypatch):
    """A size with short runs alone is left out, once there are long ones of another."""

    def of_size(millions, steps):
        runs = [result(method, steps=n) for method in ("adamw", "muon", "poet-ortho") for n in steps]
        return [run | {"parameters": {"model": millions * 10**6}} for run in runs]

    found = {("4m", "stdlib"): of_size(4, (400, 1600)), ("15m", "gsm8k"): of_size(15, (400, 1600))}
    monkeypatch.setattr(report, "read", lambda: {**found, ("60m", "stdlib"): of_size(60, (400,))})
    text = report.summary()
    assert [line for line in text.splitlines() if line.endswith(":")] == [
        "4.0M parameters, on the source of the Python standard library:",
        "15.0M parameters, on GSM8K:",
    ]
    assert text.count("| Muon | 1.000 |") == 2


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "POET, the paper's recipe"),
        ({"config.block_size": 128}, "POET, the paper's recipe, b = 128"),
        (
            {"config.variant": "fully_stochastic", "config.block_size": 0.5},
            "POET, the paper's recipe, fully stochastic, b = 0.5",
        ),
    ],
)
def test_methods_are_called_by_their_blocks(options, name):
    assert name_of(Run("poet-paper", lr=1e-2, options=options).family) == name


def test_runs_made_again_are_beside_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    monkeypatch.setattr(quality_runs, "RESULTS", tmp_path)
    for loss, again in ((3.0, False), (3.04, True)):
        path = quality.path_of(Run(**result("muon")["run"]), again)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result("muon", loss=loss)))
    (row,) = report.again_table(quality_runs.read_again("4m", "stdlib")).splitlines()[2:]
    assert row.startswith("| Muon | 42 | 3.000 | 3.040 |")
    assert len(quality_runs.read()["4m", "stdlib"]) == 1


def test_losses_of_repeated_pairs_are_those_half_way_and_at_the_end():
    runs = [result(method, steps=n) for method in ("adamw", "muon", "poet-ortho") for n in (400, 1600)]
    curve = [[400, 4.0, 5.0], [800, 3.0, 4.5], [1200, 2.5, 4.2], [1600, 2.0, 4.0]]
    runs.append(result("muon", loss=0.5, steps=1600, lr=2e-2) | {"repeat_curve": curve})
    runs.append(result("muon", loss=None, steps=1600, lr=4e-2) | {"repeat_curve": curve[:1]})
    (row,) = report.repeats_table(runs).splitlines()[2:]
    assert row.startswith("| Muon | 42 | 3.000 | 2.000 | 4.500 | 4.000 |")


def test_runs_that_are_not_there_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    monkeypatch.setattr(quality, "read_tokens", lambda *_: pytest.fail("a run is made"))
    quality.make("tune", ["frozen"], {}, None, again=True)


@pytest.mark.parametrize("plan", [[], ["--plan", "tune"]])
def test_runs_are_made_again_of_a_plan_that_has_finished_ones(plan, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quality", "--again", *plan])
    with pytest.raises(SystemExit):
        quality.main()
    assert "--plan parts or --plan final" in capsys.readouterr().err


def test_spectra_are_those_of_the_best_run_that_has_them():
    found = {"up_proj": {"rms": [0.5, 1.0], "largest": [1.6, 1.8], "median": [0.9, 0.9]}}
    runs = [result("muon", loss=1.0), result("muon", lr=2e-2, loss=2.0) | {"spectra": found}]
    (row,) = report.spectra_table(runs).splitlines()[2:]
    assert row == "| Muon | 400 | 0.001 | up_proj | 0.50 | 1.00 | 2.00 | 1.60 → 1.80 | 0.90 → 0.90 |"


def test_pattern_fits_into_a_cell_of_a_table():
    pattern = {"q_proj|k_proj": 3.0, "down_proj": 0.5}
    runs = [result("poet-ortho", options={"config.base_init_scale_pattern": pattern})]
    assert "base init scale pattern q_proj, k_proj: 3; down_proj: 0.5" in report.tuning_table(runs)


def test_variants_are_no_runs_of_the_search():
    runs = [result("poet-ortho"), result("poet-ortho", loss=0.5, options={"variant.gains": "layer"})]
    assert [run["loss"] for run in quality_runs.tuning_runs(runs)["poet-ortho"]] == [1.0]
    assert "| gains | none | layer | 1.000 | 0.500 |" in report.parts_table(runs, runs[0])


def test_costs_of_a_method_with_long_runs_alone_are_what_it_holds():
    held = {"gradient_bytes": 10**6, "optimizer_bytes": 10**6, "step_cpu_seconds": 1.0}
    runs = [result(method, steps=n) | held for method in ("adamw", "muon", "poet-ortho") for n in (400, 1600)]
    runs.append(result("poet-ortho", steps=1600, options={"config.block_size": 512}) | held)
    (row,) = (line for line in report.cost_table(runs).splitlines() if "b = 512" in line)
    assert row == '| POET, recipe "ortho", b = 512 |  | 2.0 | 100 % |  |  |  |'


def test_parts_are_those_of_the_best_blocks():
    runs = [result(method, steps=n) for method in ("adamw", "muon", "poet-ortho") for n in (400, 1600)]
    runs.append(result("poet-ortho", loss=0.5, steps=1600, options={"config.block_size": 512}))
    assert report.parts_tables(runs)[-1][1].splitlines()[2].startswith("| block size | 512 | 256 | 0.500 | 1.000 |")


def test_parts_are_those_of_the_blocks_with_the_most_seeds():
    runs = [result(method, steps=n) for method in ("adamw", "muon", "poet-ortho") for n in (400, 1600)]
    runs.append(result("poet-ortho", steps=1600, seed=43))
    runs.append(result("poet-ortho", loss=0.5, steps=1600, options={"config.block_size": 512}))
    assert report.parts_tables(runs)[-1][1].splitlines()[2].startswith("| block size | 256 | 512 | 1.000 | 0.500 |")


def test_a_run_that_no_other_differs_from_by_one_thing_has_no_table_of_parts():
    runs = [result("poet-ortho"), result("poet-ortho", lr=2e-2, matrix_lr=1e-2)]
    assert report.parts_table(runs, runs[0]) == ""


def test_parts_are_pairs_whose_first_run_has_what_the_best_run_has():
    """The better of two such pairs, and none that only worse values of another setting would make."""
    best = result("poet-ortho", loss=1.0, weight_decay=0.0)
    other = result("poet-ortho", loss=1.2, weight_decay=0.0, warmup=0.1, lr=2e-2)
    pair = [
        result("poet-ortho", loss=loss, lr=2e-2, weight_decay=0.0, options=o) for loss, o in ((1.1, {}), (1.3, LATE))
    ]
    rows = report.parts_table([best, other, *pair], best).splitlines()[2:]
    assert [row[: row.index("+") - 1] for row in rows] == [
        "| other rate | 0.01 | 0.02 | 1.000 | 1.100 |",
        "| max angle | none | 0.024 | 1.100 | 1.300 |",
        "| warmup | 0.0 | 0.1 | 1.100 | 1.200 |",
    ]


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"matrix_lr": None}, "| matrix rate | 0.001 | by the angle law | 1.000 | 1.500 |"),
        ({"method": "poet-ortho-adamw"}, "| optimizer | RotationMuon | AdamW | 1.000 | 1.500 |"),
        ({"options": {"optimizer.alternate": False}}, "| alternate | True | False | 1.000 | 1.500 |"),
        ({"options": {"optimizer.decorrelation": 0.25}}, "| decorrelation | 0.0 | 0.25 | 1.000 | 1.500 |"),
    ],
)
def test_settings_that_a_run_does_not_name_have_their_values_in_the_table_of_parts(changes, row):
    runs = [result("poet-ortho"), result(**{"method": "poet-ortho", "loss": 1.5, **changes})]
    assert row in report.parts_table(runs, runs[0])


@pytest.mark.parametrize("lengths", [[400], [400, 1600]])
def test_runs_of_every_length_have_their_parts(lengths):
    runs = [result(method, steps=steps) for method in ("adamw", "muon", "poet-ortho") for steps in lengths]
    runs += [result("poet-ortho", loss=1.5, steps=steps, lr=2e-2) for steps in lengths]
    assert [steps for steps, _ in report.parts_tables(runs)] == lengths


def test_runs_that_diverged_are_parts_too():
    runs = [result("poet-ortho"), result("poet-ortho", loss=None, lr=2e-2)]
    assert "| other rate | 0.01 | 0.02 | 1.000 | diverged |" in report.parts_table(runs, runs[0])


def test_results_of_one_length_have_no_final_runs():
    assert quality_runs.final_runs([result(), result(seed=43)]) == {}


def test_kept_results_are_runs_of_the_names_of_their_files():
    for path in quality.RESULTS.glob("*/*/*.json"):
        assert quality.path_of(Run(**json.loads(path.read_text())["run"])) == path
