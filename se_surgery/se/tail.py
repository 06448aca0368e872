"""Tail: what a rewritten block calls in place of a normalisation, activations and the SE behind them.

In: these modules and the input of the first. Out: the gated map, bit for bit what they return one after the other.
Nobody but the SE has the map between them, and it can be made again from the normalisation's input: with its `Source`
the lean form does the rest. Where a clause does not hold, the modules are called one after the other.

The map that is made again is that of the forward, bit for bit: an activation whose slope jumps, as the ReLU's at zero,
would else give another gradient where its input is zero but for rounding. It is made from what the normalisation's
parameters and statistics were in the forward, since they may change before the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d, ConvNormAct, GroupNorm, GroupNormAct
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules import module as hooks

from ..records import durable
from .excite import SqueezeExcite
from .lean import PASSING, Source, all_hold, gated, is_lean

_NOTHING: nn.Module = nn.Identity()
_GLOBAL_HOOKS = (
    hooks._global_forward_hooks,
    hooks._global_forward_pre_hooks,
    hooks._global_backward_hooks,
    hooks._global_backward_pre_hooks,
)

# What has to hold of a normalisation and its input, so that what it returns is a new map that nobody else has.
OPEN_CLAUSES: dict[str, Callable[[Any, Tensor], bool]] = {
    "its class is known": lambda norm, c: type(norm) in _NORMS,
    "its input is a plain tensor": lambda norm, c: type(c) is Tensor,
    "no dropout in it": lambda norm, c: type(norm._modules.get("drop", _NOTHING)) is nn.Identity,
    "no activation in it that is not known": lambda norm, c: is_pointwise(norm._modules.get("act", _NOTHING)),
    "nothing hangs on it": lambda norm, c: is_bare(norm) and all(map(is_bare, norm.children())),
}

# And besides, so that its input can be kept in place of that map.
KEPT_CLAUSES: dict[str, Callable[[Any, Tensor], bool]] = {
    "plain affine parameters": lambda norm, c: type(norm.weight) is type(norm.bias) is nn.Parameter,
    "parameters in full precision": lambda norm, c: norm.weight.dtype in (torch.float32, torch.float64),
    "plain statistics": lambda norm, c: all(type(tensor) in (Tensor, type(None)) for tensor in _statistics(norm)),
    # Others have kernels of their own, which round in another way.
    "its tensors lie dense": lambda norm, c: all(t is None or t.is_contiguous() for t in _tensors(norm)),
    "a momentum": lambda norm, c: getattr(norm, "momentum", 0.0) is not None,
    # In some releases of torch BatchNorm refuses zero when it trains.
    "something is added to the variance": lambda norm, c: norm.eps > 0,
    "the input is needed": lambda norm, c: c.requires_grad or norm.weight.requires_grad,
    "the input is a batch of maps": lambda norm, c: c.dim() in _ranks(norm) and c.numel() > c.shape[1],
    # BatchNorm takes maps in half precision with parameters in full precision, and is the same under autocast.
    "dtypes agree": lambda norm, c: isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or _agree(norm.weight, c),
}


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward, and nothing else."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    replaced = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return not own and not any(_GLOBAL_HOOKS) and not replaced


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is an activation that is known, or does nothing."""
    return type(module) is nn.Identity or type(module) in _ACTIVATIONS


def _statistics(norm: Any) -> tuple[Any, Any]:
    return getattr(norm, "running_mean", None), getattr(norm, "running_var", None)


# Of any, as those of a normalisation are what it has.
_NO_STATISTICS: tuple[Any, Any] = (None, None)


def _ranks(norm: Any) -> tuple[int, ...]:
    """The numbers of axes of the maps that a normalisation takes; GroupNorm takes any."""
    return (3,) if isinstance(norm, nn.BatchNorm1d) else (4,) if isinstance(norm, nn.BatchNorm2d) else (3, 4)


def _tensors(norm: Any) -> tuple[Tensor | None, ...]:
    return norm.weight, norm.bias, *_statistics(norm)


def _agree(weight: Tensor, c: Tensor) -> bool:
    return weight.dtype == c.dtype and not torch.is_autocast_enabled(c.device.type)


