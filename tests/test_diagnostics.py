"""Measures of rotations and weights, against numpy, and of whole models."""

import json
import math

import numpy as np
import pytest
import torch
from models import REGIMES, llama, poet_config, step, tokens, wrap
from quantized import dequantized, for_every_library, quantized_llama

from poet_peft import diagnostics as d
from poet_peft import merge_and_reinitialize
from poet_peft.diagnostics_file import read_diagnostics
from poet_peft.layer import poet_layers
from poet_peft.maths import measures
from poet_peft.maths.orthogonal import cayley
from poet_peft.ops import reference
from poet_peft.pace import Pace, learning_rates
from poet_peft.rotation import Orthogonality, Rotation
from poet_peft.weights.residual import join


def matrices(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skew(*shape):
    A = matrices(*shape)
    return 0.05 * (A - A.mT)


def test_entropy_of_equal_values_is_1_and_of_rank_one_0():
    s = torch.tensor([[2.0, 2.0, 2.0], [1.0, 0.0, 0.0]])
    assert measures.svd_entropy(s).tolist() == pytest.approx([1.0, 0.0])


def test_entropy_agrees_with_numpy():
    s = np.linalg.svd(matrices(7, 5).numpy(), compute_uv=False)
    p = s**2 / (s**2).sum()
    assert float(measures.svd_entropy(torch.from_numpy(s))) == pytest.approx(-(p * np.log(p)).sum() / np.log(5))


def test_energy_agrees_with_numpy():
    W = matrices(2, 6, 4)
    rows = (W / W.norm(dim=-1, keepdim=True)).numpy()
    pairs = [(i, j) for i in range(6) for j in range(i)]
    expected = [np.mean([1 / np.linalg.norm(w[i] - w[j]) for i, j in pairs]) for w in rows]
    assert measures.hyperspherical_energy(W).tolist() == pytest.approx(expected)


def test_spectral_norm_and_stable_rank_of_a_known_matrix():
    W = torch.diag(torch.tensor([4.0, 2.0, 2.0], dtype=torch.float64))
    assert float(measures.spectral_norm(W)) == pytest.approx(4.0)
    assert float(measures.stable_rank(W, torch.tensor(4.0))) == pytest.approx(1.5)


def test_spectral_change_of_a_scaled_value():
    change = measures.spectral_change(torch.tensor([4.0, 2.0, 1.0]), torch.tensor([4.4, 2.0, 1.0]))
    assert [float(change.largest), float(change.median)] == pytest.approx([0.1, 0.0], abs=1e-6)


def test_angles_are_those_of_the_eigenvalues_of_the_rotation():
    Q = skew(2, 5, 5)
    phases = np.sort(np.abs(np.angle(np.linalg.eigvals(cayley(Q).numpy()))))[:, ::-1][:, :4:2]
    np.testing.assert_allclose(measures.rotation_angles(Q).numpy(), phases, atol=1e-9)


def test_trace_is_that_of_the_rotation():
    G = cayley(skew(5, 5))
    assert float(measures.rotation_trace(G - torch.eye(5))) == pytest.approx(float(G.trace()) / 5)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_model_is_measured_by_layer_and_side(regime, exact):
    model = wrap(llama(num_hidden_layers=1), regime)
    result = d.diagnose(model, exact=exact)
    names = [layer.module_name for _, layer in poet_layers(model)]
    assert [layer.name for layer in result.layers] == names
    assert all([side.side for side in layer.sides] == ["R", "P"] for layer in result.layers)
    assert all(0 < side.max_angle < math.pi for layer in result.layers for side in layer.sides)
    json.dumps(result.as_dict(), allow_nan=False)


def test_power_iteration_agrees_with_decompositions():
    model = wrap(llama(num_hidden_layers=1), "exact_cayley")
    quick, exact = (d.diagnose(model, exact=exact).layers[0].sides[0].max_angle for exact in (False, True))
    assert quick == pytest.approx(exact, rel=0.05) and quick <= exact * (1 + 1e-5)


def test_rotations_that_are_not_finite_become_null():
    model = wrap(llama(num_hidden_layers=1), "periodic")
    next(layer for _, layer in poet_layers(model)).poet_R["default"].weight.data[0] = math.nan
    assert d.diagnose(model, exact=True).as_dict()["summary"]["max_angle"] is None


def test_an_unknown_adapter_is_named():
    with pytest.raises(ValueError, match="'other'"):
        d.diagnose(wrap(llama(num_hidden_layers=1), "periodic"), "other")


def test_a_line_cut_off_is_left_out_and_harms_no_other(tmp_path):
    path = tmp_path / "own-run" / "poet_diagnostics.jsonl"
    model = wrap(llama(num_hidden_layers=1), "periodic")
    d.log_diagnostics(model, path, step=3)
    with path.open("a") as file:
        file.write('{"step": 4, "lay')
    d.log_diagnostics(model, path, step=5)
    assert [line["step"] for line in read_diagnostics(path)] == [3, 5]


def side_of(**numbers):
    return d.SideDiagnostics(
        "R", **{"max_angle": 0.1, "rms_angle": 0.1, "trace": 1.0, "orthogonality_error": 0.0} | numbers
    )


def test_summary_has_the_largest_of_what_has_a_range_and_a_nan_stays():
    sides = [side_of(max_angle=0.3, orthogonality_error=1e-3), side_of(orthogonality_error=2e-3)]
    layers = [d.LayerDiagnostics(str(drift), "default", sides, drift) for drift in (0.01, 0.03, 0.02)]
    summary = d.Diagnostics(layers, clamped_share=0.5).summary()
    found = [summary[name] for name in ("max_angle", "orthogonality_error", "spectral_drift", "clamped_share")]
    assert found == [0.3, 2e-3, 0.03, 0.5]
    layers.append(d.LayerDiagnostics("broken", "default", [], math.nan))
    assert math.isnan(d.Diagnostics(layers).summary()["spectral_drift"])


def test_own_numbers_are_in_the_line_and_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "poet_diagnostics.jsonl"
    d.log_diagnostics(wrap(llama(num_hidden_layers=1)), path, 1, exact=True, loss=math.nan, losses=[1.0, math.inf])
    (line,) = read_diagnostics(path)
    assert line["loss"] is None and line["losses"] == [1.0, None] and line["layers"][0]["singular_values"]


def test_rates_are_of_the_steps_and_tokens_since_the_last_measurement(monkeypatch):
    times = iter([0.0, 2.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr("poet_peft.pace.time.perf_counter", lambda: next(times))
    pace = Pace()
    pace.start(10, 100)
    assert pace.rates(14, 300) == {"steps_per_second": 2.0, "tokens_per_second": 100.0}
    assert pace.rates(20, 500) == {"steps_per_second": 3.0, "tokens_per_second": 100.0}
    assert pace.rates(21, 500) == {"steps_per_second": 1.0} and pace.rates(21, 600) == {}


def test_rates_of_groups_go_by_name_and_the_largest_counts():
    groups = [
        {"params": [torch.zeros(1)], "lr": lr, **name}
        for lr, name in [(2.0, {"name": "a"}), (1.0, {"name": "a"}), (3.0, {}), (4.0, {})]
    ]
    assert learning_rates(torch.optim.SGD(groups)) == {"a": 2.0, "group 2": 3.0, "group 3": 4.0}


def test_rms_angle_of_known_planes_in_blocks_of_two_sizes():
    Q = torch.zeros(1, 4, 4, dtype=torch.float64)
    Q[0, 0, 1], Q[0, 2, 3] = 0.3, 0.1
    small = torch.tensor([[0.0, 0.2, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)[None]
    expected = 2 * math.atan(math.sqrt((0.09 + 0.01 + 0.04) / 3))
    assert measures.rms_angle([Q - Q.mT, small - small.mT]) == pytest.approx(expected)


def test_rms_angle_of_a_side_is_that_of_its_planes():
    model = wrap(llama(num_hidden_layers=1), "exact_cayley")  # 48 features in blocks of 20, 20 and 8
    layer = next(layer for _, layer in poet_layers(model))
    Q = [block for block in layer.rotations("default")[0]().blocks().Q]
    thetas = torch.cat([(measures.rotation_angles(block) / 2).tan().flatten() for block in Q])
    expected = 2 * math.atan(float(thetas.square().mean().sqrt()))
    assert d.diagnose(model).layers[0].sides[0].rms_angle == pytest.approx(expected, rel=1e-5)


def test_trace_of_a_side_is_that_of_its_matrix():
    model = wrap(llama(num_hidden_layers=1), "exact_cayley")  # 48 features in blocks of 20, 20 and 8
    rotation = next(layer for _, layer in poet_layers(model)).rotations("default")[0]
    rotation.weight.data[-28:] += 0.3  # those of the smallest block
    R = reference.rotate(torch.eye(48), (rotation.index, rotation().blocks().deltas))
    assert d.diagnose(model).layers[0].sides[0].trace == pytest.approx(float(R.trace()) / 48, rel=1e-5)


@pytest.mark.parametrize(("R", "P", "drift"), [(0.19, 0.36, 1 - 0.9 * 0.8), (8.0, 3.0, 3 * 2 - 1)])
def test_drift_is_what_both_sides_together_allow_singular_values(R, P, drift, monkeypatch):
    bounds = {"R": R, "P": P}
    monkeypatch.setattr(Rotation, "orthogonality", lambda rotation: Orthogonality(0.0, bounds[rotation.side]))
    measured = d.diagnose(wrap(llama(num_hidden_layers=1))).layers[0]
    assert measured.spectral_drift == pytest.approx(drift)


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {}], ids=["SGD", "AdamW"])
def test_momentum_cosine_is_that_of_the_optimizer_and_the_gradient(settings):
    model = wrap(llama(num_hidden_layers=1))
    weight = next(layer for _, layer in poet_layers(model)).poet_R["default"].weight
    optimizer = (torch.optim.SGD if settings else torch.optim.AdamW)([weight], lr=1e-3, **settings)
    first = []
    handle = weight.register_post_accumulate_grad_hook(lambda weight: first.append(weight.grad.clone()))
    step(model, optimizer)
    handle.remove()
    model(input_ids=tokens(seed=2), labels=tokens(seed=2)).loss.backward()
    expected = float(torch.cosine_similarity(first[0], weight.grad, dim=0))
    assert d.diagnose(model, optimizer=optimizer).layers[0].sides[0].momentum_cosine == pytest.approx(expected)
    assert expected < 0.9


def test_clamped_share_is_of_the_rotations_with_a_law():
    laws = [{"radians": 0.2, "max_radians": 0.1}, {"radians": 0.1, "max_radians": 0.1}, {"radians": 0.2}]
    groups = [{"params": [torch.zeros(1) for _ in range(n)], **law} for n, law in zip((3, 1, 4), laws, strict=True)]
    model = wrap(llama(num_hidden_layers=1))
    assert d.diagnose(model, optimizer=torch.optim.SGD(groups, lr=1.0)).clamped_share == 0.75


def test_rms_singular_value_agrees_with_numpy():
    W = matrices(2, 7, 5)
    expected = np.sqrt((np.linalg.svd(W.numpy(), compute_uv=False) ** 2).mean(-1))
    np.testing.assert_allclose(measures.rms_singular_value(W).numpy(), expected)


def test_exact_measures_are_of_the_singular_values_of_the_rotated_weight():
    model = wrap(llama(num_hidden_layers=1), "block_stochastic", adaptive_terms=False)
    layer = next(layer for _, layer in poet_layers(model))
    for rotation in layer.rotations("default"):
        rotation.weight.data *= 10  # so far that the series is not orthogonal, and the spectrum moves
    before, s = (
        np.linalg.svd(W.detach().double().numpy(), compute_uv=False)
        for W in (layer.get_base_layer().weight, layer.rotated_weight(["default"]))
    )
    change, p = abs(s - before) / before, s**2 / (s**2).sum()
    measured = d.diagnose(model, exact=True).layers[0]
    assert measured.singular_values == pytest.approx(np.quantile(s, [0, 0.25, 0.5, 0.75, 1]), rel=1e-4)
    assert measured.spectral_norm == pytest.approx(s.max(), rel=1e-5)
    assert measured.entropy == pytest.approx(-(p * np.log(p)).sum() / np.log(48), rel=1e-5)
    assert change.max() > 2 * np.median(change) > 1e-3
    found = measured.largest_change, measured.median_change
    assert found == pytest.approx((change.max(), np.median(change)), rel=1e-2)


def test_what_rounding_a_16_bit_weight_left_over_is_measured_too():
    model = wrap(llama(num_hidden_layers=1).bfloat16(), "periodic")
    merge_and_reinitialize(model)
    layer = next(layer for _, layer in poet_layers(model))
    s = torch.linalg.svdvals(join(layer.get_base_layer().weight, layer.residual))  # the fold left the identity
    assert d.diagnose(model, exact=True).layers[0].singular_values[0] == pytest.approx(float(s[-1]), rel=1e-4)


def test_histogram_counts_every_plane_up_to_the_largest_angle():
    model = wrap(llama(num_hidden_layers=1), "block_stochastic")
    side = d.diagnose(model, exact=True).layers[0].sides[0]
    assert sum(side.angle_histogram) == 48 // 2 and side.angle_histogram[-1] >= 1


def test_coverage_is_of_the_rows_and_columns_of_all_index_sets_drawn():
    model = wrap(llama(num_hidden_layers=1), "periodic", variant="fully_stochastic")
    layer = next(layer for _, layer in poet_layers(model))
    expected = torch.zeros(layer.out_features, layer.in_features, dtype=torch.int32)
    for number in range(2):
        if number:
            merge_and_reinitialize(model)
        R, P = (rotation.index.long() for rotation in layer.rotations("default"))
        expected[R] += 1
        expected[:, P] += 1
    assert torch.equal(d.update_counts(layer, "default"), expected) and set(expected.unique().tolist()) > {0, 1, 2}
    assert d.diagnose(model, exact=True).layers[0].coverage == pytest.approx(float((expected > 0).float().mean()))


# Bases and states in which an adapter may be met


@for_every_library
def test_quantized_weights_are_measured_as_dequantized(name):
    model = wrap(quantized_llama(name))
    layer = next(layer for _, layer in poet_layers(model))
    (R,), (P,) = layer.sides(["default"])
    W = dequantized(layer.get_base_layer())
    rotated = reference.effective_weight(W, [(R.index, R.deltas())], [(P.index, P.deltas())]).detach().numpy()
    s = np.linalg.svd(rotated, compute_uv=False)
    quick, exact = (d.diagnose(model, exact=exact).layers[0] for exact in (False, True))
    assert exact.singular_values == pytest.approx(np.quantile(s, [0, 0.25, 0.5, 0.75, 1]), rel=1e-3)
    assert quick.rms_singular_value == pytest.approx(np.sqrt((s**2).mean()), rel=1e-4)


@pytest.mark.parametrize("state", ["merged", "disabled"])
@pytest.mark.parametrize("exact", [False, True])
def test_merged_and_disabled_adapters_measure_as_active_ones(state, exact):
    model = wrap(llama(num_hidden_layers=1))
    active = d.diagnose(model, exact=exact)
    if state == "merged":
        model.merge_adapter()
        other = d.diagnose(model, exact=exact)
    else:
        with model.disable_adapter():
            other = d.diagnose(model, exact=exact)
    for one, two in zip(active.layers, other.layers, strict=True):
        assert one.sides == two.sides and one.name == two.name
        assert two.spectral_norm == pytest.approx(one.spectral_norm, rel=1e-5)
        assert two.energy == pytest.approx(one.energy, rel=1e-5)
        if exact:
            assert two.singular_values == pytest.approx(one.singular_values, rel=1e-4)
            assert (two.largest_change is None) == (state == "merged")


def test_adapter_beside_a_merged_one_is_refused_by_name():
    model = wrap(llama(num_hidden_layers=1))
    model.add_adapter("other", poet_config())
    model.merge_adapter(adapter_names=["default"])
    with pytest.raises(ValueError, match=r"q_proj.*\['default'\] merged.*'other' alone.*unmerge_adapter"):
        d.diagnose(model, "other")
    assert d.diagnose(model, "default").layers


def test_scaled_adapter_is_refused_by_name():
    model = wrap(llama(num_hidden_layers=1))
    layer = next(layer for _, layer in poet_layers(model))
    layer.set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"'default' of '.*q_proj' has scale=0.5.*unscale_layer"):
        d.diagnose(model)


def test_rotations_of_a_weight_that_cannot_be_read_are_measured_alone():
    base = llama(num_hidden_layers=1)
    module = base.model.layers[0].self_attn.q_proj
    module.register_forward_hook(lambda module, args, output: 2 * output)
    result = d.diagnose(wrap(base), exact=True)
    first, second = result.layers[:2]
    assert "q_proj" in first.weight_problem and first.sides[0].max_angle > 0 and first.energy is None
    assert second.weight_problem is None and result.summary()["energy"] > 0
