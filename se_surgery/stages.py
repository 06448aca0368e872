"""Stages: which stage of the network a block belongs to.

In: a `Look`. Out: the number of stages and the stage of anything that ended at a given time.

timm's `feature_info` names the module that ends each stage; entries before which no block ends (a stem) do not count,
so ResNet's stages 1..4 are layer1..layer4. Where an entry names no module (HRNet), the top-level modules that hold
blocks are the stages. Without `feature_info` a stage ends where the resolution falls.
"""

from __future__ import annotations

import bisect
import math

from torch import nn

from .anatomy import channel_axis
from .events import Call, Event
from .look import Look


class Stages:
    """The stages of a model, from 1.

    Args:
        seen: What one forward did.
        ends: When (on the look's clock) each block ended; stages that hold none of them do not count.
    """

    def __init__(self, seen: Look, ends: list[int]) -> None:
        marks = _feature_marks(seen)
        if marks is None:
            marks = _resolution_marks(seen)
        held = {min(bisect.bisect_left(marks, end), len(marks) - 1) for end in ends} if marks else set()
        self._marks = [mark for i, mark in enumerate(marks) if i in held] or [0]

    @property
    def count(self) -> int:
        """Number of stages."""
        return len(self._marks)

    def of(self, end: int) -> int:
        """The stage of something that ended at `end`."""
        return min(bisect.bisect_left(self._marks, end), len(self._marks) - 1) + 1


def _feature_marks(seen: Look) -> list[int] | None:
    """When the module of each `feature_info` entry ended, or None where there is none to go by."""
    info = getattr(seen.model, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, (list, tuple)) or not entries or not all(isinstance(e, dict) for e in entries):
        return None
    # A network of one resolution and width may list each of its blocks: they are one stage.
    levels = [(entry.get("reduction"), entry.get("num_chs")) for entry in entries]
    entries = [
        entry
        for entry, level, following in zip(entries, levels, [*levels[1:], None], strict=True)
        if level != following
    ]
    names = [str(entry.get("module", "")) for entry in entries]
    if all(name in seen.calls for name in names):
        return sorted({seen.calls[name][-1].end for name in names})
    return _top_level_marks(seen, len(entries) - 1)


def _top_level_marks(seen: Look, count: int) -> list[int] | None:
    """When each of the root's children (or those of its ModuleLists) that hold a convolution block ended."""
    root = seen.calls[""][0]
    blocks = [call for call in root.children if _holds_join(seen, call.start, call.end)]
    grouped: dict[str, int] = {}
    for call in blocks:
        path = call.path
        top = path.split(".")[0]
        grouped[top if not isinstance(seen.modules[top], nn.ModuleList) or path.count(".") == 0 else path] = call.end
    return list(grouped.values())[:count] or None


def _holds_join(seen: Look, start: int, end: int) -> bool:
    return any(e.kind in ("add", "cat") and e.spatial and start < e.clock < end for e in seen.events)


def _resolution_marks(seen: Look) -> list[int]:
    """The last moment of every resolution, in order of execution; maps of one position belong to the one before."""
    marks: list[int] = []
    last: Event | None = None
    for event in (event for event in seen.events if event.spatial and event.transforms):
        if last is not None and _area(seen, event) < _area(seen, last):
            marks.append(_closed(seen, last))
        if last is None or _area(seen, event) <= _area(seen, last):
            last = event
    return [*marks, seen.calls[""][0].end]


def _area(seen: Look, event: Event) -> int:
    """Number of positions of a map, channels first or last."""
    axis = channel_axis(event.shape, seen.size or (1, 1))
    return math.prod(event.shape[1:-1] if axis == -1 else event.shape[2:])


def _closed(seen: Look, last: Event) -> int:
    """When a resolution was left for good: at the end of the outermost call that did nothing at a lower one after.

    That is the last operation itself, where the module that ran it went on at a lower resolution.
    """
    end = last.clock
    call: Call | None = next(c for c in seen.calls[last.path] if c.start < last.clock < c.end)
    while call is not None and not _falls(seen, call, last):
        end, call = call.end, call.parent
    return end


def _falls(seen: Look, call: Call, last: Event) -> bool:
    later = (e for e in seen.during(call) if e.clock > last.clock and e.spatial and e.transforms)
    return any(_area(seen, event) < _area(seen, last) for event in later)
