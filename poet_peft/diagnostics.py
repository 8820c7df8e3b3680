"""What training did to the rotations and weights of a model: all measures, by layer and side."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .diagnostics_file import append_diagnostics, finite
from .layer import POETLayer, poet_layers, rotate_weight
from .maths.measures import (
    hyperspherical_energy,
    rms_angle,
    rms_singular_value,
    rotation_angles,
    rotation_trace,
    row_rms,
    spectral_change,
    spectral_norm,
    stable_rank,
    svd_entropy,
)
from .maths.precision import full_precision
from .maths.spectrum import skew_norm
from .probing import probe_cosine
from .rotation import Rotation
from .weights.sharded import full


# The range of what is measured, beyond which `POETCallback` warns and the report finds fault.
MAX_ANGLE = math.pi / 2
MAX_ORTHOGONALITY_ERROR = 0.05

_NUM_ENERGY_ROWS = 256
_NUM_BINS = 16
_QUANTILES = 0.0, 0.25, 0.5, 0.75, 1.0


def update_counts(layer: POETLayer, adapter: str) -> Tensor:
    """How often the index sets drawn so far, the current one included, turned each entry of a weight (out, in).

    Once by the rotation of its row and once by that of its column, as POET, arXiv 2506.08001, appendix H, counts it to
    see how evenly weights are updated. The same for all entries with block-stochastic rotations, which turn all
    features.
    """
    state = layer.state(adapter)
    counts = torch.zeros(layer.out_features, layer.in_features, dtype=torch.int32)
    for number in range(state.num_reinits + 1):
        for rotation in layer.rotations(adapter):
            index = rotation.draw_index(state.seed, number).long().cpu()
            counts[(index,) if rotation.side == "R" else (slice(None), index)] += 1
    return counts


# Models


@dataclass(frozen=True)
class SideDiagnostics:
    """One rotation, as it stands since the last fold. Angles in radians.

    Attributes:
        max_angle: of the most-turned plane; an estimate from below unless exact.
        rms_angle: root mean square over the planes.
        trace: `trace(G) / n` over the rotated features: 1 for the identity, 0 for a random rotation.
        orthogonality_error: largest entry of `|G^T G - I|`.
        probe_cosine: mean of `v^T R v` over fixed unit vectors `v`, of all rotations since training began; None where
            rotations were folded unseen, see `probing`.
        angle_histogram: with `exact`, number of planes in 16 equal bins of [0, max_angle]; else None.
        momentum_cosine: cosine between the optimizer's momentum and the gradient; None without either.
    """

    side: str
    max_angle: float
    rms_angle: float
    trace: float
    orthogonality_error: float
    probe_cosine: float | None = None
    angle_histogram: list[int] | None = None
    momentum_cosine: float | None = None


@dataclass(frozen=True)
class LayerDiagnostics:
    """One adapter of one layer. Measures of the weight are of `R W P`; of experts the largest norm and change of any,
    and the mean of the rest.

    Attributes:
        spectral_drift: bound on the relative change of any singular value by the rotations, see `MergeReport`.
        weight_problem: why the weight cannot be read, as some quantized ones; all measures below are None then.
        spectral_norm: the largest singular value; power iteration, from below, unless exact.
        rms_singular_value: root mean square of the singular values, exact.
        stable_rank: squares of all singular values over that of the largest.
        energy: hyperspherical energy of the rows, of 256 evenly spaced ones unless exact.
        mean_row_rms: mean over the rows of their root mean square.
        singular_values: with `exact`, the smallest, the quartiles and the largest; else None.
        entropy: with `exact`, SVD entropy, 1 where all singular values are equal; else None.
        largest_change, median_change: with `exact`, relative changes of singular values by the rotations; None for a
            merged adapter, whose weight from before is not read.
        coverage: with `exact`, part of the weight's entries whose row or column was ever rotated; else None.
    """

    name: str
    adapter: str
    sides: list[SideDiagnostics]
    spectral_drift: float
    weight_problem: str | None = None
    spectral_norm: float | None = None
    rms_singular_value: float | None = None
    stable_rank: float | None = None
    energy: float | None = None
    mean_row_rms: float | None = None
    singular_values: list[float] | None = None
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
        return {
            "max_angle": _largest([side.max_angle for side in sides]),
            "orthogonality_error": _largest([side.orthogonality_error for side in sides]),
            "spectral_drift": _largest([layer.spectral_drift for layer in self.layers]),
            **_means(sides, "rms_angle", "trace", "probe_cosine", "momentum_cosine"),
            **_means(self.layers, "rms_singular_value", "stable_rank", "energy", "entropy"),
            **({} if self.clamped_share is None else {"clamped_share": self.clamped_share}),
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite become None."""
        return finite({"summary": self.summary(), **asdict(self)})


