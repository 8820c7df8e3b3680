"""What `dial.py` measured: the losses of an adapter at scales from 0 to 1."""

import json
from pathlib import Path

from .text import table


RESULT = Path(__file__).parents[1] / "results" / "dial.json"


def section():
    result = json.loads(RESULT.read_text())
    training = result["training"]
    measured = sorted(result["rows"], key=lambda row: row["scale"])
    rows = [[f"{row['scale']:g}", f"{row['eval_loss']:.4f}", f"{row['prose_perplexity']:.2f}"] for row in measured]
    batch, steps = training["per_device_train_batch_size"], training["max_steps"]
    return (
        f"After {steps} steps of {batch} rows at {training['learning_rate']:g} radians a step, "
        f"b = {training['block_size']:g}, seed {training['seed']}; "
        f"on {result['eval_tokens']:,} held-out tokens and {result['prose_tokens']:,} tokens of prose.\n\n"
        + table(["scale", "held-out loss", "perplexity of other prose"], rows)
        + "\n"
    )
