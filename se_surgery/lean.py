"""Lean: the SE in a form that keeps less for the backward pass, at the price of a little more Python.

In: an SE, the map it gates and, where a normalisation made that map, what it was made from. Out: the gated map, bit for
bit that of the plain form. With c the input of the normalisation, perhaps an activation, and n positions a map:

    y = act(norm(c))     z = mean(y)     s = excite(z)     out = y * s

- *c is kept, and not y.* Autograd keeps y for ds = sum(dout * y), and for the activation's gradient. The normalisation
  keeps c anyway, so `_Scale` and `_Activate` keep c too, which is no memory, and make y again from it.
- *dy = s * dout + dz / n is made in one go.* Autograd makes each term by itself and adds them. `_Scale` hands the
  factors of its term back as the gradients of two outputs of `_Squeeze` that hold no values, and `_Squeeze`, whose
  turn comes when dz is known, puts the sum together. This pays where no normalisation made y, too; then y is kept.

The excitation is ordinary autograd in the SE's own call, and so is the normalisation. Gradients are the plain form's up
to rounding. Whatever is not one backward pass in eager mode has the plain form: see `CLAUSES` and `NORM_CLAUSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d, ConvNormAct, GroupNorm, GroupNormAct
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


class Source(NamedTuple):
    """How a map came about; it travels on the map, as the attribute `SOURCE`.

    Attributes:
        rebuild: The function that makes the map again.
        kept: What from; the normalisation that made it keeps this for its own gradient.
        version: The map's version, which goes up with every change in place.
    """

    rebuild: Callable[..., Tensor]
    kept: tuple[Tensor | None, ...]
    version: int


SOURCE = "_se_source"
_NOTHING: nn.Module = nn.Identity()
_GLOBAL_HOOKS = (
    hooks._global_forward_hooks,
    hooks._global_forward_pre_hooks,
    hooks._global_backward_hooks,
    hooks._global_backward_pre_hooks,
)


# -------------------------------------------------------------------------------------------------------- when it runs

# What has to hold of an SE and the map that it is given.
CLAUSES: dict[str, Callable[[Any, Tensor], bool]] = {
    "the lean form is wanted": lambda se, x: getattr(se, "lean", False) is True,
    "gradients are enabled": lambda se, x: torch.is_grad_enabled(),
    "the map is a plain tensor": lambda se, x: type(x) is Tensor,
    "the squeeze is the mean": lambda se, x: se.squeeze == "avg",
    "nothing is mixed in": lambda se, x: se.mix is None,
    "nothing traces": lambda se, x: torch._C._get_tracing_state() is None,
    "nothing transforms": lambda se, x: not torch._C._are_functorch_transforms_active(),
    "no gradient in forward mode": lambda se, x: forward_ad._current_level < 0,
    # torch.set_default_device is a mode as well, and changes nothing here.
    "no function mode": lambda se, x: all(type(m) is DeviceContext for m in _get_current_function_mode_stack()),
    "no dispatch mode": lambda se, x: not torch._C._len_torch_dispatch_stack(),
}

# What has to hold of a normalisation and its input, besides, for that input to be kept.
NORM_CLAUSES: dict[str, Callable[[Any, Tensor], bool]] = {
    "its class is known": lambda norm, c: type(norm) in _NORMS,
    "no dropout in it": lambda norm, c: type(getattr(norm, "drop", _NOTHING)) is nn.Identity,
    "no activation in it that is not known": lambda norm, c: is_pointwise(getattr(norm, "act", _NOTHING)),
    "plain affine parameters": lambda norm, c: type(norm.weight) is type(norm.bias) is nn.Parameter,
    "parameters in full precision": lambda norm, c: norm.weight.dtype in (torch.float32, torch.float64),
    "a momentum": lambda norm, c: getattr(norm, "momentum", 0.0) is not None,
    "nothing hangs on it": lambda norm, c: all(map(is_bare, norm.modules())),
    "the input is needed": lambda norm, c: c.requires_grad or norm.weight.requires_grad,
    "the input is a batch of maps": lambda norm, c: c.dim() == 4 and c.numel() > c.shape[1],
    # BatchNorm takes maps in half precision with parameters in full precision, and is the same under autocast.
    "dtypes agree": lambda norm, c: isinstance(norm, nn.BatchNorm2d) or _agree(norm.weight, c),
}


def is_lean(se: nn.Module, x: Tensor) -> bool:
    """Whether an SE gates a map in the lean form."""
    # Compilers take this answer and look no further.
    return not torch.compiler.is_compiling() and all(holds(se, x) for holds in CLAUSES.values())


def is_kept(norm: nn.Module, c: Tensor) -> bool:
    """Whether the input of a normalisation can be kept in place of its output."""
    return all(holds(norm, c) for holds in NORM_CLAUSES.values())


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward, and nothing else."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    replaced = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return not any(own) and not any(_GLOBAL_HOOKS) and not replaced


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is an activation that is known, or does nothing."""
    return type(module) is nn.Identity or type(module) in _ACTIVATIONS


