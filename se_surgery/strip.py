"""Strip: take SEs out again, whoever put them there, all that were asked for or none.

In: a model and a choice of its SEs. Out: the same model without them. What this library put in is undone to the letter:
the block's class, attributes and, with `origin="se_surgery"`, the native SEs that were replaced. A native SE leaves an
`nn.Identity`, because the block's own forward calls its place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict
from typing import Any

from torch import nn

from .edits import Journal, append_operation, like, rewrite, set_replaced, take_out
from .errors import NothingToDoError, OptionError
from .exam import Exam
from .find import SESite
from .graft import copied
from .options import check_stages, check_where, matches, resolve_stage
from .records import OPERATIONS, REPLACED, Implant, implants

ORIGINS = ("se_surgery", "timm", "torchvision", "other")


def strip_se(
    model: nn.Module,
    stages: int | Collection[int] | None = None,
    *,
    where: Any = None,
    origin: str | None = None,
    example_input: Any = None,
    inplace: bool = True,
) -> nn.Module:
    """Take SEs out of a model, in place, and return it.

    Without `origin` every SE goes, the base's own too: timm's SEModule, SqueezeExcite and EffectiveSE, legacy_senet's,
    torchvision's SqueezeExcitation, and anything that does what they do. With `origin="se_surgery"` exactly what this
    library put in is undone: class, keys, values and outputs are those from before `add_se`, and native SEs that were
    replaced are back.

    Args:
        model: A model with SEs.
        stages: Stages to strip, from 1; -1 is the last. All by default.
        where: A glob on the SE's path or its unit's, a list of globs, or a function `(SESite) -> bool`.
        origin: Take only the SEs of this origin: `se_surgery`, `timm`, `torchvision` or `other`.
        example_input: (C, H, W), a tensor or a tuple of arguments, to look at the model with.
        inplace: Operate on the model itself, or on a copy.

    Returns:
        The model without those SEs.

    Raises:
        SurgeryError: What is wrong and what to do; `NothingToDoError` where no SE is left to take.

    Example:
        >>> model = timm.create_model("seresnet50")
        >>> se_surgery.strip_se(model, stages=-1)
    """
    if origin is not None and origin not in ORIGINS:
        raise OptionError(f"origin={origin!r} is not known. Take one of {', '.join(ORIGINS)}, or None for every SE.")
    listed, where = check_stages(stages), check_where(where)
    if not inplace:
        model = copied(model)
    exam = Exam(model, example_input)
    chosen = _choose(exam, listed, where, origin)
    if not chosen:
        raise NothingToDoError(_nothing(exam, origin))
    return remove(model, exam, chosen, restore=origin == "se_surgery")


def _choose(exam: Exam, stages: tuple[int, ...] | None, where: Any, origin: str | None) -> list[SESite]:
    wanted = None if stages is None else {resolve_stage(stage, exam.stages.count) for stage in stages}
    return [
        site
        for site in exam.existing
        if (wanted is None or site.stage in wanted)
        and (origin is None or site.origin == origin)
        and matches(where, site)
    ]


def _nothing(exam: Exam, origin: str | None) -> str:
    if not exam.existing:
        return "The model has no SE. Put some in with add_se first."
    stages = sorted({site.stage for site in exam.existing})
    origins = sorted({site.origin for site in exam.existing})
    return (
        f"No SE is left by stages, where and origin={origin!r}: the model's {len(exam.existing)} are in the stages "
        f"{', '.join(map(str, stages))} and of the origins {', '.join(origins)}. Widen the choice."
    )


def remove(model: nn.Module, exam: Exam, sites: Iterable[SESite], restore: bool) -> nn.Module:
    """Take out the given SEs, and with `restore` put back the native ones they replaced.

    Raises:
        SurgeryError: It could not be done; the model is as before.
    """
    sites = list(sites)
    modules = exam.seen.modules
    with Journal() as journal:
        hosts = []
        for site in sites:
            host = site.path.rpartition(".")[0]
            record = take_out(journal, modules, site.path, keep=restore)
            if record is not None:
                hosts.append(host)
                _settle(journal, modules, record, host, restore)
        for host in dict.fromkeys(hosts):
            rewrite(journal, exam.anatomy, host)
        _record(journal, model, sites, restore)
    return model


def _settle(journal: Journal, modules: dict[str, nn.Module], record: Implant, host: str, restore: bool) -> None:
    """See to the native SEs that an implant had replaced: back in their places, or gone for good with it."""
    for path in record.replaced:
        holder, _, name = record.now(path, host).rpartition(".")
        parent = modules.get(holder)
        kept = dict(parent.__dict__.get(REPLACED, {})) if parent is not None else {}
        if parent is None or name not in kept:
            continue
        journal.open(parent)
        native = kept.pop(name)
        set_replaced(parent, kept)
        if restore:
            parent._modules[name] = like(native, modules[host])


def _record(journal: Journal, model: nn.Module, sites: list[SESite], restore: bool) -> None:
    """Write the operation down; a model that is its own base again needs no record."""
    operations = model.__dict__.get(OPERATIONS, [])
    undoable = all(operation["op"] == "add" or operation["restore"] for operation in operations)
    if restore and undoable and not any(implants(module) for module in model.modules()):
        journal.open(model)
        model.__dict__.pop(OPERATIONS, None)
        return
    data = [stripped_to_dict(site) for site in sites]
    append_operation(journal, model, {"op": "strip", "restore": restore, "sites": data})


def stripped_to_dict(site: SESite) -> dict[str, Any]:
    """An SE that was taken out, as plain data; what depends on the image is left out: multiply-adds and activations."""
    data = asdict(site)
    del data["macs"], data["activations"]
    return data
