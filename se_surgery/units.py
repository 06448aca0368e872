"""Units: the places of a network that an SE serves, recognised by the way the data goes.

In: an `Anatomy`. Out: `Unit`s in order of execution, and every join that is none with its reason.

Every addition and concatenation of feature maps is a candidate. Rules in a fixed order say what it is; the first one
with an opinion decides. A join inside another unit's branch belongs to that unit. Blocks without a join are units too
where they are of a class that elsewhere has a shortcut, or pair a depthwise with a pointwise convolution; a network
with no unit at all is a plain one, and each of its convolutions is a unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx, nn

from .anatomy import Anatomy, Block, is_under, no_activation_after_convolution, parents
from .errors import TraceError
from .look import Event
from .records import original_class


@dataclass(frozen=True)
class Unit:
    """A unit: where an SE can sit.

    Attributes:
        path: Path of its block.
        kind: `residual`, `concat_residual`, `inception`, `aggregation`, `straight`, `dense` or `plain`.
        block: The traced block.
        end: When it ended, on the look's clock.
        join: The addition or concatenation; None for `straight`, `dense` and `plain`.
        branch: Set of nodes of the transformed branch alone.
        transformed: Last node of the branch.
        untransformed: Last node of the shortcut.
        convolution: The convolution of a `plain` unit.
    """

    path: str
    kind: str
    block: Block
    end: int
    join: fx.Node | None = None
    branch: int = 0
    transformed: fx.Node | None = None
    untransformed: fx.Node | None = None
    convolution: Event | None = None

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """The nodes of the branch."""
        return self.block.within(self.branch)

    @property
    def start(self) -> int:
        """When its block began."""
        return self.block.call.start


@dataclass(frozen=True)
class Reject:
    """A join, or a block, that gets no SE, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Operand:
    """One operand of a join, with the set of nodes that it alone is computed from."""

    node: fx.Node
    alone: int
    script: str

    @property
    def convolutions(self) -> int:
        """Number of convolutions on the way to this operand alone."""
        return self.script.count("c")

    @property
    def transformed(self) -> bool:
        """Whether it has a convolution and an activation."""
        return "c" in self.script and "a" in self.script


@dataclass(frozen=True)
class Join:
    """An addition or concatenation of feature maps in a block's own forward."""

    block: Block
    node: fx.Node
    kind: str
    operands: tuple[Operand, ...]


@dataclass
class Units:
    """What `recognise` found: the units in order of execution, and the rejected candidates."""

    found: list[Unit] = field(default_factory=list)
    rejected: list[Reject] = field(default_factory=list)


def recognise(anatomy: Anatomy) -> Units:
    """Find the units of a model."""
    units = Units()
    for path in _owners(anatomy):
        try:
            block = anatomy.block(path)
        except TraceError as error:
            units.rejected.append(Reject(path, f"{error}"))
            continue
        _units_of_block(block, units)
    units.found = _resolve_nesting(units)
    _same_class(anatomy, units)
    _separable(anatomy, units)
    if not units.found:
        _plain(anatomy, units)
    units.found.sort(key=lambda unit: (unit.end, unit.start))
    return units


def _owners(anatomy: Anatomy) -> list[str]:
    """The modules whose own forward joins feature maps, in order of execution."""
    seen = anatomy.look
    paths = dict.fromkeys(event.path for event in seen.events if event.kind in ("add", "cat") and event.spatial)
    return [path for path in paths if not isinstance(seen.modules[path], nn.Sequential)]


# ---------------------------------------------------------------------------------------------------- joins of a block


def _units_of_block(block: Block, units: Units) -> None:
    """The units of one block, from its last join back: a join inside a unit's branch is a part of that unit."""
    taken = 0
    for node in reversed(block.nodes):
        if taken >> block.index[node] & 1:
            continue
        join = _join(block, node)
        if join is None:
            continue
        answer = next(answer for rule in RULES if (answer := rule(join)) is not None)
        if isinstance(answer, Reject):
            if answer.reason:
                units.rejected.append(answer)
            continue
        units.found.extend(answer)
        for operand in join.operands:
            taken |= operand.alone


def _join(block: Block, node: fx.Node) -> Join | None:
    kind = block.kind(node)
    if kind not in ("add", "cat") or not block.is_map(node):
        return None
    sources = _flatten(block, node, kind)
    shapes = [tuple(block.value(source).shape) for source in sources]
    if len(sources) < 2 or (kind == "add" and len(set(shapes)) > 1):
        return None
    operands = []
    for source in sources:
        others = 0
        for other in sources:
            if other is not source:
                others |= block.ancestors[other]
        alone = block.ancestors[source] & ~others
        operands.append(Operand(source, alone, block.script(block.within(alone))))
    return Join(block, node, kind, tuple(operands))


