"""Accounts: whether the operations that a model carries are those that made it what it is.

In: a model and its operations. Out: nothing, or an error. A part of an operated model, its blocks in another order, or
one with other blocks in it carries SEs that its own operations do not know, or lacks some that they do: a recipe of it
would be that of another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from ..errors import SurgeryError
from ..records import OPERATIONS, PUT_IN, Implant, generated_class, implants
from ..se.excite import Attention, SqueezeExcite
from .exchange import refuse_standing
from .generated import ways_of


class _Found(NamedTuple):
    """An SE of this library where its block has it by now."""

    se: nn.Module
    record: Implant
    block: nn.Module
    host: str


def refuse_unaccounted(model: nn.Module, operations: list[dict[str, Any]]) -> None:
    """Refuse a model whose SEs are not those that its operations say.

    Raises:
        SurgeryError: It is a graph or a script, or a part of it was operated on by itself; a block has another forward
            in its `__dict__`; an SE is not in the operations, or one of theirs is not in the model or has other widths.
    """
    _refuse_lowered(model)
    _refuse_operated_parts(model)
    _refuse_exchanged(model)
    said, found = _said(model, operations), _found(model)
    known = {path: one for path, one in found.items() if path in said and _is_its_own(one, path, said[path][0])}
    _refuse_strangers(model, found, known)
    lost = [path for path in said if path not in known]
    if lost:
        raise SurgeryError(
            f"The operations on this {type(model).__name__} put in {len(said)} SEs, and {len(lost)} of them are not "
            f"there any more, {lost[0]!r} for one: what held them was replaced after surgery. Change a fresh base in "
            f"that way and operate on it then, or take SEs out with strip_se, which is written down."
        )
    narrowed = {s["path"]: s["shapes"] for op in operations if op["op"] == "prune" for s in op["sites"]}
    for path, one in known.items():
        _refuse_other_widths(path, one.se, said[path][1], narrowed)


def _refuse_lowered(model: nn.Module) -> None:
    """Refuse what was made of a model and does not say what had been done to that."""
    kinds = {cls.__name__ for cls in type(model).__mro__} & {"GraphModule", "ScriptModule"}
    if isinstance(model, fx.GraphModule) or kinds:
        what = "a graph of torch.fx" if "GraphModule" in kinds else "compiled by torch.jit"
        raise SurgeryError(
            f"This {type(model).__name__} is {what}, which does not keep what was done to the model that it was made "
            f"of. Give the recipe of that model."
        )


def _refuse_operated_parts(model: nn.Module) -> None:
    parts = [path for path, module in model.named_modules() if path and OPERATIONS in module.__dict__]
    if parts:
        others = f" (and {len(parts) - 1} more)" if len(parts) > 1 else ""
        raise SurgeryError(
            f"{parts[0]!r}{others} of this {type(model).__name__} was operated on by itself, so that the recipe of the "
            f"whole would lack it. Give the recipe of that part: recipe_of(model.{parts[0]})."
        )


def _refuse_exchanged(model: nn.Module) -> None:
    """Refuse forwards that were written past a block into its `__dict__` and do not run its SEs."""
    for path, block in model.named_modules():
        cls = generated_class(block)
        if cls is not None:
            try:
                refuse_standing(block, ways_of(cls))
            except SurgeryError as error:
                raise SurgeryError(f"In the `__dict__` of {path or 'the model'!r}: {error}") from error


def _said(model: nn.Module, operations: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The SEs of this library that are left behind all operations, with the operation and the site, by path."""
    said: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for operation in operations:
        for site in operation["sites"]:
            if operation["op"] == "add":
                for path in site["replaces"]:
                    said.pop(path, None)
                said[site["path"]] = (operation, site)
            elif operation["op"] == "strip" and said.pop(site["path"], None) is None and site["origin"] == "se_surgery":
                raise SurgeryError(
                    f"An operation on this {type(model).__name__} took out {site['path']!r}, and none had put that in: "
                    f"it was done to a part of an operated model. Take that part of a fresh base, and operate on it."
                )
    return said


def _found(model: nn.Module) -> dict[str, _Found]:
    """The SEs of this library that stand in the blocks that they were put into, by path."""
    return {
        f"{host}.{record.name}".lstrip("."): _Found(block._modules[record.name], record, block, host)  # type: ignore[arg-type]
        for host, block in model.named_modules()
        for record in implants(block)
        if isinstance(block._modules.get(record.name), (SqueezeExcite, Attention))
    }


def _is_its_own(one: _Found, path: str, operation: dict[str, Any]) -> bool:
    """Whether an SE was put in where it is, by an operation that is this one."""
    origin = one.se.__dict__.get(PUT_IN)
    # Models that were pickled before SEs said so have the path of the block alone.
    if origin is None:
        return one.record.host == one.host
    same = origin["operation"] is operation or origin["operation"] == operation
    return bool(same and origin["path"] == path and one.record.host == one.host)


def _refuse_strangers(model: nn.Module, found: dict[str, _Found], known: dict[str, _Found]) -> None:
    """Refuse SEs, and layers of SEs, that are not among the known ones."""
    strangers = list(_loose(model, known))
    if not strangers:
        # Models that were pickled before SEs said where they were put in.
        others = ((path, one.record) for path, one in found.items() if path not in known)
        strangers = [(path, f"{record.host}.{record.name}".lstrip("."), "") for path, record in others]
    if strangers:
        path, then, whole = strangers[0]
        number = len({then for _, then, _ in strangers})
        held = "an SE that its" if number == 1 else f"{number} SEs that its"
        raise SurgeryError(
            f"This {type(model).__name__} holds {held} own operations do not account for: {path or 'itself'!r} was "
            f"put in as {then!r} of {f'a {whole}' if whole else 'another model'}. A part of an operated model, or "
            f"another arrangement of its blocks, has no recipe. Give the recipe of the model that was operated on; "
            f"or arrange a fresh base in that way, and operate on it then."
        )


def _loose(model: nn.Module, known: dict[str, _Found]) -> Iterator[tuple[str, str, str]]:
    """Each SE of which something is outside of the known ones: its path, and the path and the model of the time.

    A block may have several paths. An SE that its block has may be nowhere else.
    """
    inside = {id(module) for one in known.values() for module in one.se.modules()}
    held = {(id(one.block), name.rpartition(".")[2]) for name, one in known.items()}
    if PUT_IN in vars(model):
        yield "", vars(model)[PUT_IN]["path"], vars(model)[PUT_IN]["model"]
    for path, parent in model.named_modules():
        if id(parent) in inside or PUT_IN in vars(parent):
            continue
        for name, child in parent.named_children():
            origin = vars(child).get(PUT_IN)
            if origin is not None and (id(parent), name) not in held:
                yield f"{path}.{name}".lstrip("."), origin["path"], origin["model"]


def _refuse_other_widths(path: str, se: nn.Module, site: dict[str, Any], narrowed: dict[str, dict[str, Any]]) -> None:
    """Refuse an SE of other widths than its site has, or than an operation narrowed it to."""
    layer = se._modules.get("fc1")
    weight = getattr(layer, "weight", None)
    # What shards parameters leaves flat pieces.
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return
    wanted = narrowed.get(f"{path}.fc1", {}).get("weight", (site["rd_channels"], site["channels"]))
    if tuple(weight.shape[:2]) != tuple(wanted[:2]):
        raise SurgeryError(
            f"{path!r} has a hidden layer of {weight.shape[0]} for {weight.shape[1]} channels, and by the operations "
            f"one of {wanted[0]} for {wanted[1]}. Narrow SEs with prune_se, or inside of record_pruning."
        )
