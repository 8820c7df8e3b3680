"""Reading and writing weights that `fully_shard` (FSDP2) has spread over processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


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
    if torch.distributed.is_available():
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


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights, which a forward without backward leaves behind: writing to them would be lost."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reshard_all() -> None:
    """`reshard` for all models of the process that `fully_shard` was applied to."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for module in list(_module_state_mapping):
        module = module() if callable(module) and not isinstance(module, nn.Module) else module
        if isinstance(module, FSDPModule):
            module.reshard()
