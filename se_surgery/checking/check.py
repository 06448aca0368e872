"""Check: what each rewritten block computes, compared with what it computed before.

In: a plan that was done, and the blocks that were rewritten for it. Out: nothing, or a `RewriteError` for the first
block that computes something else; whoever calls this undoes everything then.

The comparison is by values, and takes nothing for granted of the graph that the new forward was written from. A block's
own forward and its new one run on the same small random maps, one after the other, over children that only answer (see
`stage`), with each SE giving back what it is given. Both have to call the same children with the same values, return
the same values, and leave the same behind in what they were given. Blocks are taken for one another only where all that
they hold is the same, attribute for attribute (see `alike`): that they look equal to the tracer is not enough. Only
their widths may differ, where the block's own forward went by no size.
"""

from __future__ import annotations

import functools
import inspect
import logging
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import RewriteError
from ..reading.again import comes_again
from ..reading.anatomy import Anatomy
from ..reading.block import Block
from ..reading.modes import modes_off
from ..records import CODE, Edge, implants, original_class, original_state
from .alike import are_alike
from .cast import Cast
from .sizes import names_a_width
from .stage import ARGUMENT, OPERATION, OUTPUT, Line, Stage, Unlike
from .values import leaves, same

_log = logging.getLogger("se_surgery")


@dataclass(frozen=True)
class Compared:
    """What came of comparing.

    Attributes:
        ran: How many blocks were compared, or are alike to one that was.
        left: Paths of the blocks whose own forward does not run in this setting, each with the reason.
    """

    ran: int
    left: tuple[tuple[str, str], ...]


def compare_rewritten(anatomy: Anatomy, hosts: Iterable[str]) -> Compared:
    """Compare what rewritten blocks compute with what they computed before.

    Args:
        anatomy: The model's blocks.
        hosts: Paths of the blocks; those that were not rewritten, because an SE fills a slot, are passed over.

    Raises:
        RewriteError: A block computes something else.
    """
    ran, left = 0, []
    done: dict[type[nn.Module], list[_Done]] = {}
    for path in dict.fromkeys(hosts):
        block = anatomy.look.modules[path]
        code = type(block).__dict__.get(CODE)
        if code is None:
            continue
        others = done.setdefault(type(block), [])
        # Code that calls the block's own forward and gates what that returns freezes nothing of a block.
        alike = (are_alike(anatomy.look, path, other.path, other.by_size) for other in others)
        if not (bool(code.outer and others) or any(alike)):
            ends = [one.run() for one in _comparisons(anatomy, path, block, not others)]
            told = [end.reason for end in ends if end.reason is not None]
            if told:
                left.append((path, told[0]))
                _log.info("%r could not be compared with what it was: %s", path, told[0])
                continue
            others.append(_Done(path, any(end.by_size for end in ends)))
        ran += 1
    return Compared(ran, tuple(left))


class _Done(NamedTuple):
    """A block that was compared: its path, and whether its own forward went by a size."""

    path: str
    by_size: bool


class _End(NamedTuple):
    """What came of one comparison: why there was none, or None; and whether the block's own forward went by a size."""

    reason: str | None
    by_size: bool = False


def _comparisons(anatomy: Anatomy, path: str, block: nn.Module, is_first: bool) -> Iterator[_Comparison]:
    """Every way into a rewritten block; in both modes where its forward asks which it is in."""
    calls = [(implant.name, edge) for implant in implants(block) for edge in implant.edges]
    for method in dict.fromkeys(edge.method for _, edge in calls):
        for training in (False, True) if anatomy.block(path, method).trace.modal else (False,):
            mode = "training" if training else "evaluation"
            here = tuple((name, edge) for name, edge in calls if edge.method == method and edge.mode in ("both", mode))
            yield _Comparison(anatomy, path, block, method, here, training, is_first)


@dataclass(frozen=True)
class _Played:
    """What a run ended with: what came out, what became of the arguments, and of tensors that the forward read."""

    output: list[Any]
    arguments: list[Any]
    held: dict[tuple[str, str], torch.Tensor]


