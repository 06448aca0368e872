"""Look: run a model once without computing anything, and note what happened where.

In: an nn.Module and an example input. Out: a `Look`, the list of module calls (with the shapes that went in and came
out) and of the events between them (convolutions, normalisations, activations, additions, concatenations, gates).

The parameters are replaced by meta tensors for the length of one forward, so that no arithmetic is done, and put back
whatever happens. The users' own hooks do not run. A model that cannot run on the meta device is run for real.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .events import KINDS, MAXIMA, Call, Event, is_gate, is_like_first, is_map
from .probes import BatchMixedError, check_batch, describe, is_about_shapes, probes, refused, resized

_log = logging.getLogger("se_surgery")
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


class _Recorder(TorchFunctionMode):
    """Notes events and calls while a model runs."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.real = real
        self.clock = 0
        self.stack: list[Call] = []
        self.events: list[Event] = []
        self.calls: dict[str, list[Call]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KINDS.get(function)
        kwargs = kwargs or {}
        if kind is None:
            return function(*args, **kwargs)
        result = args[0] if not self.real and is_like_first(function, args) else function(*args, **kwargs)
        value = result[0] if isinstance(result, tuple) and result else result
        if isinstance(value, Tensor) and self.stack:
            if function in MAXIMA and not (len(args) > 1 and isinstance(args[1], Tensor)):
                kind = "squeeze"
            self._note(kind, args, kwargs, value)
        return result

    def _note(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        extra: dict[str, Any] = {}
        if kind == "conv":
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            given = args[0] if args else kwargs["input"]
            channels = given.shape[1 - len(weight.shape)] if given.dim() < weight.dim() else given.shape[1]
            groups = channels // weight.shape[1]
            extra = {"kernel": tuple(weight.shape[2:]), "groups": groups, "channels": channels}
            extra["alone"] = given.dim() in (4, 5) and not is_map(given.shape)
        if kind in ("conv", "linear"):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            extra["macs"] = math.prod(result.shape[1:]) * math.prod(weight.shape[1:])
        if kind == "gate" and not is_gate(args, result):
            return
        if kind == "add" and (len(args) < 2 or not isinstance(args[1], Tensor)):
            return
        self.clock += 1
        self.events.append(Event(self.clock, kind, self.stack[-1].path, tuple(result.shape), **extra))

    def enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.clock += 1
            parent = self.stack[-1] if self.stack else None
            call = Call(path, self.clock, _to_meta(args), _to_meta(kwargs), parent=parent)
            self.calls.setdefault(path, []).append(call)
            if parent is not None:
                parent.children.append(call)
            self.stack.append(call)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.clock += 1
        call = self.stack.pop()
        call.end = self.clock
        call.output = _to_meta(output)


def _to_meta(value: Any) -> Any:
    """`value` with its tensors on the meta device, so that a record holds no memory."""
    if isinstance(value, Tensor):
        return value if value.is_meta else torch.empty_like(value, device="meta")
    if value is None or isinstance(value, (int, float, str)):
        return value
    if type(value) in (tuple, list):
        return type(value)(_to_meta(item) for item in value)
    if type(value) is dict:
        return {key: _to_meta(item) for key, item in value.items()}
    return pytree.tree_map_only(Tensor, _to_meta, value)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")

_OWN = frozenset(nn.Module().__dict__)
_CONTAINERS = (list, dict, set)
# Those that register_module_forward_hook and its like keep for all modules of the process.
_GLOBAL_HOOKS = (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks)


@contextlib.contextmanager
def _on_the_table(modules: dict[str, nn.Module], recorder: _Recorder) -> Iterator[None]:
    """Hold the modules in evaluation mode, on the meta device and under the recorder's hooks only; then undo it all."""
    saved = [(module, dict(module.__dict__)) for module in modules.values()]
    for_all = [(hooks, dict(hooks)) for hooks in _GLOBAL_HOOKS]
    # Parameters shared between modules stay shared.
    seen: dict[int, Tensor] = {}

    def meta(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        if id(tensor) not in seen:
            seen[id(tensor)] = torch.empty_like(tensor, device="meta", requires_grad=False)
        return seen[id(tensor)]

    try:
        for hooks, _ in for_all:
            hooks.clear()
        for path, module in modules.items():
            state = module.__dict__
            state["training"] = False
            # What a forward appends to or sets in a container of its own goes with the copy.
            state.update({k: copy.copy(v) for k, v in state.items() if k not in _OWN and isinstance(v, _CONTAINERS)})
            state.update({name: OrderedDict() for name in (*_HOOKS, *_HOOK_FLAGS) if name in state})
            state["_forward_pre_hooks"] = OrderedDict({0: recorder.enter(path)})
            state["_forward_pre_hooks_with_kwargs"] = OrderedDict({0: True})
            state["_forward_hooks"] = OrderedDict({0: recorder.leave})
            if recorder.real:
                continue
            for group in ("_parameters", "_buffers"):
                if state[group]:
                    state[group] = {name: None if t is None else meta(t) for name, t in state[group].items()}
            state.update({name: meta(value) for name, value in state.items() if isinstance(value, Tensor)})
        yield
    finally:
        for module, state in saved:
            module.__dict__.clear()
            module.__dict__.update(state)
        for hooks, registered in for_all:
            hooks.update(registered)


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
    raised_here = frame is not None and frame.f_globals.get("__package__") == __package__
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
    recorder = _Recorder(real)
    given = args if real else _to_meta(args)
    rng = torch.random.get_rng_state()
    try:
        with torch.no_grad(), _on_the_table(modules, recorder), recorder:
            output = model(*given)
    finally:
        torch.random.set_rng_state(rng)
    check_batch(args, output)
    clocks = tuple(event.clock for event in recorder.events)
    return Look(model, modules, recorder.calls, tuple(recorder.events), clocks, args, args)
