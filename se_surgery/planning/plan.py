"""Plan: what one operation would do, as a frozen value.

Every candidate is in it: as a site, as an SE that is there, or as skipped with the reason. `print(plan)` is a table,
`plan.to_json()` plain data. The planner makes it, graft does it.
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import SurgeryError
from ..records import Edge
from ..se.costs import activations, multiply_adds, parameter_count
from ..se.excite import SESpec
from ..structure.census import Census
from ..structure.find import SESite
from ..structure.unit import RejectKind
from ..surgery.schema import FORMAT, VERSION
from .exam import Exam
from .options import Options

UnitKind = Literal["not asked", "held", "no place", "refused"]
SkipKind = UnitKind | RejectKind
HELD = "holds an SE already"


@dataclass(frozen=True)
class Site:
    """One SE to be put in.

    Attributes:
        path: Path the SE module will have.
        unit: Path of the unit it serves.
        kind: What the unit is: `residual`, `concat_residual`, `inception`, `aggregation`, `straight`, `dense`, `plain`.
        placement: Its placement; `kept` where it takes over the place of the SE that it replaces.
        stage: Stage of the network, from 1.
        size: Spatial size of the map it gates, in the probing run.
        in_channels: Channels of the map that the first convolution of its unit takes: of the unit's input.
        spec: Architecture of the SE.
        edges: The edge it goes on, in the block's forward and in its other methods that lead there.
        fills: Whether it fills an empty slot that the block's own forward calls, so that nothing is rewritten.
        replaces: Paths of the SEs that it replaces.
    """

    path: str
    unit: str
    kind: str
    placement: str
    stage: int
    size: tuple[int, ...]
    in_channels: int
    spec: SESpec
    edges: tuple[Edge, ...] = field(repr=False)
    fills: bool = False
    replaces: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels it gates (C)."""
        return self.spec.channels

    @property
    def rd_channels(self) -> int:
        """Width of its hidden layer."""
        return self.spec.rd_channels

    @property
    def params(self) -> int:
        """Number of its parameters."""
        return parameter_count(self.spec)

    @property
    def macs(self) -> int:
        """Multiply-adds an image: its layers and the scale. Pooling is free, as the paper counts (section 4)."""
        return multiply_adds(self.spec, self.size)

    @property
    def activations(self) -> int:
        """Values an image that it makes: what its layers put out, and the scaled map."""
        return activations(self.spec, self.size)

    @property
    def edge(self) -> Edge:
        """The edge in the block's forward."""
        return self.edges[0]

    @property
    def host(self) -> str:
        """Path of the block that will hold it."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Its name in that block."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Skipped:
    """A candidate that gets no SE.

    Attributes:
        unit: Path of the unit, or of the module that is none.
        kind: Of a unit: `not asked` for, by stage or `where`; `held`, by an SE that is there; `no place` for the
            placement; `refused`, because it cannot be done. Of what is no unit, what `Reject` says.
        reason: Why it gets none.
        blocking: Whether it was asked for and cannot be done, so that `add_se` refuses the whole operation.
    """

    unit: str
    kind: SkipKind
    reason: str
    blocking: bool = False

    @property
    def is_unit(self) -> bool:
        """Whether it is a unit that gets none, and not something that is no unit."""
        return self.kind in get_args(UnitKind)

    @property
    def summary(self) -> str:
        """The reason, in words that are the same for all units that have it."""
        return HELD if self.kind == "held" else self.reason


@dataclass(frozen=True)
class Plan:
    """What one `add_se` would do.

    Attributes:
        model: Name of the model's class, or of its timm architecture.
        base: Name of the base, if the model knows it: see `records.base_of`.
        options: What was asked for.
        sites: The SEs to be put in, in order of execution.
        existing: The SEs that are there already.
        skipped: Every other candidate, with the reason.
        stages: Number of stages of the model.
        params_before: Parameters of the model.
        census: What became of each addition and concatenation of maps.
        warnings: What to look at before the plan is carried out.
        buffers_before: Elements of its floating-point buffers (BatchNorm's running statistics).
        exam: All that looking at the model told, and the model. A plan that was pickled or copied in depth has it no
            more: it is plain data, and needs it only to be carried out or drawn.
        places: Number of units with a place, by placement; looked up only when asked for.
    """

    model: str
    base: str | None
    options: Options
    sites: tuple[Site, ...]
    existing: tuple[SESite, ...]
    skipped: tuple[Skipped, ...]
    stages: int
    params_before: int
    buffers_before: int
    census: Census
    warnings: tuple[str, ...]
    exam: Exam = field(repr=False, compare=False)

    @property
    def params_added(self) -> int:
        """Parameters that the SEs add; those of the SEs they replace are taken off."""
        return sum(site.params for site in self.sites) - sum(se.params for se in self._replaced)

    @property
    def _replaced(self) -> list[SESite]:
        gone = {path for site in self.sites for path in site.replaces}
        return [se for se in self.existing if se.path in gone]

    @property
    def macs_added(self) -> int:
        """Multiply-adds an image that the SEs add; those of the SEs they replace are taken off."""
        return sum(site.macs for site in self.sites) - sum(se.macs for se in self._replaced)

    @property
    def activations_added(self) -> int:
        """Values an image that the SEs make; those of the SEs they replace are taken off."""
        return sum(site.activations for site in self.sites) - sum(se.activations for se in self._replaced)

    def __getattr__(self, name: str) -> Any:
        # Python comes here for what the plan has not: the exam, once it was left behind.
        if name == "exam":
            raise SurgeryError(
                f"This plan for {self.model} was pickled or copied, without the model. Make it anew with plan_se, or "
                f"do what it says with apply_recipe(model, json.loads(plan.to_json()))."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        """All but the exam, with what a table asks it for; functions of sites become what they said."""
        state = dict(self.__dict__)
        if "exam" in state:
            del state["exam"]
            state.update(places=self.places, image=self.image)
        said = options_to_dict(self.options, self.sites)
        if callable(self.options.where):
            state["options"] = replace(self.options, where=tuple(said["where"]) if said["where"] else None)
        if callable(self.options.rd_channels):
            state["options"] = replace(state["options"], rd_channels=said["rd_channels"])
        return state

    def __copy__(self) -> Plan:
        # A frozen value: there is no telling the two apart.
        return self

    @cached_property
    def image(self) -> tuple[int, ...]:
        """Shape of the first tensor that the model was looked at with, without its batch axis; `()` without any."""
        shapes = [tuple(arg.shape) for arg in self.exam.seen.args if hasattr(arg, "shape")]
        return shapes[0][1:] if shapes and math.prod(shapes[0]) else ()

    @cached_property
    def places(self) -> dict[str, int]:
        """For every placement the number of units of the model that have a place for it."""
        return self.exam.places

    def to_json(self, **dump: Any) -> str:
        """The plan as JSON: a recipe that `apply_recipe` takes, and under `plan` what else the plan tells."""
        return json.dumps(self.to_dict(), **dump)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, in the form of a recipe; one without sites has no operation."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "base": self.base,
            "base_args": {},
            "operations": [operation_of(self)] if self.sites else [],
            "plan": {
                "model": self.model,
                "options": options_to_dict(self.options, self.sites),
                "existing": [asdict(site) for site in self.existing],
                "skipped": [asdict(skipped) for skipped in self.skipped],
                "params_before": self.params_before,
                "params_added": self.params_added,
                "macs_added": self.macs_added,
                "activations_added": self.activations_added,
            },
        }

    def draw(self, path: str | Path) -> Path:
        """Draw every unit of the model by stage, with its SEs where the placement puts them.

        Args:
            path: Image file to write, 800 pixels wide; its ending says the format: `.svg`, `.png` or `.pdf`.

        Returns:
            The path.

        Raises:
            SurgeryError: matplotlib is missing, or the file cannot be written.

        Examples:
            >>> plan_se(timm.create_model("resnet50"), "identity").draw("resnet50.svg")
        """
        from ..showing.drawing import draw_plan

        return draw_plan(self, Path(path))

    def __str__(self) -> str:
        from ..showing.show import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from ..showing.notebook import html
        from ..showing.show import plan_parts

        return html(plan_parts(self))


def operation_of(plan: Plan) -> dict[str, Any]:
    """What a plan does, as an operation of a recipe."""
    return {
        "op": "add",
        "options": options_to_dict(plan.options, plan.sites),
        "sites": [site_to_dict(site) for site in plan.sites],
    }


def options_to_dict(options: Options, sites: Iterable[Site]) -> dict[str, Any]:
    """Options as plain data; functions of sites become the paths that they took, and the widths by path."""
    data = asdict(replace(options, where=None, r=0, rd_channels=None))
    r, where = options.r, options.where
    if callable(where):
        where = [glob.escape(site.path) for site in sites]
    data["where"] = [where] if isinstance(where, str) else list(where) if where else None
    widths = options.rd_channels
    if callable(widths):
        widths = {site.path: site.rd_channels for site in sites} or None
    data["rd_channels"] = dict(widths) if isinstance(widths, Mapping) else widths
    data["r"] = {str(stage): ratio for stage, ratio in r.items()} if isinstance(r, Mapping) else r
    data["stages"] = list(options.stages) if options.stages else None
    data["bias"] = list(options.bias)
    if not options.heads:
        del data["heads"]  # recipes of before have none
    return data


def site_to_dict(site: Site) -> dict[str, Any]:
    """A site as plain data."""
    return {
        "path": site.path,
        "unit": site.unit,
        "kind": site.kind,
        "placement": site.placement,
        "stage": site.stage,
        "channels": site.channels,
        "rd_channels": site.rd_channels,
        "params": site.params,
        "replaces": list(site.replaces),
    }
