"""Generated: classes of blocks from generated code, and what their methods call besides the block's own children.

In: a block's class and code. Out: a subclass of it. It is cached by class and code, so equal blocks share it, and a
block of it pickles as its base class and that code.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import linecache
import operator
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..errors import PatientError, SurgeryError
from ..reading.reads import is_plain
from ..records import CODE, durable, generated_class
from .deploying import refusal, thrown_away_by
from .exchange import has_gone, needs_of, refuse_class, refuse_exchange, refuse_method, settle
from .gone import REMEDY

# Where a name of the generated source comes from: (name, module, qualified name in it).
Origin = tuple[str, str, str]


@durable
@dataclass(frozen=True)
class Code:
    """The generated methods of one block's class, as plain data.

    Attributes:
        source: Python source of the methods.
        origins: Where the names it uses come from.
        outer: Whether the methods call the block's own and gate what those return.
    """

    source: str
    origins: tuple[Origin, ...]
    outer: bool = False


# By base; the classes themselves are held by their blocks alone, so that a user's class goes with its last model.
_classes: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[Code, type[nn.Module]]]
_classes = weakref.WeakKeyDictionary()
# How many classes are made of the source that linecache has under a name.
_sources: Counter[str] = Counter()


def resolve(module: str, inner: str) -> Any:
    """What a name of the generated source stands for."""
    found = importlib.import_module(module)
    return operator.attrgetter(inner)(found) if inner else found


def subclass(base: type[nn.Module], code: Code) -> type[nn.Module]:
    """The subclass of `base` with the generated methods; the same object for the same base and code."""
    made = _classes.setdefault(base, weakref.WeakValueDictionary())
    cls = made.get(code)
    if cls is None or not _is_current(base, cls):
        cls = made[code] = _made(base, code)
    return cls


def _is_current(base: type[nn.Module], cls: type[nn.Module]) -> bool:
    """Whether a class was made for the methods that its base has now."""
    return all(getattr(base, name) is own for name, own in cls.__dict__[_OWN].items())


# Under this name a generated class has the methods of its base that it has others for.
_OWN = "_se_own"


@functools.lru_cache(maxsize=512)
def _compiled(source: str, file: str) -> CodeType:
    return compile(source, file, "exec")


def _made(base: type[nn.Module], code: Code) -> type[nn.Module]:
    digest = hashlib.sha256(code.source.encode()).hexdigest()[:12]
    file = f"<se_surgery {base.__qualname__} {digest}>"
    # Tracebacks, inspect.getsource and torch.jit read the source from here.
    linecache.cache[file] = (len(code.source), None, code.source.splitlines(True), file)
    names: dict[str, Any] = {name: resolve(module, inner) for name, module, inner in code.origins}
    names["_base"] = base
    methods: dict[str, Any] = {}
    exec(_compiled(code.source, file), names, methods)
    for function in methods.values():
        function.__qualname__ = f"{base.__qualname__}.{function.__name__}"
        function.__module__ = base.__module__
    own = {name: getattr(base, name) for name in methods if hasattr(base, name)}
    names |= {f"_own_{name}": method for name, method in own.items()}
    needs = needs_of(code.source)
    refused = {name: refusal(name, base) for name in thrown_away_by(base, {name: needs[name] for name in own})}
    shared = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    contents = {**shared, **refused, **methods, CODE: code, _OWN: own}
    cls: type[nn.Module] = _meta(type(base))(base.__name__, (base,), {**contents, **_OPERATED})
    _sources[file] += 1
    weakref.finalize(cls, _forget, file).atexit = False
    return cls


class _Kept(type):
    """The class of generated classes: it refuses other methods in the place of the generated ones."""

    def __setattr__(cls, name: str, value: Any) -> None:
        generated: Any = next((one for one in cls.__mro__ if CODE in one.__dict__), None)
        if generated is not None and name in generated.__dict__[_OWN]:
            refuse_method(generated, ways_of(generated), name, value)
        super().__setattr__(name, value)


def _meta(kind: type) -> Any:
    return _Kept if kind is type else type("_Kept", (_Kept, kind), {})


def _forget(file: str) -> None:
    """Let go of a source when the last class that was made of it is gone."""
    _sources[file] -= 1
    if not _sources[file]:
        del _sources[file]
        linecache.cache.pop(file, None)


def ways_of(cls: type[nn.Module]) -> dict[str, FunctionType]:
    """The methods of a generated class that stand for those of its base."""
    return {name: cls.__dict__[name] for name in cls.__dict__[_OWN]}


def _set(self: nn.Module, name: str, value: Any) -> None:
    generated = _generated(self)
    if "_modules" not in self.__dict__:
        # A copy in the making, which has nothing yet (torch's parametrized modules are copied so).
        super(generated, self).__setattr__(name, value)
        return
    if name == "__class__":
        refuse_class(self, generated, ways_of(generated), value)
    elif name in generated.__dict__[_OWN]:
        refuse_exchange(self, ways_of(generated), name, value)
    breaks = self._modules.get(name) is not None and not callable(value)
    super(generated, self).__setattr__(name, value)
    if breaks or has_gone(self, generated.__dict__[_OWN]):
        settle(self, ways_of(generated), needs_of(getattr(generated, CODE).source), name, not breaks)


def _delete(self: nn.Module, name: str) -> None:
    generated = _generated(self)
    # A parameter that goes may come back as a property (parametrizations) or a plain tensor (weight_norm).
    breaks = name in self._modules
    super(generated, self).__delattr__(name)
    if breaks:
        settle(self, ways_of(generated), needs_of(getattr(generated, CODE).source), name, False)


def _generated(block: nn.Module) -> Any:
    return next(cls for cls in type(block).__mro__ if CODE in cls.__dict__)


def give_class(block: nn.Module, cls: type[nn.Module]) -> None:
    """Give a block another class, and the methods of its own that stand on the instance those of that class.

    Raises:
        PatientError: A wrapper of such a method stands there, which would go on calling the one from before.
    """
    former = generated_class(block)
    ways = ways_of(former) if former is not None else {}
    moved = {}
    for name in ways.keys() & block.__dict__.keys():
        standing = block.__dict__[name]
        if not isinstance(standing, MethodType) or standing.__func__ not in ways.values():
            raise PatientError(
                f"This {type(block).__name__} has {name!r} on the instance, which wraps what surgery wrote. "
                f"Take that wrapper off first."
            )
        moved[name] = getattr(cls, standing.__func__.__name__).__get__(block)
    block.__dict__.update(moved)
    object.__setattr__(block, "__class__", cls)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle (and copy) a block as its base class and code: the subclass cannot be found by its name."""
    generated = _generated(self)
    reduced: Any = super(generated, self).__reduce_ex__(protocol)  # type: ignore[arg-type]
    if generated is not type(self):
        return reduced  # type: ignore[no-any-return]
    return (revive, (generated.__mro__[1], getattr(generated, CODE)), *reduced[2:])


