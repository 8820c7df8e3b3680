"""The environment of every test: no network, and one thread per pytest-xdist worker."""

import os
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "examples"))  # as running one of them does

# Both are read once, when huggingface_hub and torch are imported: nothing above may import either.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
