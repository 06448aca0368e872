"""Behind: the place behind a convolution with its normalisation and activation.

In: an `Anatomy` and a convolution that ran. Out: the block that holds the place, and the node whose value it is.
"""

from __future__ import annotations

from torch import fx, nn

from ..errors import TraceError
from ..reading.anatomy import Anatomy
from ..reading.block import Block
from ..reading.events import Call, Event
from ..reading.layout import is_under, parents
from ..reading.look import Look
from .find import is_se
from .unit import Unit


def after_convolution(anatomy: Anatomy, event: Event, unit: Unit | None = None) -> tuple[Block, fx.Node]:
    """The node behind a convolution with its normalisation and activation, and the block it is in.

    A block that ends before the activation is followed by the one around it; with `unit`, so is every block in that
    unit's that ends there, but never behind the unit's own join. With `unit` the node is that of a whole map, too:
    where convolutions make a part of it each (Res2Net, MixNet, GhostNet, the paths of a selective kernel), the value
    behind one of them is not what the next layer takes.

    Climbs from the convolution to the block whose own forward goes on after it. In an `nn.Sequential` that is no block
    (its indices are keys), there the activation itself is the block; never the convolution or the normalisation, which
    others replace (fusing, SyncBatchNorm).

    Raises:
        TraceError: No such place exists.
    """
    modules = anatomy.look.modules
    child, inside = event.path, None
    for parent in _up_from(anatomy, event):
        if isinstance(modules[parent], nn.Sequential):
            if inside is not None and type(modules[parent]).forward is not nn.Sequential.forward:
                return inside  # VoVNet's chain, which returns all that is in it
            host = _activation_behind(anatomy, parent, child)
            if host is not None:
                block = anatomy.block(host)
                return block, _returned(block)
            if not _ends_with(anatomy, parent, child):
                raise TraceError("its Sequential has no activation behind it that could hold an SE")
        else:
            # The unit may be another method's of its block.
            own = unit.block if unit is not None and unit.block.path == parent else None
            block = own or anatomy.block(parent)
            node = _node_of(block, child, event)
            node = _after_sums(block, node, None) if unit is None else _after_parts(block, node, unit)
            is_done = "act" in block.kinds(node) if unit is None else not is_under(parent, unit.path)
            goes_on = _is_returned(block, node) or (unit is not None and _is_stacked(block, node))
            if is_done or not goes_on:
                if unit is None and "act" not in block.kinds(node):
                    break
                return block, node
            inside = block, node
        child = parent
    raise TraceError("no activation follows the convolution")


def behind_in(block: Block, event: Event) -> fx.Node:
    """The node behind a convolution with its normalisation and activation in one of its block's graphs.

    Raises:
        TraceError: The convolution is not in it, or no activation follows.
    """
    node = _after_sums(block, _node_of(block, event.path, event), None)
    if "act" not in block.kinds(node):
        raise TraceError("no activation follows the convolution")
    return node


def _is_stacked(block: Block, node: fx.Node) -> bool:
    """Whether a map is stacked with others, for its block to choose from (SKNet)."""
    users = block.takers(node)
    return len(users) == 1 and getattr(users[0].target, "__name__", "") == "stack"


def _is_returned(block: Block, node: fx.Node) -> bool:
    while node.op != "output":
        users = block.takers(node)
        if len(users) != 1:
            return False
        (user,) = users
        if user.op == "output":
            return user.args[0] is node
        if not block.passes(user):
            return False
        node = user
    return False


def _up_from(anatomy: Anatomy, event: Event) -> list[str]:
    """The called modules around a convolution, nearest first; the caller of a functional convolution is the nearest."""
    seen = anatomy.look
    above = [path for path in parents(event.path) if path in seen.calls]
    is_layer = isinstance(seen.modules[event.path], (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    # One that is no class of torch's may be a layer, too: it does nothing else with maps.
    is_layer = is_layer or sum(own.spatial for own in seen.own(seen.calls[event.path][0])) == 1
    return above if is_layer else [event.path, *above]


def _activation_behind(anatomy: Anatomy, sequential: str, child: str) -> str | None:
    """The activation that follows a child of a Sequential, behind its normalisation."""
    seen = anatomy.look
    for calls in _following(seen, sequential, child):
        if not calls:
            return None
        path = calls[0].path
        # An SE that an activation holds already has no part in what it is.
        events = [event for event in seen.during(calls[0]) if event.spatial and event.transforms]
        kinds = {event.kind for event in events}
        # One that is written out, as the snake of audio is, may be a sum.
        if "act" in kinds and kinds <= {"act", "add"}:
            return path
        if kinds == {"norm", "act"}:
            acts = [event.path for event in events if event.kind == "act"]
            return acts[0] if acts[0] != path else None
        if kinds - {"norm"} or isinstance(seen.modules[path], nn.Flatten):
            return None
    return None


def _ends_with(anatomy: Anatomy, sequential: str, child: str) -> bool:
    """Whether nothing but normalisation and identities follows a child of a Sequential."""
    seen = anatomy.look
    following = [call for calls in _following(seen, sequential, child) for call in calls]
    events = [event for call in following for event in seen.during(call)]
    shapes = {tuple(call.output.shape) for call in following}
    return {event.kind for event in events if event.spatial and event.transforms} <= {"norm"} and len(shapes) <= 1


def _following(seen: Look, sequential: str, child: str) -> list[list[Call]]:
    """The calls of each entry of a Sequential behind a child of it, in the Sequential's first call."""
    prefix = sequential + "." if sequential else ""
    names = list(seen.modules[sequential]._modules)
    behind = names[names.index(child[len(prefix) :].split(".")[0]) + 1 :]
    return [seen.inside(seen.calls[sequential][0], prefix + name) for name in behind]


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


def _after_sums(block: Block, node: fx.Node, stop: fx.Node | None) -> fx.Node:
    """Behind normalisation and activation, and behind the sums of branches that re-parameterisation makes one."""
    while True:
        node = _after_se(block, block.walk_forward(node, frozenset({"norm", "act"})))
        following = _next(block, node, "add")
        if "act" in block.kinds(node) or following is None or following is stop:
            return node
        node = following


def _after_parts(block: Block, node: fx.Node, unit: Unit) -> fx.Node:
    """As `_after_sums`, and behind the concatenation in the unit's branch that makes a whole map of parts.

    What is concatenated with the block's own input is no part (HGNet, VoVNet): it is one of several maps.
    """
    while True:
        node = _after_sums(block, node, unit.join)
        following = _next(block, node, "cat")
        if following is None or following is unit.join:
            return node
        if any(part.op == "placeholder" for part in block.maps_into(following)):
            return node
        node = following


def _after_se(block: Block, node: fx.Node) -> fx.Node:
    """Behind an SE that stands between a convolution and its activation (RepVGG's), and behind that activation."""
    users = block.takers(node)
    if "act" in block.kinds(node) or len(users) != 1:
        return node
    (user,) = users
    call = block.calls.get(user.name)
    if call is None or not is_se(block.look, call):
        return node
    return block.walk_forward(user, frozenset({"norm", "act"}))


def _next(block: Block, node: fx.Node, kind: str) -> fx.Node | None:
    """The addition or concatenation that a value goes to next, through drop paths and the like."""
    while len(users := block.takers(node)) == 1:
        (node,) = users
        if block.kind(node) == kind:
            return node
        if node.op == "output" or not block.passes(node):
            return None
    return None
