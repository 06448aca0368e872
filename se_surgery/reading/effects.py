"""Effects: what a forward does beside computing its output, and what a graph of it would drop without a word.

In: a view of a block, while its forward is traced. Out: nothing, or a `TraceError` that says what the forward does. The
random number generators, the grad mode and other threads are left as found: a draw is refused before it happens, and
what is switched is asked of this thread alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import TraceError
from .draws import Refusing
from .generators import no_numbers

_SWITCHES = "its forward switches gradients or autocast on or off for a part of it, which a graph of it would not do"
_DRAWS = "its forward draws random numbers of its own, which a graph of it would draw only once"
# A trace sees to how nn.Module calls modules in the whole process; two of them would undo each other's patches.
_ONE_AT_A_TIME = threading.RLock()
_DEVICES = ("cpu", "cuda")
# The state of autocast that the forward being traced in this thread began in.
_begun = threading.local()


@contextlib.contextmanager
def only_computing(view: nn.Module, method: str = "forward") -> Iterator[None]:
    """Hold what is traced in this block to computing: it writes nothing, draws nothing and switches nothing.

    Raises:
        TraceError: It does, with what; what it has written to the view stays there.
    """
    before = _contents(view)
    outer = getattr(_begun, "state", None)
    _begun.state = _autocast()
    try:
        with _ONE_AT_A_TIME, torch.enable_grad(), Refusing(_drawn).on(), no_numbers(view, method, _drawn):
            yield
    finally:
        _begun.state = outer
    after = _contents(view)
    written = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if written:
        raise TraceError(f"its forward writes to self.{written[0]}, which a graph of it cannot do")


def refuse_switched() -> None:
    """To be called for every node of a graph: gradients are on and autocast is as at first, unless the forward did it.

    Raises:
        TraceError: Gradients are off, or autocast has been entered or left.
    """
    if not torch.is_grad_enabled() or _begun.state != _autocast():
        raise TraceError(_SWITCHES)


def _drawn() -> TraceError:
    return TraceError(_DRAWS)


def _autocast() -> tuple[Any, ...]:
    """What autocast does in this thread: how deep it is entered, and what is on.

    That it is entered is seen even where it changes nothing, as when it is switched off inside and was off before.
    """
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth, *(_of_device(device) for device in _DEVICES)


def _of_device(device: str) -> tuple[bool, Any]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


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
