"""`POETConfig`: the method's configuration. Learning rates belong to the optimizer (`poet_param_groups`)."""

from __future__ import annotations

import json
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key

from .maths.blocks import VARIANTS
from .maths.orthogonal import Cayley, CayleyNeumann, OrthogonalMap
from .registration import check_owns_name, ensure_peft_type
from .setting_checks import boolean, check_choice, check_is_dict, integer, layer_indexes, positive, size_of_blocks
from .weights.initial import SCHEMES, scale_of


_MAPS = ("cayley_neumann", "cayley")
_BIASES = ("none", "all", "poet_only")
# Of the recipes.
_INTERVALS = {"ortho": {"merge_interval": 1, "reinit_interval": 0}, "paper": {"merge_interval": 400}}
_INITIAL_SIZES = {
    "ortho": {  # queries and keys larger, what the MLP adds to the residual stream smaller
        "base_init_scale": 0.7,
        "base_init_scale_pattern": {
            "q_proj|k_proj|qkv_proj|query_key_value|c_attn": 1.5,
            "down_proj|fc2|dense_4h_to_h|mlp.c_proj": 0.5,
        },
    },
    "paper": {},
}
_FILE_FORMAT = 1  # of adapter_config.json and of the tensors beside it


@dataclass
class POETConfig(PeftConfig):
    """Configuration of POET: `W_eff = R W P` with the weight `W` frozen and orthogonal `R` and `P` learned.

    With `merge_interval=0`, the default, POET is a pure adapter: the base weights never change, and what is saved is
    small. With `merge_interval > 0` the rotations are folded into the weights after every so many steps of the
    optimizer that holds them, any of torch's, in any training loop; a checkpoint then always holds the current base
    weights as well.

    Args:
        variant: "block_stochastic" rotates every feature, in random blocks; "fully_stochastic" rotates one random
            block of features on each side.
        block_size: size `b` of a block, at least 2; with "fully_stochastic" also a fraction of each dimension in
            (0, 1]. Trainable parameters of a layer: about `(m + n) (b - 1) / 2` block-stochastic, `b (b - 1)` fully
            stochastic.
        num_neumann_terms: `k` of the Cayley-Neumann series. 3 in the paper; 1 and 2 suffice only for small models.
        adaptive_terms: more terms wherever `num_neumann_terms` would miss orthogonality by more than rounding, up to
            the exact map, so that singular values stay for any length of training. False: exactly
            `num_neumann_terms`, as in the paper; every fold then shrinks singular values by up to `theta^(k+1)` a
            side.
        orthogonal_map: "cayley_neumann", or "cayley", which is exactly orthogonal for any `Q` and slower.
        merge_interval: optimizer steps between folds of the rotations into the weights; 0 = never.
        reinit_interval: optimizer steps between reinitialisations (new permutations or index sets, fresh optimizer
            state); a multiple of `merge_interval`. None = with every fold, 0 = never.
        base_init: draw the targeted weights anew before training from scratch: "normalized" (Gaussian, rows at unit
            norm; the paper's best), "xavier", "standard" (Gaussian, 0.02), "uniform_spectrum" (all singular values
            1), "mup" ("normalized" with the largest singular value at `4 sqrt(out / in)`). None leaves them as they
            are, as pretrained weights must be.
        base_init_scale: factor of the drawn weights. Their singular values stay for good, so that their size matters
            more than elsewhere.
        base_init_scale_pattern: a further factor for layers whose name matches a key, as in PEFT's `alpha_pattern`:
            `{"q_proj|k_proj": 2, "o_proj|down_proj": 0.5}`.
        train_rest: everything outside the rotated weights (embeddings, norms, biases, head) trains too, and is saved
            with the adapter. For pretraining.
        max_drift: largest relative change of a singular value by one fold that passes without a warning; ten times as
            much is refused. Only `adaptive_terms=False` comes near it.
        keep_initial_weights: keep a copy of the targeted weights, so that `disable_adapter` and `unload` still give
            the original model after a fold.
        memory_efficient: rebuild `R W P` of a layer in the backward pass instead of keeping it from the forward pass.
            Saves a second copy of every targeted weight in training, for about `4 m n b` flops a layer and
            micro-batch.
        compensated_folds: keep the residual that rounding leaves over when a rotation is folded into a bf16 or fp16
            weight, two bytes more a weight, so that singular values drift as little as in fp32. Without it they drift
            by about 5e-3 in 200 folds. No effect on fp32 weights, or with `merge_interval=0`.
        allow_requantize: fold into a quantized base too: dequantize, fold, quantize anew in the same format, as
            POET-XQ does (arXiv 2603.05500). Every fold then adds the error of a quantization, see `MergeReport`: up to
            0.09 of the weight's norm in 4 bits, 0.007 in 8. A fold that moves the weight by less than that is largely
            rounded away, so fold rarely. No effect on weights that are not quantized.
        seed: of permutations, index sets and `base_init`.
        init_weights: True starts at the identity. False starts at random rotations, for tests.
        target_modules: names of the layers to rotate (linear layers, convolutions, embeddings), a regular expression,
            or "all-linear": all linear layers but the output head, and experts. None = PEFT's defaults for the
            architecture.
        target_parameters: names of parameters to rotate that are no layer's weight, as in PEFT's LoRA: the stacked
            weights of experts, such as `["experts.gate_up_proj", "experts.down_proj"]`. Each expert is rotated by
            itself. Pass `target_modules=[]` to rotate nothing else. None = with "all-linear" the stacks of experts
            that can be rotated, else none.
        exclude_modules: names, or a regular expression, of layers to leave out.
        layers_to_transform: indexes of the transformer layers to rotate.
        layers_pattern: name of the layer list that `layers_to_transform` indexes.
        modules_to_save: further modules to train in full and save, such as a classification head.
        bias: biases that train: "none", "all", or "poet_only" (those of the rotated layers). Biases are not rotated.
        block_size_pattern: `block_size` for layers whose name matches a key, as in PEFT's `rank_pattern`.
        file_format: not to be set: `save_pretrained` writes it, and only a configuration that is read from such a file
            has it, see `is_from_file`. It is no field: `to_dict` and `dataclasses.replace` leave it out.

    NumPy's integers, floats and booleans are taken for Python's.

    Raises:
        ValueError: a value that is unknown, out of range or of another type, or settings that contradict each other.
            Names the setting and its value.
    """

    variant: Literal["block_stochastic", "fully_stochastic"] = field(
        default="block_stochastic", metadata={"help": "block_stochastic or fully_stochastic"}
    )
    block_size: int | float = field(
        default=64, metadata={"help": "size of a rotated block; a fraction of each dimension if fully_stochastic"}
    )
    num_neumann_terms: int = field(default=3, metadata={"help": "highest power of the Cayley-Neumann series"})
    adaptive_terms: bool = field(
        default=True, metadata={"help": "more terms where num_neumann_terms would miss orthogonality"}
    )
    orthogonal_map: Literal["cayley_neumann", "cayley"] = field(
        default="cayley_neumann", metadata={"help": "cayley_neumann, or cayley (exact)"}
    )
    merge_interval: int = field(default=0, metadata={"help": "optimizer steps between folds; 0 = never"})
    reinit_interval: int | None = field(
        default=None, metadata={"help": "optimizer steps between reinitialisations; None = with every fold, 0 = never"}
    )
    base_init: Literal["normalized", "xavier", "standard", "uniform_spectrum", "mup"] | None = field(
        default=None, metadata={"help": "draw the targeted weights anew, to train from scratch"}
    )
    base_init_scale: float = field(default=1.0, metadata={"help": "factor of the weights that base_init draws"})
    base_init_scale_pattern: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further factor of base_init_scale for layers whose name matches a key"},
    )
    max_drift: float = field(
        default=0.01, metadata={"help": "relative change of a singular value by one fold that warns"}
    )
    train_rest: bool = field(
        default=False, metadata={"help": "train and save everything outside the rotated weights too"}
    )
    keep_initial_weights: bool = field(
        default=False, metadata={"help": "keep a copy of the targeted weights, for disable_adapter after a fold"}
    )
    memory_efficient: bool = field(
        default=False, metadata={"help": "rebuild R W P in the backward pass instead of keeping it"}
    )
    compensated_folds: bool = field(
        default=True, metadata={"help": "keep the rounding of folds into bf16 and fp16 weights, in 2 bytes a weight"}
    )
    allow_requantize: bool = field(
        default=False, metadata={"help": "fold into a quantized base, which adds an error at every fold"}
    )
    seed: int = field(default=0, metadata={"help": "seed of permutations, index sets and base_init"})
    init_weights: bool = field(default=True, metadata={"help": "start at the identity"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "layers to rotate: names, a regular expression, or 'all-linear'"}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "parameters to rotate by name, such as the stacked weights of experts"}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "layers to leave out: names or a regular expression"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "indexes of the transformer layers to rotate"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the layer list that layers_to_transform indexes"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "further modules to train in full and save"}
    )
    bias: Literal["none", "all", "poet_only"] = field(
        default="none", metadata={"help": "biases that train: none, all or poet_only"}
    )
    block_size_pattern: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "block_size for layers whose name matches a key"}
    )
    file_format: InitVar[int | None] = None

    @classmethod
    def for_pretraining(cls, recipe: Literal["ortho", "paper"] = "ortho", **overrides: Any) -> POETConfig:
        """The configuration for training from random weights: all linear layers but the output head are rotated, and
        everything else trains as usual.

        Args:
            recipe: "ortho" folds after every step and keeps the blocks that it drew, for `RotationMuon`; initial
                weights have a size by the kind of layer. "paper" folds every 400 steps into new random blocks, for
                AdamW, from rows of norm 1 (POET, arXiv 2506.08001).
            overrides: any settings of `POETConfig`. With another `merge_interval` than its own, the recipe says
                nothing of `reinit_interval` and of sizes either; with a `base_init`, nothing of sizes.

        Raises:
            ValueError: an unknown recipe, or settings that contradict each other.
        """
        check_choice("recipe", recipe, tuple(_INTERVALS))
        settings = {"target_modules": "all-linear", "block_size": 256, "base_init": "normalized", "train_rest": True}
        own = _INTERVALS[recipe]
        keeps_intervals = overrides.get("merge_interval", own["merge_interval"]) == own["merge_interval"]
        intervals = own if keeps_intervals else {}
        sizes = _INITIAL_SIZES[recipe] if keeps_intervals and "base_init" not in overrides else {}
        return cls(**{**settings, **intervals, **sizes, **overrides})

    @property
    def changes_base_weights(self) -> bool:
        """Whether the targeted weights differ from the base model's, so that a checkpoint has to hold them."""
        return self.merge_interval > 0 or self.base_init is not None

    @property
    def map(self) -> OrthogonalMap:
        """The map from skew-symmetric parameters to rotations."""
        if self.orthogonal_map == "cayley":
            return Cayley()
        return CayleyNeumann(self.num_neumann_terms, self.adaptive_terms)

    @property
    def steps_between_reinits(self) -> int:
        """Optimizer steps between reinitialisations; 0 = never."""
        return self.merge_interval if self.reinit_interval is None else self.reinit_interval

    @property
    def folds_every_step(self) -> bool:
        """Whether rotations are the identity at every forward, since each optimizer step is folded right away."""
        return self.merge_interval == 1

    def folds_at(self, step: int) -> bool:
        """Whether the rotations are folded after optimizer step `step`."""
        return self.merge_interval > 0 and step % self.merge_interval == 0

    def reinitializes_at(self, step: int) -> bool:
        """Whether the fold after optimizer step `step` also reinitialises."""
        return self.steps_between_reinits > 0 and step % self.steps_between_reinits == 0

    def block_size_of(self, module_name: str) -> int | float:
        """The block size of a layer, by `block_size_pattern` if a key of it matches the layer's name."""
        key = get_pattern_key(self.block_size_pattern.keys(), module_name)
        return self.block_size_pattern.get(key, self.block_size)

    def base_init_scale_of(self, module_name: str) -> float:
        """The factor of a layer's drawn weights: `base_init_scale` times what `base_init_scale_pattern` has for it."""
        return scale_of(module_name, self.base_init_scale, self.base_init_scale_pattern)

    @property
    def is_from_file(self) -> bool:
        """Whether `from_pretrained` read this configuration from what `save_pretrained` wrote, so that an adapter's
        weights come with it. A configuration that was made from another one, by `dataclasses.replace` or from
        `to_dict`, is a new one."""
        return self._is_from_file

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        values = {**json.loads(path.read_text("utf-8")), "file_format": _FILE_FORMAT}
        path.write_text(json.dumps(values, indent=2, sort_keys=True), "utf-8")

    def __post_init__(self, file_format: int | None) -> None:
        super().__post_init__()
        check_owns_name()
        _check_file_format(file_format)
        self._is_from_file = file_format is not None
        self.peft_type = ensure_peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.target_parameters, str):
            raise TypeError(f"target_parameters={self.target_parameters!r} must be a list of names, or None.")
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

        check_choice("variant", self.variant, VARIANTS)
        check_choice("orthogonal_map", self.orthogonal_map, _MAPS)
        check_choice("bias", self.bias, _BIASES)
        if self.base_init is not None:
            check_choice("base_init", self.base_init, SCHEMES)
        self.base_init_scale = positive("base_init_scale", self.base_init_scale)
        check_is_dict("base_init_scale_pattern", self.base_init_scale_pattern, "factor")
        self.base_init_scale_pattern = {
            pattern: positive(f"base_init_scale_pattern[{pattern!r}]", factor)
            for pattern, factor in self.base_init_scale_pattern.items()
        }
        for name, default in (("base_init_scale", 1.0), ("base_init_scale_pattern", {})):
            if self.base_init is None and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)} scales the weights that base_init draws, and base_init=None "
                    "draws none; pass both, or neither."
                )
        self.block_size = size_of_blocks("block_size", self.block_size, self.variant)
        check_is_dict("block_size_pattern", self.block_size_pattern, "block size")
        self.block_size_pattern = {
            pattern: size_of_blocks(f"block_size_pattern[{pattern!r}]", block_size, self.variant)
            for pattern, block_size in self.block_size_pattern.items()
        }
        self.num_neumann_terms = integer("num_neumann_terms", self.num_neumann_terms, minimum=1)
        self.merge_interval = integer("merge_interval", self.merge_interval, minimum=0)
        self.max_drift = positive("max_drift", self.max_drift)
        self.seed = integer("seed", self.seed, minimum=0, maximum=2**63 - 1)
        self.layers_to_transform = layer_indexes(self.layers_to_transform)
        self._check_reinit_interval()
        for name, annotation in POETConfig.__annotations__.items():
            if annotation == "bool":
                setattr(self, name, boolean(name, getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} is given without layers_to_transform; pass both, or neither."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} selects among names, and target_modules="
                f"{self.target_modules!r} is none. Name the modules in a list, or write the layers into a regular "
                "expression."
            )
        if self.train_rest and self.modules_to_save:
            raise ValueError(
                f"train_rest=True already trains and saves modules_to_save={self.modules_to_save}; leave it out."
            )
        for name in ("keep_initial_weights", "allow_requantize"):
            if getattr(self, name) and self.merge_interval == 0:
                raise ValueError(
                    f"{name}=True has no use with merge_interval=0, which never changes the weights; leave it out."
                )
        if self.train_rest and self.keep_initial_weights:
            raise ValueError(
                "keep_initial_weights=True cannot bring back the original model with train_rest=True, which trains "
                "parameters outside the targeted layers. Use a separate copy of the model as reference."
            )

    def _check_reinit_interval(self) -> None:
        if self.reinit_interval is None:
            return
        self.reinit_interval = integer("reinit_interval", self.reinit_interval, minimum=0)
        if self.merge_interval == 0 or self.reinit_interval % self.merge_interval:
            raise ValueError(
                f"reinit_interval={self.reinit_interval} must be a multiple of merge_interval={self.merge_interval}, "
                "since permutations can only be drawn anew right after a fold. Pass None to do both together."
            )


def _check_file_format(file_format: Any) -> None:
    if file_format is None:
        return
    if isinstance(file_format, bool) or not isinstance(file_format, int) or file_format < 1:
        raise ValueError(f"file_format={file_format!r} is none that save_pretrained writes; leave it out.")
    if file_format > _FILE_FORMAT:
        raise ValueError(
            f"file_format={file_format} is of a newer poet_peft, this one reads up to {_FILE_FORMAT}; install a newer "
            "poet_peft."
        )
