"""Draws: random numbers that a forward draws while it is looked at.

In: whatever runs inside. Out: the same, without a number drawn from a generator of the process: other threads draw from
these meanwhile, so that they can be neither compared nor set back. A draw is answered from a generator of this
library's own, or refused before it happens; and only in this thread.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from .blame import handed

_SEED = 0
# Arguments that say whether an operation drops anything or how much, and what they are where it does not.
_OFF = {"dropout_p": 0.0, "dropout": 0.0, "train": False, "training": False}


class Undrawn(TorchDispatchMode):
    """Answers every draw of torch's from a generator of its own, with the same numbers every time.

    It is at work inside `on`, not inside `with`, which switches something for the whole process as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generators: dict[torch.device, torch.Generator] = {}

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Be at work inside, in this thread."""
        _push_mode(self)
        try:
            yield
        finally:
            _pop_mode()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function with it at work."""
        _push_mode(self)
        try:
            return handed(function, *args, **kwargs)
        finally:
            _pop_mode()

    def meet(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What to do in the place of an operation that draws."""
        return undrawn(operation, args, kwargs, self.generator)

    def generator(self, device: torch.device) -> torch.Generator:
        """Its own generator for a device."""
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(_SEED)
        return self.generators[device]


def _dispatch(mode: Undrawn, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    kwargs = kwargs or {}
    if draws(operation, args, kwargs):
        return mode.meet(operation, args, kwargs)
    return handed(operation, *args, **kwargs)


# Set here and not in the class, where torch would wrap it for its compiler, at ten times the cost of an operation.
Undrawn.__torch_dispatch__ = _dispatch  # type: ignore[assignment]


class Refusing(Undrawn):
    """Refuses every draw of torch's before it happens.

    Args:
        error: Makes the error.
    """

    def __init__(self, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.error = error

    def meet(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Refuse.

        Raises:
            Exception: The one that it was made with.
        """
        raise self.error()


def draws(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation of torch.ops.aten draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return False
    given = _named(operation, args, kwargs)
    return not any(given[name] == off for name, off in _OFF.items() if name in given)


def undrawn(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generator: Callable[..., Any]) -> Any:
    """The result of an operation that draws: with a generator of one's own or, where it takes none, without a draw."""
    given = _named(operation, args, kwargs)
    device = _device(given)
    if device.type == "meta":
        return handed(operation, *args, **kwargs)
    if "generator" in given:
        return handed(operation, **{**given, "generator": generator(device)})
    off = {name: value for name, value in _OFF.items() if name in given}
    if off:
        return handed(operation, **{**given, **off})
    with_generator = _with_generator(operation)
    if with_generator is not None:
        return handed(with_generator, **given, generator=generator(device))
    # Before torch took a generator for them, only `rand_like` and its kin are left.
    return given["out"].zero_() if "out" in given else torch.zeros_like(args[0], dtype=given["dtype"])


@functools.cache
def _with_generator(operation: Any) -> Any:
    """The overload of an operation that takes a generator beside its arguments, or None."""
    names = {argument.name for argument in operation._schema.arguments}
    packet = operation.overloadpacket
    for overload in packet.overloads():
        other = getattr(packet, overload)
        if {argument.name for argument in other._schema.arguments} == names | {"generator"}:
            return other
    return None


def _named(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operation by name, its defaults among them."""
    arguments = operation._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given.update(zip((argument.name for argument in arguments), args, strict=False))
    return {**given, **kwargs}


def _device(given: dict[str, Any]) -> torch.device:
    """The device that an operation draws on."""
    tensors = [leaf for leaf in pytree.tree_leaves(list(given.values())) if isinstance(leaf, Tensor)]
    named = given.get("device")
    if named is not None:
        return torch.device(named)
    return tensors[0].device if tensors else torch.device("cpu")
