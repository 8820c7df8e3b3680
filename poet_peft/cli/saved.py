"""Adapters as they lie on disk, read without their base model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

from ..config import POETConfig
from ..errors import POETCheckpointError
from ..files.json_object import read_json_object
from ..files.training_checkpoints import verify_checkpoint
from ..maths.blocks import BlockPartition, SideName
from ..state import AdapterState
from ..weights.layout import WeightLayout
from ..weights.residual import join
from .saved_layers import SavedLayer, prefixes_of, saved_layers


METRICS_NAME = "metrics.json"
_TENSOR_OF_ADAPTER = re.compile(r"\.poet_(R|P|state|residual)(\.|$)")
_PARAMETERS = re.compile(r".+\.poet_[RP]\.weight")


class SavedSide(NamedTuple):
    """The rotation of one side of a layer, from a file.

    Args:
        index: rotated features in block order, shape (num_rotated,).
        deltas: `G - I` of the blocks, in float64: batches of equal blocks, see `BlockPartition.skew_blocks`.
        num_parameters: of the strict upper triangles.
    """

    index: Tensor
    deltas: list[Tensor]
    num_parameters: int


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a directory.

    Args:
        directory: that holds `adapter_config.json` and the adapter's weights.
        config: of the adapter.
        shapes: of the tensors in the file, by their keys.
        layers: the rotated layers by their names, see `saved_layers`.
    """

    directory: Path
    config: POETConfig
    shapes: dict[str, tuple[int, ...]]
    layers: dict[str, SavedLayer]

    @property
    def file(self) -> Path:
        """The file of the weights."""
        return _weights_file(self.directory)

    def num_parameters(self) -> int:
        """How many parameters the rotations have."""
        return sum(shape[0] for key, shape in self.shapes.items() if _PARAMETERS.fullmatch(key))

    def num_other_values(self) -> int:
        """How many further values the file holds that train: current base weights, heads, embeddings."""
        return sum(
            torch.Size(shape).numel() for key, shape in self.shapes.items() if not _TENSOR_OF_ADAPTER.search(key)
        )

    @property
    def state(self) -> AdapterState:
        """The state of the adapter's first layer: counters are the same in all of them, block sizes are not."""
        return next(iter(self.layers.values())).state

    def side(self, tensors: OpenFile, name: str, side: SideName) -> SavedSide:
        """The rotation of one side of the layer `name`."""
        layer = self.layers[name]
        upper = tensors.get(f"{layer.prefix}.poet_{side}.weight")
        index = tensors.get(f"{layer.prefix}.poet_{side}.index")
        block_size = layer.state.block_size_R if side == "R" else layer.state.block_size_P
        partition = BlockPartition(index.numel(), index.numel(), block_size)
        if not block_size or partition.num_parameters != upper.numel():
            raise POETCheckpointError(
                f"{self.file} contradicts itself: poet_{side} of {name!r} has {upper.numel()} parameters, and "
                f"{index.numel()} features in blocks of {block_size} need {partition.num_parameters}."
            )
        deltas = [self.config.map.delta(Q) for Q in partition.skew_blocks(upper.double())]
        return SavedSide(index, deltas, upper.numel())

    def base_weight(self, tensors: OpenFile, name: str) -> Tensor:
        """The base weight (out, in) of the layer `name`, or a stack of them, of a file that holds base weights.

        Raises:
            POETCheckpointError: it is packed by quantization, or not in the file.
        """
        if name not in self.layers:
            raise POETCheckpointError(f"{self.file} has no layer {name!r}, but the other adapter has: of two models.")
        layer = self.layers[name]
        weight = tensors.get(layer.weight_key) if layer.weight_key in self.shapes else None
        if weight is None and not any(key.startswith(f"{layer.weight_key}.") for key in self.shapes):
            raise POETCheckpointError(
                f"{self.file} lacks {layer.weight_key!r}, which its settings save. Was it edited?"
            )
        if weight is None or not weight.is_floating_point():
            raise POETCheckpointError(
                f"the base weight of {name!r} in {self.file} is packed by quantization, and cannot be read from the "
                "file alone. Merge the adapters (`poet-peft merge`) and compare the models."
            )
        residual = f"{layer.prefix}.poet_residual"
        exact = join(weight, tensors.get(residual)) if residual in self.shapes else weight
        return WeightLayout(layer.state.layout).as_matrix(exact)

    def dtype_of_base_weights(self, tensors: OpenFile) -> torch.dtype | None:
        """Of the rotated base weights in the file; None where there are none, or packed ones."""
        held = [
            key
            for key, shape in self.shapes.items()
            if ".base_layer." in key and len(shape) > 1 and not _TENSOR_OF_ADAPTER.search(key)
        ]
        return next((x.dtype for key in held if (x := tensors.get(key)).is_floating_point()), None)


def open_adapter(path: Path) -> SavedAdapter:
    """Find and check the adapter in a directory, or in the one subdirectory that holds one.

    Raises:
        FileNotFoundError: no such directory.
        POETCheckpointError: there is no POET adapter in it, it is damaged, or there are several.
    """
    directory = adapter_directory(path)
    verify_checkpoint(directory)
    with open_tensors(_weights_file(directory)) as tensors:
        config = POETConfig.from_pretrained(str(directory))
        states = {
            prefix: AdapterState.of(tensors.get(f"{prefix}.poet_state")) for prefix in prefixes_of(tensors.shapes)
        }
        layers = saved_layers(tensors.shapes, states, config)
        adapter = SavedAdapter(directory, config, tensors.shapes, layers)
    if not adapter.layers:
        raise POETCheckpointError(f"{adapter.file} holds no rotation. Is it the adapter of another method?")
    return adapter


def adapter_directory(path: Path) -> Path:
    """The directory of the adapter that `path` names. Raises as `open_adapter`."""
    check_directory(path)
    if (path / CONFIG_NAME).is_file():
        return path
    found = sorted(child.parent for child in path.glob(f"*/{CONFIG_NAME}"))
    named = [directory for directory in found if not directory.name.startswith("checkpoint-")]
    if len(named) == 1:
        return named[0]
    if found:
        names = ", ".join(directory.name for directory in found)
        raise POETCheckpointError(f"{path} holds several adapters ({names}): pass the path of one of them.")
    raise POETCheckpointError(f"{path} has no {CONFIG_NAME}: it is no adapter that save_pretrained or Trainer wrote.")


def check_directory(path: Path) -> None:
    """Raise FileNotFoundError or NotADirectoryError unless `path` is a directory."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: pass the directory of an adapter, a checkpoint or a model.")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: pass the directory that it is in.")


class OpenFile:
    """The tensors of an open file, read one by one."""

    def __init__(self, read: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        self.get = read
        self.shapes = shapes


@contextmanager
def open_tensors(file: Path) -> Iterator[OpenFile]:
    """Open a file of safetensors, or one of `torch.save` with nothing but tensors in it."""
    if file.suffix != ".safetensors":
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        yield OpenFile(tensors.__getitem__, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        return
    with safe_open(file, "pt") as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        yield OpenFile(opened.get_tensor, shapes)


def read_metrics(directory: Path) -> dict[str, Any] | None:
    """What a run wrote about itself, beside an adapter or one level above a checkpoint; None where there is none."""
    for place in (directory, directory.parent):
        values = read_json_object(place / METRICS_NAME)
        if values is not None:
            return values
    return None


def _weights_file(directory: Path) -> Path:
    safe = directory / SAFETENSORS_WEIGHTS_NAME
    return safe if safe.is_file() else directory / WEIGHTS_NAME
