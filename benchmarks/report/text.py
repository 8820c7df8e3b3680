"""Markdown, and what every section says about its result file."""

MEMORY = {
    "weights": "weights",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "caches": "caches",
    "activations": "activations",
    "peak": "peak",
    "peak_accumulating": "peak, accumulating",
}


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def ratio(quartiles, digits=2):
    """Median and quartiles: 1.20 (1.18–1.23)."""
    median, q1, q3 = (f"{quartiles[name]:.{digits}f}" for name in ("median", "q1", "q3"))
    return f"{median} ({q1}–{q3})"


def milliseconds(seconds):
    return f"{1e3 * seconds:,.1f}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def megabytes(size):
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def verdict(value, target, strictly=False):
    return "met" if value < target or (value == target and not strictly) else "**missed**"


def machine(result):
    """One line: what it ran on, with which versions."""
    about, settings = result["machine"], result["settings"]
    device = about["gpu"] or f"{about['cpu']}, {about['cores']} cores, {about['threads']} torch threads"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{device}, {settings['dtype']}; {versions}."


def method_name(key):
    """A method or timing for readers: "poet-128-efficient first" -> "POET b = 128, memory-efficient, first"."""
    method, _, phase = key.partition(" ")
    kind, _, size = method.partition("-")
    every_step, size = size.startswith("ortho-"), size.removeprefix("ortho-")
    size, is_efficient = size.removesuffix("-efficient"), size.endswith("-efficient")
    fully = size.startswith("fs-")
    text = {
        "full": "linear layer in full",
        "frozen": "frozen linear layer",
        "lora": f"LoRA r = {size}",
        "oft": f"OFT b = {size}",
        "boft": f"BOFT b = {size}",
        "poet": f"POET FS {size.removeprefix('fs-')}" if fully else f"POET b = {size}",
    }[kind]
    how = ["folded every step"] * every_step + ["memory-efficient"] * is_efficient
    return ", ".join([text, *how, *[phase] * bool(phase)])


def trained_adapter(result):
    """How an adapter was trained whose forms were measured, and on how much text."""
    training = result["training"]
    batch, steps = training["per_device_train_batch_size"], training["max_steps"]
    return (
        f"After {steps} steps of {batch} rows at {training['learning_rate']:g} radians a step, "
        f"b = {training['block_size']:g}, seed {training['seed']}; "
        f"on {result['eval_tokens']:,} held-out tokens and {result['prose_tokens']:,} tokens of prose."
    )
