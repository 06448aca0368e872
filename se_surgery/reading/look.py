"""Look: run a model once without computing anything, and note what happened where.

In: an nn.Module and an example input. Out: a `Look`, the list of module calls (with the shapes that went in and came
out) and of the events between them (convolutions, normalisations, activations, additions, concatenations, gates).

No arithmetic is done, and the users' own hooks do not run (see `recorder`). A model that cannot run on the meta device
is run for real.
"""

from __future__ import annotations

import bisect
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .events import Call, Event, is_map
from .probes import BatchMixedError, check_batch, describe, is_about_shapes, probes, refused, resized
from .recorder import Recorder, on_the_table, to_meta

_log = logging.getLogger("se_surgery")
_PACKAGE = __name__.partition(".")[0] + "."
_NETWORKS = _PACKAGE + "backbones."
# A side of an image on which no network that is made for images comes down to one position.
_ENOUGH = 512


@dataclass(frozen=True)
class Look:
    """What one forward did.

    Attributes:
        model: The model that was looked at.
        modules: Its modules by path; one that is in several places by the first.
        calls: The calls of every module, by path, in order.
        events: All events in order.
        clocks: When each of them was, on the look's clock.
        args: What the model was called with.
        asked: What it was to be called with; `args` may be larger, where maps shrink to a single position.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    calls: dict[str, list[Call]]
    events: tuple[Event, ...]
    clocks: tuple[int, ...]
    args: tuple[Any, ...]
    asked: tuple[Any, ...] = ()

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial size of the images that went into the model, or `()` where it took none."""
        images = [leaf for leaf in pytree.tree_leaves(self.args) if isinstance(leaf, Tensor) and leaf.dim() in (4, 5)]
        return tuple(images[0].shape[-2:]) if images else ()

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
    """Run `model` once and note its calls and events.

    Args:
        model: The model; it is left as found.
        example_input: (C, H, W), a tensor, or a tuple of arguments; without it, see `probes`.

    Raises:
        ProbeError: The model fails on every input that was tried.
    """
    modules = dict(model.named_modules())
    failures: list[tuple[str, Exception]] = []
    for args in probes(model, example_input):
        for real in (False, True):
            if real and any(p.is_meta for p in model.parameters()):
                continue
            try:
                return _enlarged(_record(model, modules, args, real))
            except Exception as error:  # whatever the model's own code raises: the input does not fit it
                if _is_our_own(error):
                    raise
                failures.append((describe(args), error))
                if is_about_shapes(error):
                    break
                _log.debug("probing with %s failed: %r", describe(args), error)
    raise refused(model, failures, example_input) from failures[0][1]


def _is_our_own(error: Exception) -> bool:
    """Whether an error was raised by this package itself, so that no other input would help.

    What torch's own functions raise seems to come from the recorder, which calls them.
    """
    trail = error.__traceback__
    while trail is not None and trail.tb_next is not None:
        trail = trail.tb_next
    frame = trail.tb_frame if trail is not None else None
    module = str(frame.f_globals.get("__name__")) if frame is not None else ""
    raised_here = module.startswith(_PACKAGE) and not module.startswith(_NETWORKS)
    relayed = frame is not None and frame.f_code.co_name == "__torch_function__"
    return raised_here and not relayed and not isinstance(error, BatchMixedError)


def _enlarged(seen: Look) -> Look:
    """The look, or one at a larger image where on this one maps shrink to a single position before the network ends."""
    enlarged = seen
    while _hides_something(enlarged) and 0 < max(enlarged.size, default=0) < _ENOUGH:
        height, width = enlarged.size
        try:
            args = resized(enlarged.args, 2 * height, 2 * width)
            enlarged = _record(seen.model, seen.modules, args, real=False)
        except Exception as error:  # whatever the model's own code raises: it takes this size alone
            _log.debug("looking at a larger image failed: %r", error)
            return seen
    return replace(enlarged, asked=seen.args)


def _hides_something(seen: Look) -> bool:
    """Whether a convolution, or what may be an SE, was given a map of one position, on which neither can be told."""
    if any(event.alone and event.wide for event in seen.events):
        return True
    small = (call for calls in seen.calls.values() for call in calls if _keeps_a_position(call))
    kinds = ({event.kind for event in seen.during(call)} for call in small)
    return any(found & {"squeeze", "pool"} and found & {"conv", "linear"} for found in kinds)


def _keeps_a_position(call: Call) -> bool:
    """Whether a module was given one map of a single position, and returned such a map."""
    given = [arg for arg in call.args if isinstance(arg, Tensor)]
    if len(given) != 1 or not isinstance(call.output, Tensor) or given[0].shape != call.output.shape:
        return False
    return given[0].dim() in (4, 5) and not is_map(given[0].shape)


def look_again(seen: Look) -> Look | None:
    """The same look at images of another size, or None where the model takes no other."""
    height, width = seen.size or (0, 0)
    for size in ((2 * height, 2 * width), (height + 32, width + 32), (2 * height, width)):
        try:
            return _record(seen.model, seen.modules, resized(seen.args, *size), real=False)
        except Exception as error:  # whatever the model's own code raises: it does not take this size
            _log.debug("looking again at %s failed: %r", size, error)
    return None


def _record(model: nn.Module, modules: dict[str, nn.Module], args: tuple[Any, ...], real: bool) -> Look:
    recorder = Recorder(real)
    given = args if real else to_meta(args)
    rng = torch.random.get_rng_state()
    try:
        with torch.no_grad(), on_the_table(modules, recorder), recorder:
            output = model(*given)
    finally:
        torch.random.set_rng_state(rng)
    check_batch(args, output)
    clocks = tuple(event.clock for event in recorder.events)
    return Look(model, modules, recorder.calls, tuple(recorder.events), clocks, args, args)
