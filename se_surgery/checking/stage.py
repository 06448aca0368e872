"""Stage: what children of a block answer while it runs, and what is written down of that.

In: a block's call in a `Look`. Out: values for its children to answer with, of the shapes that they put out when the
model was looked at. The first run writes down what each child was given; a run after it has to call the same children,
with the same values bit for bit. Of SEs it is written down what they are given, and who takes what they give.
"""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..reading.events import Call
from ..reading.look import Look
from .draws import DRAWING
from .numbers import Numbers, Scale, numbered, positive
from .sizes import tells_a_size
from .values import leaves, mapped, same_leaf

_NO_TORCH_FUNCTION = torch._C.DisableTorchFunction


class Unlike(Exception):
    """A run did something else than the one before it; the message says what."""


class Unanswered(Exception):
    """A child was called that was not called when the model was looked at."""


class Line(NamedTuple):
    """One call of a child.

    Attributes:
        path: Its path.
        given: What it was given: of answers that nobody has changed their numbers, and copies of anything else.
        output: What it put out when the model was looked at.
        drawn: How many values had been drawn before its answer.
    """

    path: str
    given: list[Any]
    output: Any
    drawn: int


class Fresh(NamedTuple):
    """A tensor that holds numbered values, and its version then."""

    number: int
    tensor: Tensor
    version: int


