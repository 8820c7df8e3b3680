"""Whole families of transformers from a tiny configuration, by the check that the table of all families is made with.

One of each kind, whose layers the other tests do not have.
"""

import pytest

from benchmarks.families import OVERRIDES, families
from benchmarks.harness.family_check import check


# What is special about a family, and what of it is left out by name.
FAMILIES = {
    "qwen3_moe": ("experts", {"head", "experts"}),
    "modernbert": ("an encoder", {"head"}),
    "pegasus": ("an encoder and a decoder, tied", {"head"}),
    "segformer": ("images", {"head"}),
    "d_fine": ("a detector without token embeddings", {"head", "shared"}),
    "hubert": ("sound", {"head"}),
    "siglip": ("images and text, with torch's attention", set()),
    "llava": ("images in the midst of text", {"head"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_family_trains_saves_reloads_and_merges(name):
    (family,) = (family for family in families() if family.name == name)
    result = check(family, OVERRIDES.get(name))
    assert (result["status"], result["message"]) == ("works", "")
    assert set(result["left_out"]) == FAMILIES[name][1]
