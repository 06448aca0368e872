"""Nesting: which units remain where units lie in one another, or several have one place.

In: what each join of a network is by itself. Out: the units that count; each of the others is a join with a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from ..reading.dataflow import Value
from ..reading.events import Call
from ..records import original_class
from .graph import Graph, Join, members
from .rules import ATTENTION, LONG, TWICE, WITHIN, Found, Unfit, Verdicts, around

HOLDER = "joins branches that hold whole units; those get the SEs"
_ORDER = {"residual": 0}


def settle(graph: Graph, verdicts: Verdicts) -> None:
    """Take out the units that do not count."""
    _open_nets(graph, verdicts)
    _attending(verdicts)
    _strided(graph, verdicts)
    _cells(graph, verdicts)
    _one_a_place(verdicts)
    _resolve(graph, verdicts)


def _give_up(verdicts: Verdicts, units: Iterable[Found], reason: str) -> None:
    """Make joins with a reason of some units."""
    gone = dict.fromkeys(units)  # in their order
    verdicts.found = [found for found in verdicts.found if found not in gone]
    still = {found.join for found in verdicts.found}
    joins = dict.fromkeys(found.join for found in gone)
    verdicts.unfit += [(join, Unfit(reason)) for join in joins if join not in still]


def _open_nets(graph: Graph, verdicts: Verdicts) -> None:
    """The innermost of nested U-Nets has no smaller maps: its class says what it is."""
    long = Counter(_class_of(join) for join, unfit in verdicts.unfit if unfit.reason == LONG)
    found = Counter(_class_of(found.join) for found in verdicts.found)
    nets = {cls for cls, count in long.items() if count >= found[cls]}
    _give_up(verdicts, [found for found in verdicts.found if _class_of(found.join) in nets], LONG)


def _attending(verdicts: Verdicts) -> None:
    """What is concatenated with the blocks of a transformer (YOLO's C2PSA) is a part of that."""
    blocks = [join.value.index for join, unfit in verdicts.unfit if unfit.reason == ATTENTION]
    holders = [f for f in verdicts.found if f.kind != "residual" and any(f.region >> index & 1 for index in blocks)]
    _give_up(verdicts, holders, ATTENTION)


def _strided(graph: Graph, verdicts: Verdicts) -> None:
    """ShuffleNet's strided units look like two parallel branches; their class says what they are.

    The longer side is the branch. What only pools on the other side (a reduction) says nothing of its class.
    """
    split = {_class_of(found.join) for found in verdicts.found if found.kind == "concat_residual" and _passes(found)}
    for i, found in enumerate(verdicts.found):
        if found.kind == "inception" and len(found.join.operands) == 2 and _class_of(found.join) in split:
            branch, other = sorted(found.join.operands, key=lambda side: side.convolutions, reverse=True)
            verdicts.found[i] = Found("concat_residual", found.join, branch, other)


def _passes(found: Found) -> bool:
    return found.shortcut is not None and not found.shortcut.is_pooled


def _class_of(join: Join) -> type[nn.Module]:
    return original_class(join.graph.look.modules[join.path])


def _cells(graph: Graph, verdicts: Verdicts) -> None:
    """What is joined on the way to a cell's concatenation, in the same forward, is the cell's."""
    cells = [found.join.value for found in verdicts.found if found.kind == "cell"]
    inner = [found for found in verdicts.found if found.kind != "cell" and _feeds(graph, found, cells)]
    _give_up(verdicts, inner, WITHIN)


def _feeds(graph: Graph, found: Found, cells: list[Value]) -> bool:
    value = found.join.value
    return any(value.frame is cell.frame and graph.ancestors[cell.index] >> value.index & 1 for cell in cells)


def _one_a_place(verdicts: Verdicts) -> None:
    """Of units with one place the residual one stays, and otherwise the first one."""
    best: dict[int, Found] = {}
    for found in sorted(verdicts.found, key=lambda found: _ORDER.get(found.kind, 1)):
        best.setdefault(found.site, found)
    kept = set(best.values())
    branches = {found.site for found in kept if found.kind == "residual"}
    twice = (found for found in verdicts.found if found not in kept or _joins_again(found, branches))
    _give_up(verdicts, list(twice), TWICE)


def _joins_again(found: Found, branches: set[int]) -> bool:
    """Whether a concatenation takes the rest of what an addition takes a part of (dual-path networks)."""
    made = {operand.made for operand in found.join.operands}
    return found.join.kind == "cat" and found.kind != "residual" and not made.isdisjoint(branches)


def _resolve(graph: Graph, verdicts: Verdicts) -> None:
    """Of units inside one another keep the inner ones where those are whole residual units, else the outer one.

    A branch that holds a single residual with convolutions behind it is a block with an attention module of that form
    (BAT) in it; with several it is a group of blocks.
    """
    waiting = sorted(verdicts.found, key=lambda found: found.region.bit_count(), reverse=True)
    holders = {
        _class_of(outer.join) for outer in waiting if outer.kind != "residual" and len(_whole(waiting, outer)) > 1
    }
    gone: set[Found] = set()
    for outer in waiting:
        if outer in gone:
            continue
        inner = [found for found in waiting if found not in gone and _is_inside(found, outer)]
        whole = [found for found in _whole(waiting, outer) if found not in gone]
        # Of one class all hold what one of them does: the same module has more blocks in it elsewhere.
        is_holder = outer.kind != "residual" and _class_of(outer.join) in holders
        is_group = len(whole) > 1 or _is_of_modules(graph, waiting, outer)
        if is_group or (whole and (is_holder or not _goes_on(graph, outer, whole[0]))):
            gone.add(outer)
            _give_up(verdicts, [outer], HOLDER)
        elif inner:
            gone.update(inner)
            _give_up(verdicts, inner, WITHIN)


def _whole(units: list[Found], outer: Found) -> list[Found]:
    """The whole residual units inside another one, in other forwards than its own."""
    inner = (found for found in units if found.kind == "residual" and _is_inside(found, outer))
    return [found for found in inner if _is_elsewhere(found, outer)]


def _is_of_modules(graph: Graph, units: list[Found], outer: Found) -> bool:
    """Whether a residual goes around several Inception modules, and has no other convolution (InceptionTime)."""
    inner = [found for found in units if found.kind == "inception" and _is_inside(found, outer)]
    frames = [_module_of(graph, found) for found in inner if _is_elsewhere(found, outer)]
    if outer.kind != "residual" or len(frames) < 2:
        return False
    made = (graph.values[index] for index in members(outer.region & graph.convolutions))
    return all(any(value.is_in(frame) for frame in frames) for value in made)


def _module_of(graph: Graph, found: Found) -> Call:
    """The call that an Inception module is: what concatenates may be a module of its own in it."""
    frame = found.join.value.frame
    assert frame is not None
    made = (graph.values[index] for index in members(found.region & graph.convolutions))
    return frame if any(value.is_in(frame) for value in made) else around(found.join)


def _is_inside(inner: Found, outer: Found) -> bool:
    if inner.kind == outer.kind == "dense":
        return False  # each is made of those before
    region = outer.region
    is_part = inner.join.value.index != outer.join.value.index and not inner.region & ~region
    return is_part and bool(region >> inner.join.value.index & 1)


def _is_elsewhere(inner: Found, outer: Found) -> bool:
    """Whether a unit is in another module's forward than the one that it lies in: one forward is one unit."""
    return inner.join.value.frame is not outer.join.value.frame and outer.kind != "cell"


def _goes_on(graph: Graph, outer: Found, inner: Found) -> bool:
    """Whether convolutions of an outer unit come behind an inner one's join."""
    after = outer.region & graph.convolutions & ~graph.ancestors[inner.join.value.index]
    return any(graph.ancestors[index] >> inner.join.value.index & 1 for index in members(after))
