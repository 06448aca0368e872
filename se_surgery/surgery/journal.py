"""Journal: what modules, tensors and generators were like before a change, so that one that fails leaves nothing.

In: what is about to be changed. Out: nothing, or all of it as it was. A verb that changes a model does so through
`guarded`, which opens one journal before the first change and keeps it until nothing is left that could fail. It is
handed to every function that changes something, and each of them says what before it does.

Children, attributes, hooks and other containers are remembered by reference, which takes next to no memory. Values are
copied, each tensor's once, and only where they are written in place: optimizers and whatever else refers to parameters
find the same ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..errors import PatientError
from ..reading.modes import modes_off

P = ParamSpec("P")
T = TypeVar("T")
# How often it is tried to put one thing back, where that fails: an interrupt may come at any time, and several times.
_TRIES = 20


class Journal:
    """Remembers things before they are changed, and puts them back; what was remembered once is not again."""

    def __init__(self) -> None:
        self._notes: dict[Hashable, tuple[_Kind, Any, Any]] = {}

    def open(self, module: nn.Module) -> nn.Module:
        """Remember a module: its class, its attributes, and what is in its containers, such as children and hooks."""
        self._note("module", module)
        return module

    def open_all(self, model: nn.Module) -> None:
        """Remember every module of a model."""
        for module in model.modules():
            self.open(module)

    def flag(self, tensor: Tensor) -> Tensor:
        """Remember whether a tensor requires gradients."""
        self._note("flag", tensor)
        return tensor

    def move(self, model: nn.Module) -> nn.Module:
        """Remember a model that is about to be moved to another device, dtype or mode."""
        self.open_all(model)
        for tensor in (*model.parameters(), *model.buffers()):
            self._note("memory", tensor)
        return model

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Remember the values of tensors, their memory, and their gradients."""
        for tensor in tensors:
            if tensor.is_leaf and tensor.grad is not None:
                self._note("values", tensor.grad)
            self._note("values", tensor)
            # Put back first, so that the values find their own memory.
            self._note("memory", tensor)

    @torch.no_grad()
    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Give a tensor other values, rounded to its own dtype."""
        self._note("values", tensor)
        tensor.copy_(value)

    def draw(self, device: torch.device | None = None) -> None:
        """Remember torch's random number generators, the CPU's and the device's, before numbers are drawn."""
        for name in dict.fromkeys(("cpu", str(device or "cpu"))):
            if _generators(name) is not None:
                self._note("random", name, name)

    def _note(self, kind: str, thing: Any, name: Hashable = None) -> None:
        key = (kind, id(thing) if name is None else name)
        if key not in self._notes:
            row = _KINDS[kind]
            self._notes[key] = (row, thing, row.state(thing))

    def undo(self) -> None:
        """Put everything back, the last thing first.

        An error meanwhile does not stop it: each thing is put back from what was remembered, however far the try before
        had come. An interrupt is raised again when all is done; one in between the tries ends this, and what is left is
        put back by calling it again.

        Raises:
            PatientError: Something cannot be put back.
        """
        tries, interrupt, failed = 0, None, None
        while self._notes:
            try:
                self._put_back_last()
                tries = 0
            except BaseException as error:  # whatever it is, the rest has to be put back all the same
                tries += 1
                interrupt = interrupt if isinstance(error, Exception) else error
                if tries == _TRIES:
                    failed = error
                    self._notes.popitem()
        if interrupt is not None:
            raise interrupt
        if failed is not None:
            raise PatientError(
                f"A part of the model could not be put back ({failed}). Build the model anew."
            ) from failed

    def undo_for_sure(self) -> None:
        """Put everything back, though an interrupt come at any moment.

        Raises:
            PatientError: Something cannot be put back.
        """
        try:
            self.undo()
        finally:
            # Where that came to its end, nothing is left.
            self.undo()

    def _put_back_last(self) -> None:
        key = next(reversed(self._notes))
        kind, thing, state = self._notes[key]
        kind.restore(thing, state)
        del self._notes[key]


