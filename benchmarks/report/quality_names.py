"""What the methods of the pretraining comparison are called, and their colours in every picture."""

import re
from collections import Counter

from .quality_runs import VARIANT


NAMES = {
    "frozen": "linear layers frozen",
    "adamw": "AdamW",
    "muon": "Muon",
    "galore": "GaLore",
    "lora": "LoRA from scratch",
    "poet-paper": "POET, the paper's recipe",
    "poet-ortho": 'POET, recipe "ortho"',
    "poet-ortho-adamw": 'POET, recipe "ortho" with AdamW',
}
_IN_COLOR_ORDER = ["adamw", "muon", "poet-paper", "poet-ortho", "frozen", "galore", "lora", "poet-ortho-adamw"]
COLORS = {name: f"C{number}" for number, name in enumerate(_IN_COLOR_ORDER)}


_STOCHASTIC = {"-bs": ", block-stochastic", "-fs": ", fully stochastic"}
_FAMILY = re.compile(r"(.+?)(-bs|-fs)?(?:-b([\d.]+))?")
_LINES = ["-", "--", ":", "-."]


def styles_of(families):
    """Line styles for matplotlib, by family: a colour for each method, a kind of line for each of its variants."""
    styles, counts = {}, Counter()
    for family in sorted(families):
        method, *_ = _parts(family)
        styles[family] = {"color": COLORS[method], "linestyle": _LINES[counts[method] % len(_LINES)]}
        counts[method] += 1
    return styles


def name_of(family):
    method, stochastic, block_size = _parts(family)
    blocks = f", b = {block_size}" if block_size else ""
    return NAMES.get(method, method) + _STOCHASTIC.get(stochastic, "") + blocks


def _parts(family):
    """The method, "-bs" or "-fs" or None, and the block size as text or None."""
    return _FAMILY.fullmatch(family.removesuffix(VARIANT)).groups()
