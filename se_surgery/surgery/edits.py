"""Edits: the changes that operations make to modules.

In: modules and decisions made elsewhere. Out: changed modules. `graft` and `strip` are made of these; every module goes
through a `Journal` before it is changed, so that an error half-way leaves nothing behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import fx, nn

from ..errors import PatientError, TraceError
from ..planning.placements import is_returned
from ..reading.anatomy import Anatomy
from ..reading.trace import Trace, shallow_view
from ..reading.ways import names_in
from ..records import (
    HELD,
    IMPLANTS,
    OPERATIONS,
    REPLACED,
    Edge,
    Implant,
    generated_class,
    implants,
    original_class,
    original_state,
)
from ..se.tail import ends_in_norm, is_pointwise
from .codegen import RECOMPUTING, join, method_code, outer_code, signature_of, wrapping_code
from .deploying import folds
from .generated import Code, give_class, subclass
from .guards import objects, watched
from .insertion import Insertion
from .journal import Journal


def take_out(journal: Journal, modules: dict[str, nn.Module], path: str, keep: bool = True) -> Implant | None:
    """Take an SE out of its place, and return its record if it is an implant.

    Where a native SE is or was, an Identity is left; with `keep` that SE is kept aside, so that it can be put back.
    """
    holder, _, name = path.rpartition(".")
    parent = journal.open(modules[holder])
    record = next((implant for implant in implants(parent) if implant.name == name), None)
    native = parent._modules[name] if record is None else _undo(journal, parent, record)
    if isinstance(native, nn.Module) and not isinstance(native, nn.Identity):
        parent._modules[name] = nn.Identity().train(parent.training)
        if keep:
            set_replaced(parent, {**parent.__dict__.get(REPLACED, {}), name: native})
    return record


def _undo(journal: Journal, parent: nn.Module, record: Implant) -> Any:
    """Undo one implant's own change; returns what stands under its name again."""
    gone = parent._modules[record.name]
    if isinstance(record.before, nn.Module):
        parent._modules[record.name] = like(journal, record.before, gone)
    else:
        del parent._modules[record.name]
        if record.before is None:
            parent.__dict__[record.name] = None
    left = [implant for implant in implants(parent) if implant.name != record.name]
    if left:
        parent.__dict__[IMPLANTS] = left
    else:
        del parent.__dict__[IMPLANTS]
    return record.before


def set_replaced(parent: nn.Module, kept: dict[str, nn.Module]) -> None:
    """Write down the native SEs that are kept aside for a module; none leave no trace."""
    if kept:
        parent.__dict__[REPLACED] = kept
    else:
        parent.__dict__.pop(REPLACED, None)


def like(journal: Journal, module: nn.Module, other: nn.Module | None) -> nn.Module:
    """A module that was kept aside, moved to where its place has gone meanwhile."""
    reference = next(other.parameters(), None) if other is not None else None
    if reference is not None:
        journal.move(module).to(device=reference.device, dtype=reference.dtype)
        module.train(other.training)  # type: ignore[union-attr]
    return module


def rewrite(journal: Journal, anatomy: Anatomy, path: str) -> None:
    """Give a block the class that its implants need: a generated one, or its own where there is nothing to call."""
    block = journal.open(anatomy.look.modules[path])
    base = original_class(block)
    if type(block) not in (base, generated_class(block)):
        raise PatientError(
            f"{path!r} was given the class {type(block).__name__} after surgery (by a parametrization, for instance). "
            f"Take that off first."
        )
    calls = [(implant.name, edge) for implant in implants(block) for edge in implant.edges]
    block.__dict__.pop(HELD, None)
    give_class(block, subclass(base, _code(anatomy, block, path, calls)) if calls else base)


