"""What benchmarks take from the examples: the same data in the same order, and the same measure."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2] / "examples"))  # as running one of them does

import example_tools  # noqa: E402
from finetune import token_loss  # noqa: E402


__all__ = ["example_tools", "token_loss"]
