"""Find: the SEs of a model, whoever put them there.

In: an `Anatomy`. Out: a list of `SESite`s. An SE is recognised by what it does and not by its class: a module that
returns its input times one number a channel, computed from the pooled input, and runs no convolution on the map itself;
or the same written out in the forward of a block, among other things that this does (see `inline`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from ..reading.anatomy import Anatomy
from ..reading.events import Call
from ..reading.layout import is_under
from ..reading.look import Look
from ..records import Implant, implants, is_implant, original_class
from .inline import Written, written_out
from .stages import Stages

_PACKAGES = {"timm": "timm", "torchvision": "torchvision"}


@dataclass(frozen=True)
class SESite:
    """One SE of a model: a module, or one that is written out in the forward of its block.

    Attributes:
        path: Path of the SE module itself; of one that is written out the path of its first layer, or of the child of
            the block that this is in.
        unit: Path of the block it serves.
        stage: Stage of the network, from 1.
        channels: Channels it gates (C).
        rd_channels: Width of its hidden layer, or None where it has none (ECA, eSE).
        params: Number of its parameters.
        macs: Multiply-adds an image: its layers and the scale.
        activations: Values an image that it makes: what its layers put out and the scaled map.
        origin: `se_surgery`, `timm`, `torchvision` or `other`.
        layers: Paths of the layers of one that is written out, in order; a weight that is the block's own counts as
            one. None for a module.
        block: Path of the block in whose own forward it is written out; None for a module.
    """

    path: str
    unit: str
    stage: int
    channels: int
    rd_channels: int | None
    params: int
    macs: int
    activations: int
    origin: str
    layers: tuple[str, ...] = ()
    block: str | None = None

    @property
    def is_module(self) -> bool:
        """Whether it is a module, and not written out in the forward of its block."""
        return self.block is None

    @property
    def written_out(self) -> str:
        """Where one that is written out is, in words."""
        layers = " and ".join(map(repr, self.layers))
        where = repr(self.block) if self.block else "the model"
        return f"it is written out in the forward of {where}, with the layers {layers}"


def sites_in(anatomy: Anatomy, stages: Stages) -> tuple[list[SESite], dict[str, Written]]:
    """The SEs that ran in a look, in order of execution, and those among them that are written out, by path."""
    seen = anatomy.look
    found = _modules_in(seen, stages)
    written = {one.path: one for one in written_out(anatomy, [site.path for _, site in found])}
    found += [(one.clock, _written_site(one, seen, stages.of(one.clock))) for one in written.values()]
    return [site for _, site in sorted(found, key=lambda item: item[0])], written


def _modules_in(seen: Look, stages: Stages) -> list[tuple[int, SESite]]:
    """The SE modules that ran in a look, each with when it began."""
    found: list[tuple[int, SESite]] = []
    for path, calls in seen.calls.items():
        module = seen.modules[path]
        holder, _, name = path.rpartition(".")
        implanted = path != "" and is_implant(seen.modules[holder], name)
        if not implanted and (path == "" or not is_se(seen, calls[0]) or _inside(path, found)):
            continue
        if isinstance(module, nn.Identity):
            continue
        found.append((calls[0].start, _site(path, seen, stages.of(calls[0].end), implanted)))
    return found


def _inside(path: str, found: list[tuple[int, SESite]]) -> bool:
    """Whether a module lies in an SE that was found before: a wrapper comes before what it wraps."""
    return any(is_under(path, site.path) for _, site in found)


def is_se(seen: Look, call: Call) -> bool:
    """Whether a module's call multiplied the map it was given by a gate per channel, computed from that map pooled."""
    given, returned = [a for a in call.args if isinstance(a, Tensor)], call.output
    if len(given) != 1 or not isinstance(returned, Tensor) or not seen.maps.is_map(returned.shape):
        return False
    if given[0].shape != returned.shape:
        return False
    events = seen.during(call)
    on_maps = any(event.spatial and event.transforms for event in events)
    gates = [event for event in events if event.kind == "gate"]
    # A hidden layer of one position: a 1x1 convolution or Linear of the pooled map, or ECA's convolution over channels.
    layers = [event for event in events if event.kind in ("conv", "linear") and not event.spatial]
    squeezed = any(event.kind in ("squeeze", "pool") for event in events)
    gated = len(gates) == 1 and gates[0].shape == tuple(returned.shape)
    return gated and squeezed and bool(layers) and not on_maps


def _site(path: str, seen: Look, stage: int, implanted: bool) -> SESite:
    module, call = seen.modules[path], seen.calls[path][0]
    holder, record = path.rpartition(".")[0], record_of(path, seen) if implanted else None
    shape = tuple(call.output.shape)
    return SESite(
        path=path,
        unit=record.now(record.unit, holder) if record is not None else holder,
        stage=stage,
        channels=int(shape[_axis(shape, record, seen)]),
        rd_channels=hidden_width(module),
        params=sum(parameter.numel() for parameter in module.parameters()),
        macs=sum(event.macs for event in seen.during(call)) + math.prod(shape[1:]),
        activations=sum(event.activations for event in seen.during(call)) + math.prod(shape[1:]),
        origin=origin_of(module, record),
    )


def _written_site(one: Written, seen: Look, stage: int) -> SESite:
    package = original_class(seen.modules[one.block]).__module__.partition(".")[0]
    return SESite(
        path=one.path,
        unit=one.block,
        stage=stage,
        channels=one.shape[one.axis],
        rd_channels=one.rd_channels,
        params=one.params,
        macs=sum(event.macs for event in one.events) + one.scaled,
        activations=sum(event.activations for event in one.events) + one.scaled,
        origin=_PACKAGES.get(package, "other"),
        layers=one.layers,
        block=one.block,
    )


def record_of(path: str, seen: Look) -> Implant | None:
    """The record of an SE that this library put in; None for any other."""
    holder, _, name = path.rpartition(".")
    return next((implant for implant in implants(seen.modules[holder]) if implant.name == name), None)


def axis_of(path: str, seen: Look) -> int:
    """The channel axis of the maps that the SE at `path` gates: 1 or -1."""
    return _axis(tuple(seen.calls[path][0].output.shape), record_of(path, seen), seen)


def _axis(shape: tuple[int, ...], record: Implant | None, seen: Look) -> int:
    if record is not None and record.edges:
        return record.edges[0].axis
    return seen.maps.axis(shape) or 1


def origin_of(module: nn.Module, record: Implant | None) -> str:
    """Where an SE module comes from: `se_surgery`, `timm`, `torchvision` or `other`."""
    if record is not None:
        return "se_surgery"
    return _PACKAGES.get(type(module).__module__.partition(".")[0], "other")


def hidden_width(module: nn.Module) -> int | None:
    """Width of an SE's hidden layer: what its first of two layers puts out; None where it has one layer only."""
    layers = [child for child in module.modules() if isinstance(child, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]
    return int(layers[0].weight.shape[0]) if len(layers) >= 2 else None
