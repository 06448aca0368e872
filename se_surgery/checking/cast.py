"""Cast: copies of a block, before surgery and after it, over one set of children that only answer.

In: a block, and the stage that it plays on. Out: objects of its classes, over its state. A child is an object of its
own class, with its attributes and its own children, and is made when a forward gets at it; called, it asks the stage.
Nothing of the model is written to: containers are copies, and tensors are drawn when they are read.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import Tensor, nn

from ..reading.effects import is_container
from .stage import Stage


class _Tensors(dict[str, Any]):
    """The parameters or buffers of a copy: each is drawn when it is read."""

    def __init__(self, stage: Stage, path: str, tensors: dict[str, Any]) -> None:
        super().__init__(tensors)
        self.stage = stage
        self.path = path

    def __getitem__(self, name: str) -> Any:
        tensor = super().__getitem__(name)
        return self.stage.read(self.path, name, tensor) if isinstance(tensor, Tensor) else tensor

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        return [self[name] for name in self]


class _Children(dict[str, Any]):
    """The children of a copy: each is made when the forward gets at it."""

    def __init__(self, cast: Cast, prefix: str, modules: dict[str, Any]) -> None:
        super().__init__(modules)
        self.cast = cast
        self.prefix = prefix

    def __getitem__(self, name: str) -> Any:
        module = super().__getitem__(name)
        return self.cast.double(module, self.prefix + name) if isinstance(module, nn.Module) else module

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        return [self[name] for name in self]


class Cast:
    """The children of a block as stand-ins; the block itself is made over them, before surgery and after it.

    Args:
        stage: Where they play.
        path: The block's path.
        training: The mode they are in.
    """

    def __init__(self, stage: Stage, path: str, training: bool) -> None:
        self.stage = stage
        self.path = path
        self.training = training
        self.doubles: dict[int, nn.Module] = {}

    def double(self, module: nn.Module, path: str) -> nn.Module:
        """The stand-in of a module below the block."""
        if id(module) not in self.doubles:
            double: nn.Module = object.__new__(type(module))
            self.doubles[id(module)] = double
            self._furnish(double, module.__dict__, path)
            double.__dict__["_compiled_call_impl"] = functools.partial(self.stage.answer, path, double)
        return self.doubles[id(module)]

    def _furnish(self, double: nn.Module, state: dict[str, Any], path: str) -> None:
        """Give a copy its state: containers of its own, tensors that are drawn, and stand-ins as children."""
        mine = double.__dict__
        mine.update(state)
        for name, value in state.items():
            if type(value) not in _PLAIN and name not in _MODULE and is_container(value):
                mine[name] = copy.copy(value)
        if state["_modules"]:
            mine["_modules"] = _Children(self, f"{path}." if path else "", state["_modules"])
        for group in ("_parameters", "_buffers"):
            if state[group]:
                mine[group] = _Tensors(self.stage, path, state[group])
        mine["training"] = self.training

    def block(self, cls: type[nn.Module], state: dict[str, Any], ses: list[str]) -> nn.Module:
        """The block itself, of a class and over a state; its SEs give back what they are given."""
        double: nn.Module = object.__new__(cls)
        for name in ses:
            self.doubles[id(state["_modules"][name])] = self._passing(name, state["_modules"][name])
        self._furnish(double, state, self.path)
        return double

    def _passing(self, name: str, se: nn.Module) -> nn.Module:
        double: nn.Module = object.__new__(type(se))
        double.__dict__.update(se.__dict__)
        double.__dict__["_compiled_call_impl"] = functools.partial(self.stage.pass_on, name)
        return double


_PLAIN = frozenset((bool, int, float, str, tuple, type(None)))
# What every module has.
_MODULE = frozenset(nn.Module().__dict__)
