"""Vector probing: how far all rotations since training began have turned fixed vectors.

POET, arXiv 2506.08001, follows `v^T R v` through training for a fixed random unit vector `v`. A fold moves `R` into
the weight and begins anew from the identity, so what has to be kept is `R_n ... R_1 v` over all folds. Of the input
side it is `P_n^T ... P_1^T v`, since `v^T P_1 ... P_n v` is the same number. These are a few vectors a side: no weight
is copied, and they cost a fold as much as a few further columns of the weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .layer import POETLayer, poet_layers
from .maths.precision import full_precision
from .ops import reference
from .rotation import Rotation
from .state import Probes


PROBES_FILE = "poet_probes.safetensors"

_NUM_VECTORS = 8


def start_probing(model: nn.Module) -> None:
    """Follow the fixed vectors through all folds from now on. `POETCallback(diagnostics_every=...)` calls it.

    Adapters that were folded before are left out; see `load_probes`. Those that are never folded need none of it.
    """
    for layer in _layers(model):
        for adapter in layer.poet_config:
            if layer.is_periodic(adapter) and not layer.state(adapter).num_folds:
                turned = {rotation.side: _fixed_vectors(rotation) for rotation in layer.rotations(adapter)}
                layer.poet_probes[adapter] = Probes(turned)


@torch.no_grad()
def turn_probes(layer: POETLayer, adapter: str, deltas_of: Callable[[Rotation], list[Tensor] | None]) -> None:
    """Turn the vectors by what is being folded; to be called before the fold is counted.

    Args:
        deltas_of: `G - I` of the blocks of a rotation; None where it is the identity.
    """
    probes = layer.poet_probes.get(adapter)
    if probes is None or probes.num_folds != layer.state(adapter).num_folds:
        return
    for rotation in layer.rotations(adapter):
        deltas = deltas_of(rotation)
        if deltas is not None:
            probes.turned[rotation.side] = _turned(probes.turned[rotation.side], rotation, deltas)
    probes.num_folds += 1


@torch.no_grad()
def probe_cosine(layer: POETLayer, adapter: str, rotation: Rotation) -> float | None:
    """The mean over the fixed unit vectors `v` of `v^T R v`, `R` all rotations of a side since training began.

    1 where nothing was turned, 0 on average for a random rotation. The series' deviation from orthogonality is divided
    out. None where rotations were folded while no vectors were kept.
    """
    probes = layer.poet_probes.get(adapter)
    num_folds = layer.state(adapter).num_folds
    fixed = _fixed_vectors(rotation)
    if num_folds == 0:
        folded = fixed
    elif probes is not None and probes.num_folds == num_folds:
        folded = probes.turned[rotation.side]
    else:
        return None
    now = _turned(folded, rotation, rotation().blocks().deltas)
    return float(torch.cosine_similarity(fixed.to(now), now).mean())


def save_probes(model: nn.Module, path: str | Path) -> None:
    """Write the vectors of a model whose adapters were folded, to go on with where training resumes."""
    kept = {
        f"{layer.module_name}.{adapter}": probes
        for layer in _layers(model)
        for adapter, probes in layer.poet_probes.items()
        if probes.num_folds
    }
    if kept:
        tensors = {f"{name}.{side}": x.contiguous() for name, p in kept.items() for side, x in p.turned.items()}
        save_file(tensors, path, metadata={name: str(probes.num_folds) for name, probes in kept.items()})


def load_probes(model: nn.Module, path: str | Path) -> bool:
    """Take up the vectors of `save_probes` for the adapters that the file has. Returns whether there is a file."""
    if not Path(path).is_file():
        return False
    with safe_open(path, "pt") as file:
        metadata, keys = file.metadata() or {}, set(file.keys())
        for layer in _layers(model):
            for adapter in layer.poet_config:
                name = f"{layer.module_name}.{adapter}"
                sides = {r.side: f"{name}.{r.side}" for r in layer.rotations(adapter)}
                if name in metadata and keys.issuperset(sides.values()):
                    turned = {side: file.get_tensor(key) for side, key in sides.items()}
                    layer.poet_probes[adapter] = Probes(turned, int(metadata[name]))
    return True


def _layers(model: nn.Module) -> list[POETLayer]:
    return [layer for _, layer in poet_layers(model)]


def _fixed_vectors(rotation: Rotation) -> Tensor:
    """Unit vectors (num_vectors, dim) that the name of the layer and the side decide, on every process the same."""
    digest = hashlib.sha256(f"poet/{rotation.module_name}/{rotation.side}/probes".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    vectors = torch.randn(_NUM_VECTORS, rotation.partition.dim, generator=generator)
    return nn.functional.normalize(vectors, dim=-1)


def _turned(vectors: Tensor, rotation: Rotation, deltas: list[Tensor]) -> Tensor:
    """`R v`, or `P^T v`, of each row `v`."""
    pair = rotation.index, deltas
    with full_precision(rotation.index.device.type):
        return reference.rotate(vectors.to(rotation.index.device), pair, transpose=rotation.side == "P")
