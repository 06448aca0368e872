"""Lean: the SE in a form that makes and keeps fewer maps, at the price of a little more Python.

In: an SE, the map that it gates and, from `tail`, how that came about. Out: the gated map, bit for bit that of the
plain form. With c the input of a normalisation, perhaps an activation, and n positions a map:

    y = act(norm(c))     z = mean(y)     s = excite(z)     out = y * s

- *The product is taken in place* where nobody else has y: a new map takes longer to come by than to fill.
- *c is kept, and not y.* Autograd keeps y for ds = sum(dout * y), and for the activation's gradient. The normalisation
  keeps c anyway, so `_Scale` keeps c too, which is no memory, and makes y again from it, bit for bit.
- *dz is expanded, and no map.* The mean's own gradient is one, with the same value at all positions.

The excitation is ordinary autograd in the SE's own call, and so is the normalisation. Gradients are the plain form's up
to rounding. Whatever is not one backward pass in eager mode has the plain form: see `CLAUSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


class Source(NamedTuple):
    """How a map came about that nobody else has.

    Attributes:
        rebuild: The function that makes the map again, bit for bit, as a new tensor.
        kept: What from; the normalisation that made it keeps this for its own gradient.
    """

    rebuild: Callable[..., Tensor]
    kept: tuple[Tensor | None, ...]


# What has to hold of an SE and the map that it is given.
CLAUSES: dict[str, Callable[[Any, Tensor], bool]] = {
    "the lean form is wanted": lambda se, x: getattr(se, "lean", False) is True,
    "the map is a plain tensor": lambda se, x: type(x) is Tensor,
    # Gradients of complex maps have conjugates in them.
    "the map is real": lambda se, x: x.is_floating_point(),
    "the squeeze is the mean": lambda se, x: se.squeeze == "avg",
    "nothing is mixed in": lambda se, x: se.mix is None,
    "nothing traces": lambda se, x: torch._C._get_tracing_state() is None,
    "nothing transforms": lambda se, x: not torch._C._are_functorch_transforms_active(),
    "no gradient in forward mode": lambda se, x: forward_ad._current_level < 0,
    # torch.set_default_device is a mode as well, and changes nothing here.
    "no function mode": lambda se, x: all(type(m) is DeviceContext for m in _get_current_function_mode_stack()),
    "no dispatch mode": lambda se, x: not torch._C._len_torch_dispatch_stack(),
}


def is_lean(se: Any, x: Tensor) -> bool:
    """Whether an SE gates a map in the lean form."""
    # Compilers take this answer and look no further.
    return not torch.compiler.is_compiling() and all_hold(CLAUSES, se, x)


def all_hold(clauses: Mapping[str, Callable[[Any, Tensor], bool]], module: Any, x: Tensor) -> bool:
    """Whether every clause holds of a module and a map."""
    # No generator: this runs at every call of every SE.
    for holds in clauses.values():  # noqa: SIM110
        if not holds(module, x):
            return False
    return True


def gated(se: Any, y: Tensor, source: Source | None = None) -> Tensor:
    """What an SE makes of a map: `y * se.excite(mean(y))`.

    Args:
        se: The SE.
        y: The map.
        source: How it came about; it is used up then.
    """
    if not torch.is_grad_enabled():
        z = se.pool(y)
        gate = se.excite(z)
        in_place = source is not None and _fits(y, z, gate)
        return y.mul_(gate) if in_place else y * gate  # type: ignore[no-any-return]
    z = _mean(y, se.axes)
    gate = se.excite(z)
    if not _fits(y, z, gate):
        return y * gate  # type: ignore[no-any-return]
    rebuild, kept = source or (_itself, (y,))
    return _Scale.apply(y, gate, rebuild, *kept)  # type: ignore[no-any-return]


def _fits(y: Tensor, z: Tensor, gate: Tensor) -> bool:
    """Whether a gate is one value a channel of each map, and the product has the map's dtype."""
    plain = type(y) is type(gate) is Tensor
    return plain and gate.shape == z.shape and torch.result_type(y, gate) == y.dtype


def _itself(y: Tensor) -> Tensor:
    return y


# Of a map that nothing is kept for.
PASSING = Source(_itself, ())


def _mean(y: Tensor, axes: list[int]) -> Tensor:
    """`y.mean(axes, keepdim=True)`, with a gradient that is no map, but one value a channel, expanded."""
    if y.device.type == "cpu" and y.dtype in (torch.float32, torch.float64):
        # What the mean is computed as there, bit for bit.
        return y.sum(axes, keepdim=True) / math.prod(y.shape[axis] for axis in axes)
    return _Mean.apply(y, axes)  # type: ignore[no-any-return]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, axes: list[int]) -> Tensor:
        ctx.shape, ctx.positions = y.shape, math.prod(y.shape[axis] for axis in axes)
        return y.mean(axes, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None]:
        return (dz / ctx.positions).expand(ctx.shape), None


class _Scale(torch.autograd.Function):
    """The product of a map and its gate; for the gate's gradient the map is made again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, rebuild: Callable[..., Tensor], *kept: Tensor | None) -> Tensor:
        ctx.rebuild = rebuild
        ctx.gate_shape = gate.shape
        gates, scales, *_ = ctx.needs_input_grad
        # No more than the plain form's product, which raises where one that it kept has changed since.
        ctx.save_for_backward(gate if gates else None, *(kept if scales else ()))
        if rebuild is _itself:
            return y * gate
        ctx.mark_dirty(y)
        return y.mul_(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gate, *kept = ctx.saved_tensors
        gates, scales, *rest = ctx.needs_input_grad
        dgate = None
        if scales:
            y = ctx.rebuild(*kept)
            # In the plain form's order, from which comes the product's layout, and from that the order of the sum.
            product = y.mul_(dout) if ctx.rebuild is not _itself and _fits_in_place(dout, y) else dout * y
            dgate = product.sum_to_size(ctx.gate_shape)
        return (dout * gate if gates else None, dgate, *(None for _ in rest))


def _fits_in_place(gradient: Tensor, y: Tensor) -> bool:
    """Whether the product of a gradient and a map can be written over the map, and is laid out as another would be."""
    # One gradient for many is that of `torch.autograd.grad(is_grads_batched=True)`.
    many = is_batchedtensor(gradient) or is_legacy_batchedtensor(gradient)
    return not many and type(gradient) is Tensor and gradient.dtype == y.dtype and gradient.stride() == y.stride()
