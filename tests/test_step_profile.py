"""What benchmarks/step_profile.py counts as a part of a step."""

from dataclasses import replace

import pytest
import torch

from benchmarks.harness.quality_run import Run
from benchmarks.harness.token_cache import Tokens
from benchmarks.step_profile import PARTS, measure


ORTHO = Run("poet-ortho", lr=1e-2, matrix_lr=0.04, size="tiny", steps=9)


@pytest.fixture(scope="module")
def tokens():
    ids = torch.randint(64, (32, 16), generator=torch.Generator().manual_seed(0))
    return Tokens(ids, ids[:8], 64, 0)


def parts(run, tokens):
    """The parts of a step that take time, and their share of it."""
    result = measure({"run": run}, tokens, num_steps=2)["run"]
    found = {part for part, seconds in result["parts"].items() if seconds}
    return found, sum(result["parts"].values()) / result["step"]


def test_a_step_of_adamw_has_none_of_the_parts(tokens):
    assert parts(replace(ORTHO, method="adamw"), tokens) == (set(), 0)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_parts_of_the_recipe_are_a_part_of_the_step(share, tokens):
    found, of_step = parts(replace(ORTHO, options={"optimizer.decorrelation": share}), tokens)
    assert found == (set(PARTS) if share else set(PARTS) - {"decorrelation"})
    assert 0 < of_step < 1
