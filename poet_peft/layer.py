"""The rotated layer: its adapters, merge and unmerge. The forward of each kind has a file of its own."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from .config import POETConfig
from .delta import DeltaWeight
from .dial import ScaledAdapters
from .errors import POETCheckpointError
from .exchange import call_with
from .maths.blocks import partition_side
from .ops import reference
from .ops.sides import Side, are_identity
from .original import OriginalModel
from .rotation import Rotation
from .state import AdapterState, AdapterStates, Probes
from .weights import base_weight_of
from .weights.base import BaseWeight
from .weights.layout import WeightLayout
from .weights.plain import RotatedSide, features, layout_of, rotated_sides
from .weights.residual import LOW_PRECISION, zero_residual
from .weights.sharded import mesh_of


# In the order of their making, which is the same in every process: folds of sharded weights are collective.
_layers: weakref.WeakKeyDictionary[POETLayer, int] = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def register_layer(layer: POETLayer) -> None:
    """Count a layer among the living ones: a new one, or one that was copied or unpickled."""
    _layers[layer] = next(_numbers)


def living_layers() -> list[POETLayer]:
    """All rotated layers of the process, in the order of their making."""
    return sorted(_layers, key=_layers.__getitem__)


def poet_layers(model: nn.Module) -> Iterator[tuple[str, POETLayer]]:
    """All rotated layers of a model with their names in it."""
    for name, module in model.named_modules():
        if isinstance(module, POETLayer):
            yield name, module


class POETLayer(AdapterStates, DeltaWeight, ScaledAdapters, OriginalModel, BaseTunerLayer):
    """Rotations of all adapters around one base layer.

    Attributes:
        poet_R, poet_P: the `Rotation` of the output and of the input side, by adapter. A side of one feature has none.
        poet_state: an `AdapterState` as int64 tensor, by adapter. Saved with the adapter, so that a resumed run goes
            on as the run that wrote the file.
        poet_residual: the residual of a bf16 or fp16 weight, by adapter, with `compensated_folds`; see
            `residual.split`.
        poet_config, poet_scaling: the configuration and the scale, by adapter; see `ScaledAdapters`.
        poet_probes: what folds have made of fixed vectors, by adapter, while that is followed; see `start_probing`.
        poet_initial_weight: copy of the base weight from before any fold, with `keep_initial_weights`; else None.
    """

    adapter_layer_names = ("poet_R", "poet_P")
    other_param_names = ("poet_state", "poet_residual", "poet_config", "poet_scaling", "poet_probes")
    weight_name = "weight"  # of the parameter that is rotated, in the base layer
    mixes_samples: str | None = None  # why the samples of a batch cannot have adapters of their own; None: they can

    def __init__(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.module_name = module_name
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.out_features, self.in_features = self.weight_features()
        self.poet_R = nn.ModuleDict()
        self.poet_P = nn.ModuleDict()
        self.poet_state = BufferDict(persistent=True)
        self.poet_residual = BufferDict(persistent=True)
        self.poet_config: dict[str, POETConfig] = {}
        self.poet_scaling: dict[str, float] = {}
        self.poet_probes: dict[str, Probes] = {}
        self.register_buffer("poet_initial_weight", None, persistent=False)
        self._states: dict[str, tuple[Tensor, int, AdapterState]] = {}
        self._unmerged_parts: dict[str, Tensor] | None = None
        self._lacks_base_weight = False
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        register_layer(self)

    @property
    def base_weight(self) -> BaseWeight:
        """What reads and writes the weight of the base layer."""
        return base_weight_of(self.get_base_layer(), self.quantization_backend)

    @property
    def base_parameter(self) -> Tensor | None:
        """The parameter that is rotated; of another dtype or None where a quantized layer keeps it otherwise."""
        return getattr(self.get_base_layer(), self.weight_name, None)

    @property
    def path_to_weight(self) -> str:
        """The name of the base parameter below this layer."""
        path, below = "base_layer", self.base_layer
        while isinstance(below, POETLayer):
            path, below = f"{path}.base_layer", below.base_layer
        return f"{path}.{self.weight_name}"

    @property
    def weight_layout(self) -> WeightLayout:
        """How the base parameter keeps the matrix that is rotated."""
        return layout_of(self.get_base_layer())

    def weight_features(self) -> tuple[int, int]:
        """`(out_features, in_features)` of the base weight as a matrix."""
        return features(self.get_base_layer())

    def weight_sides(self) -> list[RotatedSide]:
        """The sides of the base weight that can be rotated."""
        return rotated_sides(self.get_base_layer())

    def update_layer(self, adapter_name: str, config: POETConfig) -> None:
        """Add an adapter: the identity, or random rotations with `init_weights=False`."""
        for side, dim, groups in self.weight_sides():
            partition = partition_side(config.variant, config.block_size_of(self.module_name), dim, groups)
            rotation = Rotation(
                partition,
                side,
                self.module_name,
                orthogonal_map=config.map,
                seed=config.seed,
                keeps_blocks=not config.memory_efficient,
            )
            rotation.mesh = mesh_of(self.base_parameter)
            if not config.init_weights:
                nn.init.normal_(rotation.weight, std=0.1 / partition.block_size**0.5)
            base_dtype = getattr(self.base_parameter, "dtype", None)
            dtype = torch.float64 if base_dtype == torch.float64 else torch.float32
            (self.poet_R if side == "R" else self.poet_P)[adapter_name] = rotation.to(dtype)
        self.poet_config[adapter_name] = config
        self.poet_state[adapter_name] = self.state_at_start(adapter_name).tensor()
        self.poet_scaling[adapter_name] = 1.0
        if self.is_compensated(adapter_name):
            self._ensure_residual(adapter_name)
        if config.merge_interval and config.is_from_file and self.base_weight.is_quantized:
            self._lacks_base_weight = True
        if config.keep_initial_weights and self.poet_initial_weight is None:
            self.poet_initial_weight = self.base_parameter.detach().clone()

        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT also casts here, after low-memory loading too, where fp32 rotations would lose their digits for good.
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None or device.type == "meta":  # where index and state would be lost
            return
        for rotation in self.rotations(adapter_name):
            if not rotation.weight.is_meta:
                rotation.to(device)
        for buffers in (self.poet_state, self.poet_residual):
            if adapter_name in buffers:
                buffers[adapter_name] = buffers[adapter_name].to(device)

    # What belongs to an adapter

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.poet_config

    def rotations(self, adapter_name: str) -> list[Rotation]:
        """The adapter's rotations of this layer: both sides, or the one that has more than one feature."""
        return [side[adapter_name] for side in (self.poet_R, self.poet_P) if adapter_name in side]

    def is_periodic(self, adapter_name: str) -> bool:
        """Whether the adapter is folded into the weight in training (`merge_interval > 0`)."""
        return self.poet_config[adapter_name].merge_interval > 0

    def is_compensated(self, adapter_name: str) -> bool:
        """Whether folds of the adapter keep a residual, if the weight is of 16 bits."""
        return (
            self.is_periodic(adapter_name)
            and self.poet_config[adapter_name].compensated_folds
            and self.quantization_backend is None
        )

    def _ensure_residual(self, adapter_name: str) -> None:
        weight = self.base_parameter
        if weight.dtype in LOW_PRECISION and adapter_name not in self.poet_residual:
            self.poet_residual[adapter_name] = zero_residual(weight)

    def residual_of(self, adapter_name: str) -> Tensor | None:
        """The residual that the adapter's folds left over, if there is one."""
        return dict(self.poet_residual.items()).get(adapter_name)

    @property
    def residual(self) -> Tensor | None:
        """The residual of the base weight as it is, if there is one."""
        return None if self.merged else next(iter(self.poet_residual.values()), None)

    # Forward

    def sides(self, adapter_names: list[str]) -> tuple[list[Side], list[Side]]:
        """Both sides' rotations of the adapters at their scales, the first adapter's first."""
        R, P = (list(self._scaled_sides(side, adapter_names)) for side in (self.poet_R, self.poet_P))
        return R, P

    def _active_here(self) -> list[str]:
        return self._turned(self.active_adapters)

    def _rotated_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The forward of these adapters, of which there is at least one."""
        raise NotImplementedError

    def _is_at_identity(self, adapters: list[str], sides: list[Side]) -> bool:
        """Whether all rotations are the identity, as they are where they are folded after every step."""
        configs = [self.poet_config[name] for name in adapters]
        if len(configs) != 1 or not configs[0].folds_every_step:
            return False
        if torch.compiler.is_compiling():
            return configs[0].init_weights
        return are_identity(sides)

    def _original_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.poet_initial_weight is None:
            return self.base_layer(*args, **kwargs)
        name = self.path_to_weight.removeprefix("base_layer.")
        return call_with(self.base_layer, name, self.poet_initial_weight, args, kwargs)

    # Merge and unmerge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight by `R W P`, keeping a copy of `W` so that `unmerge` is exact.

        Args:
            safe_merge: refuse a merged weight with NaN or infinite entries, before anything is changed.
            adapter_names: the adapters to merge, in this order; None = all active ones.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not adapter_names:
            return
        self.check_mergeable()
        weight = self.base_weight
        with torch.no_grad():
            merged = self.rotated_weight(adapter_names)
        if safe_merge and not weight.is_storable(merged):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken, "
                f"first in {self.module_name!r}."
            )
        if self._unmerged_parts is None:
            self._unmerged_parts = {name: part.detach().clone() for name, part in weight.parts().items()}
        weight.write(merged)
        self.merged_adapters.extend(adapter_names)

    def rotated_weight(self, adapter_names: list[str]) -> Tensor:
        """`R W P` (out, in) by these adapters, in this order."""
        return rotate_weight(self.base_weight.read_exact(self.residual), *self.sides(adapter_names))

    def unmerge(self) -> None:
        """Bring back the base weight from before `merge`, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self.base_weight.write_parts(self._unmerged_parts)
        self._unmerged_parts = None
        self.merged_adapters.clear()

    def check_mergeable(self) -> None:
        """Refuse to merge into a weight that cannot be read or written.

        Raises:
            ValueError: names the module, what is in the way, and the way out.
        """
        self.check_base_weight_was_loaded()
        below = self.base_layer
        while isinstance(below, POETLayer):  # around another parameter of the same module
            below = below.base_layer
        if isinstance(below, BaseTunerLayer):
            raise ValueError(
                f"{self.module_name!r} carries another adapter ({type(below).__name__}) below POET's, whose "
                "part of the weight would not be rotated. Merge that one first, before POET is added."
            )
        self.base_weight.check_readable(self.module_name)

    @property
    def base_parts_to_save(self) -> dict[str, Tensor]:
        """The base weight without any merged adapter, as the tensors that it is made of, by their names in the base
        layer: `weight`, or the parts of a quantized weight."""
        return self.base_weight.parts() if self._unmerged_parts is None else self._unmerged_parts

    def base_weight_was_loaded(self) -> None:
        """The base weight is now the one that belongs to the rotations."""
        self._lacks_base_weight = False

    def check_base_weight_was_loaded(self) -> None:
        """Refuse to compute with folded rotations around a quantized weight that they were not folded into.

        transformers' own loader reads the rotations of a file, but can give a layer only plain weights.

        Raises:
            POETCheckpointError: names the module and the loader to use.
        """
        if not self._lacks_base_weight:
            return
        if any(self.state(name).num_folds for name in self.poet_config):
            raise POETCheckpointError(
                f"the adapter was folded into the quantized weight of {self.module_name!r}, which was not loaded with "
                "it. Load the adapter with PeftModel.from_pretrained(base, directory)."
            )
        self._lacks_base_weight = False

    # The original model, see `original`

    def restore_initial_weight(self) -> None:
        """Write the weight from before any fold back into the base layer, if a copy is kept."""
        if self.poet_initial_weight is not None:
            self.base_weight.write_parts({self.weight_name: self.poet_initial_weight})

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.check_can_be_disabled()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        self.check_deletable(adapter_name)
        if self.has_adapter(adapter_name) and self.state(adapter_name).num_folds:
            self.restore_initial_weight()
        self._states.pop(adapter_name, None)
        super().delete_adapter(adapter_name)


def rotate_weight(weight: Tensor, R: list[Side], P: list[Side]) -> Tensor:
    """`R_n ... R_1 W P_1 ... P_n` of a weight (out, in), by the reference: what is written is never approximate."""
    pairs = ([(side.index, side.blocks().deltas) for side in sides] for sides in (R, P))
    return reference.effective_weight(weight, *pairs)