@durable
def tail(se: nn.Module, makers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What an SE behind a normalisation returns; rewritten blocks call this in place of all these modules.

    Args:
        se: The SE.
        makers: The modules that make its map, one after the other. The last ones are a normalisation and perhaps
            activations.
        x: The input of the first of them.
    """
    own = type(se).forward is SqueezeExcite.forward
    # Compilers look no further than `is_lean`.
    if not (own and is_lean(se, x) and is_bare(se)):
        return _called((*makers, se), x)
    (*before, norm), acts = _parts(makers, is_bare)
    x = _called(before, x)
    if not all_hold(OPEN_CLAUSES, norm, x):
        return _called((norm, *acts, se), x)
    if not torch.is_grad_enabled():
        return gated(se, _called((norm, *acts), x), PASSING)
    if not all_hold(KEPT_CLAUSES, norm, x) or _writes_over(norm, acts):
        return _called((norm, *acts, se), x)
    return gated(se, *_made(norm, acts, x))


def _writes_over(norm: nn.Module, acts: Sequence[nn.Module]) -> bool:
    """Whether an activation writes over what the one before it keeps, which autograd refuses in the plain form."""
    both = itertools.pairwise(_known(norm, acts))
    return any(type(first) in (nn.ReLU, nn.ReLU6) and getattr(second, "inplace", False) for first, second in both)


def _known(norm: nn.Module, acts: Sequence[nn.Module]) -> list[nn.Module]:
    """The activations in a normalisation and behind it, without those that do nothing."""
    return [act for act in (getattr(norm, "act", _NOTHING), *acts) if type(act) in _ACTIVATIONS]


def _called(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
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


def _conv_norm_act(module: Any) -> list[nn.Module]:
    return [step for step in (module.conv, module.bn, getattr(module, "aa", None)) if step is not None]


# Forwards that do no more than call some children in order.
_CHAINS: dict[Any, Callable[[Any], list[nn.Module]]] = {
    nn.Sequential.forward: list,
    ConvNormAct.forward: _conv_norm_act,
}


# --------------------------------------------------------------------------------------------- maps made again from c

# A normalisation's output, the function that makes it again, and what from.
_Made = tuple[Tensor, Callable[..., Tensor], tuple[Tensor | None, ...]]


def _made(norm: nn.Module, acts: Sequence[nn.Module], c: Tensor) -> tuple[Tensor, Source]:
    """What a normalisation and activations make of c, and how."""
    acts = _known(norm, acts)
    y, run, kept = _NORMS[type(norm)](norm, c, bool(acts))
    rebuild: Callable[..., Tensor] = partial(_rerun, run, c.stride())
    for act in acts:
        y = _Activate.apply(y, act, rebuild, *kept)
        rebuild = partial(_activated, act, rebuild)
    return y, Source(rebuild, kept)


def _rerun(run: Callable[..., Tensor], strides: tuple[int, ...], c: Tensor, *others: Tensor) -> Tensor:
    """What a normalisation makes of c, laid out as it was: other layouts have other kernels, and round in another way.

    Hooks on saved tensors, `torch.autograd.graph.save_on_cpu` for one, give c back in a layout of their own.
    """
    if c.stride() != strides:
        c = _laid_out(c, strides)
    return run(c, *others)


def _laid_out(c: Tensor, strides: tuple[int, ...]) -> Tensor:
    laid = torch.empty_strided(c.shape, strides, dtype=c.dtype, device=c.device)
    # Of what is expanded, one is written for all.
    written = tuple(slice(None) if stride else slice(0, 1) for stride in strides)
    laid[written].copy_(c[written])
    return laid


def _activated(act: nn.Module, rebuild: Callable[..., Tensor], *kept: Tensor) -> Tensor:
    return _ACTIVATIONS[type(act)].forward(act, rebuild(*kept))


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


def _batch_norm(norm: Any, c: Tensor, activated: bool) -> _Made:
    """What the forward of PyTorch's BatchNorm does, by the function that returns the statistics, too."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    weight, bias, eps, cudnn = norm.weight, norm.bias, norm.eps, torch.backends.cudnn.enabled
    tracked = norm.track_running_stats or not norm.training
    mean, variance = _statistics(norm) if tracked else _NO_STATISTICS
    by_batch = norm.training or (mean is None and variance is None)
    y, batch_mean, rstd, *_ = torch._batch_norm_impl_index(
        c, weight, bias, mean, variance, by_batch, norm.momentum, eps, cudnn
    )
    c, weight, bias = c.detach(), weight.detach(), bias.detach().clone()
    if not by_batch:
        # A forward that trains writes to them, and no version counter tells.
        statistics = (mean.clone(), variance.clone())
        return y, partial(_by_statistics, eps, cudnn), (c, *statistics, weight.clone(), bias)
    if _scales_exactly(c) or not (activated or c.device.type == "cpu"):
        return y, _scaled, (c, batch_mean, rstd * weight, bias)
    return y, partial(_by_batch, eps, cudnn), (c, weight.clone(), bias)


def _scales_exactly(c: Tensor) -> bool:
    """Whether `_scaled` is bit for bit what BatchNorm returned.

    The kernel for dense maps on CPU first makes two numbers a channel, `scale = rstd * weight` and
    `bias - mean * scale`, and of a variance of one its rstd is one.
    """
    dense = c.is_contiguous() or c.is_contiguous(memory_format=torch.channels_last)
    return dense and c.device.type in ("cpu", "meta")


def _scaled(c: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """BatchNorm by statistics that are known; no other function takes an rstd."""
    # `F.batch_norm` would refuse to add nothing to the variance, as it does in training.
    return torch.batch_norm(c, scale, bias, mean, torch.ones_like(mean), False, 0.0, 0.0, False)


def _by_batch(eps: float, cudnn: bool, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """BatchNorm as it was in the forward; the statistics are taken once more."""
    return torch.batch_norm(c, weight, bias, None, None, True, 0.0, eps, cudnn)


def _by_statistics(
    eps: float, cudnn: bool, c: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    return torch.batch_norm(c, weight, bias, mean, variance, False, 0.0, eps, cudnn)


def _group_norm(norm: nn.GroupNorm, c: Tensor, activated: bool) -> _Made:
    def run(c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(c, groups, weight, bias, eps)

    groups, eps = norm.num_groups, norm.eps
    kept = (c.detach(), norm.weight.detach().clone(), norm.bias.detach().clone())
    return run(c, norm.weight, norm.bias), run, kept


# Each takes a normalisation, its input, and whether an activation follows.
_NORMS: dict[type[nn.Module], Callable[[Any, Tensor, bool], _Made]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d), _batch_norm),
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
