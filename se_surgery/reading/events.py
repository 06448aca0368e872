"""Events: what of a forward is worth noting, and how torch's functions are told apart.

In: a torch function and its arguments. Out: the kind of event it is (a convolution, a gate, ...), or none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Event:
    """One operation of interest.

    Attributes:
        clock: Position in the order of execution; calls of modules are on the same clock.
        kind: `conv`, `norm`, `act`, `pool`, `add`, `cat`, `gate`, `linear` or `squeeze` (a reduction).
        path: The module whose own forward ran the operation.
        shape: Shape of the result.
        kernel: Spatial kernel size of a convolution.
        groups: Groups of a convolution.
        channels: Input channels of a convolution.
        macs: Multiply-adds an image of a convolution or linear layer.
        alone: Whether a convolution was given a map of one position.
        spatial: Whether the result is a feature map of more than one position.
    """

    clock: int
    kind: str
    path: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    groups: int = 1
    channels: int = 0
    macs: int = 0
    alone: bool = False
    spatial: bool = False

    @property
    def activations(self) -> int:
        """Values an image that a convolution or linear layer puts out; those of anything else do not count."""
        return math.prod(self.shape[1:]) if self.kind in ("conv", "linear") else 0

    @property
    def transforms(self) -> bool:
        """Whether this changes what a map shows: not a gate on it, and not a reduction of it."""
        return self.kind not in ("gate", "squeeze")

    @property
    def wide(self) -> bool:
        """Whether this is a convolution that looks at more than one position (k > 1)."""
        return any(size > 1 for size in self.kernel)

    @property
    def depthwise(self) -> bool:
        """Whether this is a convolution with one filter a channel."""
        return self.groups > 1 and self.groups == self.channels


@dataclass
class Call:
    """One call of a module: `path` ran from `start` to `end` on the events' clock, with meta copies of its tensors."""

    path: str
    start: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    end: int = -1
    output: Any = None
    parent: Call | None = None
    children: list[Call] = field(default_factory=list)


def functions(*names: str) -> frozenset[Callable[..., Any]]:
    """The callables of `names` in torch, torch.nn.functional and Tensor, with their in-place and dunder forms."""
    forms = [form for name in names for form in (name, name + "_", f"__{name}__", f"__i{name}__", f"__r{name}__")]
    found = [getattr(space, form, None) for space in (torch, F, Tensor) for form in forms]
    return frozenset(function for function in found if function is not None)


# The sine is that of the snake, x + sin(a x)^2 / a, which networks of audio have.
ACTIVATIONS = functions(
    *"celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6".split(),
    *"rrelu selu sigmoid silu sin softplus softshrink softsign tanh threshold".split(),
)
# Thresholded linear units are the maximum of the map and a parameter.
MAXIMA = functions("maximum", "max")
_REDUCTIONS = functions(
    *"mean sum amax logsumexp adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split(),
    *"adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split(),
)
_POOLS = "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d".split()
KINDS: dict[Callable[..., Any], str] = {
    **dict.fromkeys(functions("conv1d", "conv2d", "conv3d"), "conv"),
    **dict.fromkeys(functions("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "conv"),
    **dict.fromkeys(functions("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"), "norm"),
    **dict.fromkeys(ACTIVATIONS | MAXIMA, "act"),
    **dict.fromkeys(functions(*_POOLS), "pool"),
    **dict.fromkeys(functions("add"), "add"),
    **dict.fromkeys(functions("cat", "concat", "concatenate"), "cat"),
    **dict.fromkeys(functions("mul", "multiply"), "gate"),
    **dict.fromkeys(functions("linear"), "linear"),
    **dict.fromkeys(_REDUCTIONS, "squeeze"),
}
_SHAPELESS = ACTIVATIONS - functions("glu") | functions("batch_norm")


# What changes its first argument, and returns it: `relu_`, `x += y`.
_IN_PLACE = frozenset(
    function
    for function in (*KINDS, *functions("copy"))
    if re.fullmatch("__i.+__|[^_].*_", getattr(function, "__name__", ""))
)


def is_in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call changes its first argument, and returns it."""
    if function in _IN_PLACE:
        return True
    return function in ACTIVATIONS and (kwargs.get("inplace") is True or args[-1] is True)


def is_like_first(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether a result has its first argument's shape, strides and dtype: on the meta device one like it will do."""
    if not args or not isinstance(args[0], Tensor):
        return False
    if function in _SHAPELESS:
        return args[0].is_floating_point()  # of whole numbers a sine is none
    if KINDS.get(function) != "add" or len(args) != 2 or not isinstance(args[1], Tensor):
        return False
    first, second = args
    alike = (first.shape, first.dtype) == (second.shape, second.dtype)
    return alike and first.is_contiguous() and second.is_contiguous()


def kind_of(function: Any) -> str | None:
    """The kind of event a torch function makes, or None."""
    return KINDS.get(function) if callable(function) else None


def is_sum(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether what is added are two tensors: Python's `sum` adds the first one to a zero."""
    named = (kwargs[name] for name in ("input", "other") if name in kwargs)
    return all(isinstance(value, Tensor) for value in (*args[:2], *named))


def is_gate(args: tuple[Any, ...], result: Tensor, axis: int | None = None) -> bool:
    """Whether a product, a map, scales the channels of a map by one number each, broadcast or expanded.

    Args:
        args: What is multiplied.
        result: The product.
        axis: Its channel axis, where other axes could be taken for that: those of signals.
    """
    if len(args) < 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor):
        return False
    pair = [args[0], args[1]]
    return sum(_is_per_channel(operand, axis) for operand in pair) == 1 and all(
        operand.dim() == result.dim() and operand.shape[0] == result.shape[0] for operand in pair
    )


def gate_of(args: tuple[Any, ...], given: Tensor) -> Tensor | None:
    """Of the operands of a product the one that scales the channels of `given`, or None where neither does.

    On maps of one position the gate looks like the map: then it is the one that is not `given` itself.
    """
    if len(args) < 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor):
        return None
    per_channel = [operand for operand in args[:2] if operand.dim() == given.dim() and _is_per_channel(operand)]
    if len(per_channel) == 2:
        per_channel = [operand for operand in per_channel if operand.data_ptr() != given.data_ptr()]
    return per_channel[0] if len(per_channel) == 1 else None


def _is_per_channel(tensor: Tensor, axis: int | None = None) -> bool:
    held = [size for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True) if size > 1 and stride]
    if axis is None or not held:
        return len(held) <= 1
    return len(held) == 1 and tensor.shape[axis] == held[0] and tensor.stride(axis) != 0
