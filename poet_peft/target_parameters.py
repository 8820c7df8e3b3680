"""Parameters that are rotated by name: those of `target_parameters`, and the experts that "all-linear" adds to it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import POETConfig
from .experts import ParamWrapper, StackedWeight
from .layer import POETLayer
from .maths.blocks import partition_side
from .obstacles import Obstacle, without_indexes
from .targets import is_all_linear, parameter_names, warn_of_unmatched_names
from .uncalled import reader_of
from .weights.plain import COMPUTES
from .weights.sharded import WITHOUT_TENSOR_PARALLELISM, gathered_in_forward, split_in_forward


_OUT_OF_STACKS = "it is no stack of experts and in no linear layer"


class _Named(NamedTuple):
    """A parameter of the base model: its name there, the module that holds it, and its name in that."""

    name: str
    module: nn.Module
    parameter_name: str

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.parameter_name)

    @property
    def module_name(self) -> str:
        return self.name.rpartition(".")[0]


def _named_parameters(model: nn.Module) -> Iterator[_Named]:
    for module_name, module in model.named_modules():
        for parameter_name, _ in module.named_parameters(recurse=False):
            yield _Named(f"{module_name}.{parameter_name}".replace(".base_layer", ""), module, parameter_name)


def check_target_parameters(model: nn.Module, config: POETConfig) -> list[str]:
    """Check all parameters that `target_parameters` names before the model is touched. Returns their names.

    `target_parameters` is put into the order of the model's parameters, which is the one that wrappers are nested in:
    a file says by it which of them rotates what.

    Raises:
        ValueError: a parameter cannot be rotated; names it, what is in the way, and the way out.
    """
    targets = tuple(config.target_parameters or ())
    if not targets:
        return []
    obstacles = _Obstacles(model, config)
    names: list[str] = []
    found: dict[str, None] = {}
    for named in _named_parameters(model):
        matched = [target for target in targets if _matches(named.name, target)]
        names += [named.name] if matched else []
        found.update(dict.fromkeys(matched))
        if matched and (obstacle := obstacles.of(named)):
            raise ValueError(obstacle.refusal(repr(named.name), "target_parameters"))
    missing = sorted(set(targets) - found.keys())
    if missing:
        raise ValueError(
            f"target_parameters has names that match no parameter: {missing}. Name them as "
            "model.named_parameters() does, from the end: 'experts.gate_up_proj'."
        )
    _check_like_other_adapters(model, names)
    config.target_parameters = list(found)
    return names


def _check_like_other_adapters(model: nn.Module, names: Collection[str]) -> None:
    """Refuse other parameters of a module than its other adapters rotate: they could not be loaded without these."""
    theirs: dict[tuple[str, str], set[str]] = {}
    for module in model.modules():
        if isinstance(module, ParamWrapper) and module.setting == "target_parameters":
            for adapter in module.poet_config:
                owner = module.module_name.rpartition(".")[0]
                theirs.setdefault((adapter, owner), set()).add(module.module_name)
    for (adapter, owner), others in theirs.items():
        mine = {name for name in names if name.rpartition(".")[0] == owner}
        if mine and mine != others:
            raise ValueError(
                f"the adapter {adapter!r} rotates {', '.join(sorted(others))}, and target_parameters names "
                f"{', '.join(sorted(mine))}: the adapters of a model must rotate the same parameters of a module, "
                "since a file could not be loaded otherwise. Name the same ones."
            )


def reach_experts(model: nn.Module, config: POETConfig, requested: set[str] | str | None) -> None:
    """Let "all-linear" reach the experts as well: put their stacked weights into `config.target_parameters`.

    Only where `target_parameters` is None. Warnings name the stacks that cannot be rotated, and the routers and other
    matrices beside them, which are rotated only by name; not what `exclude_modules` or `modules_to_save` has.

    Args:
        requested: `target_modules` as the user wrote it.
    """
    if not is_all_linear(requested) or config.target_parameters is not None:
        return
    obstacles = _Obstacles(model, config)
    reached: list[str] = []
    left_out: dict[Obstacle, list[str]] = {}
    for named in _weights_of_mixtures(model):
        if isinstance(check_target_module_exists(config, named.module_name), _ExcludedModule):
            continue
        obstacle = obstacles.of(named)
        if obstacle is None and named.parameter.dim() != 3:
            obstacle = Obstacle(_OUT_OF_STACKS, "To rotate it too, name it in target_parameters")
        if obstacle is None:
            reached.append(named.name)
        else:
            left_out.setdefault(obstacle, []).append(named.name)
    if reached:
        config.target_parameters = _short_names(reached, model)
    trains = " It trains in full." if config.train_rest else ""
    for obstacle, names in left_out.items():
        warnings.warn(f"{obstacle.warning(requested, names)}{trains}")


def warn_of_unreached_weights(
    model: nn.Module, target_modules: set[str] | str | None, target_parameters: list[str] | None
) -> None:
    """Warn of what both settings, as the user wrote them, leave out without saying so: names that match no module,
    and experts and routers where PEFT chooses the layers, or where "all-linear" comes with `target_parameters`."""
    experts = without_indexes(
        named.name
        for named in _weights_of_mixtures(model)
        if not any(_matches(named.name, target) for target in target_parameters or ())
    )
    warn_of_unmatched_names(model, target_modules, experts)
    if experts and (target_modules is None or (is_all_linear(target_modules) and target_parameters)):
        warnings.warn(
            f"target_modules={target_modules!r} does not reach expert weights that are not in linear layers. To "
            f"rotate them, name them in target_parameters: {', '.join(experts)}."
        )


def _weights_of_mixtures(model: nn.Module) -> list[_Named]:
    """The matrices of experts and routers outside linear layers: stacks of experts, and what lies beside them."""
    matrices = [
        named
        for named in _named_parameters(model)
        if named.parameter.dim() > 1
        and not named.parameter_name.endswith("bias")
        and not isinstance(named.module, nn.Linear | Conv1D)
    ]
    blocks = tuple(named.module_name.rpartition(".")[0] + "." for named in matrices if _is_of_experts(named))
    return [named for named in matrices if named.name.startswith(blocks)]


def _is_of_experts(named: _Named) -> bool:
    return "expert" in f"{named.module_name.rpartition('.')[2]}.{type(named.module).__name__}".lower()


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _short_names(names: list[str], model: nn.Module) -> list[str]:
    """The shortest ends of these names, of two parts at least, that stand for these parameters and no others."""
    wanted = set(names)
    others = [named.name for named in _named_parameters(model) if named.name not in wanted]
    short = {}
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[-length:]) for length in range(2, len(parts) + 1))
        short[next(end for end in ends if not any(_matches(other, end) for other in others))] = None
    return list(short)


class _Obstacles:
    """What is in the way of rotating parameters of a model by name."""

    def __init__(self, model: nn.Module, config: POETConfig) -> None:
        self.model, self.config = model, config
        self._owners = parameter_names(model)
        self._gathered = gathered_in_forward(model)
        foreign = (m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, POETLayer))
        self._foreign = {id(module): type(layer).__name__ for layer in foreign for module in layer.modules()}

    def of(self, named: _Named) -> Obstacle | None:
        """The first obstacle; None where the parameter can be rotated."""
        module, parameter, config = named.module, named.parameter, self.config
        is_attention = isinstance(module, nn.MultiheadAttention) and named.parameter_name == "in_proj_weight"
        if is_attention or isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd):
            kind = type(module).__name__
            return Obstacle(
                f"it is the weight of a layer ({kind}), which is rotated by the name of the layer",
                "Name the layer in target_modules",
            )
        if id(module) in self._foreign:
            return Obstacle(
                f"its module carries the adapter of another method ({self._foreign[id(module)]})",
                "Merge that one first",
            )
        if reader := reader_of(self.model, named.module_name, named.parameter_name):
            kind = type(reader).__name__
            return Obstacle(f"{kind} computes with it and not its own module, so that its rotations would not train")
        if parameter.dim() not in (2, 3) or min(parameter.shape[-2:]) < 2:
            return Obstacle(
                f"its shape is {tuple(parameter.shape)}, and only matrices (out, in) and stacks of them "
                "(num_experts, out, in) are supported"
            )
        if split := split_in_forward(parameter, self._gathered):
            return Obstacle(f"it is {split}", WITHOUT_TENSOR_PARALLELISM)
        if parameter.dtype not in COMPUTES:
            return Obstacle(
                f"its dtype is {parameter.dtype}, and stacked weights are supported in fp32, bf16 and fp16 only",
                "Load the model dequantized",
            )
        if config.memory_efficient:
            return Obstacle(
                "memory_efficient=True has no effect on it, since the forward of its module keeps the weight that it "
                "is called with",
                "Pass memory_efficient=False and use gradient checkpointing of the model",
            )
        for side, dim, groups in StackedWeight(module, named.parameter_name).sides():
            try:
                partition_side(config.variant, config.block_size_of(named.name), dim, groups)
            except ValueError as error:
                side = {"R": "output", "P": "input"}[side]
                return Obstacle(f"{error} ({side} side)", "Pass another block_size or a block_size_pattern for it")
        shared = [name.replace(".base_layer", "") for name in self._owners[id(parameter)]]
        if len(shared) > 1:
            return Obstacle(
                f"it is shared by {', '.join(map(repr, shared))}, and a rotation of one would change the other"
            )
        return None
