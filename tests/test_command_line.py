"""`poet-peft`: what each command says, what it writes, and how it refuses."""

import json
import math
import sys
import types

import pytest
import torch
from cases import randomize
from models import METRICS, gpt2, llama, logits, tokenizer, train, wrap
from peft.helpers import rescale_adapter_scale
from test_attention import Attending
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from poet_peft import merge_and_reinitialize
from poet_peft.cli import Refused, app, difference, doctor, inspection, merging
from poet_peft.errors import POETCheckpointError
from poet_peft.layer import living_layers, poet_layers
from poet_peft.linear import Linear


def run(capsys, *arguments):
    """Run the command line: its exit code, and what it printed to stdout and stderr."""
    with pytest.raises(SystemExit) as exit:
        app.main([str(argument) for argument in arguments])
    return exit.value.code, *capsys.readouterr()


@pytest.fixture
def base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save(base, name, regime="block_stochastic", num_steps=2, **overrides):
    """An adapter that was trained for a few steps: its directory, and the model."""
    model = wrap(AutoModelForCausalLM.from_pretrained(base), regime, **overrides)
    train(model, num_steps)
    model.save_pretrained(base.parent / name)
    return base.parent / name, model.eval()


def dense(layer, side):
    """The rotation of one side as a matrix in float64."""
    features = layer.out_features if side == "R" else layer.in_features
    rotation = (layer.poet_R if side == "R" else layer.poet_P)["default"]()
    matrix = torch.eye(features, dtype=torch.float64)
    start = 0
    for delta in rotation.blocks().deltas:
        for block in delta:
            chosen = rotation.index[start : start + len(block)].long()
            matrix[chosen[:, None], chosen] += block.double()
            start += len(block)
    return matrix


def angles(matrix):
    """The largest angle of a rotation, and the root of the mean square of `2 asin(chord / 2)`, from eigenvalues."""
    largest = torch.linalg.eigvals(matrix).angle().abs().max()
    chord = (matrix - torch.eye(len(matrix), dtype=matrix.dtype)).norm() / len(matrix) ** 0.5
    return float(largest), 2 * math.asin(float(chord) / 2)


# inspect


