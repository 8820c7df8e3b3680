"""Layers whose weight another module reads instead of calling them, so that an adapter around them has no effect.

Examples are the `dt_proj` of a state-space model, which is multiplied by hand, and the `out_proj` of an
`nn.MultiheadAttention` that is not rotated itself. They are found in the source of the modules that hold them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType

from torch import nn


# What is asked of a weight without computing with it, as in `self.wo.weight.dtype`.
_METADATA = {"dtype", "device", "shape", "ndim", "dim", "size", "numel", "element_size", "is_meta", "is_cuda"}
_METADATA |= {"requires_grad", "requires_grad_", "quant_state", "SCB"}
_INSPECTIONS = {"isinstance", "hasattr", "type", "id"}
_SET_UP = re.compile(r"(^|_)(init|initialize|reset|tie|resize|set)(_|$)")


def _computes_in_slices(module: nn.Module) -> bool:
    return module.pretraining_tp > 1 and module.slow_but_exact


def _never(module: nn.Module) -> bool:
    return False


# Weights that are read under a condition only, by class and path in it. Others that are read under a condition count
# as read: whether fused kernels are installed must not decide which layers an adapter has.
_CONDITIONS: dict[tuple[str, str], Callable[[nn.Module], bool]] = {
    ("BloomAttention", "dense"): _computes_in_slices,
    ("BloomMLP", "dense_4h_to_h"): _computes_in_slices,
    ("DisentangledSelfAttention", "in_proj"): _never,  # DeBERTa; in a branch that no caller takes
    ("TransformerEncoderLayer", "linear1"): _never,  # in the fast path only, and the rotated weight: see `ReadLinear`
    ("TransformerEncoderLayer", "linear2"): _never,
}


def reader_of(model: nn.Module, name: str, parameter_name: str = "weight") -> nn.Module | None:
    """The module that reads the weight of the layer `name` itself, or None if the layer is called as it should be.

    A module whose source is not to be had counts as one that calls its layers.

    Args:
        parameter_name: what the weight is called in the layer.
    """
    path = name.split(".")
    for depth in reversed(range(len(path))):
        module = model.get_submodule(".".join(path[:depth]))
        relative = ".".join("*" if part.isdigit() else part for part in path[depth:])
        if relative in _weights_read_by(type(module), parameter_name):
            condition = _CONDITIONS.get((type(module).__name__, relative))
            if condition is None or condition(module):
                return module
    return None


@functools.cache
def _weights_read_by(cls: type[nn.Module], parameter_name: str) -> frozenset[str]:
    """Paths of the submodules whose parameter the methods of a class compute with, `*` for an index."""
    read: set[str] = set()
    for function in _methods(cls):
        if _names(function.__code__, parameter_name):
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, TypeError, SyntaxError):
                continue
            read.update(_paths_read(tree, parameter_name))
    return frozenset(read)


def _methods(cls: type) -> Iterator[FunctionType]:
    """The methods that compute, the overridden ones only where `super()` may call them."""
    hidden = set()
    for base in cls.__mro__:
        if base is nn.Module:
            return
        for name, member in vars(base).items():
            function = inspect.unwrap(member) if callable(member) else None
            if not isinstance(function, FunctionType) or name in hidden or _SET_UP.search(name.strip("_")):
                continue
            if "super" not in function.__code__.co_names:
                hidden.add(name)
            yield function


def _names(code: CodeType, name: str) -> bool:
    return name in code.co_names or any(isinstance(c, CodeType) and _names(c, name) for c in code.co_consts)


def _paths_read(tree: ast.AST, parameter_name: str) -> Iterator[str]:
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr == parameter_name and isinstance(node.ctx, ast.Load)):
            continue
        parent = parents[node]
        inspected = (
            (isinstance(parent, ast.Attribute) and parent.attr in _METADATA)
            or (isinstance(parent, ast.Call) and getattr(parent.func, "id", "") in _INSPECTIONS)
            or (isinstance(parent, ast.Compare) and isinstance(parent.ops[0], ast.Is | ast.IsNot))
        )
        path = _path_from_self(node.value)
        if path and not inspected:
            yield path


def _path_from_self(node: ast.AST) -> str | None:
    """`layers.*.proj` of `self.layers[i].proj`; None of anything else."""
    path: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        path.insert(0, node.attr if isinstance(node, ast.Attribute) else "*")
        node = node.value
    return ".".join(path) if isinstance(node, ast.Name) and node.id == "self" else None
