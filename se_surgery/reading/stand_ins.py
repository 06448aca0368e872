"""Stand-ins: what a traced forward calls in the place of Python's builtins and of torch's factories.

In: a callable that a forward reads by its name. Out: what to call instead, or None. Given a value of the graph, a
stand-in makes a node or answers what the value was; given anything else, it calls the callable itself.
"""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..errors import TraceError
from .answers import spelled
from .blame import handed
from .proxies import Answering, is_tensor

Handler = Callable[..., Any]


class StandIns:
    """The stand-ins of one trace."""

    def __init__(self, tracer: Answering) -> None:
        self.tracer = tracer

    def __call__(self, function: Any) -> Any:
        """What to call in the place of a function, or None."""
        handler = _HANDLERS.get(id(function))
        if handler is None and isinstance(function, types.BuiltinFunctionType) and function.__module__ == "math":
            handler = _node
        if handler is None:
            return None

        def called(*args: Any, **kwargs: Any) -> Any:
            if not any(map(_has_proxies, (*args, *kwargs.values()))):
                return handed(function, *args, **kwargs)
            return handler(self.tracer, function, *args, **kwargs)

        return called


def _has_proxies(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_proxies, value))
    return isinstance(value, fx.Proxy)


def _number(tracer: Answering, function: Any, *args: Any, **kwargs: Any) -> Any:
    # A list of values is a list.
    is_of_value = any(isinstance(arg, fx.Proxy) for arg in args)
    return _node(tracer, function, *args, **kwargs) if is_of_value else handed(function, *args, **kwargs)


def _node(tracer: Answering, function: Any, *args: Any, **kwargs: Any) -> Any:
    return tracer.create_proxy("call_function", function, args, kwargs)


def _as_tensor(tracer: Answering, function: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
    # A tensor is itself.
    is_itself = is_tensor(tracer, data) and not args and not kwargs
    return data if is_itself else _node(tracer, function, data, *args, **kwargs)


def _range(tracer: Answering, function: Any, *args: Any) -> Any:
    return handed(range, *(tracer.frozen(arg.node) if isinstance(arg, fx.Proxy) else arg for arg in args))


def _isinstance(tracer: Answering, function: Any, value: Any, kinds: Any) -> Any:
    return handed(isinstance, _value(tracer, value), kinds)


def _is_tensor(tracer: Answering, function: Any, value: Any) -> Any:
    return isinstance(_value(tracer, value), torch.Tensor)


def _hasattr(tracer: Answering, function: Any, value: Any, name: str) -> Any:
    return handed(hasattr, _value(tracer, value), name)


def _callable(tracer: Answering, function: Any, value: Any) -> Any:
    return callable(_value(tracer, value))


def _getattr(tracer: Answering, function: Any, value: Any, name: str, *default: Any) -> Any:
    has = not default or handed(hasattr, _value(tracer, value), name)
    return handed(getattr, value, name) if has else default[0]


def _type(tracer: Answering, function: Any, value: Any, *others: Any) -> Any:
    return handed(function, value, *others) if others else type(_value(tracer, value))


def _value(tracer: Answering, value: Any) -> Any:
    """A value as it was, of which a forward asks what kind of value it is.

    Raises:
        TraceError: It is not known.
    """
    if not isinstance(value, fx.Proxy):
        return value
    observed = tracer.observed(value.node)
    if observed is None:
        raise TraceError(f"its forward goes by what kind of value {spelled(value.node)} is, which is not known")
    # What is computed from shapes is a number everywhere, and the kind of an argument a matter of the traced call.
    if value.node.op == "call_module":
        tracer.frozen(_node(tracer, torch.is_tensor, value).node)
    return observed


_NUMBERS = (int, float, bool, len, round, divmod, abs)
_FACTORIES = "tensor zeros ones empty full arange linspace eye rand randn Size asarray".split()
_HANDLERS: dict[int, Handler] = {
    **{id(function): _number for function in _NUMBERS},
    **{id(function): _node for function in (max, min)},
    **{id(getattr(torch, name)): _node for name in _FACTORIES},
    id(torch.as_tensor): _as_tensor,
    id(torch.is_tensor): _is_tensor,
    id(builtins.range): _range,
    id(builtins.isinstance): _isinstance,
    id(builtins.hasattr): _hasattr,
    id(builtins.callable): _callable,
    id(builtins.getattr): _getattr,
    id(builtins.type): _type,
}