@modes_off
def guarded(change: Callable[Concatenate[Journal, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What `change` returns, called with a journal; where it fails, all that the journal has is put back.

    This is no `with`, because an interrupt may come when the block of a `with` is over and its end has not begun.
    """
    journal = Journal()
    try:
        return change(journal, *args, **kwargs)
    except BaseException:
        journal.undo_for_sure()
        raise


# -------------------------------------------------------------------------------------- what can be remembered


class _Kind(NamedTuple):
    """How a thing's state is read, and how it is given back; doing the latter twice is the same as once."""

    state: Callable[[Any], Any]
    restore: Callable[[Any, Any], None]


# Containers of a module that may be changed in place: children, parameters, buffers, hooks, a list of one's own.
_CONTAINERS = (dict, list, set)


def _module_state(module: nn.Module) -> Any:
    attributes = dict(module.__dict__)
    containers = [value for value in attributes.values() if isinstance(value, _CONTAINERS)]
    return type(module), attributes, [(container, _contents(container)) for container in containers]


def _restore_module(module: nn.Module, state: Any) -> None:
    cls, attributes, containers = state
    if type(module) is not cls:
        object.__setattr__(module, "__class__", cls)
    _refill(module.__dict__, _contents(attributes))
    for container, contents in containers:
        _refill(container, contents)


def _contents(container: Any) -> list[Any]:
    """What is in a container, in order; of a dict all keys and then all values."""
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _refill(container: Any, contents: list[Any]) -> None:
    """Give a container its contents back; one that has them is not touched."""
    now = _contents(container)
    if len(now) == len(contents) and all(map(operator.is_, now, contents)):
        return
    container.clear()
    if isinstance(container, dict):
        half = len(contents) // 2
        container.update(zip(contents[:half], contents[half:], strict=True))
    elif isinstance(container, list):
        container.extend(contents)
    else:
        container.update(contents)


def _memory(tensor: Tensor) -> Any:
    """Which memory a tensor has, its gradient and that one's memory, and whether it requires a gradient."""
    grad = tensor.grad if tensor.is_leaf else None
    return tensor.data, tensor.requires_grad, grad, grad.data if grad is not None else None


def _restore_memory(tensor: Tensor, state: Any) -> None:
    data, requires_grad, grad, grad_data = state
    tensor.data = data
    if not tensor.is_leaf:
        return
    if grad is not None:
        grad.data = grad_data
    tensor.grad = grad
    tensor.requires_grad_(requires_grad)


def _restore_flag(tensor: Tensor, flag: bool) -> None:
    if tensor.requires_grad is not flag:
        tensor.requires_grad_(flag)


@torch.no_grad()
def _restore_values(tensor: Tensor, values: Tensor) -> None:
    try:
        tensor.copy_(values)
    except RuntimeError:
        # One that cannot be written to has its values still.
        if not torch.equal(_bits(tensor), _bits(values)):
            raise


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _generators(device: str) -> Any:
    """The part of torch that has a device's random number generator; None where there is none of its own."""
    kind = torch.device(device).type
    module = torch if kind == "cpu" else getattr(torch, kind, None)
    return module if hasattr(module, "get_rng_state") else None


def _where(device: str) -> tuple[str, ...]:
    """What these parts have to be told: which of several devices, where there may be several."""
    return () if torch.device(device).type in ("cpu", "mps") else (device,)


def _random_state(device: str) -> Tensor:
    return _generators(device).get_rng_state(*_where(device))  # type: ignore[no-any-return]


def _restore_random(device: str, state: Tensor) -> None:
    _generators(device).set_rng_state(state, *_where(device))


_KINDS = {
    "module": _Kind(_module_state, _restore_module),
    "memory": _Kind(_memory, _restore_memory),
    "values": _Kind(lambda tensor: tensor.detach().clone(), _restore_values),
    "flag": _Kind(lambda tensor: tensor.requires_grad, _restore_flag),
    "random": _Kind(_random_state, _restore_random),
}