def test_inspect_counts_what_the_adapter_has(base):
    path, model = save(base, "adapter")
    about = inspection.inspect(path)
    assert (about["kind"], about["problem"], about["num_layers"]) == ("adapter", None, 14)
    assert about["num_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert about["base_model"] == str(base)
    assert about["settings"]["variant"] == "block_stochastic"
    assert about["adapter_bytes"] == (path / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("regime", ["block_stochastic", "exact_cayley"])
def test_inspect_measures_angles_from_the_file_alone(base, regime):
    path, model = save(base, "adapter", regime)
    layers = dict(poet_layers(model.base_model.model))
    for entry in inspection.inspect(path)["layers"]:
        expected = angles(dense(layers[entry["layer"]], entry["side"]))
        assert (entry["largest"], entry["rms"]) == pytest.approx(expected, rel=0.02)


def test_inspect_reads_the_counters_of_folds(base):
    path, _ = save(base, "adapter", "periodic", num_steps=6)
    assert inspection.inspect(path)["state"] == {"seed": 0, "num_steps": 6, "num_folds": 1, "num_reinits": 1}


def test_inspect_counts_weights_that_train_beside_the_rotations(base):
    path, model = save(base, "adapter", "pretraining", num_steps=1)
    assert inspection.inspect(path)["num_other_values"] == llama().num_parameters()


def test_inspect_reads_what_trainer_logged(periodic_run):
    checkpoint = sorted(periodic_run.glob("checkpoint-*"))[-1]
    about = inspection.inspect(checkpoint)
    logged = json.loads((checkpoint / "trainer_state.json").read_text())
    assert about["kind"] == "checkpoint"
    assert about["training"]["step"] == logged["global_step"]
    assert about["training"]["loss"] == [entry["loss"] for entry in logged["log_history"] if "loss" in entry][-1]


def test_inspect_says_what_the_run_was_trained_on(base):
    path, _ = save(base, "adapter")
    (path / "metrics.json").write_text(json.dumps(METRICS))
    assert inspection.inspect(path)["trained_on"]["data"] == "Made-up words"
    assert inspection.inspect(path)["trained_on"]["evaluation"] == {"Next-word accuracy": 0.8125}


def test_inspect_of_a_damaged_adapter_names_the_file_and_exits_with_1(base, capsys):
    path, _ = save(base, "adapter")
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, out, _ = run(capsys, "inspect", path)
    assert code == 1
    assert "DAMAGED" in out and "not a whole safetensors file" in out


def test_inspect_of_a_model_counts_its_parameters(base):
    about = inspection.inspect(base)
    assert (about["kind"], about["problem"]) == ("model", None)
    assert about["num_parameters"] == llama().num_parameters()


def test_inspect_of_a_model_names_a_missing_file(base):
    (base / "model.safetensors").unlink()
    assert "model.safetensors is missing" in inspection.inspect(base)["problem"]


def test_several_adapters_are_named(base, capsys):
    for name in ("one", "two"):
        save(base, f"run/{name}")
    code, _, err = run(capsys, "inspect", base.parent / "run")
    assert code == 2
    assert "several adapters (one, two)" in err


# diff


def test_diff_of_an_adapter_with_itself_is_zero(base):
    path, _ = save(base, "adapter")
    result = difference.diff(path, path)
    assert (result["largest"], result["rms"]) == (0, 0)


@pytest.mark.parametrize(
    "other", [{"num_steps": 5}, {"seed": 3}, {"block_size": 20}, {"regime": "fully_stochastic"}], ids=str
)
def test_diff_measures_the_angle_between_two_rotations(base, other):
    path, model = save(base, "one")
    path_of_other, model_of_other = save(base, "other", **other)
    layers, layers_of_other = (dict(poet_layers(m.base_model.model)) for m in (model, model_of_other))
    result = difference.diff(path, path_of_other)
    assert len(result["layers"]) == 28
    assert result["layers"] == sorted(result["layers"], key=lambda entry: -entry["largest"])
    for entry in result["layers"][::9]:
        S, R = (dense(of[entry["layer"]], entry["side"]) for of in (layers, layers_of_other))
        assert (entry["largest"], entry["rms"]) == pytest.approx(angles(R.mT @ S), rel=0.02)


def test_diff_without_another_is_against_the_identity(base):
    path, _ = save(base, "adapter")
    largest = {(entry["layer"], entry["side"]): entry["largest"] for entry in inspection.inspect(path)["layers"]}
    found = difference.diff(path)["layers"]
    assert {(entry["layer"], entry["side"]): entry["largest"] for entry in found} == largest


def mixture(**sizes):
    sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, **sizes}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    )


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize(
    ("base", "targets", "names"),
    [
        (gpt2, {}, ["transformer.h.0.mlp.c_fc.weight"]),
        (mixture, EXPERTS, [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]),
        (Attending, {"target_modules": ["attention"]}, ["attention.in_proj_weight", "attention.out_proj.weight"]),
    ],
    ids=["convolution1d", "experts", "attention"],
)
def test_diff_of_folded_adapters_compares_weights(base, targets, names, tmp_path):
    weights = []
    for number, name in enumerate(["one", "other"]):
        torch.manual_seed(0)
        model = wrap(base(), "periodic", **targets)
        randomize(model, 0.2, seed=number)
        merge_and_reinitialize(model)
        randomize(model, 0.1, seed=number)
        model.save_pretrained(tmp_path / name)
        weights.append(dict(model.merge_and_unload().named_parameters()))
    found = difference.diff(tmp_path / "one", tmp_path / "other")["layers"]
    found = {entry["layer"]: entry["weight"] for entry in found}
    for name in names:
        one, other = (of[name].detach() for of in weights)
        expected = float((one - other).norm() / other.norm())
        assert found[name.removesuffix(".weight")] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("targets", [EXPERTS["target_parameters"], EXPERTS["target_parameters"][::-1]])
def test_inspect_names_the_parameters_of_experts(targets, tmp_path):
    model = wrap(mixture(), **EXPERTS | {"target_parameters": targets})
    model.save_pretrained(tmp_path)
    found = {
        (entry["layer"], entry["side"]): entry["num_parameters"] for entry in inspection.inspect(tmp_path)["layers"]
    }
    assert found == {
        (f"model.layers.0.mlp.experts.{layer.parameter_name}", rotation.side): rotation.weight.numel()
        for _, layer in poet_layers(model)
        for rotation in layer.rotations("default")
    }


def test_diff_refuses_a_folded_adapter_alone(base):
    path, _ = save(base, "adapter", "periodic")
    with pytest.raises(POETCheckpointError, match="Pass a second checkpoint"):
        difference.diff(path)


def test_diff_refuses_a_folded_adapter_with_a_pure_one(base):
    with pytest.raises(POETCheckpointError, match="only one of them changed the base weights"):
        difference.diff(save(base, "folded", "periodic")[0], save(base, "pure")[0])


# merge


