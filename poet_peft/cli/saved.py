"""Adapters as they lie on disk, read without their base model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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


METRICS_NAME = "metrics.json"
_TENSOR_OF_ADAPTER = re.compile(r"\.poet_(R|P|state|residual)(\.|$)")
_SIDE = re.compile(r"(?P<layer>.+)\.poet_(?P<side>[RP])\.(?P<tensor>weight|index)")


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
    """

    directory: Path
    config: POETConfig
    shapes: dict[str, tuple[int, ...]]

    @property
    def file(self) -> Path:
        """The file of the weights."""
        return _weights_file(self.directory)

    @cached_property
    def layers(self) -> dict[str, list[SideName]]:
        """Names of the rotated layers in the base model, and their rotated sides."""
        layers: dict[str, list[SideName]] = {}
        for key in self.shapes:
            match = _SIDE.fullmatch(key)
            if match and match["tensor"] == "weight":
                layers.setdefault(_name_in_base_model(match["layer"]), []).append(match["side"])
        # The output side first, as in R W P.
        return {name: sorted(layers[name], reverse=True) for name in sorted(layers, key=_by_number)}

    def num_parameters(self) -> int:
        """How many parameters the rotations have."""
        return sum(
            shape[0]
            for key, shape in self.shapes.items()
            if (match := _SIDE.fullmatch(key)) and match["tensor"] == "weight"
        )

    def num_other_values(self) -> int:
        """How many further values the file holds that train: current base weights, heads, embeddings."""
        return sum(
            torch.Size(shape).numel() for key, shape in self.shapes.items() if not _TENSOR_OF_ADAPTER.search(key)
        )

    def state(self, tensors: OpenFile) -> AdapterState:
        """The state of the adapter's first layer: counters are the same in all of them, block sizes are not."""
        return AdapterState.of(tensors.get(next(key for key in self.shapes if key.endswith(".poet_state"))))

    def side(self, tensors: OpenFile, layer: str, side: SideName) -> SavedSide:
        """The rotation of one side of a layer, by the name that the layer has in the base model."""
        prefix = self._prefix(layer)
        upper = tensors.get(f"{prefix}.poet_{side}.weight")
        index = tensors.get(f"{prefix}.poet_{side}.index")
        state = AdapterState.of(tensors.get(f"{prefix}.poet_state"))
        block_size = state.block_size_R if side == "R" else state.block_size_P
        partition = BlockPartition(index.numel(), index.numel(), block_size)
        if not block_size or partition.num_parameters != upper.numel():
            raise POETCheckpointError(
                f"{self.file} contradicts itself: poet_{side} of {layer!r} has {upper.numel()} parameters, and "
                f"{index.numel()} features in blocks of {block_size} need {partition.num_parameters}."
            )
        deltas = [self.config.map.delta(Q) for Q in partition.skew_blocks(upper.double())]
        return SavedSide(index, deltas, upper.numel())

    def base_weight(self, tensors: OpenFile, layer: str) -> Tensor:
        """The base weight (out, in) of a layer, of a file that holds base weights.

        Raises:
            POETCheckpointError: it is packed by quantization, or one of several stacks of experts' weights.
        """
        prefix = self._prefix(layer)
        weight = tensors.get(f"{prefix}.base_layer.weight") if f"{prefix}.base_layer.weight" in self.shapes else None
        state = AdapterState.of(tensors.get(f"{prefix}.poet_state"))
        if weight is None or not weight.is_floating_point():
            is_stack = state.layout in (WeightLayout.STACK, WeightLayout.TRANSPOSED_STACK)
            what = "belongs to a stack of experts" if is_stack else "is packed by quantization"
            raise POETCheckpointError(
                f"the base weight of {layer!r} in {self.file} {what}, and cannot be read from the file alone. Merge "
                "the adapters (`poet-peft merge`) and compare the models."
            )
        residual = f"{prefix}.poet_residual"
        exact = join(weight, tensors.get(residual)) if residual in self.shapes else weight
        return WeightLayout(state.layout).as_matrix(exact)

    def dtype_of_base_weights(self, tensors: OpenFile) -> torch.dtype | None:
        """Of the rotated base weights in the file; None where there are none, or packed ones."""
        held = [
            key
            for key, shape in self.shapes.items()
            if ".base_layer." in key and len(shape) > 1 and not _TENSOR_OF_ADAPTER.search(key)
        ]
        return next((x.dtype for key in held if (x := tensors.get(key)).is_floating_point()), None)

    def _prefix(self, layer: str) -> str:
        prefixed = f"base_model.model.{layer}"
        return prefixed if f"{prefixed}.poet_state" in self.shapes else layer


def open_adapter(path: Path) -> SavedAdapter:
    """Find and check the adapter in a directory, or in the one subdirectory that holds one.

    Raises:
        FileNotFoundError: no such directory.
        POETCheckpointError: there is no POET adapter in it, it is damaged, or there are several.
    """
    directory = adapter_directory(path)
    verify_checkpoint(directory)
    with open_tensors(_weights_file(directory)) as tensors:
        adapter = SavedAdapter(directory, POETConfig.from_pretrained(str(directory)), tensors.shapes)
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


def _name_in_base_model(prefix: str) -> str:
    return prefix.removeprefix("base_model.model.")


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
