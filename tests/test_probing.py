"""Vector probing: what all rotations since training began have made of fixed vectors."""

import pytest
import torch
from models import llama, train, wrap

from poet_peft import diagnostics, merge_and_reinitialize, quick_fold
from poet_peft.layer import poet_layers
from poet_peft.ops import reference
from poet_peft.probing import _fixed_vectors, load_probes, probe_cosine, save_probes, start_probing


def small(**overrides):
    return wrap(llama(num_hidden_layers=1), "periodic", **overrides)


def cosines(model):
    return [
        probe_cosine(layer, "default", rotation)
        for _, layer in poet_layers(model)
        for rotation in layer.rotations("default")
    ]


def dense(rotation):
    """The rotation as a matrix (dim, dim)."""
    eye = torch.eye(rotation.partition.dim)
    return reference.rotate(eye, (rotation.index, rotation().blocks().deltas)).mT


@pytest.mark.parametrize("variant", ["block_stochastic", "fully_stochastic"])
@torch.no_grad()
def test_cosine_is_that_of_the_product_of_all_rotations(variant):
    model = small(variant=variant)
    start_probing(model)
    layer = next(layer for _, layer in poet_layers(model))
    R, P = layer.rotations("default")
    products = torch.eye(R.partition.dim), torch.eye(P.partition.dim)
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        if number:
            merge_and_reinitialize(model)
        for rotation in (R, P):
            rotation.weight.normal_(std=0.1, generator=generator)
        products = dense(R) @ products[0], products[1] @ dense(P)
    for rotation, product in zip((R, P), products, strict=True):
        v = _fixed_vectors(rotation)
        expected = ((v @ product) * v).sum(-1).mean()
        assert probe_cosine(layer, "default", rotation) == pytest.approx(float(expected), abs=1e-4)
        assert expected < 0.9


def test_fold_after_every_step_turns_the_vectors_as_a_measured_one(monkeypatch):
    found = []
    for is_quick in (quick_fold.is_quick, lambda item: False):
        monkeypatch.setattr("poet_peft.fold.is_quick", is_quick)
        model = small(merge_interval=1, reinit_interval=0, init_weights=True)
        start_probing(model)
        train(model, 4)
        found.append(cosines(model))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert max(found[0]) < 0.9999


def test_rotations_folded_unseen_are_not_measured():
    model = small()
    assert None not in cosines(model)
    merge_and_reinitialize(model)
    assert set(cosines(model)) == {None}
    start_probing(model)
    assert "probe_cosine" not in diagnostics.diagnose(model).summary()


def test_summary_has_the_mean_over_layers_and_sides():
    model = small()
    found = cosines(model)
    assert diagnostics.diagnose(model).summary()["probe_cosine"] == pytest.approx(sum(found) / len(found))


def test_saved_vectors_are_taken_up_by_the_same_training_only(tmp_path):
    model = small()
    start_probing(model)
    merge_and_reinitialize(model)
    save_probes(model, tmp_path / "probes")
    before = cosines(model)
    for _, layer in poet_layers(model):
        layer.poet_probes.clear()
    assert load_probes(model, tmp_path / "probes") and cosines(model) == before
    merge_and_reinitialize(model)
    load_probes(model, tmp_path / "probes")  # of one fold, where there have been two
    assert set(cosines(model)) == {None}
    probes = next(layer for _, layer in poet_layers(model)).poet_probes["default"]
    merge_and_reinitialize(model)
    assert probes.num_folds == 1


def test_starting_again_keeps_the_vectors_of_what_was_folded():
    model = small()
    start_probing(model)
    merge_and_reinitialize(model)
    before = cosines(model)
    start_probing(model)
    assert cosines(model) == before


def test_every_layer_and_side_has_vectors_of_its_own():
    rotations = [rotation for _, layer in poet_layers(small()) for rotation in layer.rotations("default")]
    assert len({tuple(_fixed_vectors(rotation)[0].tolist()) for rotation in rotations}) == len(rotations) == 14


def test_missing_file_is_told(tmp_path):
    assert not load_probes(small(), tmp_path / "probes")