# What every generated class has besides its code: it sees what is changed in a block, and how that is pickled.
_OPERATED = {"__setattr__": _set, "__delattr__": _delete, "__reduce_ex__": _reduce}


@durable
def revive(base: type[nn.Module], code: Code) -> nn.Module:
    """An empty block of the generated class, for pickle to fill."""
    cls = subclass(base, code)
    return cls.__new__(cls)


# ------------------------------------------------------------------------------------- what the methods call besides


@durable
def refuse_argument(parameter: str, value: Any) -> None:
    """Called by generated forwards for an argument they were not made for.

    Raises:
        SurgeryError: Always.
    """
    shown = f"{len(value)} items" if isinstance(value, (list, tuple)) else type(value).__name__
    raise SurgeryError(
        f"This block was operated on for calls with another {parameter!r} than {shown}: its forward was traced from "
        f"the call that the model itself makes. Operate with an example_input that makes the call you need."
    )


@durable
def recomputed(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Called by generated forwards whose block is asked to save memory: what it computes is computed again when needed.

    The block's own forward would do so for a part of it; the values are the same.
    """
    # The caller may go on appending to a list that it gave.
    args, kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs))
    return checkpoint(method, *args, use_reentrant=False, **kwargs)


@durable
def refuse_patch(block: nn.Module, method: str) -> None:
    """Called by generated methods whose base's own was exchanged on the class after surgery.

    Raises:
        SurgeryError: Always.
    """
    raise SurgeryError(
        f"{method!r} of the class {type(block).__name__} was exchanged after a block of it was operated on, and the "
        f"block's own was written from the former. {REMEDY}"
    )


@durable
def refuse_change(block: nn.Module, reads: dict[str, Any]) -> None:
    """Called by generated forwards whose block was changed after surgery.

    Args:
        block: The block.
        reads: What attributes of it and of its children were, by their paths.

    Raises:
        SurgeryError: Always.
    """
    now = {path: _attribute(block, path) for path in reads}
    changed = [path for path, value in reads.items() if type(now[path]) is not type(value)]
    changed += [path for path, value in reads.items() if path not in changed and now[path] != value]
    refuse_other(block, changed[0], reads[changed[0]], now[changed[0]])


def _attribute(block: nn.Module, path: str) -> Any:
    """An attribute of a block or of what it holds, `...` where there is none."""
    found: Any = block
    for name in path.split("."):
        found = getattr(found, name, ...)
    return found


@durable
def refuse_other(block: nn.Module, name: str, was: Any, now: Any) -> None:
    """Called by generated forwards for one thing that is another than when their block was operated on.

    Raises:
        SurgeryError: Always.
    """
    raise SurgeryError(
        f"{name!r} of this {type(block).__name__} was {_shown(was)} when it was operated on and now is {_shown(now)}, "
        f"but its forward was written for the former. "
        f"Set it first and operate then: put it back, strip_se(model, origin='se_surgery'), set it, operate again."
    )


def _shown(value: Any) -> str:
    if value is ...:
        return "not there"
    named = getattr(value, "__qualname__", None)
    return repr(value) if is_plain(value) else str(named) if isinstance(named, str) else f"a {type(value).__name__}"
