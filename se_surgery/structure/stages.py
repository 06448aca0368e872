"""Stages: which stage of the network a block belongs to.

In: a `Look`, and when each unit ended. Out: the number of stages and the stage of anything that ended at a given time.

timm's `feature_info` lists the levels of a network and names the module that ends each. A stage is such a level, and
what ended since the one before is in it. What stands before the stages, the stem, is none: if it holds units, they go
with the first stage. A network without `feature_info` has a stage for every resolution that its units leave behind.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..reading.events import Call, Event
from ..reading.layout import is_under, positions
from ..reading.look import Look


@dataclass(frozen=True)
class Level:
    """A stage, as far as one can tell without its units.

    Attributes:
        end: When it ended, on the look's clock.
        sure: Whether it counts even where no unit is in it: MobileNetV4's first stages are plain convolutions in the
            small model and hold units in the larger ones, and a stage has the same number in all of them.
    """

    end: int
    sure: bool = False


class Stages:
    """The stages of a model, from 1.

    Args:
        seen: What one forward did.
        ends: When (on the look's clock) each unit ended; none of them is outside the stages, and the last stage is one
            that holds some.
    """

    def __init__(self, seen: Look, ends: list[int]) -> None:
        levels = _feature_levels(seen, set(ends)) or _resolution_levels(seen, sorted(set(ends)))
        times = [level.end for level in levels]
        held = {min(bisect.bisect_left(times, end), len(times) - 1) for end in ends}
        last = max(held, default=0)
        kept = [level for i, level in enumerate(levels[: last + 1]) if level.sure or i in held or not held]
        self._ends = [level.end for level in kept]

    @property
    def count(self) -> int:
        """Number of stages."""
        return len(self._ends)

    def of(self, end: int) -> int:
        """The stage of something that ended at `end`."""
        return min(bisect.bisect_left(self._ends, end), len(self._ends) - 1) + 1


def _feature_levels(seen: Look, ends: set[int]) -> list[Level]:
    """The levels of the one `feature_info` that names modules of this model, or none.

    It may be that of a network inside the model: of a backbone, or of what timm's `features_only` wraps.
    """
    found: dict[str, list[Level]] = {}
    for path, module in seen.modules.items():
        entries = _entries(module)
        if entries and not any(is_under(path, outer) for outer in found):
            levels = _levels(seen, path, entries, ends)
            found.update({path: levels} if levels else {})
    return next(iter(found.values())) if len(found) == 1 else []


def _entries(module: nn.Module) -> list[dict[str, Any]]:
    """What a module's `feature_info` lists, be it timm's own class or a plain list."""
    info = getattr(module, "feature_info", None)
    listed = getattr(info, "info", info)
    entries = list(listed) if isinstance(listed, (list, tuple)) else []
    return entries if all(isinstance(entry, dict) for entry in entries) else []


def _levels(seen: Look, holder: str, entries: list[dict[str, Any]], ends: set[int]) -> list[Level]:
    """The levels that the entries stand for, without the stem's; none where they name no module that ran."""
    calls = [_call_of(seen, holder, str(entry.get("module", ""))) for entry in entries]
    # `features_only` leaves out what comes after the last level that it was asked for.
    while calls and calls[-1] is None:
        calls.pop()
    if not calls:
        return []
    if len(entries) > 1 and len({(entry.get("reduction"), entry.get("num_chs")) for entry in entries}) == 1:
        # A network of one resolution and width lists each of its blocks: they are one stage.
        return [Level(seen.calls[""][0].end)]
    levels: list[Level] = []
    for i, call in list(enumerate(calls))[_stem_length(entries) :]:
        # An entry that names no module (HRNet's first stage) ended when the next one began.
        end = next(later.start for later in calls[i:] if later) if call is None else _end(call, entries[i], ends)
        if not levels or end > levels[-1].end:
            levels.append(Level(end, sure=bool(entries[i].get("stage"))))
    return levels


def _call_of(seen: Look, holder: str, name: str) -> Call | None:
    """The last call of the module that an entry names; `features_only` renames `stages.0` to `stages_0`."""
    prefix = holder + "." if holder else ""
    paths = [prefix + form for form in (name, name.replace(".", "_")) if name and prefix + form in seen.calls]
    return seen.calls[paths[0]][-1] if paths else None


def _stem_length(entries: list[dict[str, Any]]) -> int:
    """How many of the first entries are the stem's: those outside the module that later ones share (`stages`)."""
    tops = [str(entry.get("module", "")).partition(".")[0] for entry in entries]
    top, shared = Counter(tops).most_common(1)[0]
    return tops.index(top) if shared > 1 else 0


def _end(call: Call, entry: dict[str, Any], ends: set[int]) -> int:
    """When a level ended: with its module, or with the unit whose last module takes the level's maps as its input."""
    if entry.get("hook_type") != "forward_pre":
        return call.end
    return next((outer.end for outer in _upwards(call) if outer.end in ends), call.end)


def _upwards(call: Call | None) -> Iterator[Call]:
    while call is not None:
        yield call
        call = call.parent


@dataclass(frozen=True)
class _State:
    """What the network had come to when a unit ended."""

    area: int
    channels: int
    dilation: int


def _resolution_levels(seen: Look, ends: list[int]) -> list[Level]:
    """The levels of a network without `feature_info`: every time its maps get smaller, a new one begins.

    Where dilation stands for the stride, maps stay as large as they were; then the level begins where they last got
    more channels (the first block of a dilated stage has the dilation of the stage before).
    """
    outputs = {call.end: call.output for calls in seen.calls.values() for call in calls}
    states = [_state(seen, since, end, outputs.get(end)) for since, end in itertools.pairwise([0, *ends])]
    begins, widened = [0], 0
    for i, state in enumerate(states[1:], 1):
        before = states[begins[-1] : i]
        widened = i if state.channels > states[i - 1].channels else widened
        if state.area < min(other.area for other in before):
            begins.append(i)
        elif state.dilation > max(other.dilation for other in before) and widened > begins[-1]:
            begins.append(widened)
    whole = seen.calls[""][0]
    return [*(Level(_before(seen, ends[i - 1], ends[i])) for i in begins[1:]), Level(whole.end)]


def _state(seen: Look, since: int, end: int, output: Any) -> _State:
    """What the network had come to at `end`, where a module may have returned `output`.

    Maps of one position count as those before them.
    """
    events = [e for e in seen.events[: bisect.bisect(seen.clocks, end)] if e.spatial and e.kind != "squeeze"]
    dilations = [_dilation(seen, event) for event in events if event.clock > since and event.wide]
    shape = tuple(output.shape) if isinstance(output, Tensor) and seen.maps.is_map(output.shape) else events[-1].shape
    axis = seen.maps.axis(shape) or 1
    return _State(math.prod(positions(shape, axis)), shape[axis], max(dilations, default=1))


def _dilation(seen: Look, event: Event) -> int:
    dilation: Any = getattr(seen.modules[event.path], "dilation", 1)
    return int(max(dilation) if isinstance(dilation, tuple) else dilation)


def _before(seen: Look, end: int, following: int) -> int:
    """When the outermost module began that holds the unit which ended at `following` and not the one before it."""
    calls = (call for calls in seen.calls.values() for call in calls)
    return min((call.start for call in calls if end < call.start < following <= call.end), default=end)