class Stage(TorchFunctionMode):
    """What children answer, and what is written down of it; to be active while a block runs.

    Args:
        look: What the model did.
        call: The call of the block.
        small: Whether maps are made small.
    """

    def __init__(self, look: Look, call: Call, small: bool = True) -> None:
        super().__init__()
        self.look = look
        self.call = call
        self.scale = Scale(look, call, small)
        self.named: dict[int, tuple[str, str]] = {}
        # Whether anybody has been told the size of a tensor.
        self.has_asked = False

    def begin(self, script: list[Line] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Begin a run, the first one or one that follows a script, and return the block's arguments."""
        self.numbers = Numbers()
        self.generator = torch.Generator().manual_seed(0)
        self.script = script
        self.lines: list[Line] = []
        self.due = list(script or ())
        self.called: Counter[str] = Counter()
        self.held: dict[tuple[str, str], Tensor] = {}
        self.fresh: dict[int, Fresh] = {}
        # Of a run with SEs: where values come from and who takes what an SE gave, by identity.
        self.origins: dict[int, set[str]] = {}
        self.marks: dict[int, tuple[str, ...]] = {}
        self.takers: dict[str, list[str]] = {}
        self.seats: dict[str, list[Tensor]] = {}
        self.spent: set[str] = set()
        # No other tensor is given the identity of one of these.
        self.kept: list[Tensor] = []
        given = mapped(self.call.args, self._drawn), mapped(self.call.kwargs, self._drawn)
        self._note(given, ARGUMENT)
        return given

    def _drawn(self, tensor: Tensor) -> Tensor:
        drawn = self.numbers.draw(self.scale.shape(tensor.shape), tensor.dtype)
        self.fresh[id(drawn)] = Fresh(self.numbers.drawn, drawn, 0)
        return drawn

    def _number(self, leaf: Tensor) -> int | None:
        """The number of a tensor's values, where it still holds what was drawn."""
        found = self.fresh.get(id(leaf))
        return found.number if found is not None and found.version == leaf._version else None

    def _renumber(self, leaf: Tensor, number: int | None) -> Tensor:
        if number is not None:
            self.fresh[id(leaf)] = Fresh(number, leaf, leaf._version)
        return leaf

    def _note(self, value: Any, origin: str) -> None:
        if self.script is None:
            return
        for leaf in leaves(value):
            if isinstance(leaf, Tensor):
                self.origins.setdefault(id(leaf), set()).add(origin)
                self.kept.append(leaf)

    # ------------------------------------------------------------------------------------------- what children do

    def answer(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a child does when it is called."""
        with _NO_TORCH_FUNCTION():
            given = leaves((args, kwargs)) if kwargs or len(args) != 1 else leaves(args[0])
            # A module that other blocks have, too, goes by its first path in the model.
            place = self.look.aliases.get(path, path)
            self._take(given, place)
            line = self._line(path, given)
            self.lines.append(line)
            answer = self._hand_over(module, args, line)
            self._note(answer, place)
        return answer

    def _line(self, path: str, given: list[Any]) -> Line:
        if self.script is None:
            return Line(path, [self._snapshot(leaf) for leaf in given], self._recorded(path), self.numbers.drawn)
        if not self.due:
            raise Unlike(f"it calls {path!r} once more")
        line = self.due[0]
        if line.path == path and not self._is_due(line, given):
            raise Unlike(f"it gives {path!r} other values")
        if line.path != path:
            # A call that is made one with an SE's comes before others, which have nothing to do with it.
            later = [other for other in self.due if other.path == path and self._is_due(other, given)]
            if not later:
                raise Unlike(f"it calls {path!r} where {line.path!r} is due")
            line = later[0]
        self.due = [other for other in self.due if other is not line]
        return line

    def _is_due(self, line: Line, given: list[Any]) -> bool:
        return len(given) == len(line.given) and all(map(self._is_given, given, line.given))

    def _snapshot(self, leaf: Any) -> Any:
        """A leaf as it is now, or the number of its values."""
        if not isinstance(leaf, Tensor):
            return leaf
        number = self._number(leaf)
        return leaf.clone() if number is None else _Numbered(number, leaf.shape, leaf.dtype)

    def _is_given(self, leaf: Any, due: Any) -> bool:
        if not isinstance(due, _Numbered):
            return same_leaf(leaf, due)
        if not isinstance(leaf, Tensor) or (leaf.shape, leaf.dtype) != (due.shape, due.dtype):
            return False
        return self._number(leaf) == due.number or torch.equal(leaf, numbered(*due))

    def _recorded(self, path: str) -> Any:
        calls = self.look.inside(self.call, path) or self.look.calls.get(path, [])
        if not calls:
            raise Unanswered(path)
        self.called[path] += 1
        return calls[min(self.called[path], len(calls)) - 1].output

    def _hand_over(self, module: nn.Module, args: tuple[Any, ...], line: Line) -> Any:
        """The answer as the child would give it: what it was given itself, changed in place, or a new value."""
        self.numbers.drawn = line.drawn
        first = args[0] if args else None
        if type(module) is nn.Identity and isinstance(first, Tensor):
            return self._renumber(first.view_as(first), self._number(first))
        answer = mapped(line.output, self._drawn)
        if not (getattr(module, "inplace", False) is True and not module._modules):
            return answer
        if not (isinstance(first, Tensor) and isinstance(answer, Tensor) and answer.shape == first.shape):
            return answer
        self._forget(first)
        return self._renumber(first.copy_(answer), self.numbers.drawn)

    def pass_on(self, name: str, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What an SE does when it is called: it gives back what it is given, and it is noted who takes that."""
        with _NO_TORCH_FUNCTION():
            if not isinstance(x, Tensor) or args or kwargs:
                raise Unlike(f"its SE {name!r} is not called with one map")
            self.seats.setdefault(name, []).append(x)
            answer = self._renumber(x.clone(), self._number(x))
            self.marks[id(answer)] = (*self.marks.get(id(x), ()), name)
            self.origins[id(answer)] = self.origins.get(id(x), set())
            self.kept += [x, answer]
        return answer

    def _take(self, given: list[Any], taker: str) -> None:
        """Note who takes what an SE gave."""
        for leaf in given if self.marks else ():
            for name in self.marks.get(id(leaf), ()):
                self.takers.setdefault(name, []).append(taker)

    def end(self, output: Any) -> list[Any]:
        """End a run; returns what came out."""
        self._take(leaves(output), OUTPUT)
        if self.due:
            raise Unlike(f"it does not call {self.due[0].path!r}")
        return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves(output)]

    def _forget(self, changed: Any) -> None:
        """What an SE gave was changed in place: who takes it from here on takes something else."""
        self.spent.update(self.marks.pop(id(changed), ()))

    # ---------------------------------------------------------------------------------- what the block does itself

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draw = DRAWING.get(function)
        result = function(*args, **kwargs) if draw is None else draw(self.generator, function, args, kwargs)
        if tells_a_size(function, result):
            self.has_asked = True
        if self.script is not None:
            if self.marks and function not in _ASKING:
                self._take(leaves((args, kwargs)), OPERATION)
                self._forget(result)
            self._note(result, OPERATION)
        return result

    def read(self, module: str, name: str, tensor: Tensor) -> Tensor:
        """A tensor that the forward reads itself: drawn, the same in every run; numbers to count with as they are."""
        # A tensor under two names is one, whichever of them a run reads first.
        module, name = self.named.setdefault(id(tensor), (module, name))
        if (module, name) not in self.held:
            with _NO_TORCH_FUNCTION():
                self.held[module, name] = positive(tensor, zlib.crc32(f"{module}.{name}".encode()))
        return self.held[module, name]


class _Numbered(NamedTuple):
    """Values that have a number, in a shape and dtype."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


ARGUMENT, OPERATION, OUTPUT = "<argument>", "<operation>", "<output>"
# Asking a map for these is not taking its values.
_ASKING = frozenset(
    getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point")
) | frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_meta", "layout")
)
