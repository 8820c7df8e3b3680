"""The tables of docs/performance.md: a short form of what `layer.py` and `model.py` measured on CPUs."""

import json
from pathlib import Path

from . import layer, model
from .text import machine, megabytes, method_name, ratio, table


RESULTS = Path(__file__).parents[1] / "results"
SHAPES = (512, 512), (1024, 2816)
NUM_TOKENS = 4096
METHODS = "frozen", "lora-64", "oft-64", "poet-64", "poet-128", "poet-256", "poet-128-efficient"


def section():
    return f"{one_layer(read('layer-cpu'))}\n\n{whole_step(read('model-60m-cpu'))}\n"


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def one_layer(result):
    """Time of forward and backward over that of the same layer trained in full, by shape."""
    timings = [layer.cells_of(result, shape)[NUM_TOKENS]["timings"] for shape in SHAPES]
    keys = [key for key in timings[0] if key.partition(" ")[0] in METHODS]
    rows = [[method_name(key), *(ratio(t[key]["ratio"]) if key in t else "" for t in timings)] for key in keys]
    header = ["", *(f"{n_in} x {n_out}" for n_in, n_out in SHAPES)]
    return (
        f"One layer, {NUM_TOKENS:,} tokens, forward and backward; time over the same layer trained in full, median "
        f"(quartiles). *First* is the first micro-batch after an optimizer step, *later* any further one.\n"
        f"{machine(result)}\n\n{table(header, rows)}"
    )


def whole_step(result):
    """Time and memory of an optimizer step of a whole model."""
    settings, (cell, *_) = result["settings"], result["cells"]
    rows = []
    for method in model.methods_of(result, cell):
        held = result["memory"][method]
        step = ratio(cell["timings"][f"{method} step"]["ratio"])
        sizes = [megabytes(held[key]) for key in ("optimizer", "gradients", "peak")]
        rows.append([model.full_name(method), step, *sizes])
    header = ["", "step over full AdamW", "optimizer, MB", "gradients, MB", "peak, MB"]
    return (
        f"A training step of a Llama of about {settings['model'].upper()} parameters, {settings['batch_size']} x "
        f"{settings['seq_length']} tokens in one micro-batch; embeddings and head train in every method, and are most "
        f"of what is left of the optimizer's memory.\n\n{table(header, rows)}"
    )
