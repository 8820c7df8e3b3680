"""The benchmark commands: what they count, fit and write, and that the READMEs say what the results say."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu, tables
from benchmarks.harness import formulas
from benchmarks.harness.fits import power_law, upper_half, upper_half_exponent
from benchmarks.harness.llama import PRESETS, linear_shapes, llama, targeted_layers
from benchmarks.harness.memory import measure_memory
from benchmarks.harness.methods import adamw, check_method, why_not
from benchmarks.harness.one_layer import LayerContender
from benchmarks.harness.timing import interleave, quartiles, summarize
from poet_peft.ops import paths


ROOT = Path(__file__).parents[1]


# Memory

N, IN, OUT = 1000, 64, 96
FLOAT = 4
STEP_COUNT = FLOAT  # AdamW's, one for each parameter


class Cached(nn.Linear):
    """A linear layer that keeps a copy of its weight from one micro-batch to the next, and computes with it."""

    copy = None

    def forward(self, x):
        if self.copy is None:
            self.copy = self.weight.detach() * 1
        return x @ self.copy.mT + x @ self.weight.mT


def memory_of(layer):
    x, grad_y = torch.ones(N, IN, requires_grad=True), torch.ones(N, OUT)
    optimizer = adamw(layer.parameters())
    return measure_memory(layer, optimizer, lambda: layer(x), lambda y: y.backward(grad_y), [x, grad_y], "cpu")


def test_memory_of_a_linear_layer_is_the_hand_count():
    memory = memory_of(nn.Linear(IN, OUT, bias=False))
    weight = FLOAT * IN * OUT
    assert memory.weights == memory.gradients == weight
    assert memory.optimizer == 2 * weight + STEP_COUNT
    assert memory.activations == FLOAT * N * IN  # the input
    assert memory.caches == 0


def test_peak_of_a_linear_layer_is_the_hand_count():
    memory = memory_of(nn.Linear(IN, OUT, bias=False))
    weight, x, y = FLOAT * IN * OUT, FLOAT * N * IN, FLOAT * N * OUT
    # In the backward: weight, its gradient, two moments; input and output with their gradients.
    assert memory.peak == 4 * weight + STEP_COUNT + 2 * x + 2 * y
    # The new gradient of the weight beside the one that it is added to.
    assert memory.peak_accumulating == memory.peak + weight


def test_frozen_layer_keeps_nothing_for_the_backward():
    layer = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    memory = memory_of(layer)
    assert (memory.activations, memory.gradients, memory.optimizer, memory.caches) == (0, 0, 0, 0)


def test_what_a_micro_batch_leaves_behind_is_a_cache_and_no_activation():
    memory = memory_of(Cached(IN, OUT, bias=False))
    assert memory.caches == FLOAT * IN * OUT
    assert memory.activations == FLOAT * N * IN


def test_parameters_that_share_a_storage_count_once():
    tied = nn.Sequential(nn.Linear(IN, IN, bias=False), nn.Linear(IN, OUT, bias=False), nn.Linear(OUT, IN, bias=False))
    tied[0].weight.data = tied[1].weight.data[:IN]
    assert memory_of(tied[:2]).weights == FLOAT * IN * OUT


# Time


def test_every_round_runs_every_task_in_an_order_that_the_seed_decides():
    def orders(seed):
        order = []
        tasks = {name: lambda name=name: order.append(name) or {"": 1.0} for name in "abcde"}
        rounds = interleave(tasks, seconds=0, min_rounds=4, max_rounds=4, seed=seed, warm_up=False)
        assert len(rounds) == 4
        return [order[start : start + 5] for start in range(0, len(order), 5)]

    assert all(sorted(order) == list("abcde") for order in orders(0))
    assert len(set(map(tuple, orders(0)))) > 1
    assert orders(0) == orders(0) != orders(1)


def test_warm_up_is_not_among_the_rounds():
    counter = iter(range(10))
    rounds = interleave({"a": lambda: {"": next(counter)}}, seconds=0, min_rounds=2, max_rounds=2)
    assert rounds == [{"a": 1}, {"a": 2}]


def test_ratios_are_taken_within_a_round_and_phase():
    rounds = [
        {"full": 1.0, "full step": 10.0, "other first": 2.0, "other step": 20.0},
        {"full": 4.0, "full step": 1.0, "other first": 8.0, "other step": 2.0},
    ]
    summary = summarize(rounds, baseline="full")
    always_twice = {"median": 2.0, "q1": 2.0, "q3": 2.0}
    assert summary["other first"]["ratio"] == summary["other step"]["ratio"] == always_twice
    assert summary["other first"]["seconds"] == {"median": 5.0, "q1": 3.5, "q3": 6.5}


def test_quartiles():
    assert quartiles([5, 1, 4, 2, 3]) == {"median": 3, "q1": 2, "q3": 4}
    assert quartiles([7]) == {"median": 7, "q1": 7, "q3": 7}


class Args:
    device, dtype, seed = "cpu", "float32", 0


def test_layer_that_does_not_notice_a_step_is_found():
    contender = LayerContender("poet-8", (16, 24), 8, Args)
    contender.check_that_steps_arrive()
    contender.optimizer.step = lambda: None
    with pytest.raises(RuntimeError, match="did not change the output"):
        contender.check_that_steps_arrive()


@pytest.mark.parametrize("name", ["poet", "poet-64-", "lora", "oft-1/2", "poet-fs-64", "fullest"])
def test_unknown_method_is_refused(name):
    with pytest.raises(ValueError, match="unknown method"):
        check_method(name)


def test_methods_that_do_not_fit_are_left_out_with_the_reason():
    assert why_not("oft-64", 256, 1376, 512, 1e9) == "64 does not divide 1376"
    assert why_not("oft-32", 256, 1376, 512, 1e9) is None
    assert re.fullmatch(r"left out: [\d,]+ GFLOP", why_not("poet-fs-1/2", 256, 4096, 4096, 100))


# Fits and formulas


def test_fit_recovers_a_power_law():
    x = [1, 2, 4, 8, 16]
    assert power_law(x, [3 * value**1.7 for value in x]) == pytest.approx((3, 1.7))


def test_exponent_is_that_of_the_upper_half():
    x = [1, 2, 4, 8, 16, 32]
    assert upper_half(x) == [8, 16, 32]
    assert upper_half_exponent(x, [100 if value < 8 else value**2 for value in x]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("block_size", "millions"), [(64, 2.39), (128, 4.81), (256, 9.66)], ids=["b64", "b128", "b256"]
)
def test_formula_counts_the_parameters_of_the_paper(block_size, millions):
    """Table 2 of arXiv 2506.08001, Llama-60M. It counts 1,280 of the 1,376 intermediate features, in whole blocks."""
    hidden, _, *rest = PRESETS["60m"]
    count = sum(formulas.poet_parameters(m, n, block_size) for m, n in linear_shapes((hidden, 1280, *rest)))
    assert count == pytest.approx(millions * 1e6, rel=3e-3)


def test_formulas_of_full_and_fully_stochastic_training_count_the_parameters_of_the_paper():
    shapes = linear_shapes(PRESETS["60m"])
    assert sum(m * n for m, n in shapes) == pytest.approx(25.3e6, rel=3e-3)
    half = sum(formulas.fully_stochastic_parameters(m, n, 1 / 2) for m, n in shapes)
    assert half == pytest.approx(8.54e6, rel=3e-3)


def test_shapes_are_those_of_the_model():
    model = llama(PRESETS["tiny"], vocab_size=64, seq_length=8)
    assert sorted(linear_shapes(PRESETS["tiny"])) == sorted(tuple(m.weight.shape) for m in targeted_layers(model))


# Files


@pytest.fixture(scope="module")
def quick(forks, tmp_path_factory):
    """A benchmarks folder with what the commands wrote with --quick."""
    directory = tmp_path_factory.mktemp("benchmarks")
    (directory / "README.md").write_bytes((ROOT / "benchmarks" / "README.md").read_bytes())
    for command in tables.SECTIONS:
        output = directory / "results" / f"{command}-quick.json"
        process = forks.run("-m", f"benchmarks.{command}", "--quick", "--output", output)
        assert process.returncode == 0, process.stderr
    return directory


def read(directory, command):
    return json.loads((directory / "results" / f"{command}-quick.json").read_text())


@pytest.mark.slow
def test_layer_command_measures_every_method(quick):
    result = read(quick, "layer")
    assert len(result["cells"]) == 2
    for cell in result["cells"]:
        assert {key.partition(" ")[0] for key in cell["timings"]} == set(result["settings"]["methods"])
        assert {"poet-16 first", "poet-16 later", "full"} <= set(cell["timings"])
    assert set(result["cells"][-1]["memory"]) == set(result["settings"]["methods"])


@pytest.mark.slow
def test_model_command_measures_every_method(quick):
    result = read(quick, "model")
    methods = set(result["settings"]["methods"])
    assert set(result["memory"]) == methods
    once, twice = result["cells"]
    assert {key.partition(" ")[0] for key in once["timings"]} == methods
    assert {key.partition(" ")[0] for key in twice["timings"]} == set(result["settings"]["accumulating_methods"])
    assert set(result["folds"]) == {m for m in methods if m.startswith("poet") and not m.startswith("poet-ortho")}


@pytest.mark.slow
def test_model_command_agrees_with_the_formula_of_adamw(quick):
    memory = read(quick, "model")["memory"]["full"]
    assert memory["linear_layers_held"] == memory["linear_layers_formula"]


@pytest.mark.slow
def test_scaling_command_fits_every_sweep(quick):
    result = read(quick, "scaling")
    assert [cell["sweep"] for cell in result["cells"]] == ["tokens", "width", "block size", "depth"]
    for cell in result["cells"]:
        assert len(cell["points"]) == len(cell["values"])
        assert set(cell["exponents"]) == {"time", "memory"}
    tokens, width = result["cells"][:2]
    assert tokens["exponents"]["time"]["full"]["predicted"] == pytest.approx(1)
    assert width["exponents"]["time"]["full"]["predicted"] == pytest.approx(2)


@pytest.mark.slow
def test_result_says_what_it_ran_on(quick):
    for command in tables.SECTIONS:
        result = read(quick, command)
        assert {"cpu", "cores", "threads", "versions"} <= set(result["machine"])
        assert result["machine"]["versions"]["torch"] == torch.__version__
        assert result["settings"]["dtype"] == "float32"


@pytest.mark.slow
def test_tables_and_plots_are_current_once_written_and_outdated_after_another_result(quick):
    pages = {quick / "README.md", *(quick / "plots" / name for name in ("layer-cpu.png", "scaling-cpu.png"))}
    assert pages <= set(tables.outdated(quick))
    tables.rewrite(quick)
    assert tables.outdated(quick) == []
    path = quick / "results" / "layer-quick.json"
    result = json.loads(path.read_text())
    result["cells"][0]["timings"]["frozen"]["ratio"]["median"] = 12.34
    path.write_text(json.dumps(result))
    assert set(tables.outdated(quick)) == {quick / "README.md", quick / "plots" / "layer-cpu.png"}


def test_missing_result_names_the_command(tmp_path):
    for command in tables.SECTIONS:
        assert tables.section(command, tmp_path) == f"Not measured yet: run `python -m benchmarks.{command}`.\n"


def test_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="<!-- layer:begin --> ... <!-- layer:end --> once, found it 0 times"):
        tables.filled_in("# Benchmarks", {"layer": "text\n"})


@pytest.mark.slow
def test_gpu_command_checks_every_path_and_measures_the_costs_of_choosing_one(forks, tmp_path):
    flags = ["--device", "cpu", "--dtype", "float32", "--quick", "--out", tmp_path / "results.json"]
    process = forks.run("-m", "benchmarks.gpu", *flags)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {check["path"] for check in results["correctness"] if check["ok"]} == set(gpu.PATHS)
    assert all(check["ok"] for check in results["correctness"])
    assert paths.PathCosts(**results["costs"]).block_flop > 0
    assert all(row["regret"] >= 1 and row["chosen"] in gpu.PATHS for row in results["choices"])
    assert set(results["layers"][0]["timings"]) >= {"full", "frozen", "poet-8 first", "poet-8 later"}
    assert set(results["steps"]["timings"]) >= {"full step", "poet-16 step", "poet-ortho-16 step"}


def test_costs_are_those_of_a_device_whose_times_follow_the_model():
    costs = paths.PathCosts(rotating=50, rotating_weight=40, gathering=3, weight_entry=7, block_flop=2)
    N, dim, b, flop = 128, 96, 16, 1e-9
    seconds = {
        "plain": flop * 2 * N * dim * dim,
        "rotating": flop * N * dim * (2 * b + costs.rotating),
        "rotating_weight": flop * dim * dim * (2 * b + costs.rotating_weight),
        "gathering": flop * N * dim * (2 * b + 2 * costs.gathering),
        "weight_entry": flop * dim * dim * costs.weight_entry,
        "block_flop": flop * costs.block_flop * 2 * dim * b**2,
    }
    assert gpu.costs_of(N, dim, b, seconds) == pytest.approx(costs._asdict())
