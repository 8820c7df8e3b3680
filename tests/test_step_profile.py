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
    """The parts that a step has."""
    result = measure({"run": run}, tokens, num_steps=2)["run"]
    return {part for part, seconds in result["parts"].items() if seconds}


def test_a_step_of_adamw_has_none_of_the_parts(tokens):
    assert parts(replace(ORTHO, method="adamw"), tokens) == set()


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_step_of_the_recipe_has_the_parts_that_its_options_ask_for(share, tokens):
    found = parts(replace(ORTHO, options={"optimizer.decorrelation": share}), tokens)
    assert found == (set(PARTS) if share else set(PARTS) - {"decorrelation"})
