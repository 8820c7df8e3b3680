"""What training does to weights: docs/training-figures.md, see `benchmarks/figures.py`."""

from .figures_data import (
    KINDS,
    METHODS,
    change_of_spectrum,
    largest,
    mean,
    median,
    pick,
    poet_runs,
    read,
    read_coverage,
)
from .figures_plots import plot_name
from .quality_names import name_of
from .text import table


def table_of_norms(runs):
    """Largest and median singular values at the start and at the end, by kind of layer."""
    header = ["linear layer"]
    for method in runs:
        header += [f"{name_of(method)}: largest", "median", "largest / median at the end"]
    rows = []
    for kind in KINDS:
        row = [f"`{kind}`"]
        for run in runs.values():
            row += [
                arrow(largest(run, 0, [kind]), largest(run, -1, [kind])),
                arrow(median(run, 0, [kind]), median(run, -1, [kind])),
                f"{largest(run, -1, [kind]) / median(run, -1, [kind]):.1f}",
            ]
        rows.append(row)
    return table(header, rows)


def arrow(before, after):
    return f"{before:.2f} → {after:.2f}"


def joined(texts):
    texts = list(texts)
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def text_of_curves(runs):
    losses = joined(f"{run['loss']:.3f} with {name_of(method)}" for method, run in runs.items())
    return (
        f"After {first(runs)['run']['steps']} steps, one seed each, the held-out loss is {losses}. In the paper's "
        "runs (5 to 50 billion tokens, tables 2 and 3), POET improves more slowly than AdamW after the first drop "
        "(figure 8), and ends ahead with its largest blocks, behind with smaller ones."
    )


def text_of_spectra(runs):
    texts = [
        f"{name_of(method)} changes none by more than {max(100 * change_of_spectrum(run), 0.001):.2g} %"
        for method, run in poet_runs(runs).items()
    ]
    grown = pick(runs, "adamw")
    for run in grown.values():
        attention = ["q_proj", "k_proj"]
        texts.append(
            f"AdamW multiplies the largest of the query and key projections by "
            f"{largest(run, -1, attention) / largest(run, 0, attention):.1f} and leaves their median within "
            f"{100 * abs(median(run, -1, attention) / median(run, 0, attention) - 1):.0f} %"
        )
    return (
        f"Of the singular values, {joined(texts)}. The paper reports the same of POET, and large values after AdamW "
        "(figure 1, appendix I); here it is a few directions that grow."
    )


def text_of_norms(runs):
    kept = "POET keeps what the initial weights gave it, the same for all layers of one shape."
    if "adamw" not in runs:
        return kept
    run = runs["adamw"]
    growth = {kind: largest(run, -1, [kind]) / largest(run, 0, [kind]) for kind in KINDS}
    most, least = max(growth, key=growth.get), min(growth, key=growth.get)
    ranks = [mean(run, "stable_rank", at, ["q_proj", "k_proj"]) for at in (0, -1)]
    return (
        f"AdamW multiplies the spectral norm by {growth[most]:.1f} in `{most}` and by {growth[least]:.1f} in "
        f"`{least}`, and the stable rank of the query and key projections falls from {ranks[0]:.0f} to "
        f"{ranks[1]:.1f}; {kept}"
    )


def text_of_entropy(runs):
    adamw = ", and AdamW lowers it until its learning rate has decayed" if "adamw" in runs else ""
    return f"{_ends(runs, 'entropy', 3)}: POET keeps it, as in the paper (figure 6){adamw}."


def text_of_energy(runs):
    kept = f"{_ends(runs, 'energy', 4)}: POET's stays at what random rows have, as the paper derives (appendix B)"
    if "adamw" not in runs:
        return f"{kept}."
    return (
        f"{kept}, and with AdamW it rises, in the query and key projections to "
        f"{mean(runs['adamw'], 'energy', -1, ['q_proj', 'k_proj']):.4f}; on this scale both changes are small."
    )


def _ends(runs, measure, digits):
    texts = [
        f"{mean(run, measure, 0):.{digits}f} → {mean(run, measure, -1):.{digits}f} with {name_of(method)}"
        for method, run in runs.items()
    ]
    return f"Mean over the layers, {joined(texts)}"


def text_of_probing(runs):
    ends = joined(
        f"{mean(run, 'probe_R', -1):.2f} and {mean(run, 'probe_P', -1):.2f} with {name_of(method)}"
        for method, run in poet_runs(runs).items()
    )
    return (
        f"The cosines fall with the learning rate's schedule and end at {ends} for the two sides. The paper's fall to "
        "0.60 to 0.65, stay there for most of a long run while the model learns, and end with the learning rate "
        "(figure 2, appendix A); a run this short turns less, and shows no such phases."
    )


def text_of_coverage(coverage):
    smallest = coverage["fully stochastic, 1/8"]
    half = coverage["fully stochastic, 1/2"]
    num_sets = next(number for number, part in enumerate(smallest["covered"], 1) if part > 0.99)
    return (
        f"Block-stochastic rotations reach every entry each time; fully stochastic ones of 1/8 need {num_sets} index "
        f"sets for 99 % of the entries, and after {len(half['spread'])} the number of updates differs between entries "
        f"by {100 * half['spread'][-1]:.0f} % of its mean with 1/2, and by {100 * smallest['spread'][-1]:.0f} % with "
        "1/8. The paper counts updates the same way, on a smaller matrix (appendix H)."
    )


def first(runs):
    return next(iter(runs.values()))


def section():
    runs = read()
    run = first(runs)
    settings = "\n".join(
        f"- {name_of(method)}: rate of the linear layers {result['run']['matrix_lr']:g}, of the rest "
        f"{result['run']['lr']:g}"
        + "".join(f", {k.partition('.')[2]} {v}" for k, v in result["run"]["options"].items())
        for method, result in runs.items()
    )
    about = (
        f"{run['parameters']['model'] / 1e6:.1f}M parameters, {run['run']['steps']} steps, "
        f"{run['tokens'] / 1e6:.2f}M tokens of the Python standard library, seed {run['run']['seed']}; "
        f"{run['hardware']}, fp32."
    )
    missing = [name_of(method) for method in METHODS if method not in runs]
    if missing:
        about += f" Not measured yet: {joined(missing)}."
    parts = [f"{about}\n\n{settings}"]
    for name, (heading, alt, text_of) in FIGURES.items():
        text = text_of(read_coverage() if name == "coverage" else runs)
        parts.append(f"## {heading}\n\n{text}\n\n![{alt}](figures/{plot_name(name)})")
        if name == "norms":
            parts.append(f"Start → end, means over the layers of a kind:\n\n{table_of_norms(runs)}")
    return "\n\n".join(parts) + "\n"


# Heading, description of the picture, sentence.
FIGURES = {
    "curves": ("Loss", "Training and held-out loss along the runs", text_of_curves),
    "spectra": ("Singular values", "Singular values of two layers along the runs", text_of_spectra),
    "norms": (
        "Spectral norm and stable rank",
        "Spectral norm and stable rank by kind of linear layer",
        text_of_norms,
    ),
    "entropy": ("SVD entropy", "SVD entropy along the runs, mean and range over the layers", text_of_entropy),
    "energy": (
        "Hyperspherical energy",
        "Energy of the rows along the runs, mean and range over the layers",
        text_of_energy,
    ),
    "probing": ("Vector probing", "Cosines of fixed vectors with what all rotations made of them", text_of_probing),
    "coverage": (
        "Coverage of updates",
        "Part of the entries updated, and how evenly, by index sets drawn",
        text_of_coverage,
    ),
}
