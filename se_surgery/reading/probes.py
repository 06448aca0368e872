"""Probes: what to run a model on in order to look at it.

In: a model, and what its user says of its input. Out: argument tuples to try, most likely first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ProbeError, shorten

# Square sizes that are tried, in this order, for a model that does not say what it takes.
PROBE_SIZES = (224, 32, 28, 64, 96, 128, 160, 256, 299, 331, 384, 448, 512)
# The same for clips, (T, H, W).
CLIP_SIZES = ((16, 112, 112), (16, 224, 224), (32, 224, 224))
PROBE_BATCH = 2
_LARGEST = 2**28


def probes(model: nn.Module, example_input: Any = None) -> Iterator[tuple[Any, ...]]:
    """The argument tuples to try on `model`, most likely first.

    The size is that of `pretrained_cfg` (timm convention) and otherwise each of `PROBE_SIZES`; channels, dtype and
    device are those of the first convolution, so that `in_chans=1` and half models work.
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
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        size = tuple(config.get("input_size") or ()) if isinstance(config, dict) else ()
        # A stem may rearrange positions into channels in front of its first convolution.
        counts = dict.fromkeys([first.in_channels if first is not None else 3, *size[:1], 3, 1])
        if isinstance(first, nn.Conv3d):
            yield from (images(channels, *size) for size in CLIP_SIZES for channels in counts)
            return
        sizes = [*([size[1:]] if len(size) == 3 else []), *((side, side) for side in PROBE_SIZES)]
        for height, width in sizes:
            yield from (images(channels, height, width) for channels in counts)


def describe(args: tuple[Any, ...]) -> str:
    """An argument tuple in a few words."""
    return ", ".join(f"{tuple(a.shape)} {a.dtype}" if isinstance(a, Tensor) else shorten(a) for a in args)


def refused(
    model: nn.Module, failures: list[tuple[str, Exception]], example_input: Any, besides: str = ""
) -> ProbeError:
    """The error for a model that ran on none of the inputs that were tried; `besides` is what else there is to say."""
    tried = list(dict.fromkeys(description for description, _ in failures))
    shown = "; ".join(tried[:3]) + (f" and {len(tried) - 3} other inputs" if len(tried) > 3 else "")
    error = failures[0][1]
    text = (str(error).splitlines() or ["no message"])[0][:300]
    remedy = (
        "Give the size (C, H, W), a tensor or a tuple of arguments as example_input."
        if example_input is None
        else "Give an example_input that the model's forward takes."
    )
    what = f"{type(model).__name__} does not run on {shown} ({type(error).__name__}: {text})"
    return ProbeError(f"{what}.{besides} {remedy}")


def resized(args: tuple[Any, ...], height: int, width: int) -> tuple[Any, ...]:
    """The same arguments with empty images of another size."""

    def image(tensor: Tensor) -> Tensor:
        if tensor.dim() not in (4, 5):
            return tensor
        return torch.zeros((*tensor.shape[:-2], height, width), dtype=tensor.dtype, device=tensor.device)

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
