"""Graft: do what a plan says, all of it or nothing.

In: a model and its plan. Out: the same model with the SEs in it. This and `strip` are the only stages that change a
module; what they change goes through a `Journal`, so that an error half-way leaves nothing behind.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy
from .codegen import Code, Insertion, join, method_code, subclass
from .errors import OptionError, PatientError, SurgeryError
from .exam import Exam
from .excite import build
from .options import check_options, option_arguments
from .plan import Plan, Site, options_to_dict, site_to_dict
from .planner import make_plan, unplaced_reason
from .records import (
    ABSENT,
    IMPLANTS,
    OPERATIONS,
    REPLACED,
    Edge,
    Implant,
    implants,
    is_implant,
    original_class,
    original_state,
)
from .trace import shallow_view


class Journal:
    """Remembers modules before they are changed, and puts them back when the block it guards fails."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[nn.Module, type, dict[str, Any], dict[str, Any]]] = {}

    def open(self, module: nn.Module) -> nn.Module:
        """Remember a module; to be called before each change."""
        if id(module) not in self._before:
            self._before[id(module)] = (module, type(module), dict(module.__dict__), dict(module._modules))
        return module

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            return
        for module, cls, state, children in self._before.values():
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(state)
            module._modules.clear()
            module._modules.update(children)


def add_se(
    model: nn.Module,
    placement: str = "standard",
    r: int | Mapping[int, int] = 16,
    *,
    stages: int | Collection[int] | None = None,
    where: Any = None,
    rd_channels: int | None = None,
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
    example_input: Any = None,
    lean: bool = False,
    inplace: bool = True,
) -> nn.Module:
    """Put squeeze-and-excitation modules into a CNN, in place, and return it.

    The model keeps its class, methods and state-dict keys. With `init="identity"` its outputs are bit-equal to those
    before, for finite features. On an error it is exactly what it was before.

    Args:
        model: Any CNN of timm, torchvision or your own.
        placement: `standard` (on the branch, before it is joined), `pre` (before the branch), `post` (after the
            addition and its activation), `identity` (on the shortcut), `inner` (after the branch's k x k convolution)
            or `inception` (after the concatenation of parallel branches).
        r: Reduction ratio: the hidden width is `max(2, C // r)`. Or a mapping from stage to ratio; a stage that is left
            out is not operated on.
        stages: Stages to operate on, from 1; -1 is the last. All by default.
        where: A glob on the site's path or its unit's, a list of globs, or a function `(site) -> bool`.
        rd_channels: Hidden width, instead of `r`.
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
        example_input: (C, H, W), a tensor with its batch axis, or a tuple of arguments, to look at the model with. By
            default the size in timm's `pretrained_cfg`, or one that works.
        lean: Only False: SEs run in the plain form. A form that saves less for the backward pass is to come.
        inplace: Operate on the model itself, or on a copy.

    Returns:
        The operated model.

    Raises:
        SurgeryError: What is wrong and what to do; `PlacementError` where the model lacks the placement,
            `NothingToDoError` where no site is left.

    Example:
        >>> model = timm.create_model("resnet50", pretrained=True)
        >>> se_surgery.add_se(model, placement="standard", r=16)

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507, sections 3 and 6.4.
    """
    options = check_options(**option_arguments(locals()))
    if lean is not False:
        raise OptionError(f"lean={lean!r}: there is no lean form of the SE yet. Leave it out, or take lean=False.")
    if not inplace:
        model = copied(model)
    return graft(model, make_plan(Exam(model, example_input), options))


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        PatientError: The model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise PatientError(f"{type(model).__name__} cannot be copied ({error}). Operate in place.") from error


def graft(model: nn.Module, plan: Plan) -> nn.Module:
    """Put in what the plan says.

    Raises:
        SurgeryError: The plan has no sites, or a blocked one; the model is as before.
    """
    blocked = [skip for skip in plan.skipped if skip.blocking]
    if blocked:
        raise PatientError(
            f"{blocked[0].unit!r}: {blocked[0].reason}. Leave it out with where, or operate on the submodule itself."
        )
    if not plan.sites:
        raise unplaced_reason(plan)
    keys = set(model.state_dict().keys())
    modules = plan.exam.seen.modules
    with Journal() as journal:
        for site in plan.sites:
            for path in site.replaces:
                take_out(journal, modules, path)
            _put_in(journal, modules, site, plan)
        anatomy = plan.exam.anatomy
        for host in dict.fromkeys(site.host for site in plan.sites):
            rewrite(journal, anatomy, host)
        _check_keys(model, keys, plan)
        record_operation(journal, model, plan)
    return model


def take_out(journal: Journal, modules: dict[str, nn.Module], path: str, keep: bool = True) -> None:
    """Take an SE out of its place.

    A native one leaves an Identity; with `keep` it is kept aside, so that what is put in its place can be undone.
    """
    holder, _, name = path.rpartition(".")
    parent = journal.open(modules[holder])
    if is_implant(parent, name):
        remove_implant(parent, name)
        return
    if keep:
        parent.__dict__[REPLACED] = {**parent.__dict__.get(REPLACED, {}), name: parent._modules[name]}
    parent._modules[name] = nn.Identity()


