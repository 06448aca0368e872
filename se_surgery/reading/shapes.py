"""Shapes: what layers put out on the meta device, at little cost.

In: a convolution of torch's and its arguments, or a tensor that another one will be like. Out: the output, without
values. torch works both out in Python, which takes longer than all else that is done for a layer while a model is
looked at; and networks repeat their layers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .blame import handed

# Tensors of other classes may have ways of their own.
_PLAIN = frozenset({Tensor, nn.Parameter})
# What says how a convolution goes: stride, padding, dilation, groups and the like.
_SETTINGS = frozenset({int, str, tuple, bool, torch.Size})
_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def like(tensor: Tensor) -> Tensor:
    """What `torch.empty_like` makes of a tensor on the meta device."""
    is_plain = type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_quantized
    if is_plain and tensor.is_contiguous():
        return _empty((tensor.shape, tensor.stride(), tensor.dtype))
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def convolved(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a convolution on the meta device; for equal ones it is worked out once."""
    tensors, settings = args[:3], args[3:]
    is_known = all(tensor is None or (type(tensor) in _PLAIN and tensor.is_meta) for tensor in tensors)
    if kwargs or not is_known or not all(type(value) in _SETTINGS for value in settings):
        return handed(function, *args, **kwargs)
    return _empty(_output(function, tuple(map(_form, tensors)), settings))


@functools.lru_cache(maxsize=4096)
def _output(function: Any, forms: tuple[_Form | None, ...], settings: tuple[Any, ...]) -> _Form:
    """The form of what a convolution puts out; what it raises is raised each time."""
    given = [None if form is None else _empty(form) for form in forms]
    output = handed(function, *given, *settings)
    return output.shape, output.stride(), output.dtype


def _form(tensor: Tensor | None) -> _Form | None:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _empty(form: _Form) -> Tensor:
    shape, strides, dtype = form
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