def _flatten(block: Block, node: fx.Node, kind: str) -> list[fx.Node]:
    """The operands of a join; a sum of sums, each used nowhere else, is one sum of all."""
    operands: list[fx.Node] = []
    for source in block.maps_into(node):
        if kind == "add" and block.kind(source) == "add" and len(source.users) == 1 and block.is_map(source):
            operands += _flatten(block, source, kind)
        else:
            operands.append(source)
    return operands


Answer = Reject | list[Unit] | None


def _residual(join: Join) -> Answer:
    """A branch with convolutions and activations, and a shortcut with fewer of the one and none of the other after."""
    if join.kind != "add" or len(join.operands) != 2:
        return None
    for branch, shortcut in (join.operands, join.operands[::-1]):
        fewer = shortcut.convolutions < branch.convolutions
        if branch.transformed and fewer and no_activation_after_convolution(shortcut.script):
            return [_joined("residual", join, branch, shortcut)]
    return None


def _sum(join: Join) -> Answer:
    """Any other addition is no unit."""
    if join.kind != "add":
        return None
    path = join.block.path
    if len(join.operands) > 2:
        return Reject(path, f"a sum of {len(join.operands)} maps is a fusion, not a residual")
    if sum(operand.transformed for operand in join.operands) == 2:
        return Reject(path, "a sum of two transformed maps is a fusion, not a residual")
    if any("c" in operand.script for operand in join.operands):
        return Reject(path, "no activation on the branch: a sum that can be re-parameterised, or an attention's")
    return Reject(path, "no convolution on either side of the addition")


def _cell(join: Join) -> Answer:
    """NASNet's cells: a concatenation of two and more sums."""
    sums = [operand for operand in join.operands if join.block.kind(operand.node) == "add"]
    return [_joined("inception", join)] if len(sums) >= 2 else None


def _dual_path(join: Join) -> Answer:
    """Dual-path networks join the same transformation twice: the addition is the unit, the concatenation a part."""
    sides = [operand for operand in join.operands if operand.transformed]
    if len(sides) != 1:
        return None
    block = join.block
    made = block.walk_back(sides[0].node)
    return Reject(block.path, "") if any(block.kind(u) == "add" for u in _reached(block, made)) else None


def _reached(block: Block, node: fx.Node) -> Iterable[fx.Node]:
    """What takes a node's value, itself or a slice of it."""
    for user in node.users:
        yield user
        if block.passes(user):
            yield from _reached(block, user)


def _dense(join: Join) -> Answer:
    """Dense connectivity: every operand but the first is a layer's output, and each layer took all those before."""
    block, operands = join.block, [operand.node for operand in join.operands]
    layers = operands[1:]
    if not layers or not all(
        layer.op == "call_module" and all(block.ancestors[layer] >> block.index[o] & 1 for o in operands[:i])
        for i, layer in enumerate(layers, 1)
    ):
        return None
    takes_all = all(set(operands[:i]) <= set(layer.all_input_nodes) for i, layer in enumerate(layers, 1))
    return [_layer(block, layer) for layer in layers] if takes_all and len(layers) > 1 else None


def _layer(block: Block, node: fx.Node) -> Unit:
    call = block.calls[node.name]
    return Unit(call.path, "dense", block, call.end)


def _aggregation(join: Join) -> Answer:
    """One-shot aggregation: a chain of convolutions, all of it concatenated, and a convolution of that."""
    block = join.block
    chained = [
        operand
        for operand in join.operands
        if any(
            other is not operand and block.ancestors[other.node] >> block.index[operand.node] & 1
            for other in join.operands
        )
    ]
    if len(chained) < 2 or not any("c" in operand.script for operand in join.operands):
        return None
    end = _after_aggregation(block, join.node)
    if end is join.node:
        return None
    inside = block.ancestors[end] & ~_placeholders(block)
    return [Unit(block.path, "aggregation", block, block.call.end, join.node, inside, end)]


def _after_aggregation(block: Block, node: fx.Node) -> fx.Node:
    allowed = frozenset({"conv", "norm", "act"})
    last = node
    while len(last.users) >= 1:
        users = [user for user in last.users if user.op != "output"]
        if len(users) != 1 or not block.kinds(users[0]) or not block.kinds(users[0]) <= allowed:
            break
        last = users[0]
    return last