def _code(anatomy: Anatomy, block: nn.Module, path: str, calls: list[tuple[str, Edge]]) -> Code:
    """The code of a block's methods; what their guards compare objects with is kept in the block."""
    cls = original_class(block)
    view = shallow_view(cls, original_state(block))
    observed = anatomy.look.calls[path][0]
    names = tuple(implant.name for implant in implants(block))
    methods = dict.fromkeys(edge.method for _, edge in calls)
    codes: list[Code] = []
    kept: dict[str, Any] = {}
    for method in methods:
        forms = []
        traced = anatomy.traced(view, observed, method, training=False)
        for mode in ("evaluation", "training"):
            if mode == "training" and traced.modal:
                traced = anatomy.traced(view, observed, method, training=True)
            here = [(name, edge) for name, edge in calls if edge.method == method and edge.mode in ("both", mode)]
            forms.append((traced, tuple(_insertion(view, block, traced, name, edge) for name, edge in here)))
        key = (*((id(traced), insertions) for traced, insertions in forms), names)
        if key not in anatomy.codes:
            may_be_outer = _changes(view, forms[0][0]) and not _calls_another(cls, method, methods)
            outer = outer_code(*forms[0]) if may_be_outer else None
            anatomy.codes[key] = outer or method_code(forms[:1] if key[0] == key[1] else forms, names)
        codes.append(anatomy.codes[key])
        if not codes[-1].outer:
            kept |= objects(watched([traced for traced, _ in forms], names), view)
    if kept:
        block.__dict__[HELD] = kept
    return join([*codes, *_later_codes(anatomy, cls, path, calls)])


def _changes(view: nn.Module, traced: Trace) -> bool:
    """Whether a trace would freeze what changes: flags to recompute, and branches that are folded into one."""
    children = {str(node.target).split(".")[0] for node in traced.graph.nodes if node.op in ("call_module", "get_attr")}
    return any(name in view.__dict__ for name in RECOMPUTING) or folds(type(view), children)


def _calls_another(cls: type[nn.Module], method: str, methods: Collection[str]) -> bool:
    """Whether a method calls another that is rewritten: what that returns is gated already."""
    return bool(names_in(cls, method) & (set(methods) - {method}))


def _later_codes(anatomy: Anatomy, cls: type[nn.Module], path: str, calls: list[tuple[str, Edge]]) -> Iterator[Code]:
    """The code of methods that can stand in for the forward once the block is deployed, where SEs gate all it returns.

    They cannot be traced yet: they call what is made then. So what they return is gated.
    """
    own = [(name, edge) for name, edge in calls if edge.method == "forward" and edge.mode != "training"]
    if not own or not all(is_returned(anatomy.block(path), edge) for _, edge in own):
        return
    for method in anatomy.later_ways(path):
        with contextlib.suppress(TraceError):
            yield wrapping_code(method, signature_of(cls, method), [name for name, _ in own])


def _insertion(view: nn.Module, block: nn.Module, traced: Trace, name: str, edge: Edge) -> Insertion:
    """The insertion of a child on an edge, with the calls that make its map where its lean form can use them."""
    producer = next((node for node in traced.graph.nodes if node.name == edge.producer), None)
    if producer is None or not hasattr(block._modules[name], "lean"):
        return Insertion.of(name, edge)
    return Insertion.of(name, edge, tuple(node.name for node in _makers(view, producer)))


def _makers(view: nn.Module, producer: fx.Node) -> list[fx.Node]:
    """The calls of children that end with a node, if that is a normalisation's output but for activations."""
    nodes: list[fx.Node] = []
    node: Any = producer
    while isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        nodes.insert(0, node)
        modules = [view.get_submodule(str(node.target)) for node in nodes]
        if ends_in_norm(*modules):
            return nodes
        if not is_pointwise(modules[0]):
            break
        (node,) = node.args
    return []


def append_operation(journal: Journal, model: nn.Module, operation: dict[str, Any]) -> None:
    """Add one operation to the model's record."""
    journal.open(model)
    model.__dict__[OPERATIONS] = [*model.__dict__.get(OPERATIONS, []), operation]
