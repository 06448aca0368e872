"""Strip: take SEs out again, whoever put them there, all that were asked for or none.

In: a model and a choice of its SEs. Out: the same model without them. What this library put in is undone to the letter:
the block's class, attributes and, with `origin="se_surgery"`, the native SEs that were replaced. A native SE leaves an
`nn.Identity`, because the block's own forward calls its place. An SE that is folded leaves its mean gate in the layers
beside it. An SE that is written out in the forward of a block is no module that could be taken out, and is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from ..errors import FoldError, NothingToDoError, OptionError, PatientError, shorten
from ..folding.absorb import absorbed
from ..folding.fold import Folding, factors_of, plan_foldings
from ..gates.excited import Excitations, excitations
from ..planning.exam import Exam
from ..planning.options import check_flags, check_stages, check_where, matches, resolve_stage
from ..records import OPERATIONS, REPLACED, Implant, implants, narrowed_beyond
from ..structure.find import SESite, record_of
from .edits import append_operation, like, rewrite, set_replaced, take_out
from .graft import copied
from .journal import Journal, guarded

ORIGINS = ("se_surgery", "timm", "torchvision", "other")


def strip_se(
    model: nn.Module,
    stages: int | Collection[int] | None = None,
    *,
    where: Any = None,
    origin: str | None = None,
    fold: str | Excitations | None = None,
    loader: Any = None,
    example_input: Any = None,
    inplace: bool = True,
) -> nn.Module:
    """Take SEs out of a model, in place, and return it.

    Without `origin` every SE goes, the base's own too: timm's SEModule, SqueezeExcite and EffectiveSE, legacy_senet's,
    torchvision's SqueezeExcitation, and anything that does what they do. With `origin="se_surgery"` exactly what this
    library put in is undone: class, keys, values and outputs are those from before `add_se`, and native SEs that were
    replaced are back.

    With `fold="mean"` the mean gate of each SE over the loader's images goes, exactly, into the normalisation or
    convolution in front of it, or behind it where that is not possible. A gate that was a constant costs nothing to
    remove. Where no layer can take it (a gate on an identity shortcut, say), nothing is changed.

    Args:
        model: A model with SEs.
        stages: Stages to strip, from 1; -1 is the last. All by default.
        where: A glob on the SE's path or its unit's, a list of globs, or a function `(SESite) -> bool`.
        origin: Take only the SEs of this origin: `se_surgery`, `timm`, `torchvision` or `other`.
        fold: `mean`, or the `Excitations` of this model where its gates have been measured already. By default the
            SEs' effect goes with them.
        loader: What to measure the gates on, as for `excitations`.
        example_input: (C, H, W), a tensor or a tuple of arguments, to look at the model with.
        inplace: Operate on the model itself, or on a copy.

    Returns:
        The model without those SEs.

    Raises:
        SurgeryError: What is wrong and what to do; `NothingToDoError` where no SE is left to take, `FoldError` where
            an SE cannot be folded, `PatientError` where one is no module, but written out in the forward of its block.

    Examples:
        >>> model = timm.create_model("seresnet50")
        >>> se_surgery.strip_se(model, stages=-1)
    """
    check_flags(inplace=inplace)
    check_origin(origin)
    listed, where = check_stages(stages), check_where(where)
    _check_fold(fold, loader)
    if not inplace:
        model = copied(model)
    exam = Exam(model, example_input)
    chosen = choose(exam, listed, where, origin)
    if not chosen:
        raise NothingToDoError(_nothing(exam, origin))
    # Before anything is measured for it.
    refuse_written_out(chosen)
    restore = origin == "se_surgery"
    if fold is None:
        return guarded(remove, model, exam, chosen, restore)
    foldings = plan_foldings(exam, chosen, restore)
    found = excitations(model, loader, example_input=example_input) if isinstance(fold, str) else fold
    return guarded(remove, model, exam, chosen, restore, factors_of(foldings, found))


def _check_fold(fold: Any, loader: Any) -> None:
    if fold is not None and fold != "mean" and not isinstance(fold, Excitations):
        raise OptionError(
            f"fold={shorten(fold)} is not known. Take 'mean', what excitations(model, loader) returned, or None."
        )
    if (fold == "mean") is (loader is None):
        told = "needs a loader to measure the gates on" if loader is None else "has no use for a loader"
        raise OptionError(f"fold={shorten(fold)} {told}. Give fold='mean' and a loader, or neither.")


def check_origin(origin: Any) -> None:
    """Refuse an origin that no SE can have."""
    if origin is not None and origin not in ORIGINS:
        raise OptionError(
            f"origin={shorten(origin)} is not known. Take one of {', '.join(ORIGINS)}, or None for every SE."
        )


def choose(exam: Exam, stages: tuple[int, ...] | None, where: Any, origin: str | None) -> list[SESite]:
    """The SEs of a model that are in these stages, of this origin, and taken by `where`."""
    wanted = None if stages is None else {resolve_stage(stage, exam.stages.count) for stage in stages}
    return [
        site
        for site in exam.existing
        if (wanted is None or site.stage in wanted)
        and (origin is None or site.origin == origin)
        and matches(where, site)
    ]


def refuse_written_out(sites: Iterable[SESite]) -> None:
    """Refuse to take out SEs that are no modules.

    Raises:
        PatientError: One is written out in the forward of its block; the message says where.
    """
    written = [site for site in sites if not site.is_module]
    if written:
        more = f", and so {'are' if len(written) > 2 else 'is'} {len(written) - 1} more" if len(written) > 1 else ""
        raise PatientError(
            f"The SE {written[0].path!r} is no module that could be taken out: {written[0].written_out}{more}. "
            f"Leave such SEs out with where=lambda site: site.is_module, or build the network without them."
        )


def _nothing(exam: Exam, origin: str | None) -> str:
    if not exam.existing:
        return "The model has no SE. Put some in with add_se first."
    stages = sorted({site.stage for site in exam.existing})
    origins = sorted({site.origin for site in exam.existing})
    return (
        f"No SE is left by stages, where and origin={origin!r}: the model's {len(exam.existing)} are in the stages "
        f"{', '.join(map(str, stages))} and of the origins {', '.join(origins)}. Widen the choice."
    )


def remove(
    journal: Journal,
    model: nn.Module,
    exam: Exam,
    sites: Iterable[SESite],
    restore: bool,
    factors: Iterable[tuple[Folding, Tensor]] = (),
) -> nn.Module:
    """Take out the given SEs, and with `restore` put back the native ones they replaced.

    The layers of the foldings take their factors.

    Raises:
        SurgeryError: It could not be done; the model is as before.
    """
    sites = list(sites)
    refuse_written_out(sites)
    modules = exam.seen.modules
    if restore:
        _refuse_old_widths(model, exam, sites)
    hosts = []
    for site in sites:
        for path in exam.seen.everywhere(site.path):
            host = path.rpartition(".")[0]
            record = take_out(journal, modules, path, keep=restore)
            if record is not None:
                hosts.append(host)
                _settle(journal, modules, record, host, restore)
    for host in dict.fromkeys(hosts):
        rewrite(journal, exam.anatomy, host)
    for one, factor in factors:
        _scale(journal, modules, one, factor)
    _record(journal, model, sites, restore)
    return model


def _refuse_old_widths(model: nn.Module, exam: Exam, sites: list[SESite]) -> None:
    """Refuse to put back native SEs that were kept aside while the network around them was pruned."""
    replaced = [path for site in sites if (record := record_of(site.path, exam.seen)) for path in record.replaced]
    if replaced and narrowed_beyond(model.__dict__.get(OPERATIONS, [])):
        raise PatientError(
            f"{replaced[0]!r} was replaced before the network was pruned, and does not fit in its place any more. "
            f"Strip without origin, so that it stays out."
        )


def _scale(journal: Journal, modules: dict[str, nn.Module], one: Folding, factor: Tensor) -> None:
    """Let the layers of a folding take its factor."""
    for taken in one.absorptions:
        module = modules[taken.path]
        tensors = absorbed(module, taken.how, factor[taken.start : taken.stop])
        if tensors is None:
            raise FoldError(f"{taken.path!r} does not take its factor any more. Please report this as a bug.")
        for name, value in tensors.items():
            tensor = getattr(module, name)
            if not value.to(tensor.dtype).isfinite().all():
                raise FoldError(
                    f"{taken.path}.{name} cannot take the mean gate of {one.site.path!r}: it would not be finite in "
                    f"{tensor.dtype}. Leave that SE out with where, or strip it without fold."
                )
            journal.write(tensor, value)


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
            parent._modules[name] = like(journal, native, modules[host])


def _record(journal: Journal, model: nn.Module, sites: list[SESite], restore: bool) -> None:
    """Write the operation down; a model that is its own base again needs no record."""
    operations = model.__dict__.get(OPERATIONS, [])
    undoable = not narrowed_beyond(operations) and all(operation.get("restore", True) for operation in operations)
    if restore and undoable and not any(implants(module) for module in model.modules()):
        journal.open(model)
        model.__dict__.pop(OPERATIONS, None)
        return
    data = [stripped_to_dict(site) for site in sites]
    append_operation(journal, model, {"op": "strip", "restore": restore, "sites": data})


def stripped_to_dict(site: SESite) -> dict[str, Any]:
    """An SE that was taken out, as plain data; what depends on the image is left out: multiply-adds and activations."""
    data = asdict(site)
    del data["macs"], data["activations"], data["layers"], data["block"]
    return data
