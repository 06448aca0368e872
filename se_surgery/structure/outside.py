"""Outside: what of a network is no place for an SE, however it looks.

In: a `Look` and the units found in it. Out: those units that are in a head, and the convolutions in no unit, each with
its reason. This is where nothing vanishes: a convolution with k > 1 is in a unit, or it or its block is a `Reject`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..reading.layout import is_under, parents
from ..reading.look import Look
from .unit import Reject, Unit

OUTSIDE = "a convolution outside of all units: of a stem, a downsampling or a head"
ON_TOKENS = "its layers are linear ones on tokens, and its convolutions only make those"
ON_SEQUENCES = "its convolutions are on sequences (Conv1d), and an SE is for maps of two or three dimensions"


def works_on_tokens(seen: Look) -> bool:
    """Whether a network is a transformer or the like: it has linear layers on sequences, or hardly any convolution.

    Linear layers on maps of four axes may be the pointwise convolutions of a channels-last block, two for its depthwise
    one.
    """
    on_tokens = [event for event in seen.events if event.kind == "linear" and len(event.shape) > 2]
    convolutions = sum(event.kind == "conv" and event.spatial for event in seen.events)
    return any(len(event.shape) == 3 for event in on_tokens) or len(on_tokens) > 4 * convolutions


def works_on_sequences(seen: Look) -> bool:
    """Whether all convolutions of a network have one dimension."""
    kernels = [len(event.kernel) for event in seen.events if event.kind == "conv"]
    return bool(kernels) and max(kernels) == 1


def in_heads(seen: Look, found: Sequence[Unit]) -> Iterator[tuple[Unit, Reject]]:
    """The units behind the backbone of a detection or segmentation network, and those that make the class scores.

    `backbone` is what torchvision's networks, and those of many others, call the part that is a classifier without its
    head.
    """
    has_backbone = isinstance(seen.modules.get("backbone"), nn.Module)
    last = next((event for event in reversed(seen.events) if event.kind in ("conv", "linear")), None)
    output = seen.calls[""][0].output
    # timm's networks say that they have no classes: what they put out then is features.
    has_scores = isinstance(output, Tensor) and getattr(seen.modules[""], "num_classes", None) != 0
    scores = tuple(output.shape[1:]) if has_scores else None
    for unit in found:
        if has_backbone and not is_under(unit.path, "backbone"):
            yield unit, Reject(unit.path, "in a head behind the backbone")
        elif last is not None and unit.convolution is last and last.shape[1:2] == scores:
            yield unit, Reject(last.path, "its channels are the outputs of the model")


def outside(seen: Look, found: Sequence[Unit], rejected: Sequence[Reject]) -> Iterator[Reject]:
    """The convolutions with k > 1 that are in no unit and have not been rejected by another rule."""
    named = {reject.path for reject in rejected}
    paths = {unit.path for unit in found if unit.path}
    # What is in a block that nobody can look into is in that block, unless it holds units of its own.
    closed = {reject.path for reject in rejected if reject.kind == "untraceable" and reject.path}
    paths |= {path for path in closed if not any(is_under(unit.path, path) for unit in found)}
    for event in seen.events:
        if event.kind != "conv" or not (event.wide and event.spatial and seen.learns(event.path)):
            continue
        if event.path in named or not paths.isdisjoint((event.path, *parents(event.path))):
            continue
        if not any(unit.calls(event.path) or unit.convolution is event for unit in found):
            yield Reject(event.path, OUTSIDE, "outside")
