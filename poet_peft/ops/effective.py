"""A rotated linear layer through its effective weight `R W P`, with a backward of its own.

The forward and the gradient by the input are those of a frozen linear layer, 4 N m n flops. No activation is rotated.
The gradients by the rotations come from one of the two rules of `block_gradients`.

At the identity, `R = P = I`, where rotations are at every forward if they are folded after every step, the effective
weight is the weight itself: nothing is built, rotated, or kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..maths.blocks import BlockPartition
from ..maths.orthogonal import OrthogonalMap
from .block_gradients import tangent_P, tangent_R, weight_centric
from .sides import KeptBlocks, Side, SideBlocks, effective_weight


@dataclass(frozen=True)
class _Plan:
    """How one call is computed, beside its tensors. A map is None where nothing rotates."""

    partition_R: BlockPartition | None
    map_R: OrthogonalMap | None
    kept_R: KeptBlocks | None
    partition_P: BlockPartition | None
    map_P: OrthogonalMap | None
    kept_P: KeptBlocks | None
    tangent: bool
    memory_efficient: bool
    identity: bool


def _planned(
    R: Side | None, P: Side | None, *, tangent: bool, memory_efficient: bool, identity: bool
) -> tuple[tuple[Tensor | None, ...], _Plan]:
    """The tensors of both sides, `upper_R, index_R, upper_P, index_P`, and the plan that has the rest of them."""
    index_R, upper_R, *settings_R = R or (None,) * 5
    index_P, upper_P, *settings_P = P or (None,) * 5
    plan = _Plan(*settings_R, *settings_P, tangent, memory_efficient, identity)
    return (upper_R, index_R, upper_P, index_P), plan


def _blocks(plan: _Plan, tensors: Sequence[Tensor | None]) -> tuple[SideBlocks | None, SideBlocks | None]:
    """Both sides' blocks, from `(upper_R, index_R, upper_P, index_P)`."""
    upper_R, index_R, upper_P, index_P = tensors
    R = P = None
    if plan.map_R is not None:
        R = Side(index_R, upper_R, plan.partition_R, plan.map_R, plan.kept_R)
    if plan.map_P is not None:
        P = Side(index_P, upper_P, plan.partition_P, plan.map_P, plan.kept_P)
    if plan.identity:
        return R and R.blocks_at_identity(), P and P.blocks_at_identity()
    return R and R.blocks(plan.tangent), P and P.blocks(plan.tangent)


def effective_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    R: Side | None,
    P: Side | None,
    *,
    tangent: bool,
    memory_efficient: bool = False,
    identity: bool = False,
) -> Tensor:
    """`reference.poet_linear` for one adapter: at most one rotation a side, and at least one in all.

    Not differentiable with respect to the weight, and only once with respect to the rest.

    Args:
        tangent: use the tangent rule if the blocks are near enough to orthogonal, else the weight-centric one.
        memory_efficient: keep no second copy of the weight between forward and backward, but build it twice.
        identity: both sides are known to be the identity.
    """
    tensors, plan = _planned(R, P, tangent=tangent, memory_efficient=memory_efficient, identity=identity)
    return _EffectiveLinear.apply(x, weight, bias, *tensors, plan)


class _EffectiveLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        upper_R: Tensor | None,
        index_R: Tensor | None,
        upper_P: Tensor | None,
        index_P: Tensor | None,
        plan: _Plan,
    ) -> Tensor:
        tensors = (upper_R, index_R, upper_P, index_P)
        if plan.identity:
            blocks, effective, is_near = None, weight, True
            y = output = F.linear(x, weight, bias)
        else:
            R, P = blocks = _blocks(plan, tensors)
            effective = effective_weight(weight, R, P)
            is_near = all(side is None or side.inverses is not None for side in blocks)
            y = F.linear(x, effective)
            output = y if bias is None else y + bias.to(y.dtype)
        ctx.tangent = plan.tangent and is_near and (ctx.needs_input_grad[3] or ctx.needs_input_grad[5])
        ctx.plan = plan
        _remember_versions(ctx, weight, upper_R, upper_P)
        ctx.blocks = None if plan.memory_efficient else blocks
        if ctx.tangent:
            ctx.output = _Unwritten(y)
        rebuilt = plan.memory_efficient or plan.identity
        ctx.save_for_backward(x, weight, *tensors, None if rebuilt else effective)
        ctx.bias = bias.detach() if plan.identity and ctx.tangent and bias is not None else None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(device_type=grad_y.device.type, enabled=False):
            return _backward(ctx, grad_y)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *tensors, effective = _saved_tensors(ctx)
    R, P = _blocks(ctx.plan, tensors) if ctx.blocks is None else ctx.blocks
    if effective is None:
        effective = weight if ctx.plan.identity else effective_weight(weight, R, P)
    y = None
    if ctx.tangent:
        y = ctx.output and ctx.output.take()
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.output = None  # its memory is needed by the layers below
        if y is not None and ctx.bias is not None:
            y = y - ctx.bias

    needs_x, _, needs_bias, needs_R, _, needs_P = ctx.needs_input_grad[:6]
    grad_x = grad_bias = grad_R = grad_P = None
    if needs_x or (y is not None and needs_P):
        grad_x = grad_y @ effective.to(grad_y.dtype)
    tokens_y, tokens_x = _flat(grad_y), _flat(x).to(grad_y.dtype)
    if needs_bias:
        grad_bias = tokens_y.sum(0)
    if y is not None:
        blocks_R = tangent_R(tokens_y, _flat(y), R) if needs_R else None
        blocks_P = tangent_P(_flat(grad_x), tokens_x, P) if needs_P else None
    elif needs_R or needs_P:
        blocks_R, blocks_P = weight_centric(tokens_y.mT @ tokens_x, weight, R, P)
    if needs_R:
        grad_R = R.vjp(ctx.plan.map_R, blocks_R).to(tensors[0].dtype)
    if needs_P:
        grad_P = P.vjp(ctx.plan.map_P, blocks_P).to(tensors[2].dtype)
    return grad_x.to(x.dtype) if needs_x else None, None, grad_bias, grad_R, None, grad_P, None, None


