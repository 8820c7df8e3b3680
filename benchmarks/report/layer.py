"""What `layer.py` measured."""

from .text import MEMORY, machine, megabytes, method_name, milliseconds, ratio, table, verdict


COMMAND = "python -m benchmarks.layer"
# Two CPU cores, fp32, 4096 tokens: input x output features, block size, time over a linear layer trained in full.
TARGETS = [
    ((512, 512), 64, 1.10),
    ((512, 512), 128, 1.15),
    ((512, 512), 256, 1.30),
    ((1024, 2816), 64, 0.95),
    ((1024, 2816), 128, 1.00),
    ((1024, 2816), 256, 1.08),
]
TARGET_TOKENS = 4096
FEW_TOKENS, FEW_TOKENS_TARGET = 256, 2.5


def section(result):
    parts = [
        machine(result),
        "Time is over that of a linear layer trained in full, in the same round: median (quartiles).",
    ]
    if result["settings"]["device"] == "cpu" and result["settings"]["dtype"] == "float32":
        parts += [f"**Targets**, {TARGET_TOKENS} tokens:", targets(result), few_tokens(result)]
    parts += [f"![time over a full linear layer](plots/{plot_name(result)})"]
    for shape in shapes(result):
        cells = cells_of(result, shape)
        parts += [f"#### {shape[0]} x {shape[1]}", times(cells), memory(cells)]
    return "\n\n".join(parts)


def plot_name(result):
    return f"layer-{result['settings']['device']}.png"


def shapes(result):
    return list(dict.fromkeys((cell["in_features"], cell["out_features"]) for cell in result["cells"]))


def cells_of(result, shape):
    """The cells of a shape, by number of tokens."""
    cells = [cell for cell in result["cells"] if (cell["in_features"], cell["out_features"]) == shape]
    return {cell["tokens"]: cell for cell in sorted(cells, key=lambda cell: cell["tokens"])}


def targets(result):
    rows = []
    for shape, b, target in TARGETS:
        timings = cells_of(result, shape).get(TARGET_TOKENS, {}).get("timings", {})
        row = [f"{shape[0]} x {shape[1]}", b, f"{target:.2f}"]
        for phase in ("first", "later"):
            timing = timings.get(f"poet-{b} {phase}")
            row += (
                [ratio(timing["ratio"]), verdict(timing["ratio"]["median"], target)]
                if timing
                else ["not measured", ""]
            )
        rows.append(row)
    return table(["shape", "b", "at most", "first micro-batch", "", "later ones", ""], rows)


def few_tokens(result):
    later = [
        (
            timing["ratio"]["median"],
            method_name(key.partition(" ")[0]),
            f"{cell['in_features']} x {cell['out_features']}",
        )
        for cell in result["cells"]
        if cell["tokens"] == FEW_TOKENS
        for key, timing in cell["timings"].items()
        if key.endswith(" later")
    ]
    begin = f"With {FEW_TOKENS} tokens, after the first micro-batch, at most {FEW_TOKENS_TARGET}:"
    if not later:
        return f"{begin} not measured."
    largest, method, shape = max(later)
    met = verdict(largest, FEW_TOKENS_TARGET)
    return f"{begin} the largest of all shapes and modes is {largest:.2f} ({method}, {shape}): {met}."


def times(cells):
    keys = dict.fromkeys(key for cell in cells.values() for key in [*cell["timings"], *cell["skipped"]])
    full = [
        "linear layer in full, ms",
        *(milliseconds(c["timings"]["full"]["seconds"]["median"]) for c in cells.values()),
    ]
    rows = [full]
    for key in keys:
        if key != "full":
            rows.append([method_name(key), *(time_of(cell, key) for cell in cells.values())])
    return table(["method", *(f"N = {n:,} ({cell['rounds']} rounds)" for n, cell in cells.items())], rows)


def time_of(cell, key):
    return cell["skipped"].get(key) or (ratio(cell["timings"][key]["ratio"]) if key in cell["timings"] else "")


def memory(cells):
    num_tokens = next((n for n, cell in cells.items() if cell["memory"]), None)
    if num_tokens is None:
        return "Memory: not measured."
    rows = [
        [method_name(method), *(megabytes(held[name]) for name in MEMORY)]
        for method, held in cells[num_tokens]["memory"].items()
    ]
    return table([f"MB at N = {num_tokens:,}", *MEMORY.values()], rows)
