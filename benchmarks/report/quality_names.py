"""What the methods of the pretraining comparison are called, and their colours in every picture."""

import re

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
_IN_COLOR_ORDER = ["adamw", "muon", "poet-paper", "poet-ortho", "frozen", "galore", "lora"]
COLORS = {name: f"C{number}" for number, name in enumerate(_IN_COLOR_ORDER)}


_STOCHASTIC = {"-bs": ", block-stochastic", "-fs": ", fully stochastic"}
_FAMILY = re.compile(r"(.+?)(-bs|-fs)?(?:-b([\d.]+))?")


def name_of(family):
    method, stochastic, block_size = _FAMILY.fullmatch(family.removesuffix(VARIANT)).groups()
    blocks = f", b = {block_size}" if block_size else ""
    return NAMES.get(method, method) + _STOCHASTIC.get(stochastic, "") + blocks
