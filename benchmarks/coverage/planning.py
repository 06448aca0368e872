"""Planning: what the library plans for one name, for every placement, without any values.

In: a name. Out: the body of its `plan` row. Where SEs would be is checked against the modules themselves: none inside
another SE, none in the classifier, and no unit that is neither a site nor skipped with a reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from timm.layers import EffectiveSEModule, SEModule, SqueezeExcite
from torch import nn
from torchvision.ops import SqueezeExcitation

from se_surgery import Plan, ProbeError, SurgeryError, plan_se
from se_surgery.planning.placements import PLACEMENTS
from se_surgery.planning.planner import make_plan, unplaced_reason

from . import zoo

SITES, HELD, REFUSED, FAILED = "sites", "all units hold an SE", "refused", "failed"
NATIVE = (SEModule, SqueezeExcite, EffectiveSEModule, SqueezeExcitation)
# Parameters of a model that may be built with values for its plan.
_SMALL = 200_000_000


def plan_body(name: str) -> dict[str, Any]:
    """The body of a name's `plan` row."""
    model = zoo.build_on_meta(name)
    body: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    try:
        try:
            plan = plan_se(model, existing="skip")
        except ProbeError:
            # What a detector does depends on the values of its boxes: without values it cannot run.
            if body["parameters"] > _SMALL:
                raise
            model = zoo.build(name)
            plan = plan_se(model, existing="skip")
        plans = {placement: _again(plan, placement=placement) for placement in PLACEMENTS}
        stacked = {placement: _again(plan, placement=placement, existing="stack") for placement in PLACEMENTS}
    except SurgeryError as error:
        return {**body, "status": f"{REFUSED}: {type(error).__name__}: {error}"}
    units = plan.exam.units.found
    return {
        **body,
        "status": _status(plan),
        "stages": plan.stages,
        "units": len(units),
        "kinds": dict(Counter(unit.kind for unit in units)),
        "native": len(plan.existing),
        "sites": {placement: len(found.sites) for placement, found in plans.items() if found.sites},
        "stacked": {placement: len(found.sites) for placement, found in stacked.items() if found.sites},
        "skipped": {placement: reasons for placement, found in plans.items() if (reasons := _reasons(found))},
        "joins": dict(Counter(reject.reason for reject in dict.fromkeys(plan.exam.units.rejected))),
        "silent": sorted({path for found in (*plans.values(), *stacked.values()) for path in silent_units(found)}),
        "misplaced": sorted(
            {fault for found in stacked.values() for fault in misplaced(model, [site.path for site in found.sites])}
        ),
    }


def _again(plan: Plan, **changes: Any) -> Plan:
    """Another plan from the same look."""
    return make_plan(plan.exam, replace(plan.options, **changes))


def _status(plan: Plan) -> str:
    """What `add_se` would come to with this plan."""
    blocking = next((skip for skip in plan.skipped if skip.blocking), None)
    if blocking is not None:
        return f"{REFUSED}: {blocking.unit!r}: {blocking.reason}"
    if plan.sites:
        return SITES
    held = {skip.unit for skip in plan.skipped if skip.kind == "held"}
    if plan.exam.units.found and all(unit.path in held for unit in plan.exam.units.found):
        return HELD
    error = unplaced_reason(plan)
    return f"{REFUSED}: {type(error).__name__}: {error}"


def _reasons(plan: Plan) -> dict[str, int]:
    """How many units get no SE, by reason; joins that are no units are another matter."""
    return dict(Counter(skip.summary for skip in plan.skipped if skip.is_unit))


def silent_units(plan: Plan) -> list[str]:
    """The units of which a plan says nothing: neither a site nor skipped."""
    answered = Counter(site.unit for site in plan.sites)
    answered.update(skip.unit for skip in plan.skipped if skip.is_unit)
    return list((Counter(unit.path for unit in plan.exam.units.found) - answered).elements())


def misplaced(model: nn.Module, paths: list[str]) -> list[str]:
    """What is wrong with where SEs are or would be, by the model's modules: inside another SE, or in the classifier."""
    natives = [path for path, module in model.named_modules() if isinstance(module, NATIVE)]
    faults = []
    for path in paths:
        around = next((se for se in (*natives, *paths) if path.startswith(se + ".")), None)
        head = next((head for head in classifiers(model) if path == head or path.startswith(head + ".")), None)
        if around is not None:
            faults.append(f"{path} is inside the SE {around}")
        if head is not None:
            faults.append(f"{path} is in the classifier {head}")
    return faults


def classifiers(model: nn.Module) -> list[str]:
    """The paths of a model's classifiers: what timm's configuration says, or torchvision's usual names."""
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, dict) else None
    names = (named,) if isinstance(named, str) else named or ("fc", "classifier", "aux1", "aux2", "AuxLogits")
    modules = dict(model.named_modules())
    return [name for name in names if name in modules]
