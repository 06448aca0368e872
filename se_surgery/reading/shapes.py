"""Shapes: what functions of torch put out on the meta device, at little cost.

In: a function and its arguments, or a tensor that another one will be like. Out: the output, without values. What most
functions put out torch works out in Python, which takes longer than all else that is done for a layer while a model is
looked at; and networks repeat their layers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blame import handed

# Tensors of other classes may have ways of their own.
_PLAIN = frozenset({Tensor, nn.Parameter})
# Values of these cannot change: stride, padding, axes and the like.
_SETTINGS = frozenset({int, float, str, bool, tuple, type(None), torch.Size, torch.dtype})
_UNKNOWN = object()


class _Form(NamedTuple):
    """All that there is of a tensor without values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def like(tensor: Tensor) -> Tensor:
    """What `torch.empty_like` makes of a tensor on the meta device."""
    is_plain = type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_quantized
    if is_plain and tensor.is_contiguous():
        return _empty(tensor.shape, tensor.stride(), tensor.dtype)
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def worked_out(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a function of tensors on the meta device; for equal calls it is worked out once.

    Args:
        function: One that makes a new tensor of what it is given and changes nothing.
        args: What it is given.
        kwargs: What it is given by name.
    """
    given = [_form(value) for value in (*args, *kwargs.values())]
    is_known = not any(value is _UNKNOWN for value in given)
    form = _output(function, tuple(kwargs), *given) if is_known else None
    return handed(function, *args, **kwargs) if form is None else _empty(*form)


def _form(value: Any) -> Any:
    """What tells all of an argument that its function's output goes by."""
    if type(value) in _PLAIN and value.is_meta:
        return _Form(value.shape, value.stride(), value.dtype)
    return value if type(value) in _SETTINGS else _UNKNOWN


# Typed: of whole numbers another dtype may come out than of others.
@functools.lru_cache(maxsize=4096, typed=True)
def _output(function: Any, names: tuple[str, ...], *given: Any) -> _Form | None:
    """The form of what comes out, or None where that is not one tensor; what is raised is raised each time."""
    values = [_empty(*value) if type(value) is _Form else value for value in given]
    first = len(values) - len(names)
    output = handed(function, *values[:first], **dict(zip(names, values[first:], strict=True)))
    return _Form(output.shape, output.stride(), output.dtype) if type(output) is Tensor else None


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
