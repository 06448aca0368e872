"""SE cost: what one SE costs, by its spec. None is run; timm's attention modules run on the meta device.

In: an `SESpec`, and the size of a map. Out: parameters, multiply-adds, activations.
"""

from __future__ import annotations

import math

import torch
from timm.layers import create_act_layer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..reading.modes import modes_off
from .excite import SESpec, attention


def parameter_count(spec: SESpec) -> int:
    """Number of parameters of the module for a spec; nothing is allocated for it.

    Examples:
        >>> parameter_count(SESpec(channels=64, rd_channels=4, bias=(False, True)))
        576
    """
    if spec.attn == "se":
        first, second = spec.bias
        act = int(sum(p.numel() for p in create_act_layer(spec.act).parameters()))
        return (
            2 * spec.channels * spec.rd_channels
            + first * spec.rd_channels
            + second * spec.channels
            + act
            + int(spec.mix)
        )
    with torch.device("meta"):
        module = attention(spec.attn, spec.channels, spec.rd_channels)
    return sum(p.numel() for p in module.parameters()) + int(spec.mix)


@modes_off
def multiply_adds(spec: SESpec, size: tuple[int, ...]) -> int:
    """Multiply-adds an image of the module for a spec on a map of `size`: its layers, and the scale of every value.

    Examples:
        >>> multiply_adds(SESpec(channels=256, rd_channels=16), (56, 56))
        811008
    """
    scale = spec.channels * math.prod(size)
    if spec.attn == "se":
        return 2 * spec.channels * spec.rd_channels + scale
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad():
        module, image = attention(spec.attn, spec.channels, spec.rd_channels), _image(spec, size)
        with counter:
            module.eval()(image)
    flops = int(counter.get_total_flops())
    return flops // 2 + scale


@modes_off
def activations(spec: SESpec, size: tuple[int, ...]) -> int:
    """Values an image that the module for a spec makes of a map of `size`: of its layers, and the scaled map.

    Examples:
        >>> activations(SESpec(channels=256, rd_channels=16), (56, 56))
        803088
    """
    scaled = spec.channels * math.prod(size)
    if spec.attn == "se":
        return spec.rd_channels + spec.channels + scaled
    made: list[int] = []
    with torch.device("meta"), torch.no_grad():
        module, image = attention(spec.attn, spec.channels, spec.rd_channels), _image(spec, size)
        for layer in module.modules():
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(lambda _, given, output: made.append(output.numel()))
        module.eval()(image)
    return sum(made) + scaled


def _image(spec: SESpec, size: tuple[int, ...]) -> torch.Tensor:
    """One map of that size; timm's attention modules take a signal as an image of one column."""
    return torch.empty(1, spec.channels, *size, *[1] * (2 - len(size)))
