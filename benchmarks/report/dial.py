"""What `dial.py` measured: the losses of an adapter at scales from 0 to 1."""

import json
from pathlib import Path

from .text import table, trained_adapter


RESULT = Path(__file__).parents[1] / "results" / "dial.json"


def section():
    result = json.loads(RESULT.read_text())
    measured = sorted(result["rows"], key=lambda row: row["scale"])
    rows = [[f"{row['scale']:g}", f"{row['eval_loss']:.4f}", f"{row['prose_perplexity']:.2f}"] for row in measured]
    return (
        f"{trained_adapter(result)}\n\n" + table(["scale", "held-out loss", "perplexity of other prose"], rows) + "\n"
    )
