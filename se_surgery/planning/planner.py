"""Planner: decide where SEs go, and change nothing.

In: a model and checked options. Out: a `Plan`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import nn

from ..errors import NothingToDoError, OptionError, PatientError, PlacementError, SurgeryError
from ..reading.block import Block
from ..reading.layout import is_under, positions
from ..reading.look import Look
from ..records import Edge, base_of, implants, is_implant
from ..se.excite import SPATIAL_ATTENTION, SESpec, hidden_channels
from ..structure.find import SESite, record_of
from ..structure.unit import Unit
from ..structure.units import ODD
from .exam import Exam
from .options import DEFAULT_PLACEMENT, Options, check_options, check_width, matches, option_arguments, resolve_stage
from .placements import KEPT, NoPlace, places, slot_of
from .plan import HELD, Plan, Site, Skipped, UnitKind


def plan_se(
    model: nn.Module,
    placement: str | None = None,
    r: int | Mapping[int, int] = 16,
    *,
    stages: int | Collection[int] | None = None,
    where: Any = None,
    rd_channels: int | Mapping[str, int] | Callable[[Any], int] | None = None,
    rd_divisor: int = 1,
    bias: bool | tuple[bool, bool] = False,
    squeeze: str = "avg",
    act: str = "relu",
    gate: str = "sigmoid",
    gate_scale: float | None = None,
    init: str = "identity",
    attn: str = "se",
    existing: str = "skip",
    name: str = "se",
    heads: bool = False,
    example_input: Any = None,
) -> Plan:
    """Say what `add_se` would do with the same arguments, and change nothing.

    `print(plan)` is a table; `.sites`, `.existing` and `.skipped` hold every candidate, `.params_added` and
    `.macs_added` the cost. A plan without sites is returned too, with the reasons in `.skipped`.

    Args:
        model: Any CNN; it is left as found.
        placement: See `add_se`; so for all other arguments.
        r: Reduction ratio.
        stages: Stages to operate on.
        where: Which sites to take.
        rd_channels: Hidden width, instead of `r`.
        rd_divisor: Round the hidden width to a multiple of this.
        bias: Biases of the two layers.
        squeeze: How to pool.
        act: Activation between the layers.
        gate: The gate.
        gate_scale: Factor on the gate.
        init: How the SEs start.
        attn: Kind of attention.
        existing: What to do in a unit that holds an SE already.
        name: Name of the child module.
        heads: Whether to operate on heads, necks and decoders, too.
        example_input: What to run the model on while looking.

    Raises:
        SurgeryError: An argument means nothing, or the model cannot be looked at.

    Examples:
        >>> plan = plan_se(timm.create_model("resnet50"))
        >>> len(plan.sites), plan.params_added
        (16, 2514944)
    """
    options = check_options(**option_arguments(locals()))
    return make_plan(Exam(model, example_input, options.heads), options)


def make_plan(exam: Exam, options: Options) -> Plan:
    """The plan for checked options."""
    return _Planner(exam, options).plan()


class _Seat(NamedTuple):
    """Where a unit's SE goes.

    Attributes:
        placement: Its placement.
        slot: Path of the SE whose call it takes over, or None where the placement's own rule says where it goes.
    """

    placement: str
    slot: str | None = None


class _Planner:
    """Goes through the units once; each ends as a site, as existing, or as skipped."""

    def __init__(self, exam: Exam, options: Options) -> None:
        self.exam = exam
        self.options = options
        count = exam.stages.count
        self.stages = None if options.stages is None else {resolve_stage(s, count) for s in options.stages}
        ratios = options.r
        self.ratios = (
            {resolve_stage(stage, count): ratio for stage, ratio in ratios.items()}
            if isinstance(ratios, Mapping)
            else dict.fromkeys(range(1, count + 1), ratios)
        )
        self.taken: dict[str, set[str]] = {}
        self.sites: list[Site] = []
        self.skipped: list[Skipped] = []
        self.shared = _shared_modules(exam.seen)

    def plan(self) -> Plan:
        for index, unit in enumerate(self.exam.units.found):
            self._consider(unit, self.exam.held[index])
        # A dense layer begins by joining what the layers before it made: that is its input.
        layers = {unit.path for unit in self.exam.units.found if unit.kind == "dense"}
        for reject in (r for r in dict.fromkeys(self.exam.units.rejected) if r.path not in layers):
            blocking = reject.blocking and self._asked_for(reject.path)
            self.skipped.append(Skipped(reject.path, reject.kind, reject.reason, blocking))
        model = self.exam.seen.model
        config = getattr(model, "pretrained_cfg", None)
        name = config.get("architecture") if isinstance(config, dict) else None
        return Plan(
            model=name or type(model).__name__,
            base=base_of(model),
            options=self.options,
            sites=tuple(self.sites),
            existing=tuple(self.exam.existing),
            skipped=tuple(self.skipped),
            stages=self.exam.stages.count,
            params_before=sum(p.numel() for p in model.parameters()),
            buffers_before=sum(b.numel() for b in model.buffers() if b.is_floating_point()),
            census=self.exam.units.census,
            warnings=tuple(self._warnings()),
            exam=self.exam,
        )

    def _warnings(self) -> Iterator[str]:
        """What is wrong with a plan although it can be carried out: units that get no SE though others do."""
        units = self.exam.units
        lost = [(path, end) for path, end in units.lost if self._asked_for(path)]
        if not lost or not self.sites:
            return  # without any site it is an error, which says why
        everywhere = f"{len(lost)} of {len(units.found) + len(lost)} units drop out, in {_shown(lost)}"
        if len(lost) > len(units.found):
            yield f"{everywhere}: most of this network. What stops each is among the candidates skipped."
            return
        held = {self.exam.stage_of(unit) for unit in units.found}
        parted = sorted({self.exam.stages.of(end) for _, end in lost} & held)
        if parted:
            yield f"{everywhere}: {_listed(parted)} would be operated on in part."

    def _consider(self, unit: Unit, held: list[SESite]) -> None:
        stage = self.exam.stage_of(unit)
        if (self.stages is not None and stage not in self.stages) or stage not in self.ratios:
            self._skip(unit, "not asked", f"stage {stage} was not asked for")
            return
        seat = self._seat(unit, held)
        try:
            edges = self._edges(unit, seat)
        except NoPlace as reason:
            self._skip(unit, "no place", f"no place for {seat.placement}: {reason}")
            return
        site = self._site(unit, seat, edges, stage, held)
        if isinstance(self.options.rd_channels, int):
            site = self._sized(site)
        if not matches(self.options.where, site):
            self._skip(unit, "not asked", "where leaves it out")
            return
        if held and self.options.existing == "skip":
            self._skip(unit, "held", f"{HELD} ({', '.join(se.path for se in held)})")
            return
        if held and self.options.existing == "error":
            ways = "'skip', 'replace' or 'stack'" if all(se.is_module for se in held) else "'skip' or 'stack'"
            raise SurgeryError(
                f"{unit.path!r} holds an SE already ({_told(held[0])}). "
                f"Take existing={ways}, or leave the unit out with where."
            )
        blocked = self._blocked(unit, site) or self._irreplaceable(held)
        if blocked:
            self.skipped.append(Skipped(unit.path, "refused", blocked, blocking=True))
            return
        self.taken.setdefault(site.host, set()).add(site.name)
        self.sites.append(self._sized(site))

    def _skip(self, unit: Unit, kind: UnitKind, reason: str) -> None:
        self.skipped.append(Skipped(unit.path, kind, reason))

    def _seat(self, unit: Unit, held: list[SESite]) -> _Seat:
        """Where a unit's SE goes: as was asked for, else to the place of the one SE that it replaces."""
        asked = self.options.placement
        if asked is not None:
            return _Seat(asked)
        if len(held) != 1 or not held[0].is_module:
            return _Seat(DEFAULT_PLACEMENT)
        (se,) = held
        record = record_of(se.path, self.exam.seen)
        if record is not None:
            return _Seat(record.placement, None if record.edges else se.path)
        return _Seat(KEPT, se.path)

    def _edges(self, unit: Unit, seat: _Seat) -> tuple[Edge, ...]:
        anatomy = self.exam.anatomy
        return (slot_of(anatomy, seat.slot),) if seat.slot else places(anatomy, unit, seat.placement)

    def _site(self, unit: Unit, seat: _Seat, edges: tuple[Edge, ...], stage: int, held: list[SESite]) -> Site:
        options, edge = self.options, edges[0]
        replaced = tuple(se.path for se in held if se.is_module) if options.existing == "replace" else ()
        host = self.exam.anatomy.block(edge.owner)
        wanted = seat.slot.rpartition(".")[2] if seat.slot else options.name
        fills = bool(seat.slot) or _slot_behind(host, edge, wanted, replaced)
        name = wanted if fills else self._free_name(host, seat.placement, replaced)
        channels = edge.channels
        width = hidden_channels(channels, self.ratios[stage], options.rd_divisor)
        channels_last = edge.axis == -1
        spec = SESpec(
            channels=channels,
            rd_channels=width,
            bias=options.bias,
            squeeze=options.squeeze,
            act=options.act,
            gate=options.gate,
            gate_scale=options.scale,
            mix=options.mix,
            channels_last=channels_last,
            dims=len(edge.shape) - 2,
            attn=options.attn,
        )
        path = f"{edge.owner}.{name}" if edge.owner else name
        size = positions(edge.shape, edge.axis)
        taken = _in_channels(self.exam.seen, unit) or channels
        return Site(path, unit.path, unit.kind, seat.placement, stage, size, taken, spec, edges, fills, replaced)

    def _sized(self, site: Site) -> Site:
        """The site with the hidden width that was asked for; the one that it has goes by `r`."""
        widths = self.options.rd_channels
        if widths is None:
            return site
        if isinstance(widths, Mapping):
            if site.path not in widths:
                raise OptionError(
                    f"rd_channels has no width for {site.path!r}. Give it one, or leave it out with where."
                )
            width = widths[site.path]
        else:
            width = widths(site) if callable(widths) else widths
        width = check_width(self.options, width, site.path)
        return replace(site, spec=replace(site.spec, rd_channels=width))

    def _free_name(self, host: Block, placement: str, replaced: tuple[str, ...]) -> str:
        """`se` where the block has nothing of that name and its forward calls none, else `se_<placement>`, numbered."""
        module = self.exam.seen.modules[host.path]
        called = {str(n.target).split(".")[0] for n in host.nodes if n.op in ("call_module", "get_attr")}
        base = self.options.name
        numbered = f"{base}_{placement}"
        gone = {path.rpartition(".")[2] for path in replaced if path.rpartition(".")[0] == host.path}
        ours = {implant.name for implant in implants(module)} & gone
        taken = called | self.taken.get(host.path, set())
        names = itertools.chain([base, numbered], (f"{numbered}_{i}" for i in itertools.count(2)))
        # What a class defines is found before any child, None and properties too.
        free = (n for n in names if n not in taken and not hasattr(type(module), n))
        return next(n for n in free if getattr(module, n, None) is None or n in ours)

    def _irreplaceable(self, held: list[SESite]) -> str | None:
        """Why the SEs of a unit cannot be replaced, where that was asked for, or None."""
        written = next((se for se in held if not se.is_module), None)
        if written is None or self.options.existing != "replace":
            return None
        return (
            f"its SE {written.path!r} is no module that could be replaced: {written.written_out}; "
            f"existing='skip' leaves it alone, and 'stack' puts one beside it"
        )

    def _asked_for(self, path: str) -> bool:
        """Whether a block that cannot be looked into is among the stages and globs that were asked for."""
        where = self.options.where
        stage = self.exam.stages.of(self.exam.seen.calls[path][-1].end)
        by_stage = (self.stages is None or stage in self.stages) and stage in self.ratios
        return by_stage and matches(where, SimpleNamespace(path=path, unit=path, stage=stage))

    def _blocked(self, unit: Unit, site: Site) -> str | None:
        """Why a site that was asked for cannot be done, or None."""
        calls = len(self.exam.seen.calls[site.host])
        if calls > 1:
            for path, places_of_it in self.shared.items():
                if path in (unit.path, site.host) or is_under(site.host, path):
                    return f"it is shared between two places ({' and '.join(places_of_it)}), and its SE would be too"
            return f"{site.host!r} runs {calls} times in one forward, and its SE would too"
        takes = (2,) if self.options.attn in SPATIAL_ATTENTION else (1, 2)
        if self.options.attn != "se" and site.spec.dims not in takes:
            return f"{self.options.attn} takes maps of {' or '.join(_DIMENSIONS[dims] for dims in takes)}"
        return None