def rotated_weight(weight: Tensor, R: Side | None, P: Side | None, identity: bool = False) -> Tensor:
    """`R W P` of a weight (out, in), in its dtype, with the weight-centric rule as its backward.

    Not differentiable with respect to the weight, and only once with respect to the rotations.

    Args:
        weight: (out, in), or at the identity also a stack (num_experts, out, in).
        identity: both sides are known to be the identity. The result is then a view of the weight.
    """
    tensors, plan = _planned(R, P, tangent=False, memory_efficient=False, identity=identity)
    return _RotatedWeight.apply(weight, *tensors, plan)


class _RotatedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        upper_R: Tensor | None,
        index_R: Tensor | None,
        upper_P: Tensor | None,
        index_P: Tensor | None,
        plan: _Plan,
    ) -> Tensor:
        tensors = (upper_R, index_R, upper_P, index_P)
        ctx.plan = plan
        _remember_versions(ctx, weight, upper_R, upper_P)
        ctx.save_for_backward(weight, *tensors)
        return weight.view_as(weight) if plan.identity else effective_weight(weight, *_blocks(plan, tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = _saved_tensors(ctx)
        _, needs_R, _, needs_P = ctx.needs_input_grad[:4]
        with torch.autocast(device_type=grad.device.type, enabled=False):
            R, P = _blocks(ctx.plan, tensors)
            blocks_R, blocks_P = weight_centric(grad, weight, R, P)
            grad_R = R.vjp(ctx.plan.map_R, blocks_R).to(tensors[0].dtype) if needs_R else None
            grad_P = P.vjp(ctx.plan.map_P, blocks_P).to(tensors[2].dtype) if needs_P else None
        return None, grad_R, None, grad_P, None, None


def _remember_versions(ctx: Any, weight: Tensor, upper_R: Tensor | None, upper_P: Tensor | None) -> None:
    if torch.compiler.is_compiling():
        return
    ctx.parameters = {"the base weight": weight, "the rotation R": upper_R, "the rotation P": upper_P}
    known = {name: x for name, x in ctx.parameters.items() if x is not None and not x.is_inference()}
    ctx.versions = {name: x._version for name, x in known.items()}


def _saved_tensors(ctx: Any) -> tuple[Tensor | None, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        changed = [name for name, version in ctx.versions.items() if ctx.parameters[name]._version != version]
        what = " and ".join(changed) or "the input of a rotated layer"
        raise RuntimeError(
            f"{what} changed in place between forward and backward, as by an optimizer step, a fold, a load or an "
            "edit. Call backward() before that, or run the forward again."
        ) from error


class _Unwritten:
    """A tensor for the backward, or nothing if it is written to in the meantime.

    Held by an autograd node of its own, so that checkpointing and offloading treat it like any saved tensor, and so
    that reading it fails alone, as for the output of a layer whose block adds to it in place (Falcon's does).
    """

    def __init__(self, x: Tensor) -> None:
        x = x.detach()  # not the output itself, which would refer to this in a cycle
        self._version = x._version
        with torch.enable_grad():
            self._node = _Hold.apply(torch.empty(0, requires_grad=True), x).grad_fn

    def take(self) -> Tensor | None:
        try:
            (x,) = self._node.saved_tensors
        except RuntimeError:
            return None
        # Checkpointing gives the tensor that the repeated forward made, and wrote to, without a check of its own.
        return x if x._version == self._version else None


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
