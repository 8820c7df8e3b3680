"""What `families.py` found: for every family of transformers, what of it is rotated, and why the rest is not."""

import json
from collections import Counter
from pathlib import Path

from benchmarks.harness.left_out import REASONS

from .text import table


RESULT = Path(__file__).parents[1] / "results" / "families.json"
KINDS = "causal LM", "encoder", "encoder-decoder", "vision", "speech", "multimodal", "other"
STATUSES = {
    "works": "works",
    "refused": "refused",
    "fails": "**fails**",
    "no inputs": "no input known here",
    "not built": "not built tiny",
}
MAX_NAMES = 4


def section():
    if not RESULT.is_file():
        return "Not measured yet: run `python -m benchmarks.families`.\n"
    result = json.loads(RESULT.read_text())
    found = result["families"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    counts = Counter(family["status"] for family in found.values())
    working = [family for family in found.values() if family["status"] == "works"]
    parts = [
        f"{len(found)} of {result['total']} families so far, with {versions}: "
        + ", ".join(f"{counts[status]} {text}" for status, text in STATUSES.items() if counts[status])
        + ". "
        + f"Of those that work, {sum(not family['left_out'] for family in working)} have every linear layer rotated, "
        + f"and {sum(bool(family['unused']) for family in working)} have layers that take no part in what was "
        + "computed from the inputs given, as an image tower that saw no image.",
    ]
    for kind in KINDS:
        rows = [row(name, family) for name, family in found.items() if family["kind"] == kind]
        if rows:
            parts += [
                f"## {kind[0].upper()}{kind[1:]}",
                table(["family", "", "rotated", "left out by name", ""], rows),
            ]
    return "\n\n".join(parts) + "\n"


def row(name, family):
    status = STATUSES[family["status"]]
    if family["status"] != "works":
        return [
            f"`{name}`",
            status,
            family.get("rotated", ""),
            said(family.get("left_out", {})),
            cell(family["message"]),
        ]
    notes = [f"without part in it: {listed(family['unused'])}"] if family["unused"] else []
    if "unchanged model" in family:
        notes.append("transformers does not bring back what it saved of the unchanged model either")
    if family.get("input gradients"):
        notes.append("trains only after `model.enable_input_require_grads()`, as every adapter")
    if family.get("in double precision"):
        notes.append("compared in double precision: its choices among equal scores turn on single roundings")
    if family.get("steps over"):
        notes.append("its outputs jump: a change of the base weights by rounding alone changes them as much")
    return [f"`{name}`", status, family["rotated"], said(family["left_out"]), "; ".join(notes)]


def said(left_out):
    return "; ".join(
        f"{REASONS[reason].label}: {listed(names)}" for reason, names in left_out.items() if reason in REASONS
    )


def listed(names):
    shown = ", ".join(f"`{name}`" for name in names[:MAX_NAMES])
    return shown + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")


def cell(text):
    for character in "|<>":
        text = text.replace(character, " ")
    return f"{text[:200].replace('`', '')}"