_DIMENSIONS = {1: "one", 2: "two dimensions"}


def _slot_behind(host: Block, edge: Edge, name: str, replaced: tuple[str, ...]) -> bool:
    """Whether the block's own forward calls an empty slot of that name right behind the edge."""
    path = f"{host.path}.{name}" if host.path else name
    if is_implant(host.look.modules[host.path], name) and path not in replaced:
        return False
    node = next(node for node in host.nodes if node.name == edge.producer)
    while len(users := host.takers(node)) == 1:
        (node,) = users
        if node.op != "call_module":
            return False
        module = host.view.get_submodule(str(node.target))
        is_empty = type(module) is nn.Identity or (node.target == name and path in replaced)
        if node.target == name and is_empty:
            return _called_once(host, name)
        if not is_empty:
            return False
    return False


def _in_channels(seen: Look, unit: Unit) -> int:
    """The channels of what the first convolution of a unit takes; 0 where it has none."""
    if unit.convolution is not None:
        return unit.convolution.channels
    found = unit.block.convolutions(unit.nodes)
    if not found and unit.path in seen.calls:
        inside = seen.during(seen.calls[unit.path][0])
        found = [event for event in inside if event.kind == "conv" and event.spatial and seen.learns(event.path)]
    return found[0].channels if found else 0


