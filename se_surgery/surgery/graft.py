"""Graft: do what a plan says, all of it or nothing.

In: a model and its plan. Out: the same model with the SEs in it. This and `strip` are the only stages that change a
module, and they decide nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..checking.check import compare_rewritten
from ..errors import PatientError, SurgeryError, SurgeryWarning
from ..planning.exam import Exam
from ..planning.options import check_flags, check_options, option_arguments
from ..planning.plan import Plan, Site, operation_of
from ..planning.planner import make_plan, unplaced_reason
from ..reading.anatomy import Anatomy
from ..records import ABSENT, IMPLANTS, REPLACED, Implant, implants, note_origin
from ..se.excite import build
from .edits import append_operation, rewrite, set_replaced, take_out
from .journal import Journal, guarded


def add_se(
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
    lean: bool = True,
    inplace: bool = True,
) -> nn.Module:
    """Put squeeze-and-excitation modules into a CNN, in place, and return it.

    The model keeps its class, methods and state-dict keys. With `init="identity"` its outputs are bit-equal to those
    before, for finite features. On an error it is exactly what it was before.

    Args:
        model: Any CNN of timm, torchvision or your own.
        placement: `standard` (on the branch, before it is joined), `pre` (before the branch), `post` (after the
            addition and its activation), `identity` (on the shortcut), `inner` (after the branch's k x k convolution)
            or `inception` (after the concatenation of parallel branches). By default `standard`; an SE that is replaced
            hands its place and its name on to the new one, unless a placement or a name is given.
        r: Reduction ratio: the hidden width is `max(2, C // r)`. Or a mapping from stage to ratio; a stage that is left
            out is not operated on.
        stages: Stages to operate on, from 1; -1 is the last. All by default.
        where: A glob on the site's path or its unit's, a list of globs, or a function `(site) -> bool`.
        rd_channels: Hidden width, instead of `r`: a number, one for each site's path, or a function of a `Site`, which
            has `path`, `unit`, `stage`, `channels`, and the `in_channels` of its unit. RegNetY and EfficientNet take a
            quarter of those: `lambda site: round(site.in_channels / 4)`. A width of 1 wants `init="paper"`.
        rd_divisor: Round the hidden width to a multiple of this, as timm does (timm: 8).
        bias: Whether the two layers have biases, or a pair for the first and the second (timm: True).
        squeeze: `avg` or `max`.
        act: Activation between the layers, by timm's name.
        gate: `sigmoid`, `tanh`, `relu` or `hard_sigmoid`.
        gate_scale: Factor on the gate. By default 2 for the identity start (a sigmoid is 1/2 at zero), else 1.
        init: `identity` starts from the model's own outputs; `paper` is the plain random start (timm: paper).
        attn: `se`, or one of timm's light attention modules: `ese`, `eca`, `cbam`, `gc`, ...
        existing: In a unit that holds an SE already: `skip` it, `replace` that SE, `stack` another, or `error`.
        name: Name of the child module.
        heads: Whether to operate on the heads, necks and decoders of detection and segmentation networks, too.
        example_input: (C, H, W) or (C, L), a tensor with its batch axis, or a tuple of arguments, to look at the model
            with. By default the size in timm's `pretrained_cfg`, or one that works.
        lean: Whether the SEs keep less for the backward pass, and take less time there: a matter of how they run, which
            can be switched later by their attribute `lean`, and no part of the architecture. Outputs are the plain
            form's bit for bit, gradients up to rounding. What a lean SE cannot do is a gradient of a gradient.
        inplace: Operate on the model itself, or on a copy.

    Returns:
        The operated model.

    Raises:
        SurgeryError: What is wrong and what to do; `PlacementError` where the model lacks the placement,
            `NothingToDoError` where no site is left.

    Examples:
        >>> model = timm.create_model("resnet50", pretrained=True)
        >>> se_surgery.add_se(model, placement="standard", r=16)

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507, sections 3 and 6.4.
    """
    options = check_options(**option_arguments(locals()))
    check_flags(lean=lean, inplace=inplace)
    if not inplace:
        model = copied(model)
    plan = make_plan(Exam(model, example_input, options.heads), options)
    model = guarded(graft, model, plan, lean)
    for text in plan.warnings:
        warnings.warn(text, SurgeryWarning, stacklevel=2)
    return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        PatientError: The model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise PatientError(f"{type(model).__name__} cannot be copied ({error}). Operate in place.") from error


def graft(journal: Journal, model: nn.Module, plan: Plan, lean: bool = True) -> nn.Module:
    """Put in what the plan says.

    Raises:
        SurgeryError: The plan has no sites, or a blocked one; the model is as before.
    """
    if torch.is_inference_mode_enabled():
        raise PatientError(
            "Parameters made in inference mode cannot be trained. Leave torch.inference_mode, then operate."
        )
    blocked = [skip for skip in plan.skipped if skip.blocking]
    if blocked:
        raise PatientError(
            f"{blocked[0].unit!r} cannot be operated on: {blocked[0].reason}. "
            f"Leave it out with where, give each place a block and a class of its own, or operate on a submodule."
        )
    if not plan.sites:
        raise unplaced_reason(plan)
    keys = _keys(model)
    modules = plan.exam.seen.modules
    hosts = []
    operation = operation_of(plan)
    for site in plan.sites:
        taken = [(path, take_out(journal, modules, path)) for path in site.replaces]
        hosts += [path.rpartition(".")[0] for path, record in taken if record is not None]
        inherited = [path for _, record in taken if record is not None for path in record.replaced]
        module = _built(journal, site, modules, plan, lean)
        _put_in(journal, modules[site.host], site, module, plan, [*site.replaces, *inherited])
        note_origin(module, site.path, model, operation)
        hosts.append(site.host)
    for host in dict.fromkeys(hosts):
        rewrite(journal, plan.exam.anatomy, host)
    _check_keys(model, keys, plan)
    compare_rewritten(plan.exam.anatomy, hosts)
    append_operation(journal, model, operation)
    return model


def _put_in(journal: Journal, host: nn.Module, site: Site, module: nn.Module, plan: Plan, replaced: list[str]) -> None:
    """Put one SE into its block; what stood under its name and what it replaced is written down."""
    journal.open(host)
    before = host._modules.get(site.name, host.__dict__.get(site.name, ABSENT))
    if before is not None and before is not ABSENT and not isinstance(before, nn.Module):
        raise SurgeryError(f"{site.host!r} has an attribute {site.name!r} already. Give another name with name=.")
    host.__dict__.pop(site.name, None)
    kept = dict(host.__dict__.get(REPLACED, {}))
    if site.name in kept:
        # The slot's native SE was taken out for this one: it comes back when this one goes.
        before = kept.pop(site.name)
        set_replaced(host, kept)
    edges = () if site.fills else site.edges
    record = Implant(site.name, site.unit, site.placement, edges, before, site.host, tuple(replaced))
    host.__dict__[IMPLANTS] = [*implants(host), record]
    if site.name in host._modules:
        host._modules[site.name] = module
    else:
        _insert_child(host, site.name, module, _child_before(plan.exam.anatomy, site))


def _built(journal: Journal, site: Site, modules: dict[str, nn.Module], plan: Plan, lean: bool) -> nn.Module:
    """The SE, on the device and in the dtype of the block's convolutions, and in the block's mode."""
    neighbours = [modules[site.unit], modules[site.host], plan.exam.seen.model]
    reference = next((p for p in map(_floating_parameter, neighbours) if p is not None), None)
    device, dtype = (reference.device, reference.dtype) if reference is not None else (None, None)
    journal.draw(device)
    module = build(site.spec, plan.options.init, device, dtype)
    module.placement = site.placement
    if not lean:
        vars(module)["lean"] = False
    if not modules[site.host].training:
        module.eval()
    return module


def _floating_parameter(module: nn.Module) -> torch.Tensor | None:
    """The first one of more than one axis, and where there is none the first one."""
    found = next((p for p in module.parameters() if p.is_floating_point() and p.dim() > 1), None)
    return next((p for p in module.parameters() if p.is_floating_point()), None) if found is None else found


def _child_before(anatomy: Anatomy, site: Site) -> str | None:
    """The block's child that runs last before the SE: the SE is listed behind it, as a hand-written one would be."""
    block = anatomy.block(site.host)
    edge = site.edge
    names = [node.name for node in block.nodes]
    stop = names.index(edge.consumers[0]) if edge.late else names.index(edge.producer) + 1
    children = [str(node.target).split(".")[0] for node in block.nodes[:stop] if node.op == "call_module"]
    return children[-1] if children else None


def _insert_child(host: nn.Module, name: str, child: nn.Module, behind: str | None) -> None:
    """Register a child behind another one; without one, before all."""
    children = list(host._modules.items())
    position = next((i + 1 for i, (other, _) in enumerate(children) if other == behind), 0 if behind is None else None)
    children.insert(len(children) if position is None else position, (name, child))
    host._modules.clear()
    host._modules.update(children)


def _keys(model: nn.Module) -> set[str]:
    # Without `keep_vars` every tensor would be detached first.
    return set(model.state_dict(keep_vars=True))


def _check_keys(model: nn.Module, before: set[str], plan: Plan) -> None:
    gone = tuple(path + "." for site in plan.sites for path in site.replaces)
    lost = sorted(key for key in before - _keys(model) if not key.startswith(gone))
    if lost:
        raise SurgeryError(f"The surgery would lose the state-dict key {lost[0]!r}. Please report this as a bug.")
