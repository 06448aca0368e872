"""Outside: what of a network is no place for an SE, however it looks.

In: a `Look` and the units found in it. Out: those units that are in a head, and the convolutions in no unit, each with
its reason. This is where nothing vanishes: a convolution with k > 1 is in a unit, or it or its block is a `Reject`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..reading.layout import is_under, parents
from ..reading.look import Look
from .graph import Graph, lowest, union_of
from .rules import Verdicts, fuses
from .unit import Reject, Unit

_BACKBONES = ("backbone", "encoder")
BEHIND = "in a neck, head or decoder behind"
OUTSIDE = "a convolution outside of all units: of a stem, a downsampling or a head"
ON_TOKENS = "its layers are linear ones on tokens, and its convolutions only make those"


def works_on_tokens(seen: Look) -> bool:
    """Whether a network is a transformer or the like: it has linear layers on sequences, or hardly any convolution.

    Linear layers on maps may be the pointwise convolutions of a channels-last block, two for its depthwise one.
    """
    on_tokens = [event for event in seen.events if event.kind == "linear" and len(event.shape) > 2]
    convolutions = sum(event.kind == "conv" and event.spatial for event in seen.events)
    is_surely = any(len(event.shape) == 3 for event in on_tokens) and not seen.maps.are_signals
    return is_surely or len(on_tokens) > 4 * convolutions


def puts_out_maps(graph: Graph) -> bool:
    """Whether a network puts out maps, or several values, and not one vector an image."""
    output = graph.look.calls[""][0].output
    if not isinstance(output, Tensor):
        return True
    return graph.look.maps.is_map(output.shape)


def in_heads(graph: Graph, verdicts: Verdicts, found: Sequence[Unit]) -> Iterator[tuple[Unit, Reject]]:
    """The units in the neck, the head or the decoder of a detection or segmentation network.

    `backbone` and `encoder` are what most call the part that is a classifier without its head; timm's `features_only`
    makes one, too. Where a network has none of that name, what goes up to larger maps again is the decoder.
    """
    seen = graph.look
    root = backbone_of(seen, found)
    up = _first_up(graph, verdicts) if root is None and puts_out_maps(graph) else None
    if up is not None and all(unit.end > up for unit in found):
        up = None  # a generator: all of it is behind
    for unit in found:
        if root is not None and not (unit.path == root or is_under(unit.path, root)):
            yield unit, Reject(unit.path, f"{BEHIND} {root!r}")
        elif up is not None and unit.end > up:
            yield unit, Reject(unit.path, f"{BEHIND} where its maps get larger again")


def backbone_of(seen: Look, found: Sequence[Unit]) -> str | None:
    """The path of the module that is a network's backbone, or None; it holds units."""
    named = [path for path in seen.modules if path.rpartition(".")[2] in _BACKBONES and path in seen.calls]
    wrapped = [path for path, module in seen.modules.items() if path and _is_features_only(module)]
    for path in sorted([*named, *wrapped], key=lambda path: path.count(".")):
        if any(unit.path == path or is_under(unit.path, path) for unit in found):
            return path
    return None


def _is_features_only(module: nn.Module) -> bool:
    """Whether it is what timm's `features_only` makes; by name, for timm has several classes of it."""
    return type(module).__name__ in ("FeatureListNet", "FeatureDictNet", "FeatureHookNet", "FeatureGetterNet")


def _first_up(graph: Graph, verdicts: Verdicts) -> int | None:
    """When maps first got larger in no unit, and in nothing that fuses several resolutions, or None.

    A pointwise convolution right in front of that makes the decoder's own channels (a lateral one), and is its first.
    """
    inner = union_of(found.region for found in verdicts.found)
    fused = union_of(join.region for join in graph.long_skips if fuses(join))
    # What gates a map, or goes nowhere, is none of the way to the outputs.
    outputs = (value.index for value in graph.values if any(not call.path for call in value.calls))
    way = union_of(graph.ancestors[index] for index in outputs)
    first = lowest(graph.enlarged & way & ~inner & ~fused)
    if first is None:
        return None
    fronts = (graph.values[index].event for index in graph.before(first))
    lateral = (event.clock for event in fronts if event is not None and not event.wide)
    return min((graph.values[first].clock, *lateral))


def in_scores(seen: Look, found: Sequence[Unit]) -> Iterator[tuple[Unit, Reject]]:
    """The unit that makes the class scores."""
    last = next((event for event in reversed(seen.events) if event.kind in ("conv", "linear")), None)
    output = seen.answered
    # timm's networks say that they have no classes: what they put out then is features.
    has_classes = getattr(seen.modules[""], "num_classes", None) != 0
    has_scores = has_classes and isinstance(output, Tensor) and not seen.maps.is_map(output.shape)
    scores = tuple(output.shape[1:2]) if has_scores else None
    for unit in found:
        if last is not None and unit.convolution is last and last.shape[1:2] == scores:
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
