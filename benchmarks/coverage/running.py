"""Running: what comes of an operation on real weights, by values.

In: a name and the placements to try. Out: the bodies of its `run` and `thorough` rows. One model serves all placements:
each operation is undone, and that it is undone to the last bit is one of the checks.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from se_surgery import Plan, SqueezeExcite, SurgeryError, add_se, plan_se, strip_se
from se_surgery.proving.promises import randomise, trials

from . import zoo
from .planning import misplaced
from .structure import shortcut_faults

PASS = "pass"
# Sides of square images that are tried, the smallest first.
_SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 299, 320, 384)

# The name of a check, and what is wrong; nothing where it passed.
Finding = tuple[str, str]


class Patient:
    """A model with random weights, the smallest input that shows the same sites as its own size, and what it was."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = zoo.build(name)
        randomise(self.model)
        self.model.eval()
        self.args = smallest_input(self.model)
        self.keys = keys_of(self.model)
        self.modules = modules_of(self.model)
        self.outputs = outputs_of(self.model, self.args)
        self.faults = _empty(self.outputs)


def smallest_input(model: nn.Module) -> tuple[Any, ...]:
    """Noise of the smallest size at which a model runs in both modes and all its sites are those of its own size."""
    own = plan_se(model, existing="stack")
    args = own.exam.seen.args
    generator = torch.Generator().manual_seed(0)
    if len(args) == 1 and isinstance(args[0], Tensor) and args[0].dim() == 4:
        batch, channels, *native = args[0].shape
        # One with an auxiliary classifier (Inception v3) may be fit for larger images only.
        sizes = [[side, side] for side in _SIDES if side < min(native)]
        sizes += [native, *([side, side] for side in _SIDES if side > max(native))]
        for size in sizes:
            images = torch.randn(batch, channels, *size, generator=generator)
            if _is_enough(model, images, own):
                return (images,)
    noise: tuple[Any, ...] = pytree.tree_map_only(Tensor, lambda t: torch.randn(t.shape, generator=generator), args)
    return noise


def _is_enough(model: nn.Module, images: Tensor, own: Plan) -> bool:
    try:
        plan = plan_se(model, existing="stack", example_input=images)
        if _sites(plan) != _sites(own):
            return False
        with torch.no_grad():
            copy.deepcopy(model).train()(images)
            return not _empty(outputs_of(model, (images,)))
    except (SurgeryError, RuntimeError, ValueError, AssertionError):
        return False


def _sites(plan: Plan) -> Any:
    places = plan.exam.places
    return [(site.path, site.kind, site.stage) for site in plan.sites], places, [se.path for se in plan.existing]


