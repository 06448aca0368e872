"""Values: what a forward is given and returns, taken apart and compared bit for bit.

In: anything that a forward may take or return. Out: its leaves, a copy of it, or whether two are equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value with its tensors changed, in containers of its own."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)([mapped(item, change) for item in value])
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, dict):
        changed = copy.copy(value)
        changed.update({key: mapped(item, change) for key, item in value.items()})
        return changed
    return value


def leaves(value: Any) -> list[Any]:
    """What is in a value, in order; of containers their kind and keys, too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)] + [(type(value), len(value))]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)] + [tuple(value)]
    return [value]


def same(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists of leaves are equal, tensors bit for bit; what is not a number has to be in the same places."""
    return len(first) == len(second) and all(map(same_leaf, first, second))


def same_leaf(first: Any, second: Any) -> bool:
    """Whether two leaves are equal."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        return torch.equal(first, second) or _equal_but_nan(first, second)
    return first is second or (type(first) is type(second) and bool(first == second))


def _equal_but_nan(first: Tensor, second: Tensor) -> bool:
    if not first.is_floating_point():
        return False
    return torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(), second.nan_to_num())
