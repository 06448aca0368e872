"""Tracer: torch.fx's, run on one method of one block, without what torch.fx patches for the whole process.

In: a block, a method of it and the arguments of one call. Out: a graph, with all children as leaves.

torch.fx puts its own `__call__` and `__getattr__` into nn.Module while it traces, and wrapped functions into `math`.
Every class of module that is loaded is told so, which takes longer than the trace. Here calls are seen where nn.Module
makes them, and tensors where the block's own modules are asked for them; both let other threads pass. For `math` there
are stand-ins (see `lent`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import ScriptObject, Tensor, fx, nn
from torch.fx import _symbolic_trace as torch_fx
from torch.utils import _pytree as pytree

from ..errors import TraceError
from .answers import answer, holds_tensors, must_be, must_count, spelled
from .blame import handed
from .effects import refuse_switched
from .lent import Lender
from .observed import Observed
from .proxies import Proxy
from .stand_ins import StandIns
from .watch import Watch

# A step into an argument: an index of a list or tuple, or the key of a dict.
Step = Any


@dataclass(frozen=True)
class Argument:
    """How one leaf of the observed arguments enters the graph.

    Attributes:
        parameter: Name of the forward's parameter that holds it.
        steps: Where in that parameter it is, outermost first; empty when it is the parameter itself.
        node: Name of its placeholder, or None for a constant.
        value: The constant.
    """

    parameter: str
    steps: tuple[Step, ...]
    node: str | None
    value: Any = None


class Tracer(fx.Tracer):
    """Traces one method of a block with all its children as leaves and the observed arguments bound."""

    proxy_buffer_attributes = True

    def __init__(self, method: str, bound: inspect.BoundArguments, watch: Watch, seen: Observed) -> None:
        super().__init__()
        self.traced_func_name = method
        self.bound = bound
        self.watch = watch
        self.seen = seen
        self.lender = Lender(StandIns(self))
        watch.lent = self.lender.method
        self.thread = threading.get_ident()
        self.arguments: list[Argument] = []
        self.lengths: list[tuple[str, tuple[Step, ...], int]] = []
        self.granted: set[fx.Node] = set()
        self.root: nn.Module
        self.proxies: dict[str, fx.Proxy] = {}

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """The graph of the method."""
        method = getattr(type(root), self.traced_func_name)
        self.root = root
        self.root_module_name = type(root).__name__
        self.submodule_paths = {module: path for path, module in self.watch.modules.items()}
        self.tensor_attrs = {}
        self.graph = fx.Graph(tracer_cls=type(self))
        values = {name: self._bind(name, (), value) for name, value in self.bound.arguments.items()}
        call = inspect.BoundArguments(self.bound.signature, values)  # type: ignore[arg-type]
        with self._patching():
            with self.watch.on():
                output = handed(self.lender.function(method), root, *call.args, **call.kwargs)
            self.create_node("output", "output", (self.create_arg(output),), {})
        return self.graph

    @contextlib.contextmanager
    def _patching(self) -> Iterator[None]:
        """Have calls of modules, what is read of theirs, and functions that are wrapped for torch.fx make nodes."""
        classes = {type(module) for module in self.watch.modules.values()}
        bases = {base for cls in classes for base in cls.__mro__}
        calls = {base: base.__dict__["_call_impl"] for base in bases if "_call_impl" in base.__dict__}
        before = _Before(_is_tracing(), calls, {cls: cls.__dict__.get("__getattr__") for cls in classes})
        found = {cls: cls.__getattr__ for cls in classes}  # type: ignore[attr-defined]
        try:
            # Compiled functions refuse to be called then.
            _set_tracing(True)
            for base, call in calls.items():
                base._call_impl = self._called(call)  # type: ignore[attr-defined]
            for cls, original in found.items():
                cls.__getattr__ = self._asked(original)  # type: ignore[attr-defined]
            torch_fx._patch_wrapped_functions(before.wrapped)
            yield
            before.put_back()
        except BaseException:
            # An interrupt may come while this is undone, too; what is undone already is not touched again.
            before.put_back()
            raise

    def _called(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _call_impl(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                return handed(original, module, *args, **kwargs)
            return self.call_module(module, functools.partial(original, module), args, kwargs)

        return _call_impl

    def _asked(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def __getattr__(module: nn.Module, name: str) -> Any:
            value = handed(original, module, name)
            return value if threading.get_ident() != self.thread else self.getattr(name, value, self.proxies)

        return __getattr__

    # What torch.fx reads itself is not read by the forward.

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a child."""
        with self.watch.on(False):
            return handed(super().call_module, m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """What is read of a child."""
        if not isinstance(attr_val, Tensor):
            return attr_val
        with self.watch.on(False):
            return handed(super().getattr, attr, attr_val, parameter_proxy_cache)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """A value of the graph."""
        with self.watch.on(False):
            return handed(super().create_proxy, *args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node of the graph."""
        refuse_switched()
        return handed(super().create_node, *args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """All children are leaves."""
        return True

    def proxy(self, node: fx.Node) -> Proxy:
        """A value that answers what is asked of it."""
        return Proxy(node, self)

    def observed(self, node: fx.Node) -> Any:
        """What a node was in the observed call, or None where that is not known."""
        with self.watch.on(False):
            self.seen.follow(list(self.graph.nodes))
        return self.seen.values[node.name]

    def frozen(self, node: fx.Node, function: Callable[[Any], Any] | None = None) -> Any:
        """What a node was, or a function of it; the graph asks whether it is so still when it runs.

        Raises:
            TraceError: That is not known, or goes by more than the shapes of tensors.
        """
        value = self.observed(node)
        is_known = value is not None and (function is len or not holds_tensors(value))
        if function is not None and is_known and type(value) is not function:
            node = self.create_proxy("call_function", function, (fx.Proxy(node, self),), {}).node
            value = self.observed(node)
        value = answer(node, self.seen.values)
        if node not in self.granted:
            self.granted.add(node)
            ask = must_be if isinstance(value, bool) else must_count
            self.create_proxy("call_function", ask, (fx.Proxy(node, self), value, spelled(node)), {})
        return value

    def _bind(self, parameter: str, steps: tuple[Step, ...], value: Any) -> Any:
        if isinstance(value, Tensor):
            name = "_".join([parameter, *map(str, steps)])
            proxy = self.create_proxy("placeholder", name, (), {})
            self.arguments.append(Argument(parameter, steps, proxy.node.name))
            self.seen.give(proxy.node.name, value)
            return proxy
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            if isinstance(value, dict):
                return {key: self._bind(parameter, (*steps, key), item) for key, item in value.items()}
            if type(value) in (list, tuple):
                self.lengths.append((parameter, steps, len(value)))
                return type(value)(self._bind(parameter, (*steps, i), item) for i, item in enumerate(value))
            raise TraceError(f"the argument {parameter} holds tensors in a {type(value).__name__}")
        self.arguments.append(Argument(parameter, steps, None, value))
        return value

    def refuse_written(self) -> None:
        """To be called when the forward has run.

        Raises:
            TraceError: It has assigned to a global variable.
        """
        name = self.lender.written()
        if name is not None:
            raise TraceError(f"its forward writes to the global {name}, which a graph of it cannot do")

    def create_arg(self, a: Any) -> Any:
        """What a node is given; no tensor is frozen into it."""
        if isinstance(a, Tensor) and not isinstance(a, fx.Proxy):
            raise TraceError("the forward makes or reads a tensor that is neither a parameter nor a buffer")
        if isinstance(a, ScriptObject) and not self.tensor_attrs:
            for path, module in self.watch.modules.items():
                held = {value: name for name, value in vars(module).items() if isinstance(value, ScriptObject)}
                self.tensor_attrs |= {value: f"{path}.{name}".lstrip(".") for value, name in held.items()}
        with self.watch.on(False):
            return handed(super().create_arg, a)


@dataclass(frozen=True)
class _Before:
    """What was there before a trace.

    Attributes:
        flag: Whether torch.fx was tracing.
        calls: What modules are called by, of nn.Module and of classes that have a way of their own.
        getters: The classes' own `__getattr__`; None where a class has none of its own.
        wrapped: The functions that torch.fx has been told to take for leaves.
    """

    flag: bool
    calls: dict[type, Any]
    getters: dict[type, Any]
    wrapped: torch_fx._Patcher = field(default_factory=torch_fx._Patcher)

    def put_back(self) -> None:
        """Put it back; doing so twice is the same as once."""
        while self.wrapped.patches_made:
            self.wrapped.patches_made[-1].revert()
            self.wrapped.patches_made.pop()
        for cls, getter in self.getters.items():
            if getter is not None:
                cls.__getattr__ = getter  # type: ignore[attr-defined]
            elif "__getattr__" in cls.__dict__:
                del cls.__getattr__  # type: ignore[attr-defined]
        for base, call in self.calls.items():
            base._call_impl = call  # type: ignore[attr-defined]
        _set_tracing(self.flag)


# It is the process's in older releases of torch, and the thread's in newer ones.


def _is_tracing() -> bool:
    """Whether torch takes this for symbolic tracing."""
    if hasattr(torch_fx, "_get_is_fx_tracing"):
        return bool(torch_fx._get_is_fx_tracing())
    return bool(vars(torch_fx)["_is_fx_tracing_flag"])


def _set_tracing(is_tracing: bool) -> None:
    if hasattr(torch_fx, "_set_is_fx_tracing"):
        torch_fx._set_is_fx_tracing(is_tracing)
    else:
        vars(torch_fx)["_is_fx_tracing_flag"] = is_tracing
