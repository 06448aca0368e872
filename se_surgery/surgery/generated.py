"""Generated: classes of blocks from generated code, and what their methods call besides the block's own children.

In: a block's class and code. Out: a subclass of it. It is cached by class and code, so equal blocks share it, and a
block of it pickles as its base class and that code.
"""

from __future__ import annotations

import hashlib
import importlib
import linecache
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..errors import SurgeryError
from ..reading.reads import is_plain
from ..records import CODE, durable

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


_classes: dict[tuple[type, Code], type[nn.Module]] = {}


def resolve(module: str, inner: str) -> Any:
    """What a name of the generated source stands for."""
    found = importlib.import_module(module)
    return operator.attrgetter(inner)(found) if inner else found


def subclass(base: type[nn.Module], code: Code) -> type[nn.Module]:
    """The subclass of `base` with the generated methods; the same object for the same base and code."""
    key = (base, code)
    if key not in _classes:
        digest = hashlib.sha256(code.source.encode()).hexdigest()[:12]
        file = f"<se_surgery {base.__qualname__} {digest}>"
        # Tracebacks, inspect.getsource and torch.jit read the source from here.
        linecache.cache[file] = (len(code.source), None, code.source.splitlines(True), file)
        names: dict[str, Any] = {name: resolve(module, inner) for name, module, inner in code.origins}
        names["_base"] = base
        methods: dict[str, Any] = {}
        exec(compile(code.source, file, "exec"), names, methods)
        for function in methods.values():
            function.__qualname__ = f"{base.__qualname__}.{function.__name__}"
            function.__module__ = base.__module__
        if not code.outer:
            methods |= {name: _refuse_folding(name) for name in FOLDING if hasattr(base, name)}
        shared = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        methods = {**shared, **methods, CODE: code, "__reduce_ex__": _reduce}
        _classes[key] = type(base.__name__, (base,), methods)
    return _classes[key]


# What timm.utils.reparameterize_model calls on blocks: each changes the children that the generated forward calls.
FOLDING = ("reparameterize", "fuse", "switch_to_deploy")


def _refuse_folding(name: str) -> Callable[..., None]:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise SurgeryError(
            f"{name}() would fold away what the forward of this operated {type(self).__name__} calls. "
            f"Re-parameterise the base first and then operate, or strip the SEs, {name}, and operate again."
        )

    return refuse


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle (and copy) a block as its base class and code: the subclass cannot be found by its name."""
    generated = next(cls for cls in type(self).__mro__ if CODE in cls.__dict__)
    reduced: Any = super(generated, self).__reduce_ex__(protocol)  # type: ignore[arg-type]
    if generated is not type(self):
        return reduced  # type: ignore[no-any-return]
    return (revive, (generated.__mro__[1], getattr(generated, CODE)), *reduced[2:])


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