def set_replaced(parent: nn.Module, kept: dict[str, nn.Module]) -> None:
    """Write down the native SEs that are kept aside for a module; none leave no trace."""
    if kept:
        parent.__dict__[REPLACED] = kept
    else:
        parent.__dict__.pop(REPLACED, None)


def remove_implant(parent: nn.Module, name: str) -> None:
    """Undo one implant's own change: what stood under its name stands there again."""
    records = implants(parent)
    record = next(implant for implant in records if implant.name == name)
    gone = parent._modules.get(name)
    if isinstance(record.before, nn.Module):
        parent._modules[name] = like(record.before, gone)
    else:
        parent._modules.pop(name, None)
        if record.before is None:
            parent.__dict__[name] = None
    parent.__dict__[IMPLANTS] = [implant for implant in records if implant.name != name]
    if not parent.__dict__[IMPLANTS]:
        del parent.__dict__[IMPLANTS]


def like(module: nn.Module, other: nn.Module | None) -> nn.Module:
    """A module that was kept aside, moved to where its place has gone meanwhile."""
    reference = next(other.parameters(), None) if other is not None else None
    if reference is not None:
        module.to(device=reference.device, dtype=reference.dtype)
        module.train(other.training)  # type: ignore[union-attr]
    return module


def _put_in(journal: Journal, modules: dict[str, nn.Module], site: Site, plan: Plan) -> None:
    host = journal.open(modules[site.host])
    module = _built(site, modules, plan)
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
    record = Implant(site.name, site.unit, site.placement, edges, before, site.host, site.replaces)
    host.__dict__[IMPLANTS] = [*implants(host), record]
    if site.name in host._modules:
        host._modules[site.name] = module
    else:
        _insert_child(host, site.name, module, _child_before(plan.exam.anatomy, site))


def _built(site: Site, modules: dict[str, nn.Module], plan: Plan) -> nn.Module:
    """The SE, on the device and in the dtype of the block's convolutions, and in the block's mode."""
    neighbours = [modules[site.unit], modules[site.host], plan.exam.seen.model]
    reference = next((p for p in map(_floating_parameter, neighbours) if p is not None), None)
    device, dtype = (reference.device, reference.dtype) if reference is not None else (None, None)
    module = build(site.spec, plan.options.init, device, dtype)
    module.train(modules[site.host].training)
    return module


def _floating_parameter(module: nn.Module) -> torch.Tensor | None:
    tensors = [p for p in module.parameters() if p.is_floating_point()]
    return next((p for p in tensors if p.dim() > 1), tensors[0] if tensors else None)


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


def rewrite(journal: Journal, anatomy: Anatomy, path: str) -> None:
    """Give a block the class that its implants need: a generated one, or its own where there is nothing to call."""
    block = journal.open(anatomy.look.modules[path])
    base = original_class(block)
    calls = [(implant.name, edge) for implant in implants(block) for edge in implant.edges]
    block.__class__ = subclass(base, _code(anatomy, block, path, calls)) if calls else base


def _code(anatomy: Anatomy, block: nn.Module, path: str, calls: list[tuple[str, Edge]]) -> Code:
    view = shallow_view(block, original_class(block), original_state(block))
    observed = anatomy.look.calls[path][0]
    codes = []
    for method in dict.fromkeys(edge.method for _, edge in calls):
        forms = []
        for mode in ("evaluation", "training"):
            traced = anatomy.traced(view, observed, method, mode == "training")
            here = [(name, edge) for name, edge in calls if edge.method == method and edge.mode in ("both", mode)]
            forms.append((traced, tuple(Insertion.of(name, edge) for name, edge in here)))
        key = tuple((id(traced), insertions) for traced, insertions in forms)
        if key not in anatomy.codes:
            anatomy.codes[key] = method_code(forms)
        codes.append(anatomy.codes[key])
    return join(codes)


def _check_keys(model: nn.Module, before: set[str], plan: Plan) -> None:
    gone = tuple(path + "." for site in plan.sites for path in site.replaces)
    lost = sorted(key for key in before - set(model.state_dict().keys()) if not key.startswith(gone))
    if lost:
        raise SurgeryError(f"The surgery would lose the state-dict key {lost[0]!r}. Please report this as a bug.")


def record_operation(journal: Journal, model: nn.Module, plan: Plan) -> None:
    """Write the operation down on the model, so that it can be done again on a fresh base."""
    operation = {
        "op": "add",
        "options": options_to_dict(plan.options),
        "sites": [site_to_dict(site) for site in plan.sites],
    }
    append_operation(journal, model, operation)


def append_operation(journal: Journal, model: nn.Module, operation: dict[str, Any]) -> None:
    """Add one operation to the model's record."""
    journal.open(model)
    model.__dict__[OPERATIONS] = [*model.__dict__.get(OPERATIONS, []), operation]
