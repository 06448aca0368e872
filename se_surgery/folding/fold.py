"""Fold: plan how SEs whose gates are constants go into the layers around them.

In: an `Exam` and some of its SEs. Out: for each a `Folding`, the layers that take the gate; or a `FoldError` that says
of each SE that cannot be folded why. Changes nothing: `strip` does what this says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import FoldError, TraceError
from ..planning.exam import Exam
from ..records import implants
from ..structure.find import SESite, record_of
from .absorb import NOT_NEGATIVE, POSITIVE, Absorption, NoFold
from .walk import Place, Walk, caller

if TYPE_CHECKING:
    from ..gates.excited import Excitations


@dataclass(frozen=True)
class Folding:
    """How the constant gate of one SE goes into other layers.

    Attributes:
        site: The SE.
        absorptions: The layers that take it.
        needs: The factors for which the outputs stay the same: `ANY`, `NOT_NEGATIVE` or `POSITIVE`.
    """

    site: SESite
    absorptions: tuple[Absorption, ...]
    needs: int


def folding(exam: Exam, site: SESite, gone: Collection[str]) -> Folding:
    """How one SE can be folded when all SEs at the paths in `gone` are taken out.

    Raises:
        NoFold: It cannot; the message says why.
    """
    try:
        found = {Walk(exam, place, gone).done() for place in _places(exam, site)}
    except TraceError as error:
        raise NoFold(str(error)) from error
    if len(found) > 1:
        raise NoFold("its block has several forwards, and each would need other layers to take it")
    ((absorptions, needs),) = found
    return Folding(site, absorptions, needs)


def _places(exam: Exam, site: SESite) -> Iterator[Place]:
    """Where an SE is, in each forward that calls it."""
    if not site.is_module:
        raise NoFold(site.written_out)
    record = record_of(site.path, exam.seen)
    if record is not None and record.edges:
        host = site.path.rpartition(".")[0]
        order = [implant.name for implant in implants(exam.seen.modules[host])].index(record.name)
        for edge in record.edges:
            anatomy = exam.anatomy.in_training if edge.mode == "training" else exam.anatomy
            block = anatomy.block(host, edge.method)
            nodes = {node.name: node for node in block.nodes}
            value = nodes[edge.producer]
            yield Place(anatomy, block, value, tuple(nodes[name] for name in edge.consumers), value, site.unit, order)
        return
    calls = exam.seen.calls[site.path]
    if len(calls) > 1:
        raise NoFold("it runs several times in one forward")
    block, node = caller(exam.anatomy, calls[0])
    sources = block.maps_into(node)
    if len(sources) != 1:
        raise NoFold("it is given several maps")
    yield Place(exam.anatomy, block, sources[0], (node,), node, site.unit)


def factor_of(found: Folding, gate: Tensor) -> Tensor:
    """The factor that the layers of a folding take for a mean gate, (C,).

    Raises:
        NoFold: They cannot take this one.
    """
    if found.needs >= NOT_NEGATIVE and (gate < 0).any():
        channel = int((gate < 0).nonzero()[0])
        raise NoFold(
            f"the gate of channel {channel} is {gate[channel]:g} on average, and what is between keeps no sign"
        )
    if found.needs == POSITIVE and (gate == 0).any():
        raise NoFold(
            f"the gate of channel {int((gate == 0).nonzero()[0])} is 0, by which the layer would have to divide"
        )
    return gate


def plan_foldings(
    exam: Exam, sites: Collection[SESite], restore: bool = False, gone: Collection[SESite] | None = None
) -> list[Folding]:
    """How each of some SEs can be folded, if all of them, or all those in `gone`, are taken out.

    Raises:
        FoldError: One of them cannot; the message names each that cannot, and why.
    """
    paths, foldings, reasons = [site.path for site in gone or sites], [], []
    for site in sites:
        record = record_of(site.path, exam.seen) if site.is_module else None
        if restore and record is not None and record.replaced:
            raise FoldError(
                f"{site.path!r} replaced {record.replaced[0]!r}, which would come back beside the folded gate. "
                f"Leave origin out, so that it stays out."
            )
        try:
            foldings.append(folding(exam, site, paths))
        except NoFold as reason:
            reasons.append(f"{site.path}: {reason}")
    _refuse(reasons, len(sites))
    return foldings


def factors_of(foldings: Collection[Folding], found: Excitations) -> list[tuple[Folding, Tensor]]:
    """The foldings with the mean gates that they are for.

    Raises:
        FoldError: A mean gate is missing, or one that cannot be folded that way.
    """
    factors, reasons = [], []
    skipped, measured = dict(found.skipped), {gates.site.path: gates for gates in found}
    for one in foldings:
        path = one.site.path
        gates = measured.get(path)
        if gates is None or len(gates.mean) != one.site.channels:
            reasons.append(f"{path}: {skipped.get(path, 'the excitations are not those of this model')}")
            continue
        try:
            factors.append((one, factor_of(one, gates.mean)))
        except NoFold as reason:
            reasons.append(f"{path}: {reason}")
    _refuse(reasons, len(foldings))
    return factors


def _refuse(reasons: list[str], number: int) -> None:
    if reasons:
        raise FoldError(
            f"{len(reasons)} of {number} SEs cannot be folded ({'; '.join(reasons)}). "
            f"Leave these out with where or stages, or strip them without fold."
        )
