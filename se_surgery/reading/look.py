"""Look: run a model once without computing anything, and note what happened where.

In: an nn.Module and an example input. Out: a `Look`, the list of module calls (with the shapes that went in and came
out) and of the events between them (convolutions, normalisations, activations, additions, concatenations, gates).

What runs is a copy (see `table`), so that another thread may run or train the model meanwhile. No arithmetic is done,
and the users' own hooks do not run (see `recorder`), unless the model does not run without them. A model that cannot
run on the meta device is run for real.
"""

from __future__ import annotations

import bisect
import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..records import implanted
from .again import comes_again
from .dataflow import Value
from .events import Call, Event
from .layout import is_under
from .maps import IMAGES, SIGNALS, Maps, ranks_by, ranks_of
from .modes import modes_off
from .probes import describe, mixed, probes, refused, resized, with_one_more
from .recorder import Recorder, to_meta
from .table import DoesNotRun, Table, Way, reason_of

_log = logging.getLogger("se_surgery")
# A side of an image on which no network that is made for images comes down to one position, and a length of a signal.
_ENOUGH = {IMAGES: 512, SIGNALS: 2**16}


@dataclass(frozen=True)
class Look:
    """What one forward did.

    Attributes:
        table: The model that was looked at, and its copies.
        way: In which way a copy was run.
        copies: The copies of its modules by path. Nothing of the model itself is written when they are.
        calls: The calls of every module, by path, in order.
        events: All events in order.
        clocks: When each of them was, on the look's clock.
        values: What was computed from what, in order of execution.
        maps: What its maps look like.
        args: What the model was called with.
        asked: What it was to be called with; `args` may be larger, where maps shrink to a single position.
        answered: What came out for what it was to be called with: class scores may be maps at a larger size.
    """

    table: Table = field(repr=False)
    way: Way
    copies: dict[str, nn.Module]
    calls: dict[str, list[Call]]
    events: tuple[Event, ...]
    clocks: tuple[int, ...]
    values: list[Value] = field(repr=False)
    maps: Maps = field(repr=False)
    args: tuple[Any, ...]
    asked: tuple[Any, ...] = ()
    answered: Any = field(default=None, repr=False)

    @property
    def model(self) -> nn.Module:
        """The model that was looked at."""
        return self.table.model

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Its modules by path; one that is in several places by the first."""
        return self.table.modules

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial size of the images that went into the model, or `()` where it took none."""
        return _size(self.args, self.maps)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """The path under which a module's calls are noted, by its other paths: it may be in several places."""
        first = {id(module): path for path, module in self.modules.items()}
        paths = self.model.named_modules(remove_duplicate=False)
        return {path: first[id(module)] for path, module in paths if path != first[id(module)]}

    def everywhere(self, path: str) -> list[str]:
        """The path of a module and its others, one for each module that holds it."""
        others = [other for other, first in self.aliases.items() if first == path]
        return [path, *(other for other in others if other.rpartition(".")[0] in self.modules)]

    @cached_property
    def others(self) -> tuple[Look, ...]:
        """The same at images of another size, an odd one if it takes such, and with one image more."""
        # Of two sides each grows by another number.
        odd = tuple(2 * side + more for side, more in zip(self.size, (1, 3), strict=False))
        sizes = (odd, tuple(side + 32 for side in self.size), tuple(2 * side for side in self.size))
        larger = [resized(self.args, self.maps, size) for size in sizes] if self.size else []
        found = (_first_look(self, larger), _first_look(self, [with_one_more(self.args)]))
        return tuple(one for one in found if one is not None)

    def inside(self, call: Call, path: str) -> list[Call]:
        """The calls of the module at `path` inside another call."""
        calls = self.calls.get(self.aliases.get(path, path), [])
        return [one for one in calls if call.start < one.start < call.end]

    def during(self, call: Call) -> tuple[Event, ...]:
        """All events inside one call, those of its children included."""
        return self.events[bisect.bisect(self.clocks, call.start) : bisect.bisect(self.clocks, call.end)]

    def learns(self, path: str) -> bool:
        """Whether a module has parameters: the filters of a blur pool are not a convolution layer's."""
        return next(self.modules[path].parameters(), None) is not None

    def own(self, call: Call) -> list[Event]:
        """The events of the module's own forward."""
        return [event for event in self.during(call) if event.path == call.path]


def look(model: nn.Module, example_input: Any = None) -> Look:
    """Run a copy of `model` once and note its calls and events.

    Args:
        model: The model; it is left as found.
        example_input: (C, H, W), a tensor, or a tuple of arguments; without it, see `probes`.

    Raises:
        ProbeError: The model fails on every input that was tried.
    """
    table, ranks = Table(model), ranks_of(model)
    failures: list[tuple[str, Exception]] = []
    for args in probes(model, example_input, ranks):
        found = _tried(table, args, ranks, failures)
        if found is not None:
            return _enlarged(found)
    raise refused(model, failures, example_input, table.hooks_text(), ranks) from failures[0][1]


