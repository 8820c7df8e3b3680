"""Result files: what was measured, on what, with which settings."""

import atexit
import gc
import json
import os
import platform
from pathlib import Path

import peft
import torch
import transformers

import poet_peft


RESULTS = Path(__file__).parents[1] / "results"
UNKEPT = Path("benchmark-output")


def start(args):
    """Applies the flags that every command has. Returns the machine's description."""
    if args.threads:
        torch.set_num_threads(args.threads)
    # Garbage collections happen around every memory measurement, and need not look at what was imported.
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)
    if args.device == "cuda":
        _allocate_workspaces(getattr(torch, args.dtype))
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, poet_peft)}
        | {"python": platform.python_version()},
    }


def _allocate_workspaces(dtype):
    """cuBLAS's, for both threads: they belong to no method."""
    layer = torch.nn.Linear(64, 64, device="cuda", dtype=dtype)
    layer(torch.ones(64, 64, device="cuda", dtype=dtype, requires_grad=True)).sum().backward()


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return fields.get("model name") or platform.processor()


class ResultFile:
    """Collects measurements, and writes the file after each, so that an interrupted run keeps what it has."""

    def __init__(self, args, command, name, machine):
        self.path = Path(args.output) if args.output else (UNKEPT if args.quick else RESULTS) / f"{name}.json"
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        self.content = {"command": command, "machine": machine, "settings": settings, "cells": []}

    def add(self, cell):
        self.content["cells"].append(cell)
        self.write()

    def write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(self.text())
        temporary.replace(self.path)

    def text(self):
        """JSON, one line a cell."""
        head = rounded({key: value for key, value in self.content.items() if key != "cells"})
        cells = ",\n".join(json.dumps(rounded(cell)) for cell in self.content["cells"])
        return f'{json.dumps(head, indent=1).removesuffix("}").rstrip()},\n "cells": [\n{cells}\n ]\n}}\n'


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