@dataclass(frozen=True)
class _Comparison:
    """One way into a rewritten block, in one mode.

    Attributes:
        anatomy: The model's blocks.
        path: The block's path.
        block: The block.
        method: The way.
        edges: The names of the SEs on this way, each with its edge.
        training: The mode.
        is_first: Whether it is the first of its class, for what is a matter of the class alone.
    """

    anatomy: Anatomy
    path: str
    block: nn.Module
    method: str
    edges: tuple[tuple[str, Edge], ...]
    training: bool
    is_first: bool

    def run(self) -> _End:
        """Compare.

        Raises:
            RewriteError: The block computes something else.
        """
        state = original_state(self.block)
        reason = ""
        for small in (True, False):
            own = functools.partial(self._own, small, state)
            try:
                stage, cast, before = own()
            except RecursionError:
                raise
            except Exception as error:  # whatever the block's own code raises in this setting
                if not comes_again(error, own):
                    raise
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            by_size = stage.has_asked or names_a_width(original_class(self.block), self.method)
            self._follow(stage, cast, state, before)
            return _End(None, by_size)
        return _End(reason)

    def _own(self, small: bool, state: dict[str, Any]) -> tuple[Stage, Cast, _Played]:
        """What the block's own forward does, on a stage of its own."""
        stage = Stage(self.anatomy.look, self.anatomy.look.calls[self.path][0], small)
        cast = Cast(stage, self.path, self.training)
        return stage, cast, self._play(stage, cast, original_class(self.block), state)

    def _follow(self, stage: Stage, cast: Cast, state: dict[str, Any], before: _Played) -> None:
        """Let the rewritten block do what its own forward did."""
        script = stage.lines
        try:
            after = self._play(stage, cast, type(self.block), self._operated, script)
            _end_alike(before, after)
            self._refuse_misplaced(stage)
            if self.is_first:
                self._refuse_other_parameters()
        except Exception as error:  # whatever a wrong forward raises
            what = str(error) if isinstance(error, Unlike) else f"it raises {type(error).__name__} ({error})"
            if not self._is_steady(stage, cast, state, before, script):
                _log.info("%r does something else each time it runs", self.path)
                return
            raise RewriteError(
                f"The {self.method} that surgery wrote for {self.path or 'the root'!r} "
                f"({original_class(self.block).__name__}) is not its own one with SEs in it, in "
                f"{'training' if self.training else 'evaluation'}: {what}. Nothing was changed. "
                f"Leave this block out with where, and please report this as a bug."
            ) from error

    @property
    def _operated(self) -> dict[str, Any]:
        """The block's `__dict__` as it is now, but for SEs in slots of its own, which its forward calls as before."""
        modules = dict(self.block._modules)
        modules.update({one.name: one.before for one in implants(self.block) if not one.edges})
        return {**self.block.__dict__, "_modules": modules}

    def _is_steady(self, stage: Stage, cast: Cast, state: dict[str, Any], before: _Played, script: list[Line]) -> bool:
        """Whether the block's own forward does the same again: it may go by what nobody can foresee."""
        try:
            _end_alike(before, self._play(stage, cast, original_class(self.block), state, script))
        except Exception:  # it does not
            return False
        return True

    @modes_off
    def _play(
        self, stage: Stage, cast: Cast, cls: type[nn.Module], state: dict[str, Any], script: list[Line] | None = None
    ) -> _Played:
        """One run: of the block over its state before surgery, or as it is now."""
        ses = [name for name, _ in self.edges] if cls is type(self.block) else []
        block = cast.block(cls, state, ses)
        args, kwargs = stage.begin(script)
        with torch.set_grad_enabled(self.training), stage:
            output = getattr(cls, self.method)(block, *args, **kwargs)
        return _Played(stage.end(output), leaves((args, kwargs)), stage.held)

    def _refuse_misplaced(self, stage: Stage) -> None:
        """Every SE on this way was called once, with the value of its edge, and what it gave went where that goes."""
        anatomy = self.anatomy.in_training if self.training else self.anatomy
        block = anatomy.block(self.path, self.method)
        for name, edge in self.edges:
            given = stage.seats.get(name, [])
            if len(given) != 1:
                raise Unlike(f"its SE {name!r} is called {len(given)} times")
            channels = _channels(block, edge)
            if given[0].dim() != len(edge.shape) or given[0].shape[edge.axis] != channels:
                raise Unlike(f"its SE {name!r} is given {tuple(given[0].shape)}, which has not {channels} channels")
            if self._place(block, edge.producer) not in stage.origins.get(id(given[0]), ()):
                raise Unlike(f"its SE {name!r} is given another value than that of {edge.producer!r}")
            due = {self._place(block, consumer) for consumer in edge.consumers}
            taken = set(stage.takers.get(name, ()))
            if taken != due and not (name in stage.spent and taken < due):
                shown = ", ".join(sorted(taken)) or "nobody"
                raise Unlike(f"what its SE {name!r} gives goes to {shown}, not to {', '.join(sorted(due))}")

    def _refuse_other_parameters(self) -> None:
        """The parameters and their defaults are those of before, those that this call does not give, too."""
        own = _parameters(original_class(self.block), self.method)
        if own != _parameters(type(self.block), self.method):
            raise Unlike("it takes other parameters, or has other defaults")

    def _place(self, block: Block, name: str) -> str:
        """What a node of the block's graph is called on a stage."""
        node = next(node for node in block.nodes if node.name == name)
        # One of several values that a child returned is the child's.
        while node.target is operator.getitem and node.args[0] in block.nodes and not block.is_map(node.args[0]):
            node = node.args[0]  # type: ignore[assignment]
        if node.op == "call_module":
            path = f"{self.path}.{node.target}" if self.path else str(node.target)
            return self.anatomy.look.aliases.get(path, path)
        return {"placeholder": ARGUMENT, "output": OUTPUT}.get(node.op, OPERATION)


def _channels(block: Block, edge: Edge) -> int:
    """The channels of an edge's value now; the network may have been pruned since an older SE was put in."""
    node = next(node for node in block.nodes if node.name == edge.producer)
    value = block.value(node)
    return int(value.shape[edge.axis]) if isinstance(value, torch.Tensor) else edge.channels


def _parameters(cls: type, method: str) -> list[tuple[Any, ...]]:
    """Name, kind and default of a method's parameters but for the first, which may be called other than `self`."""
    _, *parameters = inspect.signature(getattr(cls, method)).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


def _end_alike(before: _Played, after: _Played) -> None:
    if not same(before.output, after.output):
        raise Unlike("it returns other values")
    if not same(before.arguments, after.arguments):
        raise Unlike("it leaves other values in what it was given")
    for key in before.held.keys() & after.held.keys():
        if not same([before.held[key]], [after.held[key]]):
            raise Unlike(f"it leaves other values in {'.'.join(key)!r}")
