"""Proxies: the values of a graph while it is traced, which answer what they were in the observed call.

In: the operators and questions of a forward. Out: nodes; or an answer, with a node that asks again at run time (see
`answers`). What can wait until the forward runs becomes a node and is never frozen.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, fx

from ..errors import TraceError
from .answers import holds_tensors, spelled
from .lent import opcode


class Answering(Protocol):
    """What proxies need of a tracer."""

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        """Make a node."""

    def observed(self, node: fx.Node) -> Any:
        """What a node was in the observed call, or None."""

    def frozen(self, node: fx.Node, function: Callable[[Any], Any] | None = None) -> Any:
        """What a node was, or a function of it: from here on the graph takes it for granted."""


class Asked:
    """What the proxies of a graph answer."""

    tracer: Any
    node: fx.Node

    def __getattr__(self, name: str) -> Any:
        return Attribute(self, name)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return bool(self.tracer.frozen(self.node, bool))

    def __len__(self) -> int:
        return int(self.tracer.frozen(self.node, len))

    def __int__(self) -> int:
        return int(self.tracer.frozen(self.node, int))

    def __float__(self) -> float:
        return float(self.tracer.frozen(self.node, float))

    def __index__(self) -> int:
        # torch asks every argument of its functions for its index first; those functions take proxies as they are.
        if opcode(sys._getframe(1))[0].startswith(("CALL", "PRECALL")):
            raise TraceError(f"its forward goes by {spelled(self.node)}, which a graph of it would keep for ever")
        return int(self.tracer.frozen(self.node))

    def __hash__(self) -> int:
        value = self.tracer.observed(self.node)
        if value is None or holds_tensors(value):
            return object.__hash__(self)
        return hash(self.tracer.frozen(self.node))

    def __iter__(self) -> Iterator[Any]:
        name, count = opcode(sys._getframe(1))
        if name != "UNPACK_SEQUENCE":
            count = len(self)
        # By their place in a sequence, or a tensor along its first axis.
        return (self[i] for i in range(count))  # type: ignore[index]


def _operation(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *args), {})

    return method


_OPERATIONS = {
    "__ceil__": math.ceil,
    "__floor__": math.floor,
    "__trunc__": math.trunc,
    "__round__": round,
    "__divmod__": divmod,
    # In place where the source says so.
    **{f"__{name}__": getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "ipow")},
}
for _name, _function in _OPERATIONS.items():
    setattr(Asked, _name, _operation(_function))


class Proxy(Asked, fx.Proxy):
    """A value of a graph."""

    __hash__ = Asked.__hash__


class Attribute(Asked, fx.proxy.Attribute):
    """What a forward reads of a value, `x.shape` for one; a node if it is more than the name of a method."""

    __hash__ = Asked.__hash__


def is_tensor(tracer: Answering, value: Any) -> bool:
    """Whether a proxy stands for a tensor."""
    return isinstance(value, fx.Proxy) and isinstance(tracer.observed(value.node), Tensor)
