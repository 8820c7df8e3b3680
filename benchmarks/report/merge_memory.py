"""The table of docs/command-line.md: what merging takes, see `benchmarks/merge_memory.py`."""

import json
from pathlib import Path

from .text import megabytes, table


RESULT = Path(__file__).parents[1] / "results" / "merge-memory.json"
_NAMES = {"adapter": "an adapter without folds", "folded": "an adapter with folds, with residuals"}


def section():
    result = json.loads(RESULT.read_text())
    rows = [
        [
            f"{_NAMES[cell['adapter']]}; base in {cell['dtype']}",
            megabytes(computed(cell)),
            megabytes(cell["bytes"]["adapter"]),
            megabytes(cell["peak"]),
        ]
        for cell in result["cells"]
    ]
    header = ["merging", "model as it computes, MB", "adapter's file, MB", "peak of the merge, MB"]
    return f"{table(header, rows)}\n"


def computed(cell):
    """Bytes of the model in the dtype that it is merged in: fp32 where a residual is joined to 16-bit weights."""
    return cell["bytes"]["base"] * (2 if cell["adapter"] == "folded" and cell["dtype"] != "float32" else 1)
