"""The SE module, and the other attention modules that can take its place.

In: an `SESpec`, the shape of one SE. Out: a module that takes a batch of feature maps and returns it gated.

    z = squeeze(x)                      mean or maximum over the positions           (B, C)
    s = gate(fc2(act(fc1(z))))          excitation, hidden width rd_channels         (B, C)
    y = gate_scale * s * x              scale

Section 3 of Hu et al., Squeeze-and-Excitation Networks (arXiv 1709.01507). Module and parameter names are timm's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.layers import create_act_layer, create_attn, get_attn, make_divisible
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from ..records import durable
from .lean import gated, is_lean


class Gate(NamedTuple):
    """A gate: its module, and its value at zero, from which the scale that makes it the identity follows."""

    module: type[nn.Module]
    at_zero: float


# Table 12 of the paper compares sigmoid, tanh and ReLU. A gate that is zero at zero has no scale that makes it one.
GATES: dict[str, Gate] = {
    "sigmoid": Gate(nn.Sigmoid, 0.5),
    "hard_sigmoid": Gate(nn.Hardsigmoid, 0.5),
    "tanh": Gate(nn.Tanh, 0.0),
    "relu": Gate(nn.ReLU, 0.0),
}
# Table 11 of the paper.
SQUEEZES = ("avg", "max")
# timm's attention modules that keep the shape and add little arithmetic.
LIGHT_ATTENTION = ("ese", "eca", "ecam", "ceca", "gc", "gca", "cbam", "lcbam")
# Those of them that look at positions, by kernels of two dimensions.
SPATIAL_ATTENTION = ("cbam", "lcbam")
INITS = ("identity", "paper")


@dataclass(frozen=True)
class SESpec:
    """The architecture of one SE module: all that its construction needs, and all that is plain data.

    Attributes:
        channels: Channels it gates (C).
        rd_channels: Width of its hidden layer.
        bias: Whether the first and the second layer have a bias.
        squeeze: `avg` or `max`.
        act: Activation between the layers, by timm's name.
        gate: A key of `GATES`.
        gate_scale: What the gate is multiplied by.
        mix: Whether the output is `x + mix * (gated - x)` with a learnable `mix` that starts at zero.
        channels_last: Whether channels are the last axis of the maps.
        dims: Number of spatial dimensions of the maps: 2, 3 in networks of videos, or 1 in those of signals.
        attn: `se`, or one of `LIGHT_ATTENTION`.
    """

    channels: int
    rd_channels: int
    bias: tuple[bool, bool] = (False, False)
    squeeze: str = "avg"
    act: str = "relu"
    gate: str = "sigmoid"
    gate_scale: float = 1.0
    mix: bool = False
    channels_last: bool = False
    dims: int = 2
    attn: str = "se"


def hidden_channels(channels: int, r: int, rd_divisor: int = 1) -> int:
    """Width of the hidden layer: `max(2, C // r)`, rounded as timm does where `rd_divisor` > 1.

    Examples:
        >>> hidden_channels(256, 16), hidden_channels(24, 16), hidden_channels(24, 16, rd_divisor=8)
        (16, 2, 8)
    """
    width = max(2, channels // r)
    return int(make_divisible(width, rd_divisor, round_limit=0.0)) if rd_divisor > 1 else width


@durable
class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: scales every channel of a map by a gate computed from all of them.

    Parameters are `fc1.weight` (rd_channels, C, 1, 1) and `fc2.weight` (C, rd_channels, 1, 1), and their biases, in
    timm's names, shapes and order. With `init="identity"` the second layer is zero and the gate is one for any input,
    bit for bit on finite maps; the rows of the first layer come in pairs (w, -w), so that one of each pair passes the
    ReLU whatever the input and the second layer learns from the first step on.

    Args:
        spec: The architecture.
        init: `identity` or `paper` (plain random weights).

    Shape:
        (B, C, H, W), or (B, C, T, H, W) with `dims=3`, (B, C, L) with `dims=1`, or channels last; the output has the
        input's shape.

    Examples:
        >>> se = SqueezeExcite(SESpec(channels=64, rd_channels=4, gate_scale=2.0), init="identity")
        >>> x = torch.randn(2, 64, 7, 7)
        >>> torch.equal(se(x), x)
        True
    """

    # Where in its unit it was put, for `print`.
    placement = ""
    # Whether it runs in the form that keeps less for the backward pass, where it can (see `lean`).
    lean = True

    def __init__(
        self,
        spec: SESpec,
        init: str = "identity",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.squeeze = spec.squeeze
        self.gate_scale = spec.gate_scale
        self.channels_last = spec.channels_last
        # Fixed here and not read off the input, so that torch.fx can trace through.
        self.axes = [axis + (1 if spec.channels_last else 2) for axis in range(spec.dims)]
        first, second = spec.bias
        self.fc1 = _layer(spec.channels, spec.rd_channels, first, device, dtype)
        self.act = create_act_layer(spec.act, inplace=True).to(device=device, dtype=dtype)
        self.fc2 = _layer(spec.rd_channels, spec.channels, second, device, dtype)
        self.gate = GATES[spec.gate].module()
        self.mix = nn.Parameter(torch.zeros((), device=device, dtype=dtype)) if spec.mix else None
        self.reset_parameters(init, spec)

    @torch.no_grad()
    def reset_parameters(self, init: str, spec: SESpec) -> None:
        """Draw the weights anew from torch's global random number generator."""
        if init == "identity":
            _draw_pairs(self.fc1.weight)
            _zero(self.fc1.bias)
        else:
            self.fc1.reset_parameters()
        if init == "paper" or spec.mix:
            self.fc2.reset_parameters()
        else:
            _zero(self.fc2.weight, self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the channels of `x`."""
        # TorchScript reads the first condition and leaves out what stands behind it.
        if not is_scripting():  # noqa: SIM102
            if is_lean(self, x):
                return gated(self, x)
        gate = self.excite(self.pool(x))
        if self.mix is None:
            return x * gate
        return x + self.mix * (x * gate - x)

    def pool(self, x: Tensor) -> Tensor:
        """The squeeze: one number a channel, in the rank and layout of `x`."""
        return x.amax(self.axes, keepdim=True) if self.squeeze == "max" else x.mean(self.axes, keepdim=True)

    def excite(self, z: Tensor) -> Tensor:
        """The excitation: a scaled gate a channel from the squeezed map, in its rank and layout."""
        if len(self.axes) == 2 and not self.channels_last:
            gate = self.gate(self.fc2(self.act(self.fc1(z))))
        else:
            gate = self.gate(self.fc2(self.act(self.fc1(z.flatten(1)[:, :, None, None])))).reshape(z.shape)
        return gate if self.gate_scale == 1.0 else gate * self.gate_scale  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SqueezeExcite:
        """Do what `to`, `half` and the like do to every tensor.

        In a network of videos `to(memory_format=torch.channels_last_3d)` is for weights of five axes, and gives it to
        those of four as well, which these are, as timm's.
        """
        return super()._apply(fn if len(self.axes) == 2 else _on_five_axes(fn), recurse)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Its widths and placement, and what differs from the paper's module."""
        # What wraps a layer (LoRA) may not have them.
        widths = {"channels": "in_channels", "rd_channels": "out_channels"}
        parts = [f"{name}={getattr(self.fc1, its)}" for name, its in widths.items() if hasattr(self.fc1, its)]
        parts += [f"placement={self.placement!r}"] if self.placement else []
        parts += [f"squeeze={self.squeeze!r}"] if self.squeeze != "avg" else []
        parts += [f"gate_scale={self.gate_scale:g}"] if self.gate_scale != 1.0 else []
        parts += ["channels_last=True"] if self.channels_last else []
        parts += [f"dims={len(self.axes)}"] if len(self.axes) != 2 else []
        return ", ".join(parts)


def _on_five_axes(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of tensors that is given those of four axes with a fifth one, where it does not take them without."""

    def on_five_axes(tensor: Tensor) -> Tensor:
        if tensor.dim() != 4:
            return fn(tensor)
        try:
            return fn(tensor)
        except RuntimeError:
            # Whatever else it raises for, it raises for again.
            return fn(tensor.unsqueeze(-1)).squeeze(-1)

    return on_five_axes


class _Undrawn(nn.Conv2d):
    """A convolution with its values yet to be drawn; `nn.utils.skip_init` does the same in many times the time."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


def _layer(inputs: int, outputs: int, bias: bool, device: torch.device | None, dtype: torch.dtype | None) -> nn.Conv2d:
    layer: nn.Conv2d = _Undrawn(inputs, outputs, 1, bias=bias, device=device, dtype=dtype)
    layer.__class__ = nn.Conv2d
    return layer


def _draw_pairs(weight: Tensor) -> None:
    """Draw rows as `nn.Conv2d` does, in pairs (w, -w); of an odd number, the last one is by itself."""
    pairs = len(weight) // 2
    nn.init.kaiming_uniform_(weight[pairs:], a=math.sqrt(5))
    torch.neg(weight[pairs : 2 * pairs], out=weight[:pairs])


def _zero(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.zero_()


@durable
class Attention(nn.Module):
    """One of timm's light attention modules in an SE's place; with `mix` it starts as the identity.

    Args:
        spec: The architecture; `spec.attn` is one of `LIGHT_ATTENTION`.

    Shape:
        (B, C, H, W), or (B, C, L) with `dims=1`, or channels last; the output has the input's shape.
    """

    placement = ""
    dims = 2

    def __init__(self, spec: SESpec, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.channels_last = spec.channels_last
        self.dims = spec.dims
        self.attn = attention(spec.attn, spec.channels, spec.rd_channels).to(device=device, dtype=dtype)
        self.mix = nn.Parameter(torch.zeros((), device=device, dtype=dtype)) if spec.mix else None

    def forward(self, x: Tensor) -> Tensor:
        """Attend to the channels of `x`."""
        if self.dims == 1:
            y = self._of_signals(x)
        else:
            y = self.attn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.channels_last else self.attn(x)
        return y if self.mix is None else x + self.mix * (y - x)

    def _of_signals(self, x: Tensor) -> Tensor:
        """A signal is an image of one column."""
        if self.channels_last:
            return self.attn(x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)  # type: ignore[no-any-return]
        return self.attn(x.unsqueeze(-1)).squeeze(-1)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Its placement."""
        return f"placement={self.placement!r}" if self.placement else ""


def attention(name: str, channels: int, rd_channels: int) -> nn.Module:
    """Timm's attention module `name`, with the hidden width where it takes one."""
    takes = inspect.signature(get_attn(name).__init__).parameters
    options = {"rd_channels": rd_channels} if "rd_channels" in takes else {}
    return create_attn(name, channels, **options)  # type: ignore[no-any-return]


def build(spec: SESpec, init: str, device: torch.device | None, dtype: torch.dtype | None) -> SqueezeExcite | Attention:
    """The module for a spec."""
    if spec.attn == "se":
        return SqueezeExcite(spec, init, device, dtype)
    return Attention(spec, device, dtype)
