"""What `series.py` measured: the cost of more terms, and what three fixed ones miss."""

import json
from pathlib import Path

from .text import table


RESULT = Path(__file__).parents[1] / "results" / "series-cpu.json"


def section():
    result = json.loads(RESULT.read_text())
    rows = [
        [
            str(cell["block_size"]),
            f"{cell['angle']:g}",
            f"{1e3 * cell['timing']['fixed']['seconds']['median']:.2f}",
            f"{cell['timing']['adaptive']['ratio']['median']:.2f}",
            f"{cell['missed']['fixed']:.0e}",
            f"{cell['missed']['adaptive']:.0e}",
        ]
        for cell in result["cells"]
    ]
    header = ["b", "radians", "three terms, ms", "default over that", "three terms miss", "default misses"]
    machine, versions = result["machine"], result["machine"]["versions"]
    return (
        f"One side of 1,024 features on {machine['cpu']}, {machine['threads']} threads, torch {versions['torch']}: "
        "blocks, their inverse transpose and the gradient by the parameters, once an optimizer step. *Miss*: the "
        "largest entry by which a block differs from the exact Cayley map.\n\n" + table(header, rows) + "\n"
    )
