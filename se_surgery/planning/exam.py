"""Exam: all that looking at a model tells, in one place.

In: a model. Out: an `Exam`: what one forward did, the traced blocks, the units, the stages, the SEs that are there and
the units that hold them. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import PatientError
from ..reading.anatomy import Anatomy
from ..reading.encoded import refuse_encoded_layers
from ..reading.layout import is_under
from ..reading.look import Look, look
from ..reading.wrappers import check_module, tensors_of
from ..records import Edge
from ..structure.find import SESite, record_of, sites_in
from ..structure.stages import Stages
from ..structure.unit import Unit
from ..structure.units import Units, recognise
from .placements import KEPT, PLACEMENTS, NoPlace, place, places


class Exam:
    """Everything that looking at a model tells: its units, stages and SEs. Changes nothing."""

    def __init__(self, model: nn.Module, example_input: Any = None, heads: bool = False) -> None:
        refuse_unfit(model)
        self.seen: Look = look(model, example_input)
        self.anatomy = Anatomy(self.seen)
        self.units: Units = recognise(self.anatomy, heads)
        self.stages = Stages(self.seen, [unit.end for unit in self.units.found])
        self.existing: list[SESite] = []
        # The SEs of every unit, by the unit's index.
        self.held: dict[int, list[SESite]] = {i: [] for i in range(len(self.units.found))}
        # Those of them that are written out in a forward, by path.
        sites, self.written = sites_in(self.anatomy, self.stages)
        for site in sites:
            self._assign(site)

    def stage_of(self, unit: Unit) -> int:
        """The stage of a unit."""
        return self.stages.of(unit.end)

    @cached_property
    def places(self) -> dict[str, int]:
        """For every placement the number of units that have a place for it."""
        return {placement: sum(self._has(unit, placement) for unit in self.units.found) for placement in PLACEMENTS}

    def _has(self, unit: Unit, placement: str) -> bool:
        try:
            place(self.anatomy, unit, placement)
        except NoPlace:
            return False
        return True

    def is_place(self, unit: Unit, placement: str, edges: tuple[Edge, ...]) -> bool:
        """Whether a placement's edges in a unit are these, wherever its block is by now."""
        try:
            found = places(self.anatomy, unit, placement)
        except NoPlace:
            return False
        return [replace(edge, owner="") for edge in found] == [replace(edge, owner="") for edge in edges]

    def placement_of(self, unit: Unit, se: SESite) -> str:
        """Where an SE that a unit holds sits: as it was put there, else inside the branch if convolutions follow it."""
        record = record_of(se.path, self.seen) if se.is_module else None
        if record is not None and record.placement != KEPT:
            return record.placement
        calls = self.seen.calls
        end = calls[self.seen.aliases.get(se.path, se.path)][-1].end if se.is_module else self.written[se.path].clock
        follows = any(event.clock > end for event in unit.block.convolutions(unit.nodes))
        return "inner" if follows else "standard"

    def _assign(self, site: SESite) -> None:
        """Note an SE with the unit it serves, in each of its places; one that serves none keeps what holds it."""
        for here in self._everywhere(site):
            index = self._unit_of(here)
            if index is not None:
                here = replace(here, unit=self.units.found[index].path)
                self.held[index].append(here)
            if here.path == site.path:
                self.existing.append(here)

    def _everywhere(self, site: SESite) -> Iterator[SESite]:
        """An SE in each of its places: those of its module, or of the block in whose forward it is written out."""
        if site.block is None:
            yield from (replace(site, path=path) for path in self.seen.everywhere(site.path))
            return
        for block in self.seen.everywhere(site.block):
            path, *layers = (moved(path, site.block, block) for path in (site.path, *site.layers))
            self.written.setdefault(path, self.written[site.path])
            yield replace(site, path=path, unit=block, block=block, layers=tuple(layers))

    def _unit_of(self, site: SESite) -> int | None:
        units = list(enumerate(self.units.found))
        if site.block is not None:
            return self._around(site)
        if site.origin == "se_surgery":
            same = [i for i, unit in units if unit.path == site.unit]
            own = [i for i in same if len(same) == 1 or self._is_servant(units[i][1], site)]
            if same:
                return (own or same)[0]
        around = [(unit.path.count(".") if unit.path else -1, i) for i, unit in units if is_under(site.path, unit.path)]
        deepest = [i for depth, i in around if depth == max(around)[0]]
        for i in deepest:
            if len(deepest) == 1 or self.units.found[i].calls(site.path):
                return i
        return self._behind(self.seen.calls[site.path][0].start) if site.path in self.seen.calls else None

    def _around(self, site: SESite) -> int | None:
        """The deepest unit in whose block an SE is written out; of several of one block the one whose branch has it.

        A unit that the whole model's forward makes holds what its branch does, and no more.
        """
        block, node = str(site.block), self.written[site.path].node
        units = list(enumerate(self.units.found))
        around = [(len(unit.path), i) for i, unit in units if unit.path == block or is_under(block, unit.path)]
        same = [i for length, i in around if length == max(around)[0]]
        for i in same:
            unit = units[i][1]
            inside = unit.block.path == block and any(n.name == node for n in unit.nodes)
            if inside or unit.calls(block) or (len(same) == 1 and unit.path):
                return i
        return self._behind(min(event.clock for event in self.written[site.path].events))

    def _is_servant(self, unit: Unit, site: SESite) -> bool:
        """Whether an SE of this library serves just this one of the units that its block has."""
        record = record_of(site.path, self.seen)
        if record is None or not record.edges:
            # It fills a slot that a branch calls.
            return unit.calls(site.path)
        return self.is_place(unit, record.placement, record.edges)

    def _behind(self, start: int) -> int | None:
        """The plain unit that what began then follows directly: an SE that is an entry of the same Sequential."""
        before = [(unit.end, i) for i, unit in enumerate(self.units.found) if unit.end < start and unit.kind == "plain"]
        if not before:
            return None
        end, index = max(before)
        between = any(event.kind == "conv" and end < event.clock < start for event in self.seen.events)
        return None if between else index


