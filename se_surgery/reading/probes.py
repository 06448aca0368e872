"""Probes: what to run a model on in order to look at it.

In: a model, and what its user says of its input. Out: argument tuples to try, most likely first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ProbeError, shorten
from .maps import IMAGES, SIGNALS, Maps

# Square sizes that are tried, in this order, for a model that does not say what it takes.
PROBE_SIZES = (224, 32, 28, 64, 96, 128, 160, 256, 299, 331, 384, 448, 512, 480, 473, 513, 640)
# The same for clips, (T, H, W), and for signals, (L,).
CLIP_SIZES = ((16, 112, 112), (16, 224, 224), (32, 224, 224))
LENGTHS = (1024, 256, 4096, 16000, 1000, 128, 512, 64, 2048, 5000, 187, 3000, 8000, 16384, 32000, 48000, 65536)
PROBE_BATCH = 2
# What networks call the size that they take, and the number of channels: on themselves, or on one of these.
_SIZES = ("input_size", "in_size", "img_size", "image_size", "input_shape", "in_shape", "input_resolution")
_LENGTHS = (
    *"input_length input_len seq_len seq_length sequence_length signal_length window_size window_length".split(),
    *"n_samples num_samples n_times length".split(),
)
_CHANNELS = ("in_channels", "in_chans", "input_channels", "num_channels", "n_channels")
_CONFIGS = ("config", "cfg", "conf", "hparams", "args", "pretrained_cfg", "default_cfg")
_LARGEST = 2**28


def probes(model: nn.Module, example_input: Any = None, ranks: tuple[int, ...] = IMAGES) -> Iterator[tuple[Any, ...]]:
    """The argument tuples to try on `model`, most likely first.

    The size is what the model says of itself (`input_size`, `img_size` and the like, its own or in its configuration,
    timm's `pretrained_cfg` for one) and otherwise each of `PROBE_SIZES`; channels, dtype and device are those of the
    first convolution, so that `in_chans=1` and half models work. A network of signals is given (B, C, L), and where it
    takes none of these (B, L) and (B, L, C).
    """
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    weight = first.weight if first is not None else next(model.parameters(), torch.empty(0))

    def images(*shape: int) -> tuple[Tensor]:
        return (torch.zeros(PROBE_BATCH, *shape, device=weight.device, dtype=weight.dtype),)

    if isinstance(example_input, Tensor):
        if not example_input.numel():
            raise ProbeError(
                f"example_input is a tensor of shape {tuple(example_input.shape)}, in which no image is. "
                f"Give an example_input with at least one."
            )
        yield (example_input,)
    elif isinstance(example_input, (tuple, list)) and example_input and all(type(n) is int for n in example_input):
        if min(example_input) < 0 or math.prod(example_input) > _LARGEST:
            raise ProbeError(
                f"example_input is {example_input!r}, which no image is. "
                f"Give the size (C, H, W) of one that fits into memory."
            )
        yield images(*example_input)
    elif isinstance(example_input, tuple) and example_input:
        yield example_input
    elif example_input is not None:
        raise ProbeError(
            f"example_input is {shorten(example_input)}, which is not an input. "
            "Give the size (C, H, W), a tensor with its batch axis, or a tuple of the forward's arguments."
        )
    else:
        dims = 1 if ranks == SIGNALS else 3 if isinstance(first, nn.Conv3d) else 2
        yield from (images(*shape) for shape in _shapes(model, dims, [first.in_channels] if first is not None else []))


def _shapes(model: nn.Module, dims: int, own: list[int]) -> Iterator[tuple[int, ...]]:
    """The shapes of images or signals to try, without the batch; `own` are the channels of the first convolution."""
    said = list(_said(model, dims))
    # A stem may rearrange positions into channels in front of its first convolution. Of what a network calls its number
    # of channels some is that of its last layer.
    counts = dict.fromkeys([*own, *(count for count, _ in said if count), *_numbers(model, _CHANNELS), 3, 1])
    sizes = dict.fromkeys([*(size for _, size in said if size), *_STAND_INS[dims]])
    for size in sizes:
        fitting = [count for count in counts if count * math.prod(size) <= _LARGEST]
        yield from ((count, *size) for count in fitting)
    if dims == 1:
        yield from sizes
        yield from ((*size, *own) for size in sizes)


_STAND_INS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: tuple((length,) for length in LENGTHS),
    2: tuple((side, side) for side in PROBE_SIZES),
    3: CLIP_SIZES,
}


def _said(model: nn.Module, dims: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """What a model says of the size that it takes: channels, 0 where it does not say, and the sides."""
    for value in _attributes(model, (*_LENGTHS, *_SIZES) if dims == 1 else _SIZES):
        sides = (value,) * dims if _is_number(value) else tuple(value) if _is_listed(value) else ()
        if len(sides) == dims:
            yield 0, sides
        elif len(sides) == dims + 1:
            # The channels come first in torch, and last in what was brought from elsewhere.
            channels, *rest = sides if sides[0] <= sides[-1] else (sides[-1], *sides[:-1])
            yield channels, tuple(rest)
        elif len(sides) == 1:
            yield 0, sides * dims


def _numbers(model: nn.Module, names: tuple[str, ...]) -> list[int]:
    return [value for value in _attributes(model, names) if _is_number(value)]


def _attributes(model: nn.Module, names: tuple[str, ...]) -> Iterator[Any]:
    """What a model, or its configuration, has under some names."""
    holders = [model, *(vars(model).get(name) for name in _CONFIGS)]
    for holder in holders:
        spaces = [holder] if isinstance(holder, Mapping) else [*_spaces(holder)]
        for name in names:
            yield from [space[name] for space in spaces if name in space][:1]


def _spaces(holder: Any) -> Iterator[Mapping[str, Any]]:
    """Where an object has its attributes, without running any of its code."""
    yield getattr(holder, "__dict__", {})
    yield from (base.__dict__ for base in type(holder).__mro__)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**17


def _is_listed(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_number, value))


def describe(args: tuple[Any, ...]) -> str:
    """An argument tuple in a few words."""
    return ", ".join(f"{tuple(a.shape)} {a.dtype}" if isinstance(a, Tensor) else shorten(a) for a in args)


def refused(
    model: nn.Module,
    failures: list[tuple[str, Exception]],
    example_input: Any,
    besides: str = "",
    ranks: tuple[int, ...] = IMAGES,
) -> ProbeError:
    """The error for a model that ran on none of the inputs that were tried; `besides` is what else there is to say."""
    tried = list(dict.fromkeys(description for description, _ in failures))
    shown = "; ".join(tried[:3]) + (f" and {len(tried) - 3} other inputs" if len(tried) > 3 else "")
    error = failures[0][1]
    text = (str(error).splitlines() or ["no message"])[0][:300]
    remedy = (
        f"Give the size {'(C, L)' if ranks == SIGNALS else '(C, H, W)'}, a tensor or a tuple of arguments as "
        "example_input."
        if example_input is None
        else "Give an example_input that the model's forward takes."
    )
    what = f"{type(model).__name__} does not run on {shown} ({type(error).__name__}: {text})"
    return ProbeError(f"{what}.{besides} {remedy}")


def resized(args: tuple[Any, ...], maps: Maps, size: tuple[int, ...]) -> tuple[Any, ...]:
    """The same arguments with empty images or signals of another size."""

    def image(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        for axis, side in zip(maps.inputs.get(tensor.dim(), ()), size, strict=False):
            shape[axis] = side
        is_image = tensor.dim() in maps.inputs
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device) if is_image else tensor

    return pytree.tree_map_only(Tensor, image, args)  # type: ignore[no-any-return]


def with_one_more(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with batches of one image more, all of them empty."""
    batches = [leaf.shape[0] for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim()]

    def batch(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != batches[0]:
            return tensor
        return torch.zeros((batches[0] + 1, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)

    return pytree.tree_map_only(Tensor, batch, args)  # type: ignore[no-any-return]


def mixed(args: tuple[Any, ...], output: Any) -> str:
    """What is wrong with an input of the wrong size that went through all the same, or nothing.

    A `view(-1, n)` on a map of the wrong size mixes images: the batch that comes out is not the one that went in.
    """
    shapes = [leaf.shape for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim()]
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim()]
    if len(leaves) == 1 and shapes and leaves[0].shape[0] != shapes[0][0]:
        return f"a batch of {shapes[0][0]} came out as a batch of {leaves[0].shape[0]}"
    return ""