@pytest.mark.parametrize("regime", ["block_stochastic", "fully_stochastic", "periodic", "pretraining"])
def test_merged_model_needs_nothing_of_this_package(base, regime):
    path, model = save(base, "adapter", regime, num_steps=6)
    result = merging.merge(path, base.parent / "merged")
    merged = AutoModelForCausalLM.from_pretrained(base.parent / "merged")
    assert not any("poet" in name for name in merged.state_dict())
    assert torch.allclose(logits(merged.eval()), logits(model), atol=1e-5)
    assert result["relative_error"] < 1e-5


def test_experts_are_merged(tmp_path):
    mixture().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    path, model = save(tmp_path / "base", "adapter", target_modules=[], target_parameters=["experts.gate_up_proj"])
    merging.merge(path, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged.eval()), logits(model), atol=1e-5)


def test_merge_saves_tokenizer_generation_config_and_card(base):
    path, _ = save(base, "adapter")
    merging.merge(path, base.parent / "merged")
    assert AutoTokenizer.from_pretrained(base.parent / "merged").vocab_size == tokenizer().vocab_size
    names = {file.name for file in (base.parent / "merged").iterdir()}
    assert {"generation_config.json", "model.safetensors", "README.md"} <= names
    assert "states no evaluation" in (base.parent / "merged/README.md").read_text()


def test_card_of_a_merged_model_has_the_run_s_numbers(base):
    path, _ = save(base, "adapter")
    (path / "metrics.json").write_text(json.dumps(METRICS))
    merging.merge(path, base.parent / "merged")
    assert "0.8125" in (base.parent / "merged/README.md").read_text()


def test_merge_into_another_dtype_rounds_once(base):
    path, model = save(base, "adapter")
    merging.merge(path, base.parent / "merged", dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(base.parent / "merged", dtype="auto").state_dict()
    exact = model.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], exact[name].bfloat16()) for name in exact)


def test_a_run_from_scratch_needs_only_the_base_model_s_configuration(base):
    path, model = save(base, "adapter", "pretraining", num_steps=1)
    (base / "model.safetensors").unlink()
    merging.merge(path, base.parent / "merged")
    merged = AutoModelForCausalLM.from_pretrained(base.parent / "merged")
    assert torch.allclose(logits(merged.eval()), logits(model), atol=1e-5)


def test_a_merge_that_changes_the_model_writes_nothing(base, monkeypatch):
    path, _ = save(base, "adapter")
    monkeypatch.setattr(Linear, "merge", lambda self, *args, **kwargs: None)
    with pytest.raises(POETCheckpointError, match="nothing was written"):
        merging.merge(path, base.parent / "merged")
    assert sorted(child.name for child in base.parent.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_merge_at_a_scale_gives_the_logits_of_the_scaled_adapter(base, scale):
    path, model = save(base, "adapter", num_steps=6)
    result = merging.merge(path, base.parent / "merged", scale=scale)
    merged = AutoModelForCausalLM.from_pretrained(base.parent / "merged")
    with rescale_adapter_scale(model, scale):
        expected = logits(model)
    assert torch.allclose(logits(merged.eval()), expected, atol=1e-5)
    assert (result["scale"], result["num_unscaled_values"]) == (scale, 0)


def test_logits_of_a_merge_are_compared_at_its_scale(base, monkeypatch):
    path, _ = save(base, "adapter", num_steps=6)
    merge_layer = Linear.merge

    def merge_as_trained(layer, *args, **kwargs):
        layer.set_scale("default", 1)
        merge_layer(layer, *args, **kwargs)

    monkeypatch.setattr(Linear, "merge", merge_as_trained)
    with pytest.raises(POETCheckpointError, match="nothing was written"):
        merging.merge(path, base.parent / "merged", scale=0.5)


def test_merge_of_a_folded_adapter_at_a_scale_is_refused_by_name(base, capsys):
    path, _ = save(base, "adapter", "periodic", num_steps=6)
    code, _, err = run(capsys, "merge", path, base.parent / "merged", "--scale", "0.5")
    assert code == 2
    assert "q_proj" in err and "folded into the weight 1 times" in err
    assert not (base.parent / "merged").exists()


def test_merge_at_a_scale_counts_what_it_does_not_scale(base, capsys):
    path, _ = save(base, "adapter", modules_to_save=["lm_head"])
    _, out, _ = run(capsys, "merge", path, base.parent / "merged", "--scale", "0.5")
    assert f"turned by 0.5 times their angles; {llama().lm_head.weight.numel():,} values beside the rotations" in out


def test_card_of_a_scaled_merge_has_no_numbers_of_the_run(base):
    path, _ = save(base, "adapter")
    (path / "metrics.json").write_text(json.dumps(METRICS))
    merging.merge(path, base.parent / "merged", scale=0.5)
    card = (base.parent / "merged/README.md").read_text()
    assert "0.8125" not in card and "by 0.5 times the angle" in card


def test_merge_keeps_no_blocks_and_one_weight_at_a_time(base, monkeypatch):
    path, _ = save(base, "adapter")
    held, before = [], set(living_layers())
    merge_layer = Linear.merge

    def merge_and_look(layer, *args, **kwargs):
        living = [other for other in living_layers() if other not in before]
        rotations = [rotation for other in living for rotation in other.rotations("default")]
        held.append((sum(other.merged for other in living), sum(r._kept._values is not None for r in rotations)))
        merge_layer(layer, *args, **kwargs)

    monkeypatch.setattr(Linear, "merge", merge_and_look)
    merging.merge(path, base.parent / "merged")
    assert held == 14 * [(0, 0)]


def test_merge_keeps_what_lies_in_its_way(base, capsys):
    path, _ = save(base, "adapter")
    code, _, err = run(capsys, "merge", path, base)
    assert code == 2
    assert "exists and is not empty" in err


def test_merge_names_an_unknown_dtype(base):
    with pytest.raises(Refused, match="--dtype int8 is unknown; choose one of float32"):
        merging.merge(base, base.parent / "merged", dtype="int8")


def test_merge_uploads_the_directory_that_it_wrote(base, monkeypatch):
    path, _ = save(base, "adapter")
    calls = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append(name)

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(file.name for file in folder_path.iterdir())))

    monkeypatch.setattr(merging, "HfApi", Hub)
    merging.merge(path, base.parent / "merged", push_to_hub="someone/merged")
    name, (repo_id, files) = calls
    assert name == repo_id == "someone/merged"
    assert "model.safetensors" in files and "README.md" in files