def _placeholders(block: Block) -> int:
    return sum(1 << i for i, node in enumerate(block.nodes) if node.op == "placeholder")


def _concat_residual(join: Join) -> Answer:
    """A residual by concatenation: one transformed operand with an untransformed one (chunked, pooled or plain)."""
    if join.kind != "cat" or len(join.operands) != 2:
        return None
    for branch, other in (join.operands, join.operands[::-1]):
        if branch.transformed and "c" not in other.script:
            return [_joined("concat_residual", join, branch, other)]
    return None


def _inception(join: Join) -> Answer:
    """Parallel branches from one input, concatenated."""
    branches = [operand for operand in join.operands if operand.transformed]
    return [_joined("inception", join)] if join.kind == "cat" and len(branches) >= 2 else None


def _concat(join: Join) -> Answer:
    """Any other concatenation is no unit."""
    return Reject(join.block.path, "a concatenation of maps that were not transformed here")


RULES: tuple[Callable[[Join], Answer], ...] = (
    _residual,
    _sum,
    _cell,
    _dual_path,
    _dense,
    _aggregation,
    _concat_residual,
    _inception,
    _concat,
)


def _joined(kind: str, join: Join, branch: Operand | None = None, other: Operand | None = None) -> Unit:
    block = join.block
    mask = branch.alone if branch else _union(operand.alone for operand in join.operands)
    return Unit(
        path=block.path,
        kind=kind,
        block=block,
        end=_end(block, join.node),
        join=join.node,
        branch=mask,
        transformed=branch.node if branch else None,
        untransformed=other.node if other else None,
    )


