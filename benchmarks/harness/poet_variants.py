"""What the comparison tries beyond what the package has: other spectra, gains, angles by layer, growing weights."""

import math

import torch

from poet_peft import AngleLaw
from poet_peft.layer import poet_layers
from poet_peft.weights.initial import scale_of

from .llama import kinds_of_layers, targeted_layers


@torch.no_grad()
def change_spectra(model, name):
    """Give the linear layers of a wrapped model initial weights of other spectra, a key of `SPECTRA`."""
    for layer, kind in zip(targeted_layers(model), kinds_of_layers(model), strict=True):
        weight = layer.base_layer.weight
        weight.copy_(SPECTRA[name](weight, kind))


def scaled(factors):
    """Weights times a factor by the kind of layer."""
    return lambda weight, kind: weight * factors.get(kind, 1.0)


def of_shape(values_of):
    """Singular values `values_of(those of the weight)`, at the norm and with the singular vectors of the weight."""

    def change(weight, kind):
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        values = values_of(S)
        return (U * (values * S.norm() / values.norm())) @ Vh

    return change


def power_law(exponent):
    """Singular values `i^-exponent`."""
    return of_shape(lambda S: torch.arange(1, len(S) + 1, dtype=S.dtype) ** -exponent)


def floored(smallest):
    """Singular values raised to `smallest` times their root mean square."""
    return of_shape(lambda S: S.clamp_min(smallest * S.norm() / len(S) ** 0.5))


SPECTRA = {
    "double-q-k": scaled({"q_proj": 2.0, "k_proj": 2.0}),
    "half-o-down": scaled({"o_proj": 0.5, "down_proj": 0.5}),
    "equal": power_law(0.0),
    "decaying": power_law(0.5),
    "floored": floored(0.5),
}


def add_gains(model, per):
    """Multiply what the linear layers of a wrapped model return by gains that train, 1 at the start.

    Args:
        per: "layer" for one number a layer, "output" for one for each output feature.

    Returns:
        The parameters: how much the gains differ from 1.
    """
    layers = targeted_layers(model)
    return [_add_gain(layer, () if per == "layer" else layer.base_layer.out_features) for layer in layers]


def _add_gain(layer, shape):
    layer.gain = torch.nn.Parameter(torch.zeros(shape))
    layer.register_forward_hook(lambda layer, inputs, y: y * (1 + layer.gain))
    return layer.gain


def let_grow(model, groups, rate, factors):
    """Groups whose weights `grow` as they are turned: one for each rotation, and the others as they are.

    Args:
        rate: by how much a weight grows, over the angle of the step that has turned it.
        factors: of the rate, for the layers whose names match a pattern.
    """
    layers = {
        rotation.weight: layer
        for _, layer in poet_layers(model)
        for adapter in layer.poet_config
        for rotation in layer.rotations(adapter)
    }
    found = []
    for group in groups:
        if "blocks" in group:
            for rotation, blocks, side in zip(group["params"], group["blocks"], group["sides"], strict=True):
                layer = layers[rotation]
                turned = [layer.base_layer.weight] if side == "R" else []  # once, not with both of its rotations
                growth = {"growth": scale_of(layer.module_name, rate, factors), "size": 1.0, "turned": turned}
                found.append({**group, "params": [rotation], "blocks": [blocks], "sides": [side], **growth})
        else:
            found.append(group)
    return found


@torch.no_grad()
def grow(groups):
    """After a step: weights grow with the angle that it turned them by, as Muon's do."""
    for group in groups:
        if "growth" in group:
            factor = 1 + group["growth"] * group["lr"]
            for weight in group["turned"]:
                weight *= factor
            group["size"] *= factor


class AnglesByLayer(AngleLaw):
    """One angle, times a factor for the layers whose names match a pattern."""

    def __init__(self, angle, factors):
        super().__init__(max_angle=math.inf)
        object.__setattr__(self, "angle", angle)
        object.__setattr__(self, "factors", factors)

    def radians(self, layer, side, lr, rms=None):
        return self.angle * scale_of(layer.module_name, 1.0, self.factors)
