"""Tail: what a rewritten block calls in place of a normalisation, activations and the SE behind them.

In: these modules and the input of the first. Out: the gated map, bit for bit what they return one after the other.
Nobody but the SE has the map between them, and it can be made again from the normalisation's input: with its `Source`
the lean form does the rest. Where a clause does not hold, the modules are called one after the other.
"""

from __future__ import annotations

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
    "no dropout in it": lambda norm, c: type(norm._modules.get("drop", _NOTHING)) is nn.Identity,
    "no activation in it that is not known": lambda norm, c: is_pointwise(norm._modules.get("act", _NOTHING)),
    "nothing hangs on it": lambda norm, c: is_bare(norm) and all(map(is_bare, norm.children())),
}

# And besides, so that its input can be kept in place of that map.
KEPT_CLAUSES: dict[str, Callable[[Any, Tensor], bool]] = {
    "plain affine parameters": lambda norm, c: type(norm.weight) is type(norm.bias) is nn.Parameter,
    "parameters in full precision": lambda norm, c: norm.weight.dtype in (torch.float32, torch.float64),
    "a momentum": lambda norm, c: getattr(norm, "momentum", 0.0) is not None,
    "the input is needed": lambda norm, c: c.requires_grad or norm.weight.requires_grad,
    "the input is a batch of maps": lambda norm, c: c.dim() == 4 and c.numel() > c.shape[1],
    # BatchNorm takes maps in half precision with parameters in full precision, and is the same under autocast.
    "dtypes agree": lambda norm, c: isinstance(norm, nn.BatchNorm2d) or _agree(norm.weight, c),
}


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward, and nothing else."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    replaced = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return not own and not any(_GLOBAL_HOOKS) and not replaced


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is an activation that is known, or does nothing."""
    return type(module) is nn.Identity or type(module) in _ACTIVATIONS


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
    if not all_hold(KEPT_CLAUSES, norm, x):
        return _called((norm, *acts, se), x)
    return gated(se, *_made(norm, acts, x))


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
    y, rebuild, kept = _NORMS[type(norm)](norm, c)
    for act in (getattr(norm, "act", _NOTHING), *acts):
        if type(act) in _ACTIVATIONS:
            y = _Activate.apply(y, act, rebuild, *kept)
            rebuild = partial(_activated, act, rebuild)
    return y, Source(rebuild, kept)


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
        return y, _normalised, (c.detach(), batch_mean, rstd, weight.detach(), bias.detach())
    return y, partial(F.batch_norm, eps=eps), (c.detach(), mean, variance, weight.detach(), bias.detach())


def _normalised(c: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(c, mean, rstd**-2, weight, bias, eps=0.0)


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
