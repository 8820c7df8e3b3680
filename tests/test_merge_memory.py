"""`benchmarks.merge_memory`: the file that it writes, and what is said of it."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from benchmarks import merge_memory
from benchmarks.report import merge_memory as report


def in_this_process(command, **kwargs):
    with redirect_stdout(io.StringIO()) as output:
        merge_memory.measure(Path(command[-1]))
    return SimpleNamespace(stdout=output.getvalue())


def test_file_has_the_sizes_and_the_peak_of_a_merge(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_memory, "CELLS", [("adapter", "bfloat16", 0)])
    monkeypatch.setattr(merge_memory.subprocess, "run", in_this_process)
    flags = ["--preset", "tiny", "--vocab-size", "64", "--output", str(tmp_path / "result.json")]
    monkeypatch.setattr("sys.argv", ["merge_memory", *flags])
    merge_memory.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"] == {"preset": "tiny", "vocab_size": 64, "block_size": merge_memory.BLOCK_SIZE}
    (cell,) = result["cells"]
    assert (cell["adapter"], cell["dtype"]) == ("adapter", "bfloat16") and cell["before"] > 1e6
    assert cell["bytes"]["base"] > 0 < cell["bytes"]["adapter"] and cell["bytes"]["merged"] >= cell["bytes"]["base"]


def test_table_counts_the_model_in_the_dtype_of_the_merge(tmp_path, monkeypatch):
    sizes = {"base": 2e6, "adapter": 1e6, "merged": 4e6}
    cells = [
        {"adapter": adapter, "dtype": dtype, "bytes": sizes, "peak": 5e6}
        for adapter, dtype in [("adapter", "bfloat16"), ("folded", "bfloat16"), ("folded", "float32")]
    ]
    monkeypatch.setattr(report, "RESULT", tmp_path / "result.json")
    report.RESULT.write_text(json.dumps({"cells": cells}))
    rows = [row.split(" | ")[1:] for row in report.section().splitlines()[2:]]
    assert [row[0] for row in rows] == ["2.0", "4.0", "2.0"] and rows[0][1:] == ["1.0", "5.0 |"]
