"""What `scaling.py` measured."""

from .text import machine, table


COMMAND = "python -m benchmarks.scaling"


def section(result):
    settings = result["settings"]
    about = (
        f"One square layer of {settings['base_width']:,} features, {settings['base_tokens']:,} tokens, "
        f"b = {settings['base_block_size']}, with one of them swept; and a Llama {settings['hidden_size']} wide with "
        f"{settings['batch_size']} x {settings['seq_length']} tokens, its depth swept. Slopes over the upper half of "
        "each sweep. Predictions count floating-point operations and bytes held between forward and backward."
    )
    return "\n\n".join([machine(result), about, exponents(result), f"![scaling](plots/{plot_name(result)})"])


def plot_name(result):
    return f"scaling-{result['settings']['device']}.png"


def exponents(result):
    rows = []
    for cell in result["cells"]:
        for quantity, methods in cell["exponents"].items():
            for method, fit in methods.items():
                rows.append([sweep(cell), quantity, method, f"{fit['fitted']:.2f}", f"{fit['predicted']:.2f}"])
    return table(["swept", "quantity", "method", "fitted exponent", "predicted"], rows)


def sweep(cell):
    return f"{cell['sweep']} {cell['values'][0]:,}–{cell['values'][-1]:,}"
