"""The rotated layer: forward, merge, unmerge, fold."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .base_layers import features, weight_as_matrix
from .cache import RotationCache
from .config import POETConfig
from .errors import POETCheckpointError, POETMergeError, POETReferenceError
from .ops import reference
from .ops.input_centric import rotate
from .ops.paths import choose_path, poet_linear
from .ops.prepared import RotationParameters
from .precision import LOW_PRECISION, at_least_fp32, join, nothing_cut_off, split
from .primitives import partition_side
from .quantization import quantized_format
from .rotation import Rotation
from .sharding import full, keep_replicas_equal, mesh_of, some_model_is_sharded, write


_NUM_PROBES = 8


class LayerFold(NamedTuple):
    """What the fold of one layer did; see `MergeReport`."""

    relative_output_change: float
    orthogonality_error: float
    rotation_angle: float
    spectral_drift: float
    requantization_error: float


class POETLayer(BaseTunerLayer):
    """Rotations of all adapters around one base layer.

    Attributes:
        poet_R, poet_P: the `Rotation` of the output and of the input side, by adapter. A side of one feature has none.
        poet_schedule: int64 (4,) by adapter: the seed that index tensors are drawn from, the number of
            reinitialisations (the epoch they are drawn for), the number of folds, the number of optimizer steps that
            were skipped. Saved with the adapter, so that a resumed run goes on as the run that wrote the file.
        poet_residual: what folding cut off a bf16 or fp16 weight, by adapter, with `compensated_folds`; see
            `precision.split`.
        poet_initial_weight: copy of the base weight from before any fold, with `keep_initial_weights`; else None.
    """

    adapter_layer_names = ("poet_R", "poet_P")
    other_param_names = ("poet_schedule", "poet_residual")

    def __init__(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.module_name = module_name
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.quantized_format = quantized_format(self.quantization_backend)
        self.out_features, self.in_features = features(self.get_base_layer())
        self.poet_R = nn.ModuleDict()
        self.poet_P = nn.ModuleDict()
        self.poet_schedule = BufferDict(persistent=True)
        self.poet_residual = BufferDict(persistent=True)
        self.register_buffer("poet_initial_weight", None, persistent=False)
        self._unmerged_parts: dict[str, Tensor] | None = None
        self._may_lack_folds = False
        self._trains_rest = False
        self._folds_ahead = False  # set by POETCallback while it trains
        self._periodic_adapters: set[str] = set()
        self._compensated_adapters: set[str] = set()
        self._memory_efficient = False
        self._cache = RotationCache()
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True

    def update_layer(self, adapter_name: str, config: POETConfig) -> None:
        """Add an adapter: the identity, or random rotations with `init_weights=False`."""
        block_size = config.block_size
        if config.block_size_pattern:
            key = get_pattern_key(config.block_size_pattern.keys(), self.module_name)
            block_size = config.block_size_pattern.get(key, block_size)

        for side, rotations, dim in (("R", self.poet_R, self.out_features), ("P", self.poet_P, self.in_features)):
            if dim == 1:
                continue
            rotation = Rotation(
                partition_side(config.variant, block_size, dim),
                side,
                self.module_name,
                orthogonal_map=config.orthogonal_map,
                num_neumann_terms=config.num_neumann_terms,
                seed=config.seed,
            )
            rotation.mesh = mesh_of(getattr(self.get_base_layer(), "weight", None))
            if not config.init_weights:
                nn.init.normal_(rotation.weight, std=0.1 / rotation.partition.block_size**0.5)
            # As PEFT's tuners do: in the dtype of the base weight, from which PEFT goes to fp32 by default.
            rotations[adapter_name] = rotation.to(self._adapter_dtype())
        self.poet_schedule[adapter_name] = torch.tensor([config.seed, 0, 0, 0])
        self._trains_rest |= config.train_rest
        self._memory_efficient |= config.memory_efficient
        if config.merge_interval:
            self._periodic_adapters.add(adapter_name)
            if config.compensated_folds and self.quantization_backend is None:
                self._compensated_adapters.add(adapter_name)
                self._ensure_residual(adapter_name)
            self._may_lack_folds |= config._is_from_file and self.quantized_format is not None
        if config.keep_initial_weights and self.poet_initial_weight is None:
            self.poet_initial_weight = self.get_base_layer().weight.detach().clone()

        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _adapter_dtype(self) -> torch.dtype | None:
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype is not None and dtype.is_floating_point else None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT also casts here, after low-memory loading too, where fp32 rotations would lose their digits for good.
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for rotation in self.rotations(adapter_name):
            if device is not None and not rotation.weight.is_meta:
                rotation.to(device)
        for buffers in (self.poet_schedule, self.poet_residual):
            if device is not None and adapter_name in buffers:
                buffers[adapter_name] = buffers[adapter_name].to(device)

    # State of the schedule

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.poet_schedule

    def rotations(self, adapter_name: str) -> list[Rotation]:
        """The adapter's rotations of this layer: both sides, or the one that has more than one feature."""
        return [side[adapter_name] for side in (self.poet_R, self.poet_P) if adapter_name in side]

    def is_periodic(self, adapter_name: str) -> bool:
        """Whether the adapter is folded into the weight in training (`merge_interval > 0`)."""
        return adapter_name in self._periodic_adapters

    def seed(self, adapter_name: str) -> int:
        return int(self.poet_schedule[adapter_name][0])

    def epoch(self, adapter_name: str) -> int:
        """Number of reinitialisations so far."""
        return int(self.poet_schedule[adapter_name][1])

    def num_folds(self, adapter_name: str) -> int:
        return int(self.poet_schedule[adapter_name][2])

    def num_skipped_steps(self, adapter_name: str) -> int:
        """Number of optimizer steps that a gradient scaler skipped."""
        return int(self.poet_schedule[adapter_name][3])

    def count_skipped_step(self, adapter_name: str) -> None:
        self.poet_schedule[adapter_name][3] += 1

    # Forward

    def _rotation_parameters(self, adapter_names: list[str]) -> tuple[list[RotationParameters], ...]:
        """Both sides' rotations, the first adapter's first."""
        R, P = ([side[name] for name in adapter_names if name in side] for side in (self.poet_R, self.poet_P))
        return [rotation() for rotation in R], [rotation() for rotation in P]

    def _tensors(self, adapter_names: list[str]) -> tuple[list[reference.RotationTensors], ...]:
        """The same in the form that `reference` takes."""
        R, P = self._rotation_parameters(adapter_names)
        return [rotation.tensors() for rotation in R], [rotation.tensors() for rotation in P]

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if self.has_adapter(name)]

    def _rotated_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():
            for name in self._active_here():
                for rotation in self.rotations(name):
                    if rotation.mesh is not None:
                        keep_replicas_equal(rotation.weight, rotation.mesh)
        R, P = self._rotation_parameters(self._active_here())
        base_layer = self.get_base_layer()
        if self.quantization_backend is not None or hasattr(base_layer, "_hf_hook"):
            return self._rotate_around(base_layer, x, *args, **kwargs)
        # Frozen by the method, also where a loader of transformers has made a new parameter of it that is not.
        weight = weight_as_matrix(base_layer).detach()
        dtype = x.dtype
        autocasts = torch.is_autocast_enabled(x.device.type)
        if not autocasts:
            x = self._cast_input_dtype(x, weight.dtype)
        keeps_weight = self._can_keep_weight(weight)
        path = choose_path(x, weight, R, P, keeps_weight, self._memory_efficient)
        if keeps_weight and not torch.is_grad_enabled() and path != "input_centric":
            y = F.linear(x, self._cache.effective_weight(weight, R, P), base_layer.bias)
        else:
            prepared = None
            if keeps_weight and path in ("weight_centric", "tangent"):
                prepared = self._cache.preparation(weight, R, P, with_inverses=path == "tangent")
            y = poet_linear(x, weight, base_layer.bias, R, P, path, self._memory_efficient, prepared)
        return y if autocasts else y.to(dtype)

    def _can_keep_weight(self, weight: Tensor) -> bool:
        """Whether `R W P` may be kept for the next forward."""
        return not (
            self._memory_efficient
            or torch.compiler.is_compiling()
            or type(weight) is not Tensor
            or weight.is_inference()
            or weight.is_meta
            or hasattr(self, "_hf_hook")  # accelerate may take the weights away after each forward
            or some_model_is_sharded()
        )

    def _rotate_around(
        self,
        base_layer: nn.Module,
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The forward around a base layer whose weight cannot be read cheaply: `R (base(P x) - b) + b`."""
        R, P = self._tensors(self._active_here())
        for rotation in reversed(P):
            x = rotate(x, rotation)
        y = base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        bias = _bias(base_layer)
        unrotated = rotated = y if bias is None else y - bias.to(y.dtype)
        for rotation in R:
            rotated = rotate(rotated, rotation)
        # The change, not the result, is put back under the bias: the identity then changes no bit.
        return rotated if bias is None else y + (rotated - unrotated)

    def _original_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.poet_initial_weight is None:
            return self.base_layer(x, *args, **kwargs)
        base_layer = self.get_base_layer()
        return F.linear(x, weight_as_matrix(base_layer, self.poet_initial_weight), base_layer.bias)

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
        R, P = self._tensors(adapter_names)
        with torch.no_grad():
            merged = reference.effective_weight(self._exact_matrix(), R, P)
        if safe_merge and not self._is_storable(merged):
            raise ValueError(
                f"NaNs detected in the merged weights of {self.module_name!r}. The adapter "
                f"{', '.join(adapter_names)} seems to be broken."
            )
        if self._unmerged_parts is None:
            self._unmerged_parts = {name: part.detach().clone() for name, part in self._base_parts().items()}
        self._write_matrix(merged)
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Bring back the base weight from before `merge`, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self._write_parts(self._unmerged_parts)
        self._unmerged_parts = None
        self.merged_adapters.clear()

    def base_weight_was_loaded(self) -> None:
        """The base weight is now the one that belongs to the rotations."""
        self._may_lack_folds = False

    def check_base_weight_was_loaded(self) -> None:
        """Refuse to compute with folded rotations around a quantized weight that they were not folded into.

        transformers' own loader reads the rotations of a file, but can give a layer only plain weights.

        Raises:
            POETCheckpointError: names the module and the loader to use.
        """
        if not self._may_lack_folds:
            return
        if any(self.num_folds(name) for name in self.poet_schedule):
            raise POETCheckpointError(
                f"the adapter was folded into the quantized weight of {self.module_name!r}, which was not loaded with "
                "it. Load the adapter with PeftModel.from_pretrained(base, directory)."
            )
        self._may_lack_folds = False

    def check_mergeable(self) -> None:
        """Refuse to merge into a weight that cannot be read or written.

        Raises:
            ValueError: names the module, the library that quantized it, and the way out.
        """
        self.check_base_weight_was_loaded()
        if self.quantization_backend is not None and self.quantized_format is None:
            raise ValueError(
                f"{self.module_name!r} is quantized by {self.quantization_backend.backend_name}, which cannot take "
                "merged weights. Keep the adapter beside the base, or load it over an unquantized copy of the base "
                "and merge there."
            )

    @property
    def base_parts_to_save(self) -> dict[str, Tensor]:
        """The base weight without any merged adapter, as the tensors that it is made of, by their names in the base
        layer: `weight`, or the parts of a quantized weight."""
        return self._base_parts() if self._unmerged_parts is None else self._unmerged_parts

    def _base_parts(self) -> dict[str, Tensor]:
        base_layer = self.get_base_layer()
        return (
            {"weight": base_layer.weight} if self.quantized_format is None else self.quantized_format.parts(base_layer)
        )

    def _matrix(self) -> Tensor:
        """The base weight (out, in) as a forward pass sees it, in fp32 at least: dequantized, gathered."""
        base_layer = self.get_base_layer()
        if self.quantized_format is not None:
            return self.quantized_format.dequantize(base_layer)
        return at_least_fp32(weight_as_matrix(base_layer, full(base_layer.weight)))

    def _exact_matrix(self) -> Tensor:
        """`_matrix` with what folding cut off it."""
        base_layer = self.get_base_layer()
        if self.quantized_format is not None:
            return self._matrix()
        weight = full(base_layer.weight)
        residual = next(iter(self.poet_residual.values()), None)
        if residual is not None and weight.dtype in LOW_PRECISION and not self.merged:
            weight = join(weight, residual)
        return at_least_fp32(weight_as_matrix(base_layer, weight))

    @torch.no_grad()
    def _write_matrix(self, matrix: Tensor) -> None:
        base_layer = self.get_base_layer()
        if self.quantized_format is not None:
            self._write_parts(self.quantized_format.quantize(base_layer, matrix))
        else:
            write(base_layer.weight, weight_as_matrix(base_layer, matrix))

    def _ensure_residual(self, adapter_name: str) -> None:
        weight = self.get_base_layer().weight
        if weight.dtype in LOW_PRECISION and adapter_name not in self.poet_residual:
            self.poet_residual[adapter_name] = nothing_cut_off(weight)

    def _write_parts(self, parts: dict[str, Tensor]) -> None:
        base_layer = self.get_base_layer()
        if self.quantized_format is not None:
            self.quantized_format.write(base_layer, parts)
        else:
            write(base_layer.weight, parts["weight"])

    def _storage_dtype(self) -> torch.dtype:
        """The dtype whose range limits what the base weight can hold."""
        base_layer = self.get_base_layer()
        if self.quantized_format is not None:
            return self.quantized_format.range_dtype(base_layer)
        return base_layer.weight.dtype

    def _is_storable(self, matrix: Tensor) -> bool:
        return bool(torch.isfinite(matrix.to(self._storage_dtype())).all())

    # Fold

    def check_foldable(self, adapter_name: str) -> None:
        """Refuse a fold that would be wrong, before anything is changed.

        Raises:
            POETMergeError: names the module, what is in the way, and the way out.
        """
        if self.merged:
            raise POETMergeError(
                f"{self.module_name!r} has the adapter {self.merged_adapters} merged into its weight, so its "
                "rotations cannot be folded into it a second time. Call unmerge_adapter() first."
            )
        self.check_base_weight_was_loaded()
        adapters = list(self.poet_schedule.keys())
        if len(adapters) > 1:
            raise POETMergeError(
                f"{self.module_name!r} carries the adapters {adapters}; folding one of them into the shared weight "
                "would change the others. Delete the others, or train them with merge_interval=0."
            )
        for rotation in self.rotations(adapter_name):
            if not rotation.is_usable():
                raise POETMergeError(
                    f"the rotation {rotation.side} of {self.module_name!r} is NaN or infinite, or has grown without "
                    "bound. No weight was changed. Go back to the last checkpoint and lower the learning rate of the "
                    "rotations."
                )

    @torch.no_grad()
    def fold(self, adapter_name: str, reinitialize: bool = True) -> LayerFold:
        """`W <- R W P` in place, computed in fp32 at least, and `Q <- 0`; then new permutations, if asked for."""
        rotations = self.rotations(adapter_name)
        angle = max(rotation.angle() for rotation in rotations)
        base_layer = self.get_base_layer()
        weight = self._exact_matrix()
        probes = torch.randn(_NUM_PROBES, self.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
        before = reference.poet_linear(probes, self._matrix(), None, *self._tensors([adapter_name]))

        orthogonality_error, smallest, largest = 0.0, 1.0, 1.0
        tensors: dict[str, list[reference.RotationTensors]] = {"R": [], "P": []}
        for rotation in rotations:
            offsets, error = rotation.offsets_for_fold()
            tensors[rotation.side].append((rotation.index, offsets))
            orthogonality_error = max(orthogonality_error, error.orthogonality)
            smallest *= max(1 - error.spectrum, 0.0) ** 0.5
            largest *= (1 + error.spectrum) ** 0.5
        folded = reference.effective_weight(weight, tensors["R"], tensors["P"])
        if not self._is_storable(folded):
            raise POETMergeError(
                f"the folded weight of {self.module_name!r} does not fit into {self._storage_dtype()}. Layers "
                "before it are folded already: go back to the last checkpoint, and train in bf16 or fp32."
            )
        self._write_matrix(folded)
        if adapter_name in self._compensated_adapters and base_layer.weight.dtype in LOW_PRECISION:
            self._ensure_residual(adapter_name)
            _, rest = split(weight_as_matrix(base_layer, folded), base_layer.weight.dtype)
            self.poet_residual[adapter_name].copy_(rest)

        written = self._matrix()
        requantization_error = 0.0 if self.quantized_format is None else _relative_error(written, folded)
        after = F.linear(probes, written)
        for rotation in rotations:
            rotation.reset()
        self.poet_schedule[adapter_name][2] += 1
        if reinitialize:
            self.poet_schedule[adapter_name][1] += 1
            for rotation in rotations:
                rotation.redraw(self.seed(adapter_name), self.epoch(adapter_name))

        drift = max(1 - smallest, largest - 1)
        return LayerFold(_relative_error(after, before), orthogonality_error, angle, drift, requantization_error)

    # The original model

    def check_original_available(self, operation: str) -> None:
        """Refuse an operation that needs the weights from before training, if they are gone.

        Raises:
            POETReferenceError: names the module and the ways out.
        """
        ways_out = (
            "a separate copy of the model as reference (in TRL: ref_model=...), or training without folds "
            "(merge_interval=0, train_rest=False)"
        )
        if self._trains_rest:
            raise POETReferenceError(
                f"{operation} cannot give the original model: train_rest=True trains parameters outside the rotated "
                f"layers. Ways out: {ways_out}."
            )
        folds = max((self.num_folds(name) for name in self.poet_schedule), default=0)
        if folds and self.poet_initial_weight is None:
            raise POETReferenceError(
                f"{operation} cannot give the original model: the rotations of {self.module_name!r} were folded into "
                f"its weight {folds} times. Ways out: POETConfig(keep_initial_weights=True), {ways_out}."
            )
        if self._folds_ahead and self.poet_initial_weight is None:
            raise POETReferenceError(
                f"{operation} gives the original model only until the first fold, and {self.module_name!r} is being "
                "trained with folds (merge_interval > 0). Ways out: POETConfig(keep_initial_weights=True), "
                f"{ways_out}."
            )

    def restore_initial_weight(self) -> None:
        """Write the weight from before any fold back into the base layer, if a copy is kept."""
        if self.poet_initial_weight is not None:
            self._write_parts({"weight": self.poet_initial_weight})

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.check_original_available("disable_adapter")
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        self.check_deletable(adapter_name)
        if self.has_adapter(adapter_name) and self.num_folds(adapter_name):
            self.restore_initial_weight()
        self._periodic_adapters.discard(adapter_name)
        self._compensated_adapters.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def check_deletable(self, adapter_name: str) -> None:
        """Refuse to delete an adapter whose folds cannot be taken back."""
        if not self.has_adapter(adapter_name):
            return
        if self._trains_rest or self.num_folds(adapter_name):
            self.check_original_available("delete_adapter")

    # Scaling, which PEFT asks of every layer, has no meaning for a rotation

    def scale_layer(self, scale: float) -> None:
        if scale != 1 and self._active_here():
            warnings.warn("POET's rotations cannot be scaled; the scale stays 1.")

    def unscale_layer(self, scale: float | None = None) -> None:
        if scale not in (None, 1) and self._active_here():
            warnings.warn("POET's rotations cannot be scaled; the scale stays 1.")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


def _bias(base_layer: nn.Module) -> Tensor | None:
    """The bias, also where accelerate has offloaded it and puts it into the layer for its own forward only."""
    bias = getattr(base_layer, "bias", None)
    if bias is None or not bias.is_meta:
        return bias
    hook = base_layer._hf_hook
    return hook.weights_map["bias"].to(hook.execution_device)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual - expected)
    return float(difference / torch.linalg.vector_norm(expected).clamp_min(1e-30))


class Linear(nn.Module, POETLayer):
    """POET around an `nn.Linear` (also quantized) or transformers' `Conv1D`: `y = R W P x + bias`."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: POETConfig, module_name: str, **kwargs: Any
    ) -> None:
        super().__init__()
        POETLayer.__init__(self, base_layer, module_name, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._original_forward(x, *args, **kwargs)
        self.check_base_weight_was_loaded()
        if self.merged or not self._active_here():
            return self.base_layer(x, *args, **kwargs)
        return self._rotated_forward(x, *args, **kwargs)

    def train(self, mode: bool = True) -> Linear:
        if mode != self.training:
            self._cache.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Linear:
        self._cache.clear()
        return super()._apply(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Linear:
        replica = super()._replicate_for_data_parallel()
        replica._cache = RotationCache()
        return replica

    def __repr__(self) -> str:
        return "poet." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
