"""Answers: what a forward asks of its tensors while it is traced, told from the call that was observed.

In: a question to a proxy, such as whether `x.shape[1] == 64`. Out: what the answer was, and a node of the graph that
asks again when it runs, and refuses to go on with another answer. Only what goes by shapes is answered: values are not
known, and the dtype and the device may be others tomorrow.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import SurgeryError, TraceError
from ..records import durable
from .reads import is_plain

# What asks a tensor, or several in a container, for its shape or for what kind of value it is.
_SHAPES = frozenset({"shape", "ndim", "size", "dim", "ndimension", "numel", "nelement", "__len__"})
_KINDS = (len, torch.is_tensor)


# TorchScript compiles these two as well, each by its own types.


@durable
def must_be(found: bool, was: bool, what: str) -> None:
    """Called by generated forwards for what their graph took for granted.

    Raises:
        SurgeryError: It is not so.
    """
    if bool(found) != was:
        raise SurgeryError(
            f"This block was operated on for calls in which {what} is {was}, and in this one it is {found}: its "
            f"forward was traced from the call that the model itself makes. "
            f"Operate with an example_input that makes the call you need, or leave this block out with where."
        )


@durable
def must_count(found: int, was: int, what: str) -> None:
    """The same for a number that a graph took for granted, such as that of the parts of a map.

    Raises:
        SurgeryError: It is another one.
    """
    if found != was:
        raise SurgeryError(
            f"This block was operated on for calls in which {what} is {was}, and in this one it is {found}: its "
            f"forward was traced from the call that the model itself makes. "
            f"Operate with an example_input that makes the call you need, or leave this block out with where."
        )


# What asks for the things that a graph takes for granted.
ASKING = (must_be, must_count)


def must_bes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a graph that ask for what it takes for granted."""
    return [node for node in graph.nodes if node.target in ASKING]


def holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor or a container of tensors."""
    if isinstance(value, dict):
        return any(map(holds_tensors, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(holds_tensors, value)))


def goes_by_shapes(node: fx.Node, values: dict[str, Any]) -> bool:
    """Whether a value is computed from the shapes of tensors alone."""
    return all(
        asks_for_shape(node) if holds_tensors(values.get(source.name)) else goes_by_shapes(source, values)
        for source in node.all_input_nodes
    )


def asks_for_shape(node: fx.Node) -> bool:
    """Whether a node takes the shape of a tensor alone, or how many there are."""
    if node.op == "call_method":
        return node.target in _SHAPES
    return node.target in _KINDS or (node.target is getattr and node.args[1] in _SHAPES)


def answer(node: fx.Node, values: dict[str, Any]) -> Any:
    """What a node was that is asked for its number, its truth or its length.

    Raises:
        TraceError: That is not known, or goes by more than shapes.
    """
    value = values.get(node.name)
    if value is None or holds_tensors(value) or not is_plain(_plain(value)) or not goes_by_shapes(node, values):
        raise TraceError(f"its forward goes by {spelled(node)}, which a graph of it would keep for ever")
    return value


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, tuple) else value


def spelled(node: Any) -> str:
    """A value of a graph as one would write it.

    Examples:
        >>> spelled(graph_node)
        'x.shape[1] == 64'
    """
    if isinstance(node, (tuple, list)):
        return f"({', '.join(map(spelled, node))})"
    if isinstance(node, slice):
        return ":".join("" if part is None else spelled(part) for part in (node.start, node.stop))
    if not isinstance(node, fx.Node):
        return getattr(node, "__name__", None) or repr(node)
    args = [spelled(arg) for arg in node.args]
    if node.op == "call_function" and node.target is getattr:
        return f"{args[0]}.{node.args[1]}"
    if node.op == "call_function" and node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    sign = _SIGNS.get(getattr(node.target, "__name__", "")) if len(args) == 2 else None
    if sign is not None:
        return f"{args[0]} {sign} {args[1]}"
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:])})"
    if node.op == "call_module":
        return f"self.{node.target}({', '.join(args)})"
    if node.op == "call_function":
        return f"{getattr(node.target, '__name__', node.target)}({', '.join(args)})"
    return str(node.target)


_SIGNS = {
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**"},
}
