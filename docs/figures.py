"""Draws the pictures of docs/method.md into docs/figures/.

python docs/figures.py
python docs/figures.py --num_folds 4 --output_dir DIRECTORY    # in a second or two, to see that it works
"""

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from peft import get_peft_model
from torch import nn

from poet_peft import POETConfig, merge_and_reinitialize


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


HERE = Path(__file__).parent
SIZE = 64


def skew(n, norm, generator):
    """A random skew-symmetric matrix (n, n) of spectral norm `norm`, in float64."""
    A = torch.randn(n, n, dtype=torch.float64, generator=generator)
    Q = A - A.T
    return Q * (norm / torch.linalg.matrix_norm(Q, 2))


def cayley(Q):
    I = torch.eye(len(Q), dtype=Q.dtype)
    return torch.linalg.solve(I - Q, I + Q)


def draw_rotations(_):
    """One side's rotation in both variants, as the features lie in the model and in block order."""
    generator = torch.Generator().manual_seed(0)
    n, b = 24, 6
    panels = {}
    for name, num_blocks in (("block-stochastic", n // b), ("fully stochastic", 1)):
        G = torch.eye(n, dtype=torch.float64)
        for i in range(num_blocks):
            G[i * b : i * b + b, i * b : i * b + b] = cayley(skew(b, 0.8, generator))
        order = torch.randperm(n, generator=generator)
        panels[f"{name}, in block order"] = G
        placed = torch.empty_like(G)
        placed[order[:, None], order] = G
        panels[f"{name}, R itself"] = placed
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
    for panel, (title, matrix) in zip(axes, panels.items(), strict=True):
        panel.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
        panel.set_title(title, fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
    return figure


def draw_series(_):
    """What k terms leave of orthogonality at each angle, and how many products they cost."""
    figure, (error, cost) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    angles = np.logspace(-2, math.log10(2), 200)
    for k in (1, 3, 7, 15, 31):
        error.loglog(angles, np.tan(angles / 2) ** (k + 1), label=f"k = {k}")
    rounding = np.finfo(np.float32).eps
    error.axhline(rounding, color="black", linestyle=":")
    error.text(angles[0], 1.5 * rounding, "rounding in fp32", fontsize=8)
    error.set(ylim=(1e-9, 10), xlabel="angle of a plane, radians", ylabel="distance of singular values of G from 1")
    error.legend(fontsize=8)
    orders = range(1, 32)
    cost.plot(orders, list(orders), label="term by term (Horner)")
    doubled = [2**j - 1 for j in range(1, 6)]
    cost.plot(doubled, [max(1, 2 * (j - 1)) for j in range(1, 6)], "o-", label="k = 2^j - 1, by doubling")
    cost.set(xlabel="k, highest power of the series", ylabel="matrix products for G")
    cost.legend(fontsize=8)
    for panel in (error, cost):
        panel.grid(alpha=0.3)
    return figure


def drift(num_folds, norm, dtype=torch.float32, **settings):
    """The largest relative change of a singular value after each fold of random rotations, all of one norm."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(SIZE, SIZE, bias=False, dtype=dtype)
    U, V = (torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0] for _ in range(2))
    with torch.no_grad():
        layer.weight.copy_(U * torch.linspace(0.5, 2, SIZE) @ V)
    config = POETConfig(target_modules=["0"], block_size=SIZE, merge_interval=1, **settings)
    model = get_peft_model(nn.Sequential(layer), config)
    before = torch.linalg.svdvals(layer.weight.double())
    rows, columns = torch.triu_indices(SIZE, SIZE, offset=1)
    changes = []
    for _ in range(num_folds):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "poet_" in name:
                    parameter.copy_(skew(SIZE, norm, generator)[rows, columns].view_as(parameter))
        merge_and_reinitialize(model)
        after = torch.linalg.svdvals(layer.weight.double())
        changes.append(((after - before) / before).abs().max().item())
    return changes


def draw_drift(num_folds):
    """Singular values over folds: the series of three terms, as the paper has it, and with as many as are needed."""
    maps = {
        "3 terms": ({"adaptive_terms": False}, "--"),
        "3 terms and more where needed (default)": ({}, "-"),
        "exact Cayley map": ({"orthogonal_map": "cayley"}, ":"),
    }
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    folds = range(1, num_folds + 1)
    for label, (settings, style) in maps.items():
        for color, norm in enumerate((0.05, 0.2)):
            changes = drift(num_folds, norm, **settings)
            axes.loglog(folds, changes, style, color=f"C{color}", label=f"{label}, |Q| = {norm:g}")
    axes.set(xlabel="folds", ylabel="largest relative change of a singular value")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def draw_compensation(num_folds):
    """Singular values of a bf16 weight over folds, with and without the residual of the rounding."""
    rows = {
        "bf16, compensated folds (default)": (torch.bfloat16, {}),
        "bf16, plain folds": (torch.bfloat16, {"compensated_folds": False}),
        "fp32": (torch.float32, {}),
    }
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for label, (dtype, settings) in rows.items():
        axes.loglog(range(1, num_folds + 1), drift(num_folds, 0.02, dtype, **settings), label=label)
    axes.set(xlabel="folds", ylabel="largest relative change of a singular value")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_costs(_):
    """Floating-point operations of the ways to train a rotated layer, over those of a layer trained in full."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    N = np.logspace(2, 5, 100)
    for panel, (m, n, b) in zip(axes, ((512, 512, 256), (1024, 2816, 128)), strict=True):
        full = 6 * N * m * n
        panel.loglog(N, (4 * N * m * n + 6 * N * b * (m + n)) / full, label="rotating activations")
        panel.loglog(N, (4 * N * m * n + 2 * N * b * (m + n) + 4 * m * n * b) / full, label="tangent rule")
        panel.loglog(N, (6 * N * m * n + 8 * m * n * b) / full, label="weight-centric rule")
        panel.axhline(4 / 6, color="black", linestyle=":", label="frozen layer")
        panel.set_title(f"{m} x {n}, b = {b}", fontsize=9)
        panel.set_xlabel("tokens in a micro-batch")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("operations over training in full")
    axes[0].set_yticks([0.7, 1, 2, 4], ["0.7", "1", "2", "4"])
    axes[0].minorticks_off()
    axes[0].set_ylim(0.6, 5)
    axes[1].legend(fontsize=8)
    return figure


FIGURES = {
    "rotations": draw_rotations,
    "series": draw_series,
    "drift": draw_drift,
    "compensation": draw_compensation,
    "costs": draw_costs,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_folds", type=int, default=300)
    parser.add_argument("--output_dir", type=Path, default=HERE / "figures")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        figure = draw(args.num_folds)
        figure.savefig(args.output_dir / f"{name}.png", dpi=130, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
