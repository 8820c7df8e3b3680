"""What `lora_conversion.py` measured: a converted adapter's share of the change, and its losses, by rank."""

import json
from pathlib import Path

from .text import table


RESULT = Path(__file__).parents[1] / "results" / "lora-conversion.json"


def section():
    result = json.loads(RESULT.read_text())
    training = result["training"]
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
    batch, steps = training["per_device_train_batch_size"], training["max_steps"]
    return (
        f"After {steps} steps of {batch} rows at {training['learning_rate']:g} radians a step, "
        f"b = {training['block_size']:g}, seed {training['seed']}; "
        f"on {result['eval_tokens']:,} held-out tokens and {result['prose_tokens']:,} tokens of prose.\n\n"
        + table(["", "parameters", "squared change that is kept", "held-out loss", "perplexity of other prose"], rows)
        + "\n"
    )


def name_of(row):
    return {"base": "base model", "poet": "POET, as trained"}.get(row["kind"]) or f"converted, rank {row['rank']}"
