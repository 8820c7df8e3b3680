"""What `model.py` measured."""

from .text import MEMORY, machine, megabytes, method_name, ratio, table, verdict


COMMAND = "python -m benchmarks.model"
TARGET_METHOD = "poet-128"
MEMORY_TARGET = 0.60


def section(result):
    settings = result["settings"]
    about = (
        f"Random weights and tokens, vocabulary of {settings['vocab_size']:,}, batch {settings['batch_size']} x "
        f"{settings['seq_length']}; outside the linear layers everything "
        f"{'trains, in every method' if settings['rest'] == 'train' else 'is frozen, in every method'}. "
        "The optimizer is torch's fused AdamW; of rotations *folded every step* it is `RotationMuon` "
        "as the recipe has it, and its time has the fold in it."
    )
    parts = [machine(result), about]
    if settings["model"] == "60m" and settings["device"] == "cpu" and TARGET_METHOD in result["memory"]:
        parts += ["**Targets**, POET b = 128 over full AdamW:", targets(result)]
    for cell in result["cells"]:
        count = cell["micro_batches"]
        parts += [
            f"#### {count} micro-batch{'es' * (count > 1)} per step ({cell['rounds']} rounds)",
            times(result, cell),
        ]
    if result["folds"]:
        parts += [f"A fold, every {result['merge_interval']} steps here, comes on top:", folds(result)]
    parts += [
        "#### Memory",
        memory(result),
        "Weights and moments of the linear layers beside the papers' formulas (AdamW `3mn`, POET "
        "`mn + 3/2 (m+n)(b-1)`, fully stochastic `mn + 3/2 (b_m (b_m - 1) + b_n (b_n - 1))`, folded "
        "every step `mn + (m+n)(b-1)`):",
        formulas(result),
    ]
    if any(cell["micro_batches"] == 1 for cell in result["cells"]):
        parts.append(f"![memory and speed](plots/{plot_name(result)})")
    return "\n\n".join(parts)


def plot_name(result):
    settings = result["settings"]
    rest = "" if settings["rest"] == "train" else "-frozen-rest"
    return f"model-{settings['model']}{rest}-{settings['device']}.png"


def full_name(method):
    return "full AdamW" if method == "full" else method_name(method)


def num_tokens(result, cell):
    return cell["micro_batches"] * result["settings"]["batch_size"] * result["settings"]["seq_length"]


def targets(result):
    rows = []
    for count, wording in ((1, "at most 1.00"), (8, "below 1.00")):
        cell = next((cell for cell in result["cells"] if cell["micro_batches"] == count), None)
        what = f"step time, {count} micro-batch{'es' * (count > 1)}"
        if cell is None or f"{TARGET_METHOD} step" not in cell["timings"]:
            rows.append([what, wording, "not measured", ""])
            continue
        time = cell["timings"][f"{TARGET_METHOD} step"]["ratio"]
        rows.append([what, wording, ratio(time), verdict(time["median"], 1.0, strictly=count > 1)])
    memory, full = result["memory"][TARGET_METHOD], result["memory"]["full"]
    model = (memory["optimizer"] + memory["gradients"]) / (full["optimizer"] + full["gradients"])
    # State and gradient are proportional to the number of trained parameters.
    linear = memory["trained_in_linear_layers"] / full["trained_in_linear_layers"]
    for what, share in (("of the whole model", model), ("of the linear layers", linear)):
        state = f"optimizer state and gradients {what}"
        rows.append(
            [state, f"below {MEMORY_TARGET:.2f}", f"{share:.2f}", verdict(share, MEMORY_TARGET, strictly=True)]
        )
    return table(["", "target", "measured", ""], rows)


def times(result, cell):
    timings = cell["timings"]
    phases = [phase for phase in ("first", "later", "optimizer") if f"full {phase}" in timings]
    rows = []
    for method in methods_of(result, cell):
        step = timings[f"{method} step"]
        seconds = step["seconds"]["median"]
        speed = f"{num_tokens(result, cell) / seconds:,.0f}"
        parts = (f"{timings[f'{method} {phase}']['seconds']['median']:.3f}" for phase in phases)
        rows.append([full_name(method), speed, ratio(step["ratio"]), f"{seconds:.3f}", *parts])
    names = {"first": "first micro-batch, s", "later": "a later one, s", "optimizer": "optimizer, s"}
    header = ["method", "tokens/s", "step over full AdamW", "step, s", *(names[phase] for phase in phases)]
    return table(header, rows)


def methods_of(result, cell):
    return [method for method in result["memory"] if f"{method} step" in cell["timings"]]


def folds(result):
    interval = result["merge_interval"]
    rows = [
        [full_name(method), f"{fold['median']:.3f}", f"{1e3 * fold['median'] / interval:.2f}"]
        for method, fold in result["folds"].items()
    ]
    return table(["method", "a fold, s", "per step, ms"], rows)


def memory(result):
    full = result["memory"]["full"]
    rows = []
    for method, held in result["memory"].items():
        state = (held["optimizer"] + held["gradients"]) / (full["optimizer"] + full["gradients"])
        rows.append([full_name(method), *(megabytes(held[name]) for name in MEMORY), f"{state:.2f}"])
    return table(["MB", *MEMORY.values(), "optimizer and gradients over full AdamW"], rows)


def formulas(result):
    rows = []
    for method, held in result["memory"].items():
        name, formula = full_name(method), held["linear_layers_formula"]
        if sizes := held["oft_block_sizes"]:
            name += f" (blocks of {', '.join(map(str, sizes))})"
        predicted = [megabytes(formula), f"{held['linear_layers_held'] / formula:.3f}"] if formula else ["", ""]
        rows.append([name, f"{held['trained_in_linear_layers']:,}", megabytes(held["linear_layers_held"]), *predicted])
    return table(["method", "trained in linear layers", "measured, MB", "formula, MB", "measured / formula"], rows)
