"""Observed: what the nodes of a graph were in the call that it is a trace of.

In: a block, the nodes of its graph in order, and the observed calls of its children. Out: the meta value of every node,
and the calls that belong to nodes. Nothing is computed: children answer with what they returned in the call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import TraceError
from .answers import ASKING
from .blame import handed, is_ours
from .draws import Undrawn
from .events import Call, is_like_first
from .modes import modes_off
from .shapes import like

# Where a module keeps what is registered with it.
_GROUPS = ("_parameters", "_buffers", "_modules")
# torch works these out in Python, and slowly.
_SUMS = frozenset({operator.add, operator.iadd, torch.add})


class Observed:
    """The meta values of a graph's nodes, found in the graph's order.

    Attributes:
        values: The values by the nodes' names; None where a value is not known.
        calls: The calls of the children, by node: the n-th node of a child is its n-th call.

    Args:
        view: The block.
        calls_of: The calls of the child at a path inside the block, those of this one call of the block.
    """

    def __init__(self, view: nn.Module, calls_of: Callable[[str], Sequence[Call]]) -> None:
        self.view = view
        self.values: dict[str, Any] = {}
        self.calls: dict[str, Call] = {}
        self._calls_of = calls_of
        self._left: dict[str, list[Call]] = {}
        self._undrawn = Undrawn()

    def give(self, name: str, value: Any) -> None:
        """Say what a placeholder was."""
        self.values[name] = value

    @modes_off
    def follow(self, nodes: Sequence[fx.Node]) -> None:
        """Find the values of these nodes; those of the nodes before them are known."""
        # What runs here is none of the forward's: no mode that is at work for that sees it.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for node in nodes:
                if node.name in self.values:
                    continue
                try:
                    self.values[node.name] = _on_meta(self._value(node))
                except Exception as error:  # a value that is not known makes those computed from it unknown, no more
                    # Where a trace is under way, draws are refused.
                    if isinstance(error, MemoryError) or (is_ours(error) and not isinstance(error, TraceError)):
                        raise
                    self.values[node.name] = None

    def _value(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            return self._call(node)
        if node.target in ASKING:
            return None
        if node.op == "get_attr":
            value = _held(self.view, str(node.target))
            return like(value) if isinstance(value, Tensor) else value
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n.name])
        if node.target in _SUMS and not kwargs and is_like_first(torch.add, args):
            first: Any = args[0]
            return first if node.target is operator.iadd else like(first)
        if node.op == "call_function":
            # On the meta device nothing is drawn; what makes tensors of numbers alone may do so.
            may_draw = not any(isinstance(arg, Tensor) and arg.is_meta for arg in args)
            if may_draw:
                return handed(self._undrawn.run, node.target, args, kwargs)  # type: ignore[arg-type]
            return handed(node.target, *args, **kwargs)  # type: ignore[arg-type]
        if _is_a_float(node, args):
            return 1.0
        if node.op == "call_method":
            return handed(operator.methodcaller(str(node.target), *args[1:], **kwargs), args[0])
        return args[0]

    def _call(self, node: fx.Node) -> Any:
        path = str(node.target)
        left = self._left.setdefault(path, list(self._calls_of(path)))
        if not left:
            return None
        self.calls[node.name] = left.pop(0)
        return self.calls[node.name].output


def _is_a_float(node: fx.Node, args: tuple[Any, ...]) -> bool:
    """Whether a value is the number in a tensor: on the meta device any will do, for the maps that it scales."""
    of_tensor = bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].numel() == 1
    return of_tensor and (node.target == "item" or node.target is float)


def _on_meta(value: Any) -> Any:
    """A value on the meta device, also where a forward makes tensors of its own on another one."""
    if isinstance(value, Tensor) and not value.is_meta:
        return like(value)
    return value


def _held(view: nn.Module, path: str) -> Any:
    """What is at a path in a block, without asking its modules, whose classes are watched while they are traced."""
    value: Any = view
    for name in path.split("."):
        state = value.__dict__
        spaces = (*(state[group] for group in _GROUPS if group in state), state)
        value = next((space[name] for space in spaces if name in space), None)
        if value is None:
            return None
    return value
