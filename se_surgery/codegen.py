"""Codegen: a traced forward with calls of new children in it, as a subclass of the block's own class.

In: traces and the edges to put calls on. Out: a class. It is cached by base class and source, so equal blocks share it,
and a block of it pickles as its base class and that source.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import inspect
import itertools
import linecache
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen, _format_target
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from .errors import SurgeryError, TraceError
from .records import CODE, Edge
from .tail import tail
from .trace import Argument, Trace, is_plain

# Where a name of the generated source comes from: (name, module, qualified name in it).
Origin = tuple[str, str, str]


@dataclass(frozen=True)
class Code:
    """The generated methods of one block's class, as plain data.

    Attributes:
        source: Python source of the methods.
        origins: Where the names it uses come from.
        outer: Whether the methods call the block's own and gate what those return.
    """

    source: str
    origins: tuple[Origin, ...]
    outer: bool = False


@dataclass(frozen=True)
class Insertion:
    """A call of the child `name` to be put on an edge; equal for equal blocks.

    `makers` are the calls that make its map, the last of them the producer, where they end with a normalisation and
    perhaps activations: all these calls and the SE's become one.
    """

    name: str
    producer: str
    consumers: tuple[str, ...]
    late: bool
    makers: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, edge: Edge, makers: tuple[str, ...] = ()) -> Insertion:
        """The insertion of a child on an edge."""
        return cls(name, edge.producer, edge.consumers, edge.late, makers)


_classes: dict[tuple[type, Code], type[nn.Module]] = {}


def method_code(forms: Sequence[tuple[Trace, Sequence[Insertion]]]) -> Code:
    """The code of one method with the insertions made, for both modes.

    Args:
        forms: The method's trace and its insertions in evaluation, then those in training where they are others.

    Raises:
        TraceError: An edge is not in the graph, or a name cannot be found again by import.
    """
    bodies, names, helpers = [], {}, {}
    evaluating = forms[0][0]
    for traced, insertions in forms:
        graph = insert(traced.graph, insertions)
        text, found = _body(graph)
        bodies.append(_bindings(traced) + text)
        names.update(found)
        helpers.update({node.target: node.meta[_JOINED] for node in graph.nodes if _JOINED in node.meta})
    inserted = {new.name for _, insertions in forms for new in insertions}
    reads = {name: value for traced, _ in forms for name, value in traced.reads if name not in inserted}
    flags = [name for name in RECOMPUTING if reads.get(name) is False]
    lines = [line for name, targets in helpers.items() for line in _helper(name, targets)]
    lines += [*_head(evaluating, flags), *_guards(evaluating), *_watch(reads, flags)]
    if bodies[0] == bodies[-1]:
        lines += bodies[0]
    else:
        lines += ["    if self.training:", *("    " + line if line else line for line in bodies[1]), *bodies[0]]
    names |= {"_refuse": refuse_argument, "_changed": refuse_change, "_recomputed": recomputed, "_tail": tail}
    names |= {"torch": torch}
    source = "\n".join(lines) + "\n"
    compiled = compile(source, "<check>", "exec").co_consts
    used = {name for code in compiled if isinstance(code, CodeType) for name in code.co_names}
    return Code(source, tuple(_origin(name, value) for name, value in sorted(names.items()) if name in used))


def _head(traced: Trace, flags: Sequence[str]) -> list[str]:
    """The head of a method; where a flag asks for it, the whole method is computed again in the backward pass."""
    head = f"(self{_parameters(traced)}):"
    if not flags:
        return [f"def {traced.method}{head}"]
    inner, names = f"_traced_{traced.method}", ", ".join(map(_passed, traced.signature.parameters.values()))
    return [
        f"def {traced.method}{head}",
        f"    if {' or '.join(f'self.{flag}' for flag in flags)}: return _recomputed(self.{inner}, {names})",
        f"    return self.{inner}({names})",
        "",
        f"def {inner}{head}",
    ]


def outer_code(traced: Trace, insertions: Sequence[Insertion]) -> Code | None:
    """The code of a method that calls the block's own and gates what that returns; None where a gate sits inside.

    For blocks whose own forward goes by what changes after surgery: a flag to recompute in the backward pass, branches
    that re-parameterisation makes one. A traced forward would have lost that.
    """
    output = next(node for node in traced.graph.nodes if node.op == "output")
    returned = output.args[0]
    if any(new.consumers != (output.name,) or new.producer != getattr(returned, "name", None) for new in insertions):
        return None
    names = ", ".join(_passed(parameter) for parameter in traced.signature.parameters.values())
    lines = [f"def {traced.method}(self{_parameters(traced)}):", f"    x = _base.{traced.method}(self, {names})"]
    lines += [f"    x = self.{new.name}(x)" for new in insertions]
    return Code("\n".join([*lines, "    return x"]) + "\n", (), outer=True)


def _passed(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"*{parameter.name}"
    if parameter.kind is parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    return f"{parameter.name}={parameter.name}" if parameter.kind is parameter.KEYWORD_ONLY else parameter.name


def insert(graph: fx.Graph, insertions: Sequence[Insertion]) -> fx.Graph:
    """A copy of the graph with one call for every insertion, in their order; each is checked to be there once."""
    graph = copy.deepcopy(graph)
    nodes = {node.name: node for node in graph.nodes}
    order = {name: i for i, name in enumerate(nodes)}
    standing: dict[tuple[str, str], fx.Node] = {}
    for new in insertions:
        missing = [name for name in (new.producer, *new.consumers) if name not in nodes]
        if missing:
            raise TraceError(f"the forward has no value {missing[0]!r} any more")
        sources = {standing.get((new.producer, consumer), nodes[new.producer]) for consumer in new.consumers}
        if len(sources) > 1:
            raise TraceError(f"{new.name!r} would gate the same value before and behind another SE")
        (source,) = sources
        first = min(new.consumers, key=order.__getitem__)
        with graph.inserting_before(nodes[first]) if new.late else graph.inserting_after(source):
            call = graph.call_module(new.name, (source,))
        for consumer in new.consumers:
            nodes[consumer].replace_input_with(source, call)
            standing[new.producer, consumer] = call
    for insertion in insertions:
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target == insertion.name]
        if len(calls) != 1 or not calls[0].users:
            raise TraceError(f"{insertion.name!r} would be called {len(calls)} times, not once")
        _join(graph, [nodes[maker] for maker in insertion.makers], calls[0])
    return graph


# Under this a node's `meta` has the modules whose calls were made one, the SE's last.
_JOINED = "se_surgery_joined"


def _join(graph: fx.Graph, makers: list[fx.Node], call: fx.Node) -> None:
    """Make one call of an SE's and of those that make its map, where nothing else takes what is between them."""
    calls = [*makers, call]
    if not makers or any(set(one.users) != {following} for one, following in itertools.pairwise(calls)):
        return
    targets = tuple(str(one.target) for one in calls)
    with graph.inserting_before(makers[0]):
        joined = graph.call_module("_lean_" + "_".join(targets).replace(".", "_"), makers[0].args)
    joined.meta[_JOINED] = targets
    call.replace_all_uses_with(joined)
    for one in reversed(calls):
        graph.erase_node(one)


