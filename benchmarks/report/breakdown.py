"""What `breakdown.py` measured: where the time of a rotated layer goes."""

import json
from itertools import groupby
from pathlib import Path

from .text import machine, method_name, table


RESULT = Path(__file__).parents[1] / "results" / "breakdown-cpu.json"


def section():
    if not RESULT.is_file():
        return "Not measured yet: run `python -m benchmarks.breakdown`.\n"
    result = json.loads(RESULT.read_text())
    parts = [machine(result), "Milliseconds of operations in one forward and backward; *over full* is of their sum."]
    cells = groupby(result["rows"], key=lambda row: (row["in_features"], row["out_features"], row["tokens"]))
    for (in_features, out_features, tokens), rows in cells:
        rows = list(rows)
        kinds = list(rows[0]["milliseconds"])
        full = sum(rows[0]["milliseconds"].values())
        lines = []
        for row in rows:
            times = row["milliseconds"]
            key = f"{row['method']} {row['phase']}".strip()
            cells_of_row = [f"{times[kind]:.2f}" for kind in kinds]
            lines.append([method_name(key), *cells_of_row, f"{sum(times.values()) / full:.2f}"])
        parts += [f"{in_features} x {out_features}, {tokens} tokens:", table(["", *kinds, "over full"], lines)]
    return "\n\n".join(parts) + "\n"