def _agree(weight: Tensor, c: Tensor) -> bool:
    return weight.dtype == c.dtype and not torch.is_autocast_enabled(c.device.type)


# --------------------------------------------------------------------------------------------------------- what it does


def gated(se: Any, y: Tensor) -> Tensor:
    """What an SE makes of a map: `y * se.excite(mean(y))`."""
    z, *factors = _Squeeze.apply(y, se.axes)
    gate = se.excite(z)
    if gate.shape != z.shape or torch.result_type(y, gate) != y.dtype:
        return y * gate  # type: ignore[no-any-return]
    source: Source | None = getattr(y, SOURCE, None)
    if source is None or source.version != y._version:
        source = Source(_itself, (y.detach(),), y._version)
    return _Scale.apply(y.detach(), gate, *factors, source.rebuild, *source.kept)  # type: ignore[no-any-return]


def tail(se: nn.Module, makers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What an SE behind a normalisation returns; rewritten blocks call this in place of all these modules.

    Args:
        se: The SE.
        makers: The modules that make its map, one after the other. The last ones are a normalisation and perhaps
            activations.
        x: The input of the first of them.
    """
    if is_lean(se, x):
        (*before, norm), acts = _parts(makers, is_bare)
        for module in before:
            x = module(x)
        if is_kept(norm, x):
            return se(_made(norm, acts, x))  # type: ignore[no-any-return]
        makers = (norm, *acts)
    for module in (*makers, se):
        x = module(x)
    return x


def ends_in_norm(*makers: nn.Module) -> bool:
    """Whether some modules, called one after the other, end with a normalisation and perhaps activations."""
    return type(_parts(makers, lambda module: True)[0][-1]) in _NORMS


def _parts(
    makers: Sequence[nn.Module], is_open: Callable[[nn.Module], bool]
) -> tuple[list[nn.Module], list[nn.Module]]:
    """What comes down to calling some modules one after the other: steps, and behind the last one activations."""
    steps = [step for maker in makers for step in _steps(maker, is_open)]
    acts: list[nn.Module] = []
    while len(steps) > 1 and is_open(steps[-1]) and is_pointwise(steps[-1]):
        acts.insert(0, steps.pop())
    return steps, acts


def _steps(module: nn.Module, is_open: Callable[[nn.Module], bool]) -> list[nn.Module]:
    chain = _CHAINS.get(type(module).forward)
    inner = chain(module) if chain is not None and is_open(module) else []
    return [step for one in inner for step in _steps(one, is_open)] or [module]


def _made(norm: nn.Module, acts: Sequence[nn.Module], c: Tensor) -> Tensor:
    """What a normalisation and activations make of c, with its source."""
    y, rebuild, kept = _NORMS[type(norm)](norm, c)
    for act in (getattr(norm, "act", _NOTHING), *acts):
        if type(act) in _ACTIVATIONS:
            y = _Activate.apply(y, act, rebuild, *kept)
            rebuild = partial(_activated, act, rebuild)
    setattr(y, SOURCE, Source(rebuild, kept, y._version))
    return y


def _activated(act: nn.Module, rebuild: Callable[..., Tensor], *kept: Tensor) -> Tensor:
    return _ACTIVATIONS[type(act)].forward(act, rebuild(*kept))


class _Squeeze(torch.autograd.Function):
    """The mean over the positions; and two empty outputs, for the factors of a term of the map's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, axes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        z = y.mean(axes, keepdim=True)
        ctx.shape, ctx.positions = y.shape, math.prod(y.shape[axis] for axis in axes)
        # Of the right shapes, with room for one value.
        return (z, *(like.new_empty_strided(like.shape, (0,) * like.dim()) for like in (y, z)))  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, dout: Tensor | None, gate: Tensor | None) -> tuple[Tensor | None, None]:
        share = None if dz is None else dz / ctx.positions
        if dout is None or gate is None:
            return (None if share is None else share.expand(ctx.shape)), None
        if share is None:
            return dout * gate, None
        # One pass is faster than two but for contiguous maps on a CPU, where broadcasting slows `addcmul` down.
        two = dout.device.type == "cpu" and dout.is_contiguous()
        return ((dout * gate).add_(share) if two else torch.addcmul(share, dout, gate)), None


