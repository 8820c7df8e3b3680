"""What the comparison tries beyond what the package has: other spectra, gains, angles by layer, growing weights."""

import math

import torch

from poet_peft import AngleLaw
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


def power_law(exponent):
    """Singular values `i^-exponent`, at the norm and with the singular vectors of the weight."""

    def change(weight, kind):
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        values = torch.arange(1, len(S) + 1, dtype=S.dtype) ** -exponent
        return (U * (values * S.norm() / values.norm())) @ Vh

    return change


SPECTRA = {
    "double-q-k": scaled({"q_proj": 2.0, "k_proj": 2.0}),
    "half-o-down": scaled({"o_proj": 0.5, "down_proj": 0.5}),
    "equal": power_law(0.0),
    "decaying": power_law(0.5),
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
    """Groups of rotations whose weights `grow` with them, cut so that all weights of a group grow alike.

    Args:
        rate: by how much a weight grows, over the angle of the step that has turned it.
        factors: of the rate, for the layers whose names match a pattern.
    """
    layers = {
        id(rotation): layer
        for layer in targeted_layers(model)
        for name, rotation in layer.named_parameters()
        if name.startswith("poet_")
    }
    found = []
    for group in groups:
        if "blocks" not in group:
            found.append(group)
            continue
        by_rate = {}
        for rotation, blocks, side in zip(group["params"], group["blocks"], group["sides"], strict=True):
            layer = layers[id(rotation)]
            own_rate = scale_of(layer.module_name, rate, factors)
            part = by_rate.setdefault(own_rate, {"params": [], "blocks": [], "sides": [], "turned": []})
            for key, value in (("params", rotation), ("blocks", blocks), ("sides", side)):
                part[key].append(value)
            if side == "R":
                part["turned"].append(layer.base_layer.weight)
        found += [{**group, **part, "growth": own_rate, "size": 1.0} for own_rate, part in by_rate.items()]
    return found


@torch.no_grad()
def grow(groups):
    """After a step: weights grow with the angle that it turned them by, as Muon's do."""
    for group in groups:
        if "growth" in group:
            factor = 1 + group["growth"] * group["lr"]
            torch._foreach_mul_(group["turned"], factor)
            group["size"] *= factor


class AnglesByLayer(AngleLaw):
    """One angle, times a factor for the layers whose names match a pattern."""

    def __init__(self, angle, factors):
        super().__init__(max_angle=math.inf)
        object.__setattr__(self, "angle", angle)
        object.__setattr__(self, "factors", factors)

    def radians(self, layer, side, lr, rms=None):
        return self.angle * scale_of(layer.module_name, 1.0, self.factors)
