"""What `requantization.py` measured: the error that folds add to quantized weights."""

import json
import statistics
from itertools import groupby
from pathlib import Path

from .text import table


RESULT = Path(__file__).parents[1] / "results" / "requantization.json"


def section():
    result = json.loads(RESULT.read_text())
    rows = []
    for (name, angle), group in groupby(result["rows"], key=lambda row: (row["format"], row["angle"])):
        runs = list(group)
        if angle:
            means = [
                statistics.mean(run[key] for run in runs)
                for key in ("added_by_last_fold", "total_after_20", "moved_after_20")
            ]
            rows.append([name, f"{angle:g}", *(f"{mean:.3f}" for mean in means)])
    header = ["format", "radians a fold", "added by the last fold", "error after 20", "moved by the rotations"]
    return table(header, rows) + "\n"