def _told(site: SESite) -> str:
    return site.path if site.is_module else f"{site.path}: {site.written_out}"


def _called_once(host: Block, name: str) -> bool:
    return sum(node.op == "call_module" and node.target == name for node in host.nodes) == 1


def _shared_modules(seen: Look) -> dict[str, list[str]]:
    """All paths of the modules that have several, by the first."""
    paths: dict[str, list[str]] = {}
    for path, first in seen.aliases.items():
        paths.setdefault(first, [first]).append(path)
    return paths


def unplaced_reason(plan: Plan) -> SurgeryError:
    """The error for a plan without sites: the placement the model lacks, or what left nothing to do."""
    options = plan.options
    if not plan.exam.units.found and plan.exam.units.closed:
        path = plan.exam.units.closed[0]
        why = next(skip.reason for skip in plan.skipped if skip.unit == path)
        return PatientError(
            f"{path or 'the root'!r} of {plan.model} cannot be operated on: {why}. "
            f"Give it a forward that torch.fx can trace, or operate on a submodule."
        )
    odd = next((skip for skip in plan.skipped if skip.reason == ODD), None)
    if not plan.exam.units.found and odd is not None:
        return PlacementError(
            f"{plan.model} has no unit that is understood: {odd.unit or 'its root'}: {odd.reason}. "
            f"Write the join as an addition, or operate on a submodule."
        )
    if not plan.exam.units.found:
        told = [skip for skip in plan.skipped if not skip.unit] or plan.skipped
        first = told[0] if told else None
        why = f"{first.unit or 'its root'}: {first.reason}" if first else "no convolution is followed by an activation"
        return PlacementError(
            f"{plan.model} has no convolutional unit ({why}). "
            f"Give a CNN: SE recalibrates its channels, and in a transformer there is nothing to operate on."
        )
    asked = options.placement or DEFAULT_PLACEMENT
    if not plan.places[asked]:
        has = ", ".join(placement for placement, count in plan.places.items() if count)
        return PlacementError(
            f"{plan.model} has no place for {asked!r} ({_first_reason(plan, asked)}). It has places for: {has}."
        )
    exam = plan.exam
    held = sorted({exam.stage_of(unit) for unit in exam.units.found})
    wanted = sorted({resolve_stage(stage, exam.stages.count) for stage in options.stages or held})
    if not set(wanted) & set(held):
        return NothingToDoError(
            f"{plan.model} has no unit in {_listed(wanted)}: its units are in {_listed(held)}. Name one of those."
        )
    reasons = dict.fromkeys(skip.reason for skip in plan.skipped if skip.is_unit)
    return NothingToDoError(
        f"Nothing to do in {plan.model} with placement={asked!r}: {'; '.join(list(reasons)[:3])}. "
        f"Widen stages or where, or say with existing what to do where an SE is."
    )


def _shown(lost: list[tuple[str, int]]) -> str:
    paths = list(dict.fromkeys(path for path, _ in lost))
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(repr, paths[:3])) + more


def _listed(stages: list[int]) -> str:
    return f"{'stage' if len(stages) == 1 else 'stages'} {', '.join(map(str, stages))}"


def _first_reason(plan: Plan, placement: str) -> str:
    prefix = f"no place for {placement}: "
    return next((skip.reason.removeprefix(prefix) for skip in plan.skipped if skip.kind == "no place"), "none")