def outputs_of(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a model returns for its own copy of the arguments."""
    with torch.no_grad():
        returned = pytree.tree_leaves(model(*pytree.tree_map_only(Tensor, torch.clone, args)))
    return [leaf for leaf in returned if isinstance(leaf, Tensor)]


def _empty(outputs: list[Tensor]) -> str:
    """Why comparing outputs would show nothing, or nothing where it shows something."""
    if not outputs or not all(leaf.isfinite().all() for leaf in outputs):
        return "the base's outputs are not finite, so that comparing them shows nothing"
    return "" if all((leaf != leaf.flatten()[0]).any() for leaf in outputs) else "the base puts out one constant"


def _unlike(outputs: list[Tensor], expected: list[Tensor]) -> str:
    same = len(outputs) == len(expected) and all(map(torch.equal, outputs, expected))
    return "" if same else "the outputs are not bit-equal to the base's"


def keys_of(model: nn.Module) -> dict[str, str]:
    """Every key of the state dict in its order, with a digest of its values."""
    return {
        key: hashlib.sha1(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for key, value in model.state_dict().items()
    }


def modules_of(model: nn.Module) -> dict[str, Any]:
    """The class of every module and the names of its attributes."""
    return {path: (type(module), sorted(module.__dict__)) for path, module in model.named_modules()}


def run_bodies(name: str, wanted: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The body of a `run` row for every placement.

    Args:
        name: The model's.
        wanted: What to do with existing SEs, by placement.
    """
    patient: Patient | None = None
    for placement, existing in wanted.items():
        body: dict[str, Any] = {"existing": existing, "checks": []}
        try:
            patient = patient or Patient(name)
            body["input"] = [list(arg.shape) for arg in patient.args if isinstance(arg, Tensor)]
            body["status"] = _outcome(body, _findings(patient, placement, existing, body))
        except Exception as error:  # whatever goes wrong is what the row is for
            body["status"] = f"fail: {_after(body)}: {type(error).__name__}: {error}"
        yield body
        if body["status"] != PASS:
            patient = None


def _outcome(body: dict[str, Any], findings: Iterator[Finding]) -> str:
    for check, fault in findings:
        if fault:
            return f"fail: {check}: {fault}"
        body["checks"].append(check)
    return PASS


def _after(body: dict[str, Any]) -> str:
    return f"after {body['checks'][-1]}" if body["checks"] else "at the start"


def _findings(patient: Patient, placement: str, existing: str, body: dict[str, Any]) -> Iterator[Finding]:
    """Operate, check, undo. The order matters: what comes first is what the rest builds on."""
    model, args = patient.model, patient.args
    options: dict[str, Any] = {"existing": existing, "example_input": args}
    yield "base", patient.faults
    plan = plan_se(model, placement, **options)
    body["sites"] = len(plan.sites)
    if placement == "standard":
        yield "re-parameterised", _reparameterised(model, plan, options)
    add_se(model, placement, **options)
    paths = [path for path, module in model.named_modules() if isinstance(module, SqueezeExcite)]
    yield "sites", _unplanned(plan, paths)
    yield "nesting", "; ".join(misplaced(model, paths))
    faults, body["units_run"] = shortcut_faults(model, plan.sites, args)
    yield "shortcut", "; ".join(faults)
    yield "outputs", _unlike(outputs_of(model, args), patient.outputs)
    yield "keys", _lost(patient.keys, keys_of(model), paths)
    yield from _verified(model, args)
    yield "deepcopy", _copied(model, copy.deepcopy(model), patient)
    yield "pickle", _copied(model, pickle.loads(pickle.dumps(model)), patient)
    strip_se(model, origin="se_surgery", example_input=args)
    yield "strip", _restored(patient)


def _unplanned(plan: Plan, paths: list[str]) -> str:
    planned = [site.path for site in plan.sites]
    strange = sorted(set(planned) ^ set(paths))
    return f"{strange[0]} is planned and not there, or the other way round" if strange else ""


def _lost(before: dict[str, str], after: dict[str, str], paths: list[str]) -> str:
    mine = tuple(path + "." for path in paths)
    kept = {key: value for key, value in after.items() if not key.startswith(mine)}
    return "" if list(kept.items()) == list(before.items()) else "the base's keys, their order or their values changed"


def _verified(model: nn.Module, args: tuple[Any, ...]) -> Iterator[Finding]:
    for trial in trials(model, args, thorough=False):
        check = trial.run()
        if check.passed is not None:
            yield f"verify: {check.name}", "" if check.passed else check.detail


def _copied(model: nn.Module, other: nn.Module, patient: Patient) -> str:
    if [type(module) for module in model.modules()] != [type(module) for module in other.modules()]:
        return "classes are lost"
    if keys_of(other) != keys_of(model):
        return "keys or values are lost"
    return _unlike(outputs_of(other, patient.args), patient.outputs)


def _restored(patient: Patient) -> str:
    if list(keys_of(patient.model).items()) != list(patient.keys.items()):
        return "the keys, their order or their values are not the base's"
    if modules_of(patient.model) != patient.modules:
        return "classes or attributes are not the base's"
    return _unlike(outputs_of(patient.model, patient.args), patient.outputs)


def _reparameterised(model: nn.Module, plan: Plan, options: dict[str, Any]) -> str:
    """No SE is on a branch that is folded: a base that is re-parameterised has the same units."""
    folded = reparameterize_model(model, inplace=False)
    if list(folded.state_dict()) == list(model.state_dict()):
        return ""
    units = {"before": _units(plan), "after": _units(plan_se(folded, **options))}
    lost = sorted(set(units["before"]) ^ set(units["after"]))
    return f"{len(lost)} units are not the same when re-parameterised: {', '.join(lost[:3])}" if lost else ""


def _units(plan: Plan) -> list[str]:
    return [site.unit for site in plan.sites]


def thorough_bodies(name: str, wanted: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The body of a `thorough` row for every placement: all that `verify` tries, compilers and exporters too."""
    for placement, existing in wanted.items():
        ways: dict[str, str] = {}
        body: dict[str, Any] = {"existing": existing, "ways": ways}
        try:
            patient = Patient(name)
            add_se(patient.model, placement, existing=existing, example_input=patient.args)
            for trial in trials(patient.model, patient.args, thorough=True):
                check = trial.run()
                ways[check.name] = {True: PASS, False: f"fail: {check.detail}", None: check.detail}[check.passed]
            body["status"] = next((f"fail: {way}: {what}" for way, what in ways.items() if _failed(what)), PASS)
        except Exception as error:  # whatever goes wrong is what the row is for
            body["status"] = f"fail: {type(error).__name__}: {error}"
        yield body


def _failed(what: str) -> bool:
    return what.startswith("fail: ")
