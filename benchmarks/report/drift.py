"""What `drift.py` measured."""

import json
from pathlib import Path

from .text import table


RESULT = Path(__file__).parents[1] / "results" / "drift.json"


def section():
    result = json.loads(RESULT.read_text())
    steps = list(result["cells"][0]["drift"])
    rows = [[cell["weights"], *(f"{cell['drift'][step]:.0e}" for step in steps)] for cell in result["cells"]]
    rows_out, columns = result["shape"]
    versions = result["machine"]["versions"]
    return (
        f"Drift, the largest relative change of a singular value, of a weight of {rows_out} x {columns} with blocks "
        f"of {result['block_size']}, in which every plane turns by about {result['angle']:g} rad at every step "
        f"(`python -m benchmarks.drift`; torch {versions['torch']}):\n\n"
        + table(["weight", *(f"{int(step):,} steps" for step in steps)], rows)
        + "\n"
    )