def _union(masks: Iterable[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def _end(block: Block, node: fx.Node) -> int:
    """When a node ran: the end of the last child called before it. The block's own end where it is its only unit."""
    before = [block.calls[n.name].end for n in block.nodes[: block.index[node]] if n.name in block.calls]
    return max(before, default=block.call.start) + 1 if not block.path else block.call.end


# ------------------------------------------------------------------------------------------- units within one another


def _resolve_nesting(units: Units) -> list[Unit]:
    """Of units inside one another keep the inner ones where those are whole residual units, else the outer one."""
    kept = list(units.found)
    by_depth = sorted(units.found, key=lambda unit: unit.path.count(".") if unit.path else -1)
    for outer in by_depth:
        if outer not in kept or outer.kind == "dense":
            continue
        inner = [unit for unit in kept if is_under(unit.path, outer.path) and _is_in_branch(outer, unit)]
        if any(unit.kind == "residual" for unit in inner):
            kept.remove(outer)
            units.rejected.append(Reject(outer.path, "joins branches that hold whole units; those get the SEs"))
            continue
        for unit in inner:
            kept.remove(unit)
    return kept


def _is_in_branch(outer: Unit, unit: Unit) -> bool:
    """Whether a unit's block was called in the branch of another (in any of its branches, for a concatenation)."""
    calls = outer.block.calls
    held = [calls[node.name].path for node in outer.nodes if node.name in calls]
    return any(unit.path == path or is_under(unit.path, path) for path in held)


# -------------------------------------------------------------------------------------------- blocks without a join


def _same_class(anatomy: Anatomy, units: Units) -> None:
    """Blocks of a class that elsewhere has a shortcut, and have none themselves: strided inverted residuals."""
    seen = anatomy.look
    classes = {_class_of(unit) for unit in units.found if unit.kind in _WITH_SHORTCUT and unit.path} - {nn.Sequential}
    # ShuffleNet's strided units look like a concatenation of parallel branches; their class says what they are.
    strided = [unit for unit in units.found if unit.kind == "inception" and _class_of(unit) in classes]
    units.found = [unit for unit in units.found if unit not in strided]
    found = []
    for path in seen.calls:
        if path and original_class(seen.modules[path]) in classes and not _touches(units.found, path):
            try:
                unit = _straight(anatomy.block(path))
            except TraceError as error:
                units.rejected.append(Reject(path, str(error)))
                continue
            script = unit.block.script(unit.nodes)
            if "c" in script and "a" in script:
                found.append(unit)
    units.found += found


_WITH_SHORTCUT = ("residual", "concat_residual")


def _class_of(unit: Unit) -> type[nn.Module]:
    return original_class(unit.block.look.modules[unit.path])


def other_ways(anatomy: Anatomy, unit: Unit) -> list[Unit]:
    """The same unit as other methods of its block have it (aligned Xception's `forward_with_tap`)."""
    if unit.kind in ("dense", "plain"):
        return []
    index = [other.join for other in _same_kind(unit.block, unit.kind)].index(unit.join)
    found = []
    for block in anatomy.other_ways(unit.path):
        units = _same_kind(block, unit.kind)
        if index < len(units):
            found.append(units[index])
    return found


def in_training(anatomy: Anatomy, unit: Unit) -> Unit | None:
    """The same unit as its block has it in training, or None where there is none."""
    training = anatomy.in_training
    if unit.kind == "dense":
        return unit
    if unit.convolution is not None:
        return plain_unit(training, unit.convolution)
    index = [other.join for other in _same_kind(unit.block, unit.kind)].index(unit.join)
    units = _same_kind(training.block(unit.path, unit.block.trace.method), unit.kind)
    return units[index] if index < len(units) else None


def _same_kind(block: Block, kind: str) -> list[Unit]:
    if kind == "straight":
        return [_straight(block)]
    units = Units()
    _units_of_block(block, units)
    return [unit for unit in units.found if unit.kind == kind] or [_straight(block)]


def _straight(block: Block) -> Unit:
    """A block without a shortcut as a unit: all it does is the branch."""
    path = block.path
    join = _last_concat(block)
    if join is not None:
        # ShuffleNet's strided unit: both sides are transformed; the longer one is the branch.
        branch, other = sorted(join.operands, key=lambda operand: operand.convolutions, reverse=True)
        return _joined("concat_residual", join, branch, other)
    output = block.output()
    inside = block.ancestors[output] & ~_placeholders(block) & ~(1 << block.index[output])
    return Unit(path, "straight", block, block.call.end, None, inside)


def _last_concat(block: Block) -> Join | None:
    joins = [join for node in block.nodes if (join := _join(block, node)) is not None]
    last = joins[-1] if joins else None
    return last if last is not None and last.kind == "cat" and len(last.operands) == 2 else None


def _touches(units: Iterable[Unit], path: str) -> bool:
    """Whether a block is a unit's, lies in one, or holds one."""
    return any(
        unit.path == path
        or is_under(unit.path, path)
        or (is_under(path, unit.path) and (unit.kind in ("dense", "straight") or _holds(unit, path)))
        for unit in units
    )


def _holds(unit: Unit, path: str) -> bool:
    calls = unit.block.calls
    return any(
        n.name in calls and (calls[n.name].path == path or is_under(path, calls[n.name].path)) for n in unit.nodes
    )


def _separable(anatomy: Anatomy, units: Units) -> None:
    """A depthwise convolution followed by a pointwise one in the same module (MobileNetV1, LCNet)."""
    seen = anatomy.look
    convolutions = [e for e in seen.events if e.kind == "conv" and e.spatial]
    pairs = [
        (first, second)
        for first, second in itertools.pairwise(convolutions)
        if first.depthwise and first.wide and not second.wide and second.groups == 1 and _learns(anatomy, first)
    ]
    holders: dict[str, list[Event]] = {}
    for first, second in pairs:
        holder = next(path for path in parents(first.path) if is_under(second.path, path))
        if not any(
            is_under(e.path, u.path) and (u.path or _holds(u, e.path)) for e in (first, second) for u in units.found
        ):
            holders.setdefault(holder, []).append(second)
    found = []
    for holder, seconds in holders.items():
        try:
            if len(seconds) == 1 and not isinstance(seen.modules[holder], nn.Sequential) and holder:
                found.append(_straight(anatomy.block(holder)))
            else:
                found += [plain_unit(anatomy, event) for event in seconds]
        except TraceError as error:
            units.rejected.append(Reject(holder, str(error)))
    units.found += found


def _learns(anatomy: Anatomy, event: Event) -> bool:
    return next(anatomy.look.modules[event.path].parameters(), None) is not None


def _plain(anatomy: Anatomy, units: Units) -> None:
    """In a network without any unit every convolution is one, with its normalisation and activation."""
    found: dict[tuple[str, str], Unit] = {}
    for event in anatomy.look.events:
        if event.kind != "conv" or not event.spatial or not _learns(anatomy, event):
            continue
        try:
            unit = plain_unit(anatomy, event)
        except TraceError as error:
            units.rejected.append(Reject(event.path, str(error)))
            continue
        assert unit.transformed is not None
        # Several convolutions of one re-parameterisable block count as one.
        found.setdefault((unit.block.path, unit.transformed.name), unit)
    units.found += found.values()


def plain_unit(anatomy: Anatomy, event: Event) -> Unit:
    """A convolution with its normalisation and activation as a unit of its own.

    Raises:
        TraceError: There is no place behind its activation that can hold an SE, with the reason.
    """
    block, node = after_convolution(anatomy, event)
    return Unit(block.path, "plain", block, block.call.end if block.path else event.clock, None, 0, node, None, event)


def after_convolution(anatomy: Anatomy, event: Event, within: str | None = None) -> tuple[Block, fx.Node]:
    """The node behind a convolution with its normalisation and activation, and the block it is in.

    Where a block under `within` ends there, it is the block around that one, as near to `within` as the value goes.

    Climbs from the convolution to the block whose own forward goes on after it. In an `nn.Sequential` that is no block
    (its indices are keys), there the activation itself is the block; never the convolution or the normalisation, which
    others replace (fusing, SyncBatchNorm).

    Raises:
        TraceError: No such place exists.
    """
    modules = anatomy.look.modules
    child = event.path
    for parent in _up_from(anatomy, event):
        if isinstance(modules[parent], nn.Sequential):
            host = _activation_behind(anatomy, parent, child)
            if host is not None:
                block = anatomy.block(host)
                return block, _returned(block)
            if not _ends_with(anatomy, parent, child):
                raise TraceError("its Sequential has no activation behind it that could hold an SE")
        else:
            block = anatomy.block(parent)
            node = _after_sums(block, _node_of(block, child, event))
            if within is None or not is_under(parent, within) or not _is_returned(block, node):
                return block, node
        child = parent
    raise TraceError("it is not reached from any block's forward")


def _is_returned(block: Block, node: fx.Node) -> bool:
    while node.op != "output":
        if len(node.users) != 1:
            return False
        (user,) = node.users
        if user.op == "output":
            return user.args[0] is node
        if not block.passes(user):
            return False
        node = user
    return False


def _up_from(anatomy: Anatomy, event: Event) -> list[str]:
    """The called modules around a convolution, nearest first; the caller of a functional convolution is the nearest."""
    module = anatomy.look.modules[event.path]
    above = [path for path in parents(event.path) if path in anatomy.look.calls]
    return (
        above if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or not module._modules else [event.path, *above]
    )


def _activation_behind(anatomy: Anatomy, sequential: str, child: str) -> str | None:
    """The activation that follows a child of a Sequential, behind its normalisation."""
    seen = anatomy.look
    prefix = sequential + "." if sequential else ""
    names = list(seen.modules[sequential]._modules)
    for name in names[names.index(child[len(prefix) :].split(".")[0]) + 1 :]:
        calls = seen.calls.get(prefix + name)
        if not calls:
            return None
        kinds = {event.kind for event in seen.during(calls[0])}
        if kinds == {"act"}:
            return prefix + name
        if kinds == {"norm", "act"}:
            acts = [event.path for event in seen.during(calls[0]) if event.kind == "act"]
            return acts[0] if acts[0] != prefix + name else None
        if kinds - {"norm"} or isinstance(seen.modules[prefix + name], nn.Flatten):
            return None
    return None


def _ends_with(anatomy: Anatomy, sequential: str, child: str) -> bool:
    """Whether nothing but normalisation and identities follows a child of a Sequential."""
    seen = anatomy.look
    prefix = sequential + "." if sequential else ""
    names = list(seen.modules[sequential]._modules)
    following = names[names.index(child[len(prefix) :].split(".")[0]) + 1 :]
    events = [event for name in following for call in seen.calls.get(prefix + name, []) for event in seen.during(call)]
    shapes = {tuple(call.output.shape) for name in following for call in seen.calls.get(prefix + name, [])}
    return {event.kind for event in events} <= {"norm"} and len(shapes) <= 1


def _returned(block: Block) -> fx.Node:
    value = block.output().args[0]
    if not isinstance(value, fx.Node) or not block.is_map(value):
        raise TraceError(f"{block.path!r} does not return one feature map")
    return value


def _node_of(block: Block, child: str, event: Event) -> fx.Node:
    """The node in which a convolution ran."""
    for node in block.nodes:
        if event in block.events(node):
            return node
    raise TraceError(f"the convolution at {child!r} is not reached from the forward of {block.path or 'the model'!r}")


def _after_sums(block: Block, node: fx.Node) -> fx.Node:
    """Behind normalisation and activation, and behind the sum of branches that re-parameterisation makes one."""
    kinds = frozenset({"norm", "act"})
    while True:
        node = block.walk_forward(node, kinds)
        users = list(node.users)
        if "act" in block.kinds(node) or len(users) != 1 or block.kind(users[0]) != "add":
            return node
        node = users[0]
