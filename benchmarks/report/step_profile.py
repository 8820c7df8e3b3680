"""What `step_profile.py` measured: a pretraining step by its parts."""

import json
from pathlib import Path

from .text import machine, table


RESULT = Path(__file__).parents[1] / "results" / "step-profile-cpu.json"


def section():
    result = json.loads(RESULT.read_text())
    adamw = result["cells"][0]["step"]
    parts = list(result["cells"][0]["parts"])
    rows = []
    for cell in result["cells"]:
        step, of_parts = cell["step"], [cell["parts"][part] for part in parts]
        seconds = [f"{value:.3f}" if value else "" for value in of_parts]
        rows.append([cell["name"], f"{step:.3f}", f"{step / adamw:.2f}", *seconds, f"{step - sum(of_parts):.3f}"])
    size = result["settings"]["size"].upper()
    return (
        f"Seconds of one step of the model of the pretraining comparison ({size} parameters, 1,024 tokens), at the "
        f"angle of the first steps.\n{machine(result)}\n\n"
        + table(["", "step", "over AdamW", *parts, "everything else"], rows)
        + "\n"
    )