# doctor


def test_doctor_finds_a_healthy_installation():
    about = doctor.doctor()
    assert about["healthy"], about
    assert about["checks"]["fold"] == "ok"
    assert "torch" in about["versions"]


def test_doctor_finds_a_layer_that_computes_something_else(monkeypatch, capsys):
    monkeypatch.setattr(Linear, "forward", lambda self, x: self.base_layer(x))
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "relative error" in out and "something is wrong" in out


def test_doctor_names_versions_that_do_not_go_together(monkeypatch):
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda name: ["peft<0.1", "nothing-of-this-name", "x; extra=='y'"]
    )
    monkeypatch.setattr(doctor, "_DISTRIBUTION", "peft")
    conflicts = doctor._conflicts()
    assert len(conflicts) == 2
    assert "peft<0.1 is needed" in conflicts[0] and "nothing-of-this-name is not installed" in conflicts[1]


# The command line as a whole


def test_report_hands_its_runs_on(tmp_path, monkeypatch, capsys):
    calls = []
    stand_in = types.ModuleType("poet_peft.report")
    stand_in.write_report = lambda runs, path: calls.append((runs, path)) or path
    monkeypatch.setitem(sys.modules, "poet_peft.report", stand_in)
    code, out, _ = run(capsys, "report", tmp_path, tmp_path, "--output", tmp_path / "page.html")
    assert (code, out.strip()) == (0, str(tmp_path / "page.html"))
    assert calls == [([tmp_path, tmp_path], tmp_path / "page.html")]


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "nowhere"],
        ["diff", "nowhere"],
        ["merge", "nowhere", "out"],
        ["report", "nowhere"],
        ["inspect", "file"],
    ],
    ids=" ".join,
)
def test_a_bad_path_is_one_line_and_exit_code_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("poet-peft: ") and err.count("\n") == 1 and arguments[1] in err


def test_an_unexpected_error_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "inspect", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        app.main(["inspect", str(tmp_path)])


@pytest.mark.parametrize("command", ["inspect", "diff", "doctor", "merge"])
def test_json_is_all_that_is_printed(command, base, capsys):
    path, _ = save(base, "adapter")
    capsys.readouterr()
    arguments = {"doctor": [], "merge": [path, base.parent / "merged"]}.get(command, [path])
    code, out, _ = run(capsys, command, *arguments, "--json")
    assert code == 0
    assert isinstance(json.loads(out), dict)


def test_list_of_commands_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "..." not in run(capsys, "--help")[1].partition("Commands:")[2]


@pytest.mark.parametrize("command", ["report", "inspect", "merge", "diff", "doctor"])
def test_help_has_an_example(command, capsys):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"Example: poet-peft {command}" in " ".join(out.split())
