"""Weighted sums of adapters in the Lie algebra: the average of rotations is a rotation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .config import POETConfig
from .layer import POETLayer, poet_layers
from .maths.geodesic import from_generator, generator
from .maths.orthogonal import upper_triangle
from .rotation import Rotation


# Largest parameter of a sum: its plane is 1e-4 radians from a half turn, where no parameter would do.
_LARGEST = 2e4
_WAY_OUT = "To use them one after the other, activate them together: model.base_model.set_adapter([...])."


def check_combinable(
    model: nn.Module,
    configs: dict[str, POETConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    """Refuse a sum that is none in the Lie algebra of one group, before anything is changed.

    Args:
        configs: of all adapters of the model, by name.

    Raises:
        ValueError: names the adapters, what differs, and the way out.
    """
    if combination_type != "linear":
        raise ValueError(
            f"combination_type={combination_type!r} combines low-rank matrices; rotations are combined by 'linear', "
            "the weighted sum in the Lie algebra."
        )
    if adapter_name in configs:
        raise ValueError(
            f"the model has an adapter {adapter_name!r} already: choose another name, or delete it first."
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"got {len(adapters)} adapters and {len(weights)} weights: pass one weight for each adapter, of which at "
            "least one is needed."
        )
    unknown = [name for name in adapters if name not in configs]
    if unknown:
        raise ValueError(f"the model has no adapter {unknown[0]!r}, but {', '.join(map(repr, configs))}.")
    for name, weight in zip(adapters, weights, strict=True):
        if not math.isfinite(weight):
            raise ValueError(f"the weight {weight} of the adapter {name!r} is not a finite number.")
        config = configs[name]
        if config.modules_to_save or config.bias != "none" or config.train_rest:
            raise ValueError(
                f"the adapter {name!r} also trains what is not a rotation (modules_to_save={config.modules_to_save}, "
                f"bias={config.bias!r}, train_rest={config.train_rest}), which has no Lie algebra to be summed in. "
                "Train it without, or merge the adapters into models of their own and average those."
            )
    for _, layer in poet_layers(model):
        _check_same_planes(layer, adapters)


def _check_same_planes(layer: POETLayer, adapters: Sequence[str]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        pair = f"the adapters {first!r} and {other!r} cannot be summed at {layer.module_name!r}"
        if layer.has_adapter(first) != layer.has_adapter(other):
            raise ValueError(f"{pair}: only one of them rotates it. {_WAY_OUT}")
        for a, b in zip(layer.rotations(first), layer.rotations(other), strict=True):
            if a.partition != b.partition or not torch.equal(a.index, b.index):
                raise ValueError(
                    f"{pair}: their blocks of side {a.side} hold other features (another variant, block_size or seed, "
                    f"or another reinitialisation). {_WAY_OUT}"
                )
            if a.orthogonal_map != b.orthogonal_map and not (
                a.orthogonal_map.is_orthogonal and b.orthogonal_map.is_orthogonal
            ):
                raise ValueError(f"{pair}: {a.orthogonal_map} and {b.orthogonal_map} are other maps. {_WAY_OUT}")


@torch.no_grad()
def weighted_parameters(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float]
) -> dict[POETLayer, list[Tensor]]:
    """The parameters of the sum of the adapters at their scales, of every rotation of the layers that carry them.

    Raises:
        ValueError: the sum turns a plane by half a turn, which the Cayley map cannot; names the module.
    """
    parameters = {}
    for _, layer in poet_layers(model):
        if layer.has_adapter(adapters[0]):
            factors = [weight * layer.scaling[name] for name, weight in zip(adapters, weights, strict=True)]
            sides = zip(*(layer.rotations(name) for name in adapters), strict=True)
            parameters[layer] = [_weighted_sum(rotations, factors) for rotations in sides]
    return parameters


def _weighted_sum(rotations: Sequence[Rotation], factors: Iterable[float]) -> Tensor:
    first = rotations[0]
    sums = [0] * len(first.partition.split(first.weight))
    for rotation, factor in zip(rotations, factors, strict=True):
        side = rotation()
        for i, Q in enumerate(side.partition.skew_blocks(side.upper)):
            sums[i] = sums[i] + factor * generator(Q)
    upper = torch.cat([upper_triangle(from_generator(A)).flatten() for A in sums])
    if not bool((upper.abs() < _LARGEST).all()):
        raise ValueError(
            f"the sum turns a plane of side {first.side} of {first.module_name!r} by half a turn, which has no "
            "parameters in the Cayley map. Choose other weights."
        )
    return upper


@torch.no_grad()
def write_sum(adapters: Sequence[str], adapter_name: str, parameters: dict[POETLayer, list[Tensor]]) -> None:
    """Give a new adapter, injected already, the planes of the others and these parameters."""
    for layer, values in parameters.items():
        layer.poet_state[adapter_name].copy_(layer.state(adapters[0])._replace(num_steps=0).tensor())
        sides = zip(layer.rotations(adapters[0]), layer.rotations(adapter_name), values, strict=True)
        for first, new, upper in sides:
            new.index.copy_(first.index)
            new.weight.copy_(upper)
            new.weight.requires_grad_(False)
