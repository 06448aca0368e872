"""Behind: the place behind a convolution with its normalisation and activation.

In: an `Anatomy` and a convolution that ran. Out: the block that holds the place, and the node whose value it is.
"""

from __future__ import annotations

from torch import fx, nn

from .anatomy import Anatomy, Block, is_under, parents
from .errors import TraceError
from .events import Call, Event
from .find import is_se
from .joins import Unit
from .look import Look


def after_convolution(anatomy: Anatomy, event: Event, unit: Unit | None = None) -> tuple[Block, fx.Node]:
    """The node behind a convolution with its normalisation and activation, and the block it is in.

    A block that ends before the activation is followed by the one around it; with `unit`, so is every block in that
    unit's that ends there, but never behind the unit's own join.

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
            node = _after_sums(block, _node_of(block, child, event), unit.join if unit is not None else None)
            is_done = "act" in block.kinds(node) if unit is None else not is_under(parent, unit.path)
            if is_done or not _is_returned(block, node):
                if unit is None and "act" not in block.kinds(node):
                    break
                return block, node
        child = parent
    raise TraceError("no activation follows the convolution")


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
    for calls in _following(seen, sequential, child):
        if not calls:
            return None
        path = calls[0].path
        # An SE that an activation holds already has no part in what it is.
        events = [event for event in seen.during(calls[0]) if event.spatial and event.transforms]
        kinds = {event.kind for event in events}
        if kinds == {"act"}:
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
        following = _next_sum(block, node)
        if "act" in block.kinds(node) or following is None or following is stop:
            return node
        node = following


def _after_se(block: Block, node: fx.Node) -> fx.Node:
    """Behind an SE that stands between a convolution and its activation (RepVGG's), and behind that activation."""
    if "act" in block.kinds(node) or len(node.users) != 1:
        return node
    (user,) = node.users
    call = block.calls.get(user.name)
    if call is None or not is_se(block.look, call):
        return node
    return block.walk_forward(user, frozenset({"norm", "act"}))


def _next_sum(block: Block, node: fx.Node) -> fx.Node | None:
    """The addition that a value goes to next, through drop paths and the like."""
    while len(node.users) == 1:
        (node,) = node.users
        if block.kind(node) == "add":
            return node
        if node.op == "output" or not block.passes(node):
            return None
    return None
