"""Alike: whether two blocks hold the same but for their widths, so that what is written for one is for the other.

In: two blocks of one generated class. Out: yes, or no. Everything that a forward can read counts, of the block and of
all that is below it: classes, attributes, dtypes, which children are one and the same. An object that is no plain value
has to be the very same object in both. Of a forward that goes by no size (see `sizes`), widths do not count where
torch's layers keep them, and neither does the size of maps: whatever it does, it does at every width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..reading.look import Look
from ..reading.reads import is_plain
from ..records import FROZEN, HELD, IMPLANTS, OPERATIONS, PUT_IN, REPLACED, Implant, implants

# A buffer of so few values may be numbers to count with.
FEW = 16
_GROUPS = ("_parameters", "_buffers")
# Where torch's layers keep their widths.
_LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Linear)
WIDTHS = frozenset(
    {"in_channels", "out_channels", "groups", "num_features", "num_channels", "normalized_shape"}
    | {"in_features", "out_features"}
)
# What says nothing of what a forward computes: hooks, and what this library keeps; implants have their own comparison.
# What every module has, and what this library writes down in it, HELD among it: copies of what guards compare with.
_SILENT = (frozenset(nn.Module().__dict__) - {"training"}) | {
    FROZEN,
    HELD,
    IMPLANTS,
    OPERATIONS,
    PUT_IN,
    REPLACED,
}
_SILENT_IN_LAYERS = _SILENT | WIDTHS
_SIMPLE = frozenset({bool, int, float, str})


def are_alike(look: Look, path: str, other: str, sizes: bool) -> bool:
    """Whether two blocks that were called alike hold the same, and with `sizes` in the same sizes."""
    first, second = look.calls[path][0], look.calls[other][0]
    if not _is_same((first.args, first.kwargs), (second.args, second.kwargs)):
        return False
    if sizes and _sizes(look, path) != _sizes(look, other):
        return False
    return _hold_the_same(look.modules[path], look.modules[other], {})


def _sizes(look: Look, path: str) -> list[Any]:
    """The sizes of all tensors that a block is given, has, and gives to its SEs."""
    block, call = look.modules[path], look.calls[path][0]
    given = [leaf.shape for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    gated = [edge.shape for implant in implants(block) for edge in implant.edges]
    return [given, gated, [tensor.shape for tensor in (*block.parameters(), *block.buffers())]]


def _hold_the_same(first: nn.Module, second: nn.Module, met: dict[int, int]) -> bool:
    if id(first) in met:
        return met[id(first)] == id(second)
    met[id(first)] = id(second)
    mine, others = first.__dict__, second.__dict__
    if type(first) is not type(second) or mine.keys() != others.keys():
        return False
    silent = _SILENT_IN_LAYERS if isinstance(first, _LAYERS) else _SILENT
    for name, value in mine.items():
        if name not in silent and not _is_same(value, others[name]):
            return False
    for group in _GROUPS:
        if not _same_tensors(mine[group], others[group]):
            return False
    if IMPLANTS in mine and not _same_implants(mine[IMPLANTS], others[IMPLANTS]):
        return False
    return _same_children(mine["_modules"], others["_modules"], met)


def _same_children(first: dict[str, Any], second: dict[str, Any], met: dict[int, int]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(_same_child(child, second[name], met) for name, child in first.items())


def _same_child(first: nn.Module | None, second: nn.Module | None, met: dict[int, int]) -> bool:
    if first is None or second is None:
        return first is second
    return _hold_the_same(first, second, met)


def _same_tensors(first: dict[str, Any], second: dict[str, Any]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(map(_same_tensor, first.values(), map(second.__getitem__, first)))


def _same_tensor(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    if type(first) is not type(second) or first.dim() != second.dim() or first.dtype != second.dtype:
        return False
    return not (_is_number(first) or _is_number(second)) or torch.equal(first, second)


def _is_number(tensor: Tensor) -> bool:
    if type(tensor) is nn.Parameter:
        return False
    return tensor.numel() <= FEW and not isinstance(tensor, nn.Parameter) and not tensor.is_meta


def _same_implants(first: list[Implant], second: list[Implant]) -> bool:
    return [_outline(implant) for implant in first] == [_outline(implant) for implant in second]


def _outline(implant: Implant) -> tuple[Any, ...]:
    edges = [(e.method, e.producer, e.consumers, len(e.shape), e.axis, e.late, e.mode) for e in implant.edges]
    return (implant.name, type(implant.before), edges)


def _is_same(first: Any, second: Any) -> bool:
    """Whether two values are the same: the same object, equal plain values, tensors of one rank, or all in them is."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if type(first) in _SIMPLE:
        return bool(first == second)
    if isinstance(first, Tensor):
        return first.is_meta and second.is_meta and (first.dim(), first.dtype) == (second.dim(), second.dtype)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_is_same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_is_same(value, second[key]) for key, value in first.items())
    return is_plain(first) and bool(first == second)
