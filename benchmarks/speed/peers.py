"""Peers: one network with SEs as each of those makes it who are compared.

In: the name of a base, and inputs. Out: the network, or None where a peer has none. Weights are random, for what is
compared is time and memory. Peers that are SE modules stand on the very sites of this library's `standard`, as a
hand-written block would have them: behind the last normalisation of the branch, before the addition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from se_surgery import SqueezeExcite, add_se, find_se, strip_se
from se_surgery.errors import FoldError

BASE, AGAIN = "base", "base again"
OURS, PLAIN = "this library", "this library, plain"

# timm's own networks with SEs, where they are the base and SEs and nothing else.
NATIVE = {"resnet18": "seresnet18", "resnet50": "seresnet50", "resnext50_32x4d": "seresnext50_32x4d"}


def build(name: str) -> nn.Module:
    """The base."""
    return timm.create_model(name)


def native(name: str) -> nn.Module | None:
    """timm's own network with SEs."""
    return build(NATIVE[name]) if name in NATIVE else None


def by_hand(make: Callable[[SqueezeExcite], nn.Module]) -> Callable[..., nn.Module]:
    """A network with somebody's SE module on every site of `standard`."""

    def build_with(name: str, *_: Tensor) -> nn.Module:
        model = add_se(build(name), lean=False)
        for site in find_se(model):
            if site.origin == "se_surgery":
                host, _, child = site.path.rpartition(".")
                setattr(model.get_submodule(host), child, make(model.get_submodule(site.path)))  # type: ignore[arg-type]
        return model

    return build_with


def _widths(se: SqueezeExcite) -> tuple[int, int]:
    return se.fc1.in_channels, se.fc1.out_channels


class LinearSE(nn.Module):
    """The block of most write-ups: a pooling layer, `view`, two Linear layers, `view`, the product."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        layers = nn.Linear(channels, hidden, bias=False), nn.ReLU(inplace=True), nn.Linear(hidden, channels, bias=False)
        self.fc = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of a map."""
        pooled = self.avg_pool(x).view(x.shape[:2])
        return x * self.fc(pooled).view(*x.shape[:2], 1, 1).expand_as(x)


class GatedConv(nn.Module):
    """A convolution and an SE behind it, before any normalisation: Composer's way."""

    def __init__(self, convolution: nn.Conv2d, hidden: int) -> None:
        super().__init__()
        self.conv = convolution
        self.se = LinearSE(convolution.out_channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and scale."""
        return self.se(self.conv(x))


def composer(name: str, *_: Tensor, hidden: int = 64, least: int = 128) -> nn.Module:
    """The method of Composer's `SqueezeExcite`, with its default widths.

    Every convolution whose inputs and outputs have at least `least` channels is replaced by itself and an SE. This is
    the method written down, and not Composer's own code.
    """
    model = build(name)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Conv2d and min(module.in_channels, module.out_channels) >= least:
            host, _, child = path.rpartition(".")
            setattr(model.get_submodule(host), child, GatedConv(module, hidden))
    return model


def folded(name: str, *inputs: Tensor) -> nn.Module | None:
    """The base again after its SEs were folded into the layers beside them."""
    try:
        return strip_se(add_se(build(name), init="paper"), fold="mean", loader=[inputs[0]])
    except FoldError:
        return None


# By name, what makes a network from a base's name and inputs. The order is that of the tables.
PEERS: dict[str, Callable[..., nn.Module | None]] = {
    BASE: lambda name, *inputs: build(name),
    AGAIN: lambda name, *inputs: build(name),
    OURS: lambda name, *inputs: add_se(build(name)),
    PLAIN: lambda name, *inputs: add_se(build(name), lean=False),
    "timm's own": lambda name, *inputs: native(name),
    "torchvision's module": by_hand(lambda se: SqueezeExcitation(*_widths(se))),
    "Linear layers": by_hand(lambda se: LinearSE(*_widths(se))),
    "Composer's method": composer,
    "stripped": lambda name, *inputs: strip_se(add_se(build(name))),
    "folded": folded,
}
# The ones that torch.compile compiles; their ratios are to the base that it compiled.
COMPILED = {
    f"{peer}, compiled": (lambda name, *inputs, peer=peer: _compiled(PEERS[peer](name, *inputs)))
    for peer in (BASE, OURS, "timm's own")
}


def _compiled(model: nn.Module | None) -> Any:
    return None if model is None else torch.compile(model)