class _Scale(torch.autograd.Function):
    """The product of a map and its gate. The map's gradient goes back in its two factors."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gate: Tensor, dout: Tensor, factor: Tensor, rebuild: Callable[..., Tensor], *kept: Tensor
    ) -> Tensor:
        ctx.rebuild = rebuild
        ctx.save_for_backward(gate, *kept)
        return y * gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gate, *kept = ctx.saved_tensors
        y = ctx.rebuild(*kept)
        # One gradient for many, as of `torch.autograd.grad(..., is_grads_batched=True)`, does not fit in place.
        many = is_batchedtensor(dout) or is_legacy_batchedtensor(dout)
        product = y * dout if many or y is kept[0] else y.mul_(dout)
        return (None, product.sum_to_size(gate.shape), dout, gate, None, *(None for _ in kept))


class _Activate(torch.autograd.Function):
    """An activation that keeps what its input can be made from, and neither its input nor its output."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, act: nn.Module, rebuild: Callable[..., Tensor], *kept: Tensor) -> Tensor:
        ctx.act, ctx.rebuild = act, rebuild
        ctx.save_for_backward(*kept)
        return act(a.detach())  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        return (
            _ACTIVATIONS[type(ctx.act)].backward(ctx.act, dy, ctx.rebuild(*kept)),
            None,
            None,
            *(None for _ in kept),
        )


# ----------------------------------------------------------------------------------------------------- what it knows of


def _itself(y: Tensor) -> Tensor:
    return y


# A normalisation's output, the function that makes it again, and what from.
_Made = tuple[Tensor, Callable[..., Tensor], tuple[Tensor | None, ...]]


def _batch_norm(norm: Any, c: Tensor) -> _Made:
    """What the forward of `nn.BatchNorm2d` does, by the function that returns the statistics, too."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    tracked = norm.track_running_stats or not norm.training
    mean, variance = (norm.running_mean, norm.running_var) if tracked else (None, None)
    by_batch = norm.training or mean is None
    y, batch_mean, rstd, *_ = torch._batch_norm_impl_index(
        c, weight, bias, mean, variance, by_batch, norm.momentum, eps, torch.backends.cudnn.enabled
    )
    if by_batch:
        mean, variance, eps = batch_mean, rstd**-2, 0.0
    return y, partial(F.batch_norm, eps=eps), (c.detach(), mean, variance, weight.detach(), bias.detach())


def _group_norm(norm: nn.GroupNorm, c: Tensor) -> _Made:
    def run(c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(c, groups, weight, bias, eps)

    groups, eps = norm.num_groups, norm.eps
    return run(c, norm.weight, norm.bias), run, (c.detach(), norm.weight.detach(), norm.bias.detach())


_NORMS: dict[type[nn.Module], Callable[[Any, Tensor], _Made]] = {
    **dict.fromkeys((nn.BatchNorm2d, BatchNormAct2d), _batch_norm),
    **dict.fromkeys((nn.GroupNorm, GroupNorm, GroupNormAct), _group_norm),
}


class _Activation(NamedTuple):
    """An activation by what it computes, never in place, and its gradient by that of its output and its input."""

    forward: Callable[[Any, Tensor], Tensor]
    backward: Callable[[Any, Tensor, Tensor], Tensor]


_aten = torch.ops.aten
_ACTIVATIONS: dict[type[nn.Module], _Activation] = {
    nn.ReLU: _Activation(lambda act, a: F.relu(a), lambda act, dy, a: _aten.threshold_backward(dy, a, 0)),
    nn.ReLU6: _Activation(lambda act, a: F.relu6(a), lambda act, dy, a: _aten.hardtanh_backward(dy, a, 0.0, 6.0)),
    nn.SiLU: _Activation(lambda act, a: F.silu(a), lambda act, dy, a: _aten.silu_backward(dy, a)),
    nn.Hardswish: _Activation(lambda act, a: F.hardswish(a), lambda act, dy, a: _aten.hardswish_backward(dy, a)),
}


def _conv_norm_act(module: Any) -> list[nn.Module]:
    return [step for step in (module.conv, module.bn, getattr(module, "aa", None)) if step is not None]


# Forwards that do no more than call some children in order.
_CHAINS: dict[Any, Callable[[Any], list[nn.Module]]] = {
    nn.Sequential.forward: list,
    ConvNormAct.forward: _conv_norm_act,
}
