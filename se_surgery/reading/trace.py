"""Trace: write the forward of one block as a graph that reads like its source.

In: a block (a module whose own forward joins branches), and the arguments of one observed call. Out: a `Trace`, a
torch.fx graph with the block's children as leaves.

What torch.fx alone gets wrong for a rewriter, and is put right here: arguments that are not tensors are kept as the
constants they were in the call; what the forward asks of its tensors' shapes is answered (see `proxies`) and asked
again when the graph runs; in-place operators of the source (`x += y`) stay in place; buffers are read when the
forward runs; a parameter is never frozen into the graph; nothing is eliminated as dead; whatever the forward read that
is no tensor, and which the graph has frozen, is written down (see `reads`); what a graph would drop is refused (see
`effects`); other threads may go on running models.
"""

from __future__ import annotations

import collections
import copy
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from ..errors import TraceError
from .blame import is_ours
from .effects import is_container, only_computing
from .events import Call
from .modes import modes_off
from .numbers import Numbers
from .observed import Observed
from .outer import add_outer
from .reads import BASE, SELF, Read
from .tracer import Argument, Step, Tracer
from .watch import Watch


@dataclass(frozen=True)
class Trace:
    """A block's method as a graph.

    Attributes:
        method: Name of the method, `forward` for almost every block.
        graph: Its graph; children of the block are `call_module` leaves.
        signature: The method's signature, without `self`.
        arguments: How the arguments of the call were bound.
        lengths: Length of every list or tuple that holds tensors, by (parameter, steps).
        reads: What the method read that is no tensor, with the values that the graph is made for.
        bare: Parameters that were given a list of one tensor, and for which that tensor alone does the same.
        modal: Whether the method read `self.training`, or a child's, so that its graph may be another one in the
            other mode.
    """

    method: str
    graph: fx.Graph
    signature: inspect.Signature
    arguments: tuple[Argument, ...]
    lengths: tuple[tuple[str, tuple[Step, ...], int], ...]
    reads: tuple[Read, ...] = ()
    bare: tuple[str, ...] = ()
    modal: bool = False


def shallow_view(cls: type, state: dict[str, Any]) -> nn.Module:
    """A module of class `cls` over `state`: a block as it was before surgery, without touching the block.

    Parameters, buffers and children are the block's own; the containers that hold them, and any other list, dict or
    set, are copies, so that a forward that writes to `self` writes to the view.
    """
    view: nn.Module = object.__new__(cls)
    view.__dict__.update({name: _copied(value) if is_container(value) else value for name, value in state.items()})
    return view


def _copied(container: Any) -> Any:
    """A copy of a container; those of Python's own classes know how to make one in a fraction of the time."""
    return container.copy() if type(container) in _CONTAINERS else copy.copy(container)


_CONTAINERS = frozenset({dict, list, set, collections.OrderedDict})


@modes_off
def trace(
    block: nn.Module,
    call: Call,
    *,
    method: str = "forward",
    training: bool = False,
    calls_of: Callable[[str], Sequence[Call]] = lambda path: (),
) -> Trace:
    """Trace `block.method` for the arguments of `call`.

    Args:
        block: The block, its own class's forward unchanged (see `shallow_view` for one that was operated on).
        call: An observed call of it.
        method: The method to trace.
        training: The value `self.training` has in the trace.
        calls_of: The observed calls of the child at a path inside this one.

    Raises:
        TraceError: The method cannot be written as a graph, with the reason.
    """
    view = shallow_view(type(block), {**block.__dict__, "training": training})
    function = getattr(type(block), method)
    signature = inspect.signature(function)
    signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    bound = signature.bind(*call.args, **call.kwargs)
    watch = Watch(view, training)
    tracer = Tracer(method, bound, watch, Observed(view, calls_of))
    _meet(watch, type(block), method)
    try:
        with only_computing(view, method), watch.patching(), Numbers(tracer, watch) as numbers:
            graph = tracer.trace(view)
            if watch.fault is not None:
                raise watch.fault
        add_outer(watch, view)
        numbers.refuse_frozen()
        tracer.refuse_written()
    except TraceError as error:
        error.reads = _read(watch)
        raise
    except Exception as error:  # whatever the block's own code raises on a proxy
        if watch.fault is not None:
            raise watch.fault from None
        if isinstance(error, MemoryError) or is_ours(error):
            raise
        reason = f"its forward cannot be traced ({type(error).__name__}: {_first_line(error)})"
        refusal = TraceError(reason)
        refusal.reads = _read(watch)
        raise refusal from error
    arguments, lengths = tuple(tracer.arguments), tuple(tracer.lengths)
    return Trace(method, graph, signature, arguments, lengths, _read(watch), modal=watch.modal)


def _read(watch: Watch) -> tuple[Read, ...]:
    """What was read: the block's own first, the nearest first, and otherwise by name."""
    found = watch.reads.found.values()
    return tuple(sorted(found, key=lambda read: (read.root != SELF, len(read.steps), read.name, read.kind)))


def _meet(watch: Watch, cls: type[nn.Module], method: str) -> None:
    """Note the functions that a method is, those included that it overrides and may go on with."""
    for i, base in enumerate(cls.__mro__):
        function = base.__dict__.get(method)
        function = getattr(function, "__func__", function)
        if isinstance(function, types.FunctionType):
            way = ((".", "__mro__"), ("[]", i), (".", "__dict__"), ("[]", method))
            watch.reads.functions.append((function, BASE, way))


def with_bare(
    traced: Trace, block: nn.Module, call: Call, training: bool, calls_of: Callable[[str], Sequence[Call]]
) -> Trace:
    """The trace, with the parameters for which a list of one tensor and the tensor itself come to the same graph.

    SelecSLS's blocks take both, and timm's `FeatureListNet` gives the first one the other.
    """
    names = tuple(parameter for parameter, steps, length in traced.lengths if not steps and length == 1)
    if not names:
        return traced
    bound = traced.signature.bind(*call.args, **call.kwargs)
    bound.arguments.update({name: bound.arguments[name][0] for name in names})
    try:
        bare = replace(call, args=bound.args, kwargs=bound.kwargs)
        other = trace(block, bare, method=traced.method, training=training, calls_of=calls_of)
    except TraceError:
        return traced
    same = structure(other.graph, constants=True) == structure(traced.graph, constants=True)
    return replace(traced, bare=names) if same else traced


def structure(graph: fx.Graph, constants: bool = False) -> list[tuple[Any, ...]]:
    """What two graphs have to have in common to be the same one; placeholders may have any names.

    Args:
        graph: A graph.
        constants: Whether arguments that are no values of the graph count, too.
    """
    names = {node: node.name for node in graph.nodes}
    inputs = {node: f"placeholder {i}" for i, node in enumerate(n for n in names if n.op == "placeholder")}
    names |= inputs

    def given(node: fx.Node) -> Any:
        if constants:
            return str(fx.node.map_arg((node.args, node.kwargs), lambda source: names[source]))
        return [names[source] for source in node.all_input_nodes]

    return [(n.op, names[n], None if n in inputs else n.target, given(n)) for n in graph.nodes]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