def moved(path: str, root: str, other: str) -> str:
    """A path under one root, under another.

    Examples:
        >>> moved("blocks.0.fc1", "blocks.0", "tail"), moved("fc1", "", "net")
        ('tail.fc1', 'net.fc1')
    """
    if not is_under(path, root):
        return path
    return f"{other}.{path[len(root) + 1 if root else 0 :]}".strip(".")


# Wrappers are known by name: importing torch.distributed's to compare classes would cost more than the surgery.
_WRAPPERS = {
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "FSDP2",
    "OptimizedModule": "torch.compile",
    "ScriptModule": "torch.jit",
}


def refuse_unfit(model: Any) -> None:
    """Refuse what cannot be operated on.

    Raises:
        PatientError: The model is no module, is wrapped, compiled or scripted, or lies partly on the meta device.
    """
    check_module(model)
    modules = dict(model.named_modules())
    wrapped: dict[type, set[str]] = {}
    for path, module in modules.items():
        kind = type(module)
        if kind not in wrapped:
            wrapped[kind] = {cls.__name__ for cls in kind.__mro__} & _WRAPPERS.keys()
        names = wrapped[kind]
        if names or module.__dict__.get("_compiled_call_impl") is not None:
            wrapper = _WRAPPERS[min(names)] if names else "torch.compile"
            raise PatientError(
                f"{repr(path) if path else 'The model'} is wrapped or compiled by {wrapper}, which has fixed what it "
                f"runs and synchronises already. Operate on the bare model first, then wrap it."
            )
    tensors = list(tensors_of(modules))
    lazy = next((name for name, tensor in tensors if is_lazy(tensor)), None)
    if lazy is not None:
        raise PatientError(f"{lazy!r} of the model is lazy and has no shape yet. Run it on one batch, then operate.")
    refuse_encoded_layers(model)
    empty = next((name for name, module in modules.items() if _takes_nothing(module)), None)
    if empty is not None:
        raise PatientError(
            f"{empty!r} is a convolution of no channels. Give the model channels: in_chans=3, for instance."
        )
    places = {tensor.is_meta for _, tensor in tensors}
    if len(places) == 2:
        lost = next(name for name, tensor in tensors if tensor.is_meta)
        raise PatientError(
            f"Some tensors are on the meta device and some are not ({lost!r} is). "
            f"Load all weights first, or keep the whole model on meta."
        )


def _takes_nothing(module: nn.Module) -> bool:
    """Whether it is a convolution without channels, as timm makes one for `in_chans=0`."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not module.weight.numel()


def find_se(model: nn.Module, example_input: Any = None) -> list[SESite]:
    """List the SEs of a model in order of execution, whoever put them there.

    They are modules, or written out in the forward of a block (`site.block` says which, and `site.layers` with what
    layers).

    Args:
        model: Any CNN; it is left as found.
        example_input: (C, H, W), a tensor with its batch axis, or a tuple of arguments for the probing run.

    Raises:
        ProbeError: The model does not run on the probing input.

    Examples:
        >>> [site.path for site in find_se(timm.create_model("seresnet18"))][:2]
        ['layer1.0.se', 'layer1.1.se']
    """
    return list(Exam(model, example_input).existing)