def _tried(
    table: Table, args: tuple[Any, ...], ranks: tuple[int, ...], failures: list[tuple[str, Exception]]
) -> Look | None:
    """The look at one input in the first way that works, or None."""
    hopeless: set[bool] = set()
    for way in table.ways():
        if way.real and way.hooks in hopeless:
            continue
        try:
            return _checked(_record(table, args, way, ranks))
        except DoesNotRun as error:
            failures.append((describe(args), error.cause))
            if error.is_about_shapes:
                hopeless.add(way.hooks)
            _log.debug("probing with %s failed: %r", describe(args), error.cause)
    return None


def _enlarged(seen: Look) -> Look:
    """The look, or one at a larger image where on this one maps shrink to a single position before the network ends."""
    enlarged = seen
    while _hides_something(enlarged) and 0 < max(enlarged.size, default=0) < _ENOUGH[enlarged.maps.ranks]:
        larger = resized(enlarged.args, enlarged.maps, tuple(2 * side for side in enlarged.size))
        try:
            enlarged = _record(seen.table, larger, seen.way.on_meta(), seen.maps.ranks)
        except DoesNotRun as error:  # it takes this size alone
            _log.debug("looking at a larger image failed: %r", error.cause)
            return seen
    return replace(enlarged, asked=seen.args, answered=seen.answered)


def _hides_something(seen: Look) -> bool:
    """Whether a convolution, or what may be an SE, was given a map of one position, on which neither can be told."""
    if any(event.alone and event.wide for event in seen.events):
        return True
    small = (call for calls in seen.calls.values() for call in calls if _keeps_a_position(call, seen.maps))
    kinds = ({event.kind for event in seen.during(call)} for call in small)
    return any(found & {"squeeze", "pool"} and found & {"conv", "linear"} for found in kinds)


def _keeps_a_position(call: Call, maps: Maps) -> bool:
    """Whether a module was given one map of a single position, and returned such a map."""
    given = [arg for arg in call.args if isinstance(arg, Tensor)]
    if len(given) != 1 or not isinstance(call.output, Tensor) or given[0].shape != call.output.shape:
        return False
    return maps.is_single(given[0].shape)


def look_again(seen: Look) -> Look | None:
    """The same look at images of another size, or None where the model takes no other."""
    doubled = tuple(2 * side for side in seen.size)
    sizes = (doubled, tuple(side + 32 for side in seen.size), (*doubled[:1], *seen.size[1:]))
    return _first_look(seen, [resized(seen.args, seen.maps, size) for size in sizes] if seen.size else [])


def _first_look(seen: Look, inputs: list[tuple[Any, ...]]) -> Look | None:
    """The look at the first of some inputs that the model takes, or None."""
    for args in inputs:
        try:
            return _record(seen.table, args, seen.way.on_meta(), seen.maps.ranks)
        except DoesNotRun as error:  # it does not take this one
            _log.debug("looking again at %s failed: %r", describe(args), error.cause)
    return None


@modes_off
def _record(table: Table, args: tuple[Any, ...], way: Way, ranks: tuple[int, ...]) -> Look:
    """One run of the copy.

    Raises:
        DoesNotRun: The model's own code fails on these arguments.
    """
    recorder = Recorder(way.real, ranks)
    given = args if way.real else _on_meta(args)
    with table.ready(way, recorder) as copies:
        try:
            with recorder:
                output = copies[""](*given)
        except Exception as error:  # whatever the model's own code raises: the input does not fit it
            raise reason_of(error, recorder, copies) from error
    wrong = mixed(args, output)
    if wrong:
        raise DoesNotRun(RuntimeError(wrong), is_about_shapes=True)
    clocks = tuple(event.clock for event in recorder.events)
    events = tuple(recorder.events)
    values, answered = recorder.flow.values, recorder.calls[""][0].output
    maps = Maps(ranks, _size(args, Maps()) or (1, 1)) if recorder.axes is None else recorder.axes.maps()
    return Look(table, way, copies, recorder.calls, events, clocks, values, maps, args, args, answered)


def _size(args: tuple[Any, ...], maps: Maps) -> tuple[int, ...]:
    """Spatial size of the images or signals in some arguments, or `()` where there are none."""
    images = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim() in maps.inputs]
    return tuple(images[0].shape[axis] for axis in maps.inputs[images[0].dim()]) if images else ()


def _checked(seen: Look) -> Look:
    """The look, or another one where the convolutions that ran say that maps have another rank than its layers said."""
    ran = [event for event in seen.events if event.kind == "conv" and any(size > 1 for size in event.shape[2:])]
    ours = implanted(seen.model) if seen.maps.are_signals else []
    own = (event for event in ran if not any(event.path == path or is_under(event.path, path) for path in ours))
    ranks = ranks_by(len(event.kernel) for event in own) if ran else seen.maps.ranks
    return seen if ranks == seen.maps.ranks else _record(seen.table, seen.args, seen.way, ranks)


def _on_meta(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments without values.

    Raises:
        DoesNotRun: There are no such: a tensor's class has no meta device.
    """
    try:
        return to_meta(args)  # type: ignore[no-any-return]
    except MemoryError:
        raise
    except Exception as error:  # whatever a tensor of another class raises
        if not comes_again(error, lambda: to_meta(args)):
            raise
        raise DoesNotRun(error, is_about_shapes=False) from error
