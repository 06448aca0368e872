"""What the random configurations of test_lean_random.py are drawn from: by axis, the options by name.

The first option of each axis is the usual one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BatchNormAct2d, GroupNorm, GroupNormAct, LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def batch_norm(**options: Any) -> Callable[[int], nn.Module]:
    return lambda width: nn.BatchNorm2d(width, **options)


def batch_norm_act(act: type[nn.Module], **options: Any) -> Callable[[int], nn.Module]:
    return lambda width: BatchNormAct2d(width, act_layer=act, **options)


def in_groups(kind: Callable[..., nn.Module], **options: Any) -> Callable[[int], nn.Module]:
    return lambda width: kind(**{"num_channels": width, "num_groups": 2 if width % 2 == 0 else 1, **options})


def uncounted(width: int) -> nn.Module:
    norm = nn.BatchNorm2d(width)
    norm.num_batches_tracked = None
    return norm


def hooked(width: int) -> nn.Module:
    norm = nn.BatchNorm2d(width)
    norm.register_forward_hook(lambda *_: None)
    return norm


def parametrized(width: int) -> nn.Module:
    norm = nn.BatchNorm2d(width)
    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    return norm


def strided(width: int) -> nn.Module:
    """With a weight that is a part of a larger tensor."""
    norm = nn.BatchNorm2d(width)
    norm.weight = nn.Parameter(torch.ones(2 * width)[::2])
    return norm


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm": batch_norm(),
    "BatchNorm, eps=0": batch_norm(eps=0.0),
    "BatchNorm, eps=-1": batch_norm(eps=-1.0),
    "BatchNorm, eps=1e-60": batch_norm(eps=1e-60),
    "BatchNorm, eps=0.1": batch_norm(eps=0.1),
    "BatchNorm, momentum=None": batch_norm(momentum=None),
    "BatchNorm, momentum=1": batch_norm(momentum=1.0),
    "BatchNorm that tracks nothing": batch_norm(track_running_stats=False),
    "BatchNorm that is not affine": batch_norm(affine=False),
    "BatchNorm that counts nothing": uncounted,
    "BatchNorm with a hook": hooked,
    "BatchNorm with a parametrization": parametrized,
    "BatchNorm with strided parameters": strided,
    "BatchNorm of another width": lambda width: nn.BatchNorm2d(width + 1),
    "SyncBatchNorm": lambda width: nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(width)),
    "InstanceNorm": lambda width: nn.InstanceNorm2d(width, affine=True),
    "BatchNormAct without": lambda width: BatchNormAct2d(width, apply_act=False),
    "BatchNormAct, ReLU": batch_norm_act(nn.ReLU),
    "BatchNormAct, ReLU, not in place": batch_norm_act(nn.ReLU, inplace=False),
    "BatchNormAct, ReLU, eps=0": batch_norm_act(nn.ReLU, eps=0.0),
    "BatchNormAct, ReLU6": batch_norm_act(nn.ReLU6),
    "BatchNormAct, SiLU": batch_norm_act(nn.SiLU),
    "BatchNormAct, Hardswish": batch_norm_act(nn.Hardswish),
    "BatchNormAct, GELU": batch_norm_act(nn.GELU),
    "BatchNormAct, PReLU": batch_norm_act(nn.PReLU),
    "GroupNorm": in_groups(nn.GroupNorm),
    "GroupNorm, eps=0": in_groups(nn.GroupNorm, eps=0.0),
    "GroupNorm that is not affine": in_groups(nn.GroupNorm, affine=False),
    "timm's GroupNorm": in_groups(GroupNorm),
    "GroupNormAct, ReLU": in_groups(GroupNormAct),
    "GroupNormAct, SiLU": in_groups(GroupNormAct, act_layer=nn.SiLU),
    "LayerNorm2d": LayerNorm2d,
    "none": lambda width: nn.Identity(),
}
ACTS: dict[str, Callable[[], list[nn.Module]]] = {
    "none": list,
    "ReLU": lambda: [nn.ReLU()],
    "ReLU in place": lambda: [nn.ReLU(inplace=True)],
    "ReLU6 in place": lambda: [nn.ReLU6(inplace=True)],
    "Hardswish": lambda: [nn.Hardswish()],
    "SiLU in place": lambda: [nn.SiLU(inplace=True)],
    "SiLU and ReLU": lambda: [nn.SiLU(), nn.ReLU(inplace=True)],
    "GELU": lambda: [nn.GELU()],
}
SPECS: dict[str, dict[str, Any]] = {
    "usual": {},
    "biases": {"bias": (True, True), "act": "silu"},
    "gate of one": {"gate_scale": 1.0},
    "hard sigmoid": {"gate": "hard_sigmoid"},
    "tanh": {"gate": "tanh", "gate_scale": 1.0, "bias": (True, True)},
    "relu": {"gate": "relu", "gate_scale": 1.0, "bias": (False, True)},
    "mix": {"mix": True},
    "max": {"squeeze": "max"},
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a part of a wider map": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "every second position": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "some of more channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "one map for all": lambda x: x[:1].expand_as(x),
    "one position for all": lambda x: x[:, :, :1, :1].expand_as(x),
}


def with_first_channel(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x[:, :1] = value
        return x

    return change


def with_first_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x.view(-1)[:1] = value
        return x

    return change


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda x: x,
    "far from zero": lambda x: x * 0.1 + 20.0,
    "large": lambda x: x * 1e3,
    "small": lambda x: x * 1e-6,
    "a constant channel": with_first_channel(0.7),
    "constant channels": lambda x: x[:, :, :1, :1].mean(0, keepdim=True).expand_as(x).clone(),
    "a channel of zeros": with_first_channel(0.0),
    "zeros": torch.zeros_like,
    "a NaN": with_first_value(float("nan")),
    "an infinity": with_first_value(float("inf")),
}
SIZES: dict[str, tuple[int, int, int, int]] = {
    "usual": (3, 6, 5, 4),
    "vectors": (2, 16, 8, 8),
    "more channels": (2, 19, 3, 3),
    "one map": (1, 6, 5, 4),
    "one position": (3, 6, 1, 1),
    "one value a channel": (1, 6, 1, 1),
    "one channel": (3, 1, 5, 4),
    "one row": (2, 5, 1, 7),
    "no maps": (0, 6, 5, 4),
    "no positions": (2, 6, 0, 4),
}
# By what the names of its parameters start with; 0 is the convolution, 1 the normalisation and 2 the SE.
FROZEN: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "the convolution": ("0",),
    "the normalisation": ("1",),
    "the normalisation's bias": ("1.0.bias",),
    "the normalisation's weight": ("1.0.weight",),
    "the SE": ("2",),
    "all but the SE": ("0", "1"),
    "all but the normalisation's bias": ("0", "1.0.weight", "2"),
    "all": ("0", "1", "2"),
}
DRAWN: dict[str, Callable[[nn.Module], Any]] = {
    "usual": lambda norm: None,
    "no bias": lambda norm: None if norm.bias is None else norm.bias.zero_(),
    "whole bias": lambda norm: None if norm.bias is None else norm.bias.fill_(3.0),
    "negative weight": lambda norm: None if norm.weight is None else norm.weight.neg_(),
    "no weight": lambda norm: None if norm.weight is None else norm.weight.zero_(),
}

Parts = nn.ModuleList


def norm_of(parts: Parts) -> nn.Module:
    return parts[1][0]


def changed(of: Callable[[Parts], Any], name: str) -> Callable[[Parts, Tensor], None]:
    """Adds to a parameter or a buffer in place, where it is one that counts."""

    @torch.no_grad()
    def change(parts: Parts, x: Tensor) -> None:
        tensor = getattr(of(parts), name, None)
        if tensor is not None:
            tensor.add_(0.5)

    return change


def changed_unseen(name: str) -> Callable[[Parts, Tensor], None]:
    """Adds to a parameter or a buffer in place, and no version counter tells."""

    def change(parts: Parts, x: Tensor) -> None:
        tensor = getattr(norm_of(parts), name, None)
        if tensor is not None:
            tensor.data.add_(0.5)

    return change


def trained_on(parts: Parts, x: Tensor) -> None:
    norm = norm_of(parts)
    mode = norm.training
    with contextlib.suppress(RuntimeError, ValueError):
        norm.train()(torch.randn(4, *x.shape[1:], generator=torch.Generator().manual_seed(9)).to(x.dtype))
    norm.train(mode)


@torch.no_grad()
def stepped(parts: Parts, x: Tensor) -> None:
    for name, parameter in parts.named_parameters():
        if "bias" in name:
            parameter.sub_(0.25)


def loaded(parts: Parts, x: Tensor) -> None:
    norm_of(parts).load_state_dict({key: value + 1 for key, value in norm_of(parts).state_dict().items()})


def reset(parts: Parts, x: Tensor) -> None:
    if getattr(norm_of(parts), "running_mean", None) is not None:
        norm_of(parts).reset_running_stats()


@torch.no_grad()
def changed_input(parts: Parts, x: Tensor) -> None:
    x.mul_(2)


def switched(parts: Parts, x: Tensor) -> None:
    parts.train(not parts.training)
    norm_of(parts).eps = 3.0


def copied_and_stepped(parts: Parts, x: Tensor) -> None:
    stepped(copy.deepcopy(parts), x)


# What happens between the forward and the backward pass.
EVENTS: dict[str, Callable[[Parts, Tensor], None]] = {
    "nothing": lambda parts, x: None,
    "the norm's bias changes": changed(norm_of, "bias"),
    "the norm's weight changes": changed(norm_of, "weight"),
    "its running mean changes": changed(norm_of, "running_mean"),
    "its running variance changes": changed(norm_of, "running_var"),
    "its bias changes unseen": changed_unseen("bias"),
    "its running mean changes unseen": changed_unseen("running_mean"),
    "its running variance changes unseen": changed_unseen("running_var"),
    "it trains on other maps": trained_on,
    "it loads a state": loaded,
    "it forgets its statistics": reset,
    "an optimizer steps on biases": stepped,
    "the SE's weight changes": changed(lambda parts: parts[2].fc1, "weight"),
    "the input changes": changed_input,
    "modes and eps are switched": switched,
    "a copy is stepped on": copied_and_stepped,
}
USES: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda out: out,
    "twice": lambda out: out + out.sigmoid(),
    "squared": Tensor.square,
    "clipped in place": Tensor.relu_,
    "added to in place": lambda out: out.add_(1.0).mul_(0.5),
    "a part": lambda out: out[..., :1] * 2,
    "joined": lambda out: torch.cat([out, out.tanh()], 1),
    "detached": lambda out: out.detach() * out,
}
Forward = Callable[[Tensor], Tensor]


def within(context: Callable[[], Any]) -> Callable[[Forward, Tensor], Tensor]:
    def run(forward: Forward, x: Tensor) -> Tensor:
        with context():
            return forward(x)

    return run


def packed(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Callable[[Forward, Tensor], Tensor]:
    return within(lambda: torch.autograd.graph.saved_tensors_hooks(pack, unpack))


def to_array(tensor: Tensor) -> Any:
    # NumPy has no bfloat16.
    return tensor if tensor.dtype == torch.bfloat16 else tensor.numpy(force=True).copy()


def after_evaluation(forward: Forward, x: Tensor) -> Tensor:
    with torch.no_grad():
        forward(x)
    return forward(x)


WAYS: dict[str, Callable[[Forward, Tensor], Tensor]] = {
    "called": lambda forward, x: forward(x),
    "hooks that clone": packed(Tensor.clone, Tensor.clone),
    "hooks that lay out anew": packed(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t),
    "hooks that keep arrays": packed(to_array, torch.as_tensor),
    "offloaded": within(torch.autograd.graph.save_on_cpu),
    "recomputed": lambda forward, x: checkpoint(forward, x, use_reentrant=False),
    "recomputed, reentrant": lambda forward, x: checkpoint(forward, x, use_reentrant=True),
    "anomalies looked for": within(torch.autograd.detect_anomaly),
    "after an evaluation": after_evaluation,
    "no_grad": within(torch.no_grad),
    "inference_mode": within(torch.inference_mode),
}
