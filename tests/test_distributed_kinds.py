"""Experts, convolutions, embeddings, attention: two processes (gloo, on the CPU) train as one, under FSDP2 and DDP."""

import functools
import json

import pytest
import torch
from cases import relative_error
from safetensors.torch import load_file
from workers import kinds_run


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo"),
]
for_every_run = pytest.mark.parametrize(
    ("kind", "regime", "way"), [(*case, way) for case in kinds_run.CASES for way in kinds_run.WAYS]
)


@pytest.fixture(scope="module")
def directory(forks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("kinds")
    forks.launch("kinds_run.py", directory)
    return directory


@functools.cache
def in_one_process(kind, regime):
    model = kinds_run.build(kind, regime)
    losses = kinds_run.train(model, kinds_run.make_optimizer(model, regime), kind)
    return losses, model.state_dict()


@for_every_run
def test_two_processes_train_as_one(directory, kind, regime, way):
    name = f"{kind}-{regime}-{way}"
    losses, weights = in_one_process(kind, regime)
    for rank in range(2):
        assert json.loads((directory / f"rank{rank}.json").read_text())[name] == pytest.approx(losses, rel=1e-5)
    trained = load_file(directory / f"{name}.weights")
    assert trained.keys() == weights.keys()
    for key, weight in weights.items():
        assert relative_error(trained[key], weight) < 1e-4, key
