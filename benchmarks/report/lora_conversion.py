"""What `lora_conversion.py` measured: a converted adapter's share of the change, and its losses, by rank."""

import json
from pathlib import Path

from .text import table, trained_adapter


RESULT = Path(__file__).parents[1] / "results" / "lora-conversion.json"


def section():
    result = json.loads(RESULT.read_text())
    rows = [
        [
            name_of(row),
            f"{row['parameters']:,}" if "parameters" in row else "",
            f"{100 * row['kept']:.1f} %" if "kept" in row else "",
            f"{row['eval_loss']:.4f}",
            f"{row['prose_perplexity']:.2f}",
        ]
        for row in result["rows"]
    ]
    return (
        f"{trained_adapter(result)}\n\n"
        + table(["", "parameters", "squared change that is kept", "held-out loss", "perplexity of other prose"], rows)
        + "\n"
    )


def name_of(row):
    return {"base": "base model", "poet": "POET, as trained"}.get(row["kind"]) or f"converted, rank {row['rank']}"
