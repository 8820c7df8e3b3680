"""Reading and writing weights that `fully_shard` (FSDP2) has spread over processes."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


WITHOUT_TENSOR_PARALLELISM = (
    "Load the model without tp_plan, and shard it with FSDP2 (DistributedConfig(fsdp_size=...), or fully_shard)"
)


def full(x: Tensor) -> Tensor:
    """The whole tensor of one that may be sharded. Every process must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into one that may be sharded, in place."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        # Writing to what full_tensor() returned would be lost: only the local shard is the parameter.
        target.to_local().copy_(spread_like(target, value).to_local())
    else:
        target.copy_(value)


def spread_like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor spread over the processes as `target` is, in its dtype. Every process must call it."""
    value = value.to(target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements) if isinstance(target, DTensor) else value


def check_sharding(model: nn.Module) -> None:
    """Refuse models whose weights are not where a fold would write.

    Raises:
        ValueError: FSDP1, or DeepSpeed ZeRO-3; names the way out.
    """
    if dist.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(
                "the model is wrapped in FullyShardedDataParallel (FSDP1), which hides the weights that are folded. "
                "Use fully_shard (FSDP2; fsdp_version: 2 in accelerate)."
            )
    partitioned = [name for name, parameter in model.named_parameters() if hasattr(parameter, "ds_id")]
    if partitioned:
        raise ValueError(
            f"DeepSpeed ZeRO-3 has taken {partitioned[0]!r} apart, so it cannot be folded. Use DDP or FSDP2."
        )


def check_checkpoints_hold_folds() -> None:
    """Refuse accelerate's FSDP2 with FULL_STATE_DICT for adapters that are folded.

    Trainer has accelerate save the adapter alone. With FULL_STATE_DICT, accelerate takes that for everything that has
    a gradient, without asking PEFT (`ignore_frozen_params`), so that the folded weights would be missing.

    Raises:
        ValueError: names the setting that saves them.
    """
    from accelerate.state import AcceleratorState, is_initialized

    plugin = getattr(AcceleratorState(), "fsdp_plugin", None) if is_initialized() else None
    if plugin is None or plugin.fsdp_version != 2 or plugin.state_dict_type.name != "FULL_STATE_DICT":
        return
    raise ValueError(
        "with fsdp_state_dict_type: FULL_STATE_DICT, Trainer's checkpoints lack the weights that folds change "
        "(merge_interval > 0), and a resumed run would go on from others. Set fsdp_state_dict_type: "
        "SHARDED_STATE_DICT; for one last whole file, trainer.accelerator.state.fsdp_plugin.set_state_dict_type("
        "'FULL_STATE_DICT') before trainer.save_model()."
    )


def gathered_in_forward(model: nn.Module) -> set[int]:
    """The ids of the parameters that FSDP2 gathers for every forward."""
    if not dist.is_available():
        return set()
    from torch.distributed.fsdp import FSDPModule

    return {id(p) for module in model.modules() if isinstance(module, FSDPModule) for p in module.parameters()}


def split_in_forward(weight: Tensor | None, gathered: Collection[int]) -> str | None:
    """How a weight is split of which a process never holds the whole, as under tensor parallelism; None if it does.

    A rotation mixes features of the whole weight. FSDP2 gathers it for every forward; tensor parallelism does not.
    """
    if not isinstance(weight, DTensor):
        return None
    split = [placement for placement in weight.placements if not placement.is_replicate()]
    if len(split) <= (id(weight) in gathered):
        return None
    return (
        f"split by tensor parallelism ({weight.placements} over {weight.device_mesh}), and a rotation needs all of it"
    )


def mesh_of(weight: Tensor | None) -> DeviceMesh | None:
    """The processes that a weight is spread over; None if each has all of it."""
    return weight.device_mesh if isinstance(weight, DTensor) else None


def keep_replicas_equal(parameter: nn.Parameter, mesh: DeviceMesh) -> None:
    """Make the copies of a parameter that every process has beside a sharded weight start equal and train alike.

    FSDP2 averages the gradients of what it has sharded. A parameter that was added to a sharded model afterwards is
    not sharded: every process would train a copy of its own on batches of its own. Here the copies take the first
    process's values, and their gradients are averaged after every backward, also of accumulated ones: what is averaged
    already stays as it is. Every process must call it before its first backward; later calls do nothing.
    """
    if not parameter.requires_grad or hasattr(parameter, "_poet_average"):
        return
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]

    def average(parameter: nn.Parameter) -> None:
        for group in groups:
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad.div_(group.size())

    for group in groups:
        dist.broadcast(parameter.data, src=dist.get_global_rank(group, 0), group=group)
    parameter._poet_average = parameter.register_post_accumulate_grad_hook(average)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` for sharded gradients beside others, as `train_rest` has on a sharded base."""
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(mesh_of(parameter.grad), []).append(parameter)
    if not by_mesh:
        return
    norms = [full(get_total_norm([parameter.grad for parameter in group])) for group in by_mesh.values()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for group in by_mesh.values():
        clip_grads_with_norm_(group, max_norm, norm)


def check_whole(name: str, parameter: Tensor, num_entries: int) -> None:
    """Refuse a parameter of which this process holds a part that cannot be put together.

    Raises:
        ValueError: names the module and the way out.
    """
    if not isinstance(parameter, DTensor) and (parameter.numel() != num_entries or hasattr(parameter, "ds_id")):
        raise ValueError(
            f"the rotations of {name!r} are spread over processes by FSDP1 or DeepSpeed ZeRO-3, which hide the "
            "weights that are folded. Use DDP, or fully_shard (FSDP2; fsdp_version: 2 in accelerate)."
        )


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let go of gathered weights, which a forward without backward leaves behind: writing to them would be lost."""
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def sharded_modules() -> list[nn.Module]:
    """The modules of all models of the process that `fully_shard` was applied to."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed._composable_state import _module_state_mapping

    return list(_module_state_mapping)
