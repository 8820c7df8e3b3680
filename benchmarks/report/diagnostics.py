"""The table of docs/diagnostics.md: what measuring costs beside training, see `diagnostics.py`."""

import json
import math
from pathlib import Path

from .text import machine, method_name, table


RESULT = Path(__file__).parents[1] / "results" / "diagnostics-cpu.json"
INTERVAL = 100
MOST = 0.02


def section():
    result = json.loads(RESULT.read_text())
    rows = [
        [
            f"{row['model'].upper()}, {method_name(row['method'])}",
            f"{row['tokens']:,}",
            f"{row['step_seconds']:.2f}",
            f"{row['diagnose_seconds']:.2f}",
            percent(row["diagnose_seconds"] / (INTERVAL * row["step_seconds"])),
            f"{interval(row['diagnose_seconds'], row['step_seconds'])}",
            f"{row['exact_seconds']:.1f}",
            f"{interval(row['exact_seconds'], row['step_seconds']):,}",
        ]
        for row in result["rows"]
    ]
    header = [
        "model",
        "tokens a step",
        "step, s",
        "measuring, s",
        f"share at every {INTERVAL}th step",
        "steps apart for 2 %",
        "exact, s",
        "steps apart for 2 %, exact",
    ]
    return f"{machine(result)} CPU time of the process, medians.\n\n{table(header, rows)}\n"


def interval(seconds, step_seconds):
    """The fewest steps between measurements whose share of the training time is at most `MOST`."""
    return math.ceil(seconds / (MOST * step_seconds))


def percent(part):
    return f"{100 * part:.2f} %"
