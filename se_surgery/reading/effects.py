"""Effects: what a forward does beside computing its output, and what a graph of it would drop without a word.

In: a view of a block, while its forward is traced. Out: nothing, or a `TraceError` that says what the forward does. The
random number generators, the grad mode and other threads are left as found.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import TraceError

_SWITCHES = "its forward switches gradients or autocast on or off for a part of it, which a graph of it would not do"
# torch.fx patches nn.Module for the whole process while it traces; two traces would undo each other's patches.
_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def only_computing(view: nn.Module) -> Iterator[None]:
    """Hold what is traced in this block to computing: it writes nothing, draws nothing and switches nothing.

    Raises:
        TraceError: It does, with what; what it has written to the view stays there.
    """
    before, numbers, draws = _contents(view), random.getstate(), _Draws()
    try:
        with _ONE_AT_A_TIME, torch.enable_grad(), _no_autocast(), draws:
            yield
    finally:
        is_random = draws.undo() or numbers != random.getstate()
        random.setstate(numbers)
    after = _contents(view)
    written = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if written:
        raise TraceError(f"its forward writes to self.{written[0]}, which a graph of it cannot do")
    if is_random:
        raise TraceError("its forward draws random numbers of its own, which a graph of it would draw only once")


def refuse_without_gradients() -> None:
    """To be called for every node of a graph: inside `only_computing` gradients are on, unless the forward did that.

    Raises:
        TraceError: Gradients are off.
    """
    if not torch.is_grad_enabled():
        raise TraceError(_SWITCHES)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Refuse `torch.autocast` in this thread; that it is switched off inside leaves no other trace."""
    enter, thread = torch.autocast.__enter__, threading.get_ident()

    def refuse(self: torch.autocast) -> Any:
        if threading.get_ident() == thread:
            raise TraceError(_SWITCHES)
        return enter(self)

    torch.autocast.__enter__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


class _Draws(TorchFunctionMode):
    """Sees that what it is on for draws random numbers from torch's generator; other threads may draw theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Tensor | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return function(*args, **kwargs)  # becomes a node
        state = torch.get_rng_state()
        result = function(*args, **kwargs)
        if self.before is None and not torch.equal(state, torch.get_rng_state()):
            self.before = state
        return result

    def undo(self) -> bool:
        """Give the numbers back; whether there were any."""
        if self.before is not None:
            torch.set_rng_state(self.before)
        return self.before is not None


def is_container(value: Any) -> bool:
    """Whether a value is one that a forward may write to in place."""
    return isinstance(value, (list, dict, set))


def _contents(view: nn.Module) -> dict[str, Any]:
    """What a view's attributes are, to see later whether a forward has written to one."""

    def held(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, id(item)) for key, item in value.items()]
        return [id(item) for item in value] if is_container(value) else None

    return {name: (id(value) if held(value) is None else 0, held(value)) for name, value in view.__dict__.items()}
