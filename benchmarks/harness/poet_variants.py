"""What the comparison tries beyond what the package has: other initial spectra, gains, angles by
layer, decorrelated sides."""

import math

import torch

from poet_peft import AngleLaw, RotationMuon
from poet_peft.layer import poet_layers
from poet_peft.maths.orthogonal import skew, upper_triangle
from poet_peft.ops.block_gradients import weight_centric
from poet_peft.quick_fold import rotate_in_place
from poet_peft.weights.initial import scale_of

from .llama import targeted_layers


@torch.no_grad()
def change_spectra(model, name):
    """Give the linear layers of a wrapped model initial weights of other spectra, a key of `SPECTRA`."""
    names = {module: name for name, module in model.named_modules()}
    for layer in targeted_layers(model):
        weight = layer.base_layer.weight
        weight.copy_(SPECTRA[name](weight, names[layer].rpartition(".")[2]))


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


class AnglesByLayer(AngleLaw):
    """One angle, times a factor for the layers whose names match a pattern."""

    def __init__(self, angle, factors):
        super().__init__(max_angle=math.inf)
        object.__setattr__(self, "angle", angle)
        object.__setattr__(self, "factors", factors)

    def radians(self, layer, side, lr, rms=None):
        return self.angle * scale_of(layer.module_name, 1.0, self.factors)


class DecorrelatedMuon(RotationMuon):
    """`RotationMuon` whose step leaves out a share of what the other side of the layer asks for as well.

    The generator `A_R` of one side changes the weight by `A_R W`, the momentum `M_P` of the other by `W M_P`. Seen
    from `R` the latter is `g = W M_P W^T`, and the step takes `share * <A_R, g> / <g, g> * g` off `A_R`; for `P` the
    same with `g = W^T M_R W`. Public notes of POET's authors, 2026. For folds after every step, at which rotations are
    the identity, of one adapter.
    """

    def __init__(self, groups, model, share, **settings):
        super().__init__(groups, **settings)
        self.share = share
        self.layer_of = {}
        for _, layer in poet_layers(model):
            R, P = layer.rotations("default")
            self.layer_of |= {R.weight: (layer, R, P), P.weight: (layer, P, R)}

    def _turn(self, turns, num_steps):
        super()._turn(turns, num_steps)
        for turn in turns:
            layer, rotation, other = self.layer_of[turn.parameter]
            momentum = self.state[other.weight]["momentum_buffer"]
            seen = seen_from_other_side(layer.base_weight.read(), rotation, other, momentum)
            seen /= seen.norm().clamp_min(torch.finfo(seen.dtype).tiny)
            turn.parameter.sub_(seen, alpha=self.share * float(turn.parameter @ seen))


def seen_from_other_side(weight, rotation, other, upper):
    """The parameters of the generator of `rotation` that changes the weight most like the other side's does.

    Args:
        upper: the parameters of the other side's generator.
    """
    asked = weight.clone()
    generators = [skew(triangles, size) for triangles, size in other.partition.split(upper)]
    rotate_in_place(asked, other.side, other.index, generators)
    sides = {rotation.side: rotation().blocks_at_identity()}
    blocks_R, blocks_P = weight_centric(asked - weight, weight, sides.get("R"), sides.get("P"))
    return torch.cat([upper_triangle(block).flatten() for block in [*blocks_R, *blocks_P]])
