"""What `adapter_sizes.py` measured: bytes of adapter files at about equal parameter counts."""

import json
from pathlib import Path

from .text import table


RESULT = Path(__file__).parents[1] / "results" / "adapter-sizes.json"


def section():
    result = json.loads(RESULT.read_text())
    rows = [
        [name, f"{size['trained']:,}", f"{size['bytes']:,}", f"{size['bytes_per_parameter']:.3f}"]
        for name, size in result["adapters"].items()
    ]
    return table(["adapter", "parameters", "bytes of the file", "bytes a parameter"], rows) + "\n"