@torch.no_grad()
def diagnose(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    exact: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Diagnostics:
    """Measure all rotations and rotated weights of a model, layer by layer. With sharding, every process must call it.

    An adapter is measured as if it were the only one and active: also while adapters are disabled, and while it is
    merged. Quantized weights are measured as they are dequantized, before the rotations round anything.

    Args:
        model: a model with POET layers, wrapped by PEFT or not.
        adapter_name: None = all adapters.
        exact: decompositions instead of power iteration, and what only they give. Slow.
        optimizer: for what its state tells.

    Raises:
        ValueError: no layer has the adapter, another adapter is merged into its weight, or it is scaled.
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
    layers = []
    for layer, adapter in items:
        with full_precision(layer.base_parameter.device.type):
            layers.append(_diagnose_layer(layer, adapter, exact, optimizer))
    return Diagnostics(layers, _clamped_share(optimizer))


def log_diagnostics(
    model: nn.Module,
    path: str | Path,
    step: int,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    exact: bool = False,
    **numbers: Any,
) -> Diagnostics:
    """Measure a model, see `diagnose`, and append one line of JSON to a file, in the main process only.

    Args:
        numbers: to be kept in the same line. `poet-peft report` draws `loss`, `steps_per_second` and
            `tokens_per_second`.
    """
    diagnostics = diagnose(model, exact=exact, optimizer=optimizer)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        append_diagnostics(diagnostics.as_dict(), path, step, optimizer, **numbers)
    return diagnostics


def _diagnose_layer(
    layer: POETLayer, adapter: str, exact: bool, optimizer: torch.optim.Optimizer | None
) -> LayerDiagnostics:
    _check_measurable(layer, adapter)
    sides, smallest, largest = [], 1.0, 1.0
    for rotation in layer.rotations(adapter):
        side, spectrum = _diagnose_side(rotation, exact, optimizer)
        sides.append(replace(side, probe_cosine=probe_cosine(layer, adapter, rotation)))
        smallest *= max(1 - spectrum, 0.0) ** 0.5
        largest *= (1 + spectrum) ** 0.5
    drift = _largest([1 - smallest, largest - 1])
    try:
        layer.base_weight.check_readable(layer.module_name)
    except ValueError as error:
        return LayerDiagnostics(layer.module_name, adapter, sides, drift, str(error))
    return LayerDiagnostics(layer.module_name, adapter, sides, drift, **_diagnose_weight(layer, adapter, exact))


def _diagnose_weight(layer: POETLayer, adapter: str, exact: bool) -> dict[str, Any]:
    before = layer.base_weight.read_exact(layer.residual)
    W = before if layer.merged else rotate_weight(before, *layer.sides([adapter]))
    s = torch.linalg.svdvals(W) if exact and bool(torch.isfinite(W).all()) else None
    norm = spectral_norm(W) if s is None else s[..., 0]
    rows = W if exact else W[..., :: max(1, -(-W.shape[-2] // _NUM_ENERGY_ROWS)), :]
    return {
        "spectral_norm": float(norm.max()),
        "rms_singular_value": float(rms_singular_value(W).mean()),
        "stable_rank": float(stable_rank(W, norm).mean()),
        "energy": float(hyperspherical_energy(rows).mean()),
        "mean_row_rms": float(row_rms(W).mean()),
        **({} if s is None else _of_decomposition(layer, adapter, before, s)),
    }


def _check_measurable(layer: POETLayer, adapter: str) -> None:
    if layer.merged and layer.merged_adapters != [adapter]:
        raise ValueError(
            f"the weight of {layer.module_name!r} has the adapters {layer.merged_adapters} merged into it, so that "
            f"{adapter!r} alone cannot be measured. Call unmerge_adapter() first, or pass adapter_name."
        )
    if layer.is_scaled(adapter):
        raise ValueError(
            f"the adapter {adapter!r} of {layer.module_name!r} has scale={layer.scaling[adapter]:g}, and measures are "
            "of adapters as trained. Call unscale_layer() on the layer, or set_scale(adapter, 1), first."
        )


def _of_decomposition(layer: POETLayer, adapter: str, before: Tensor, s: Tensor) -> dict[str, Any]:
    """What needs the singular values (..., n) of the rotated weight."""
    change = None if layer.merged else spectral_change(torch.linalg.svdvals(before), s)
    quantiles = s.quantile(torch.tensor(_QUANTILES).to(s), dim=-1).reshape(len(_QUANTILES), -1).mean(1)
    return {
        "singular_values": quantiles.tolist(),
        "entropy": float(svd_entropy(s).mean()),
        "largest_change": None if change is None else float(change.largest.max()),
        "median_change": None if change is None else float(change.median.mean()),
        "coverage": float((update_counts(layer, adapter) > 0).float().mean()) if s.dim() == 1 else None,
    }


def _diagnose_side(
    rotation: Rotation, exact: bool, optimizer: torch.optim.Optimizer | None
) -> tuple[SideDiagnostics, float]:
    blocks = rotation().blocks()
    num_features = sum(Q.shape[0] * Q.shape[-1] for Q in blocks.Q)
    orthogonality = rotation.orthogonality()
    histogram = None
    if exact and all(bool(torch.isfinite(Q).all()) for Q in blocks.Q):
        angles = torch.cat([rotation_angles(Q).flatten() for Q in blocks.Q]).cpu().float()
        max_angle = float(angles.max())
        histogram = [int(n) for n in angles.histc(_NUM_BINS, 0, max_angle or math.pi)]
    else:
        max_angle = _largest([float(2 * torch.atan(skew_norm(Q)).amax()) for Q in blocks.Q])
    side = SideDiagnostics(
        rotation.side,
        max_angle=max_angle,
        rms_angle=rms_angle(blocks.Q),
        trace=sum(float(rotation_trace(d).sum()) * d.shape[-1] for d in blocks.deltas) / num_features,
        orthogonality_error=orthogonality.error,
        angle_histogram=histogram,
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


def _means(measured: list[Any], *names: str) -> dict[str, float]:
    """Of those measures that were taken of anything."""
    found = {name: [v for item in measured if (v := getattr(item, name)) is not None] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items() if values}
