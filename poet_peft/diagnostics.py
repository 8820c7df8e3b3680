"""What training did to the rotations and to the weights: measures of tensors, and all of them for a model.

Leading dimensions of tensors are always batch.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layer import POETLayer, poet_layers, rotate_weight
from .maths.spectrum import skew_norm
from .rotation import Rotation
from .weights.sharded import full


DIAGNOSTICS_FILE = "poet_diagnostics.jsonl"

_NUM_ENERGY_ROWS = 256
_NUM_ITERATIONS = 16


class SpectralChange(NamedTuple):
    """Relative changes of singular values: the largest and the median, each (...)."""

    largest: Tensor
    median: Tensor


# Weights


def spectral_change(before: Tensor, after: Tensor) -> SpectralChange:
    """`|s'_i - s_i| / s_i` of the sorted singular values of two matrices (..., m, n). Two decompositions."""
    return _change_of_values(torch.linalg.svdvals(before), torch.linalg.svdvals(after))


def _change_of_values(before: Tensor, after: Tensor) -> SpectralChange:
    change = (after - before).abs() / before.clamp_min(torch.finfo(before.dtype).tiny)
    return SpectralChange(change.amax(-1), change.quantile(0.5, dim=-1))


def svd_entropy(s: Tensor) -> Tensor:
    """`-sum p_i log(p_i) / log(n)` with `p_i = s_i^2 / sum s^2`: (..., n) -> (...), from 0 (rank 1) to 1 (all equal).

    Alter et al., PNAS 2000. A single value has entropy 0.
    """
    p = s.square() / s.square().sum(-1, keepdim=True)
    return -torch.xlogy(p, p).sum(-1) / math.log(max(s.shape[-1], 2))


def hyperspherical_energy(W: Tensor) -> Tensor:
    """The mean over pairs of rows of `1 / ||w_i - w_j||`, rows scaled to length 1: (..., m, n) -> (...).

    Liu et al., arXiv 1805.09298, with exponent 1. Low where rows are spread evenly over the sphere. One row: 0.
    """
    m = W.shape[-2]
    if m < 2:
        return W.new_zeros(W.shape[:-2])
    rows = nn.functional.normalize(W, dim=-1)
    upper = torch.triu_indices(m, m, 1, device=W.device)
    gram = (rows @ rows.mT)[..., upper[0], upper[1]]
    return (2 - 2 * gram).clamp_min(torch.finfo(W.dtype).eps).rsqrt().mean(-1)


def spectral_norm(W: Tensor, num_iterations: int = _NUM_ITERATIONS) -> Tensor:
    """An estimate from below of the largest singular value: (..., m, n) -> (...). Power iteration, fixed start."""
    return skew_norm(W, num_iterations + 1)  # which iterates on `W^T W`, whatever W is


def stable_rank(W: Tensor, norm: Tensor | None = None) -> Tensor:
    """`||W||_F^2 / ||W||_2^2`: (..., m, n) -> (...). `norm` is the largest singular value, if it is known."""
    norm = torch.linalg.matrix_norm(W, 2) if norm is None else norm
    return W.square().sum((-2, -1)) / norm.square().clamp_min(torch.finfo(W.dtype).tiny)


def row_rms(W: Tensor) -> Tensor:
    """The root mean square of each row: (..., m, n) -> (..., m)."""
    return W.square().mean(-1).sqrt()


# Rotations


def rotation_angles(Q: Tensor) -> Tensor:
    """The angles in radians of all planes that the Cayley transform of `Q` turns: (..., n, n) -> (..., n // 2).

    `Q` has eigenvalues `+-i theta`, and the plane of each pair turns by `2 atan(theta)`. A decomposition.
    """
    theta = torch.linalg.eigvalsh(1j * Q.to(torch.complex128 if Q.dtype == torch.float64 else torch.complex64))
    return 2 * torch.atan(theta.flip(-1)[..., : Q.shape[-1] // 2].clamp_min(0))


def rms_angle(Q: Tensor) -> Tensor:
    """`2 atan` of the root mean square `theta` of all planes, by `||Q||_F^2 = 2 sum theta^2`: (..., n, n) -> (...)."""
    return 2 * torch.atan((Q.square().sum((-2, -1)) / (2 * max(Q.shape[-1] // 2, 1))).sqrt())


def rotation_trace(delta: Tensor) -> Tensor:
    """`trace(G) / n` of `G = I + delta`: (..., n, n) -> (...). The mean cosine of the angle by which `G` turns a
    random vector: the vector probing of POET, arXiv 2506.08001, in expectation. 1 is the identity, 0 a random turn."""
    return 1 + delta.diagonal(dim1=-2, dim2=-1).mean(-1)


def update_counts(layer: POETLayer, adapter: str) -> Tensor:
    """How many of the index sets drawn so far, the current one included, rotate an entry's row or column (out, in).

    Counter of weight updates of POET, arXiv 2506.08001. Even for block-stochastic rotations, which turn all features.
    """
    state = layer.state(adapter)
    counts = torch.zeros(layer.out_features, layer.in_features, dtype=torch.int32)
    for number in range(state.num_reinits + 1):
        is_still = {"R": torch.ones(layer.out_features), "P": torch.ones(layer.in_features)}
        for rotation in layer.rotations(adapter):
            is_still[rotation.side][rotation.draw_index(state.seed, number).long()] = 0
        counts += 1 - torch.outer(is_still["R"], is_still["P"]).int()
    return counts


# Models


@dataclass(frozen=True)
class SideDiagnostics:
    """One rotation, as it stands since the last fold. Angles in radians.

    Attributes:
        max_angle: of the most-turned plane; an estimate from below unless exact.
        rms_angle: see `rms_angle`.
        trace: mean over the rotated features, see `rotation_trace`.
        orthogonality_error: largest entry of `|G^T G - I|`.
        angle_histogram: with `exact`, number of planes in 16 equal bins of [0, pi]; else None.
        momentum_cosine: cosine between the optimizer's momentum and the gradient; None without either.
    """

    side: str
    max_angle: float
    rms_angle: float
    trace: float
    orthogonality_error: float
    angle_histogram: list[int] | None = None
    momentum_cosine: float | None = None


@dataclass(frozen=True)
class LayerDiagnostics:
    """One adapter of one layer. Measures of the weight are of `R W P`; of experts the largest norm and change of any,
    and the mean of the rest.

    Attributes:
        spectral_drift: bound on the relative change of any singular value by the rotations, see `MergeReport`.
        spectral_norm, stable_rank: power iteration unless exact.
        energy: `hyperspherical_energy`, of 256 evenly spaced rows unless exact.
        mean_row_rms: mean of `row_rms`.
        entropy, largest_change, median_change, coverage: with `exact`, else None: `svd_entropy`, `spectral_change`
            by the rotations, and the part of the entries with `update_counts > 0`.
    """

    name: str
    adapter: str
    sides: list[SideDiagnostics]
    spectral_drift: float
    spectral_norm: float
    stable_rank: float
    energy: float
    mean_row_rms: float
    entropy: float | None = None
    largest_change: float | None = None
    median_change: float | None = None
    coverage: float | None = None


@dataclass(frozen=True)
class Diagnostics:
    """All measures of a model.

    Attributes:
        clamped_share: part of the rotations whose `AngleLaw` asks for more than `max_angle`; None without such a law.
    """

    layers: list[LayerDiagnostics]
    clamped_share: float | None = None

    def summary(self) -> dict[str, float]:
        """Maxima of angle, orthogonality error and drift, and means of the rest, over the layers."""
        sides = [side for layer in self.layers for side in layer.sides]
        result = {
            "max_angle": _largest([side.max_angle for side in sides]),
            "orthogonality_error": _largest([side.orthogonality_error for side in sides]),
            "spectral_drift": _largest([layer.spectral_drift for layer in self.layers]),
            "trace": _mean([side.trace for side in sides]),
            "stable_rank": _mean([layer.stable_rank for layer in self.layers]),
            "energy": _mean([layer.energy for layer in self.layers]),
        }
        entropies = [layer.entropy for layer in self.layers if layer.entropy is not None]
        cosines = [side.momentum_cosine for side in sides if side.momentum_cosine is not None]
        result |= {"entropy": _mean(entropies)} if entropies else {}
        result |= {"momentum_cosine": _mean(cosines)} if cosines else {}
        return result | ({} if self.clamped_share is None else {"clamped_share": self.clamped_share})

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite become None."""
        return _finite({"summary": self.summary(), **asdict(self)})


@torch.no_grad()
def diagnose(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    exact: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Diagnostics:
    """Measure all rotations and rotated weights of a model, layer by layer. With sharding, every process must call it.

    Args:
        model: a model with POET layers, wrapped by PEFT or not.
        adapter_name: None = all adapters.
        exact: decompositions instead of power iteration, and what only they give. Slow.
        optimizer: for what its state tells.

    Raises:
        ValueError: no layer has the adapter, or a weight cannot be read.
    """
    items = [
        (layer, adapter)
        for _, layer in poet_layers(model)
        for adapter in layer.poet_config
        if adapter_name in (None, adapter)
    ]
    if not items:
        wanted = "POET layer" if adapter_name is None else f"POET layer with the adapter {adapter_name!r}"
        raise ValueError(
            f"the model has no {wanted}: wrap it with get_peft_model(model, POETConfig(...)), or load it."
        )
    layers = [_diagnose_layer(layer, adapter, exact, optimizer) for layer, adapter in items]
    return Diagnostics(layers, _clamped_share(optimizer))


def log_diagnostics(
    model: nn.Module,
    path: str | Path,
    step: int,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    exact: bool = False,
) -> Diagnostics:
    """Measure a model, see `diagnose`, and append one line of JSON to a file, in the main process only."""
    diagnostics = diagnose(model, exact=exact, optimizer=optimizer)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        append_diagnostics(diagnostics, path, step)
    return diagnostics


def append_diagnostics(diagnostics: Diagnostics, path: str | Path, step: int) -> None:
    """Append one line of JSON to a file, made with its folder where missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **diagnostics.as_dict()}) + "\n")


def read_diagnostics(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a file of `log_diagnostics`; a line that a crash cut off is left out."""
    lines = []
    for line in Path(path).read_text("utf-8").splitlines() if Path(path).exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def _diagnose_layer(
    layer: POETLayer, adapter: str, exact: bool, optimizer: torch.optim.Optimizer | None
) -> LayerDiagnostics:
    layer.base_weight.check_readable(layer.module_name)
    sides, smallest, largest = [], 1.0, 1.0
    for rotation in layer.rotations(adapter):
        side, spectrum = _diagnose_side(rotation, exact, optimizer)
        sides.append(side)
        smallest *= max(1 - spectrum, 0.0) ** 0.5
        largest *= (1 + spectrum) ** 0.5
    before = layer.base_weight.read_exact(layer.residual)
    W = before if layer.merged else rotate_weight(before, *layer.sides([adapter]))
    s = torch.linalg.svdvals(W) if exact and bool(torch.isfinite(W).all()) else None
    norm = spectral_norm(W) if s is None else s[..., 0]
    rows = W if exact else W[..., :: max(1, -(-W.shape[-2] // _NUM_ENERGY_ROWS)), :]
    extra = {}
    if s is not None:
        change = None if layer.merged else _change_of_values(torch.linalg.svdvals(before), s)
        extra = {
            "entropy": float(svd_entropy(s).mean()),
            "largest_change": None if change is None else float(change.largest.max()),
            "median_change": None if change is None else float(change.median.mean()),
            "coverage": float((update_counts(layer, adapter) > 0).float().mean()) if W.dim() == 2 else None,
        }
    return LayerDiagnostics(
        layer.module_name,
        adapter,
        sides,
        spectral_drift=_largest([1 - smallest, largest - 1]),
        spectral_norm=float(norm.max()),
        stable_rank=float(stable_rank(W, norm).mean()),
        energy=float(hyperspherical_energy(rows).mean()),
        mean_row_rms=float(row_rms(W).mean()),
        **extra,
    )


def _diagnose_side(
    rotation: Rotation, exact: bool, optimizer: torch.optim.Optimizer | None
) -> tuple[SideDiagnostics, float]:
    blocks = rotation().blocks()
    num_features = sum(Q.shape[0] * Q.shape[-1] for Q in blocks.Q)
    orthogonality = rotation.orthogonality()
    usable = all(bool(torch.isfinite(Q).all()) for Q in blocks.Q)
    angles = torch.cat([rotation_angles(Q).flatten() for Q in blocks.Q]).cpu() if exact and usable else None
    largest = (
        [float(2 * torch.atan(skew_norm(Q)).amax()) for Q in blocks.Q] if angles is None else [float(angles.max())]
    )
    num_planes = sum(Q.shape[0] * (Q.shape[-1] // 2) for Q in blocks.Q)
    squares = sum(float(Q.square().sum()) for Q in blocks.Q)
    side = SideDiagnostics(
        rotation.side,
        max_angle=_largest(largest),
        rms_angle=2 * math.atan((squares / (2 * max(num_planes, 1))) ** 0.5),
        trace=sum(float(rotation_trace(d).sum()) * d.shape[-1] for d in blocks.deltas) / num_features,
        orthogonality_error=orthogonality.error,
        angle_histogram=None if angles is None else [int(n) for n in angles.float().histc(16, 0, math.pi)],
        momentum_cosine=_momentum_cosine(rotation.weight, optimizer),
    )
    return side, orthogonality.spectrum


def _momentum_cosine(parameter: Tensor, optimizer: torch.optim.Optimizer | None) -> float | None:
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    momentum = next((state[name] for name in ("exp_avg", "momentum_buffer") if state.get(name) is not None), None)
    if momentum is None or parameter.grad is None:
        return None
    pair = [full(x).flatten().float() for x in (momentum, parameter.grad)]
    return float(torch.cosine_similarity(*pair, dim=0)) if pair[0].shape == pair[1].shape else None


def _clamped_share(optimizer: torch.optim.Optimizer | None) -> float | None:
    groups = [] if optimizer is None else [group for group in optimizer.param_groups if "max_radians" in group]
    if not groups:
        return None
    clamped = sum(len(group["params"]) for group in groups if group["radians"] > group["max_radians"])
    return clamped / sum(len(group["params"]) for group in groups)


def _largest(values: list[float]) -> float:
    # Python's max() may pass over a NaN.
    return math.nan if any(math.isnan(value) for value in values) else max(values, default=0.0)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
