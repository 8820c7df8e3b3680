"""What the methods of the pretraining comparison are called, and their colours in every picture."""

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


def name_of(family):
    method, _, block_size = family.removesuffix(VARIANT).partition("-b")
    if block_size.isdigit():
        return f"{name_of(method)}, b = {block_size}"
    return NAMES.get(method, family)