def _helper(name: str, targets: Sequence[str]) -> list[str]:
    """The method that makes the one call; TorchScript compiles them all."""
    *makers, se = (_format_target("self", target) for target in targets)
    nested = functools.reduce(lambda inner, module: f"{module}({inner})", (*makers, se), "x")
    return [
        f"def {name}(self, x):",
        "    if torch.jit.is_scripting():",
        f"        return {nested}",
        "    else:",
        f"        return _tail({se}, ({', '.join(makers)},), x)",
        "",
    ]


def _body(graph: fx.Graph) -> tuple[list[str], dict[str, Any]]:
    graph._codegen = CodeGen()
    code = graph.python_code("self")
    lines = code.src.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def forward("))
    return [line for line in lines[start + 1 :] if line.strip()], dict(code.globals)


def _parameters(traced: Trace) -> str:
    """The method's own parameters, as source."""
    parts = []
    previous = None
    for parameter in traced.signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and previous not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            parts.append("*")
        prefix = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        prefix = "**" if parameter.kind is parameter.VAR_KEYWORD else prefix
        default = "" if parameter.default is parameter.empty else f"={_literal(parameter.default)}"
        parts.append(f"{prefix}{parameter.name}{default}")
        previous = parameter.kind
    return "".join(f", {part}" for part in parts)


def _literal(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (tuple, list)) and all(isinstance(v, (bool, int, float, str)) for v in value):
        return repr(value)
    raise TraceError(f"its forward has the default {value!r}, which cannot be written down")


def _guards(traced: Trace) -> list[str]:
    """Refuse calls with other constants than those the graph was made for."""
    lines = [f"    if isinstance({name}, torch.Tensor): {name} = [{name}]" for name in traced.bare]
    for argument in traced.arguments:
        if argument.node is None:
            test = f"{_differs(argument.value)} {_literal(argument.value)}"
            lines.append(_guard(argument.parameter, argument.steps, "{} " + test))
    lines += [_guard(parameter, steps, f"len({{}}) != {length}") for parameter, steps, length in traced.lengths]
    return lines


def _watch(reads: dict[str, Any], besides: Sequence[str]) -> list[str]:
    """Refuse to run when an attribute has another value than the one that the graph was made for."""
    reads = {name: value for name, value in reads.items() if name not in besides}
    if not reads:
        return []
    tests = [f"self.{name} {_differs(value)} {value!r}" for name, value in reads.items()]
    # TorchScript takes the values when it compiles, and could not compile this.
    return ["    if not torch.jit.is_scripting():", f"        if {' or '.join(tests)}: _changed(self, {reads!r})"]


def _differs(value: Any) -> str:
    """The operator that asks whether something is another value than this one."""
    return "is not" if value is None or isinstance(value, bool) else "!="


def _guard(parameter: str, steps: tuple[Any, ...], test: str) -> str:
    place = _place(parameter, steps)
    return f"    if {test.format(place)}: _refuse({parameter!r}, {place})"


def _bindings(traced: Trace) -> list[str]:
    """Give the placeholders their values, where they are not the parameters themselves."""
    return [
        f"    {argument.node} = {_access(argument)}"
        for argument in traced.arguments
        if argument.node is not None and argument.node != _access(argument)
    ]


def _access(argument: Argument) -> str:
    return _place(argument.parameter, argument.steps)


def _place(parameter: str, steps: tuple[Any, ...]) -> str:
    return parameter + "".join(f"[{step!r}]" for step in steps)


def refuse_argument(parameter: str, value: Any) -> None:
    """Called by generated forwards for an argument they were not made for.

    Raises:
        SurgeryError: Always.
    """
    shown = f"{len(value)} items" if isinstance(value, (list, tuple)) else type(value).__name__
    raise SurgeryError(
        f"This block was operated on for calls with another {parameter!r} than {shown}: its forward was traced from "
        f"the call that the model itself makes. Operate with an example_input that makes the call you need."
    )


def recomputed(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Called by generated forwards whose block is asked to save memory: what it computes is computed again when needed.

    The block's own forward would do so for a part of it; the values are the same.
    """
    # The caller may go on appending to a list that it gave.
    args, kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs))
    return checkpoint(method, *args, use_reentrant=False, **kwargs)


def refuse_change(block: nn.Module, reads: dict[str, Any]) -> None:
    """Called by generated forwards whose block was changed after surgery.

    Raises:
        SurgeryError: Always.
    """
    changed = [name for name, value in reads.items() if type(getattr(block, name, ...)) is not type(value)]
    changed += [name for name, value in reads.items() if name not in changed and getattr(block, name) != value]
    name = changed[0]
    value = getattr(block, name, None)
    shown = repr(value) if is_plain(value) else f"a {type(value).__name__}"
    raise SurgeryError(
        f"{name!r} of this {type(block).__name__} was {reads[name]!r} when it was operated on and now is {shown}, "
        f"but its forward was written for the former. "
        f"Set it first and operate then: strip_se(model, origin='se_surgery') undoes the operation."
    )


def _origin(name: str, value: Any) -> Origin:
    module = getattr(value, "__name__", "") if type(value) is type(torch) else getattr(value, "__module__", "") or ""
    inner = "" if type(value) is type(torch) else getattr(value, "__qualname__", "")
    if isinstance(value, float):
        module, inner = "math", {"inf": "inf", "nan": "nan"}.get(name, "")
    for candidate in (module, "torch", "builtins"):
        try:
            if _resolve(candidate, inner) is value:
                return (name, candidate, inner)
        except (ImportError, AttributeError, ValueError):
            continue
    raise TraceError(f"its forward uses {name!r}, which cannot be found again by import")


def _resolve(module: str, inner: str) -> Any:
    found = importlib.import_module(module)
    return operator.attrgetter(inner)(found) if inner else found


def join(codes: Sequence[Code]) -> Code:
    """The code of several methods as one."""
    origins = tuple(dict.fromkeys(origin for code in codes for origin in code.origins))
    return Code("\n".join(code.source for code in codes), origins, all(code.outer for code in codes))


def subclass(base: type[nn.Module], code: Code) -> type[nn.Module]:
    """The subclass of `base` with the generated methods; the same object for the same base and code."""
    key = (base, code)
    if key not in _classes:
        digest = hashlib.sha256(code.source.encode()).hexdigest()[:12]
        file = f"<se_surgery {base.__qualname__} {digest}>"
        # Tracebacks, inspect.getsource and torch.jit read the source from here.
        linecache.cache[file] = (len(code.source), None, code.source.splitlines(True), file)
        names: dict[str, Any] = {name: _resolve(module, inner) for name, module, inner in code.origins}
        names["_base"] = base
        methods: dict[str, Any] = {}
        exec(compile(code.source, file, "exec"), names, methods)
        for function in methods.values():
            function.__qualname__ = f"{base.__qualname__}.{function.__name__}"
            function.__module__ = base.__module__
        if not code.outer:
            methods |= {name: _refuse_folding(name) for name in FOLDING if hasattr(base, name)}
        shared = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        methods = {**shared, **methods, CODE: code, "__reduce_ex__": _reduce}
        _classes[key] = type(base.__name__, (base,), methods)
    return _classes[key]


# Flags by which the blocks of timm, torchvision and others compute themselves again in the backward pass.
RECOMPUTING = ("memory_efficient", "grad_checkpointing", "use_checkpoint", "with_cp")
# What timm.utils.reparameterize_model calls on blocks: each changes the children that the generated forward calls.
FOLDING = ("reparameterize", "fuse", "switch_to_deploy")


def _refuse_folding(name: str) -> Callable[..., None]:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise SurgeryError(
            f"{name}() would fold away what the forward of this operated {type(self).__name__} calls. "
            f"Re-parameterise the base first and then operate, or strip the SEs, {name}, and operate again."
        )

    return refuse


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle (and copy) a block as its base class and code: the subclass cannot be found by its name."""
    generated = next(cls for cls in type(self).__mro__ if CODE in cls.__dict__)
    reduced: Any = super(generated, self).__reduce_ex__(protocol)  # type: ignore[arg-type]
    if generated is not type(self):
        return reduced  # type: ignore[no-any-return]
    return (revive, (generated.__mro__[1], getattr(generated, CODE)), *reduced[2:])


def revive(base: type[nn.Module], code: Code) -> nn.Module:
    """An empty block of the generated class, for pickle to fill."""
    cls = subclass(base, code)
    return cls.__new__(cls)
