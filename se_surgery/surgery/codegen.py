"""Codegen: the source of a block's methods with calls of new children in them.

In: traces and the insertions to make in them. Out: code, which `generated` makes a class of.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Sequence
from types import CodeType
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen, _format_target

from ..errors import TraceError
from ..reading.trace import Trace
from ..reading.tracer import Argument
from ..se.tail import tail
from .generated import Code, Origin, recomputed, refuse_argument, refuse_patch, resolve
from .guards import ByWay, guards, watched
from .insertion import JOINED, Insertion, insert


def method_code(forms: Sequence[tuple[Trace, Sequence[Insertion]]], besides: Collection[str] = ()) -> Code:
    """The code of one method with the insertions made, for both modes.

    Args:
        forms: The method's trace and its insertions in evaluation, then those in training where they are others.
        besides: Names of the block's new children: an attribute of such a name is another on purpose.

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
        helpers.update({node.target: node.meta[JOINED] for node in graph.nodes if JOINED in node.meta})
    reads = watched([traced for traced, _ in forms], besides)
    flags = [name for name in RECOMPUTING if any(read.name == name and read.value is False for read in reads)]
    guarded = guards([read for read in reads if read.name not in flags])
    names |= guarded.names
    lines = [line for name, targets in helpers.items() for line in _helper(name, targets)]
    lines += [*_head(evaluating, flags), *_guards(evaluating), *_own(evaluating.method), *_left_out(evaluating)]
    # They, too, stand behind the line of `_own`: TorchScript takes values as they are when it compiles.
    lines += ["        " + line for line in guarded.lines]
    if bodies[0] == bodies[-1]:
        lines += bodies[0]
    else:
        lines += ["    if self.training:", *("    " + line if line else line for line in bodies[1]), *bodies[0]]
    names |= {"_refuse": refuse_argument, "_recomputed": recomputed, "_tail": tail, "torch": torch}
    names["_patched"] = refuse_patch
    source = "\n".join(lines) + "\n"
    compiled = compile(source, "<check>", "exec").co_consts
    used = {name for code in compiled if isinstance(code, CodeType) for name in code.co_names}
    return Code(source, tuple(_origin(name, value) for name, value in sorted(names.items()) if name in used))


def _head(traced: Trace, flags: Sequence[str]) -> list[str]:
    """The head of a method; where a flag asks for it, the whole method is computed again in the backward pass."""
    head = f"(self{_parameters(traced.signature)}):"
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
    return wrapping_code(traced.method, traced.signature, [new.name for new in insertions])


def wrapping_code(method: str, signature: inspect.Signature, ses: Sequence[str]) -> Code:
    """The code of a method that calls the block's own and gives what that returns to SEs.

    Raises:
        TraceError: A default of its parameters cannot be written down.
    """
    names = ", ".join(_passed(parameter) for parameter in signature.parameters.values())
    lines = [f"def {method}(self{_parameters(signature)}):", f"    x = _base.{method}(self, {names})"]
    lines += [f"    x = self.{name}(x)" for name in ses]
    return Code("\n".join([*lines, "    return x"]) + "\n", (), outer=True)


def signature_of(cls: type, method: str) -> inspect.Signature:
    """A method's signature, without `self`."""
    signature = inspect.signature(getattr(cls, method))
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _passed(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"*{parameter.name}"
    if parameter.kind is parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    return f"{parameter.name}={parameter.name}" if parameter.kind is parameter.KEYWORD_ONLY else parameter.name


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


def _parameters(signature: inspect.Signature) -> str:
    """A method's own parameters, as source."""
    parts = []
    previous = None
    for parameter in signature.parameters.values():
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
            test = f"{'is not' if argument.value is None or isinstance(argument.value, bool) else '!='} "
            test += _literal(argument.value)
            lines.append(_guard(argument.parameter, argument.steps, "{} " + test))
    lines += [_guard(parameter, steps, f"len({{}}) != {length}") for parameter, steps, length in traced.lengths]
    return lines


def _own(method: str) -> list[str]:
    """Refuse to run when the class has another method than the one that the graph was made of.

    TorchScript takes attributes as they are when it compiles, and could compile neither this nor what follows it.
    """
    test = f"if _base.{method} is not _own_{method}: _patched(self, {method!r})"
    return ["    if not torch.jit.is_scripting():", f"        {test}"]


def _left_out(traced: Trace) -> list[str]:
    """Refuse calls that give what the observed call left to its default: the graph was made for that.

    They stand behind the line of `_own`.
    """
    given = {argument.parameter for argument in traced.arguments} | {parameter for parameter, _, _ in traced.lengths}
    lines = []
    for parameter in traced.signature.parameters.values():
        name, default = parameter.name, parameter.default
        if name in given:
            continue
        if default is parameter.empty:
            # What takes the rest of the arguments was given none.
            test = name
        elif default is None or isinstance(default, bool):
            test = f"{name} is not {default!r}"
        else:
            # A tensor compared with a number is a tensor, and no answer.
            test = f"isinstance({name}, torch.Tensor) or {name} != {_literal(default)}"
        lines.append(f"        if {test}: _refuse({name!r}, {name})")
    return lines


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


def _origin(name: str, value: Any) -> Origin:
    if isinstance(value, ByWay):
        return (name, value.module, value.inner)
    module = getattr(value, "__name__", "") if type(value) is type(torch) else getattr(value, "__module__", "") or ""
    inner = "" if type(value) is type(torch) else getattr(value, "__qualname__", "")
    if isinstance(value, float):
        module, inner = "math", {"inf": "inf", "nan": "nan"}.get(name, "")
    for candidate in (module, "torch", "builtins"):
        try:
            if resolve(candidate, inner) is value:
                return (name, candidate, inner)
        except (ImportError, AttributeError, ValueError):
            continue
    raise TraceError(f"its forward uses {name!r}, which cannot be found again by import")


def join(codes: Sequence[Code]) -> Code:
    """The code of several methods as one."""
    origins = tuple(dict.fromkeys(origin for code in codes for origin in code.origins))
    return Code("\n".join(code.source for code in codes), origins, all(code.outer for code in codes))


# Flags by which the blocks of timm, torchvision and others compute themselves again in the backward pass.
RECOMPUTING = ("memory_efficient", "grad_checkpointing", "use_checkpoint", "with_cp")
