"""Show: plans, SEs, their gates and what they are worth, and what looking at a model tells, for people to read.

In: a `Plan`, SEs, `Excitations`, a `Tradeoff` or an `Exam`. Out: parts, each a paragraph or a table, or text that has
them all. What notebooks show is made of the same parts (see `notebook`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..planning.options import Options
from ..structure.find import SESite
from .tables import Part, Section, as_text, compact, count, groups, shape

if TYPE_CHECKING:
    from ..gates.excited import Excitations
    from ..gates.worth import Tradeoff, Worth
    from ..planning.exam import Exam
    from ..planning.plan import Plan, Site


def plan_text(plan: Plan) -> str:
    """A plan as text."""
    return as_text(plan_parts(plan))


def plan_parts(plan: Plan) -> list[Part]:
    """A plan: its sites, the SEs that are there, the units that get none and why, and what it adds."""
    return [
        f"{plan.model}, {count(plan.stages, 'stage')}: {options_text(plan.options)}",
        *(f"Warning: {text}" for text in plan.warnings),
        _sites(plan.sites) if plan.sites else _no_sites(plan),
        *_existing(plan),
        _skipped(plan),
        *_totals(plan),
        _outside(skip.unit for skip in plan.skipped if skip.kind == "outside"),
    ]


def sites_text(sites: Sequence[SESite]) -> str:
    """SEs that are in a model, as `find_se` lists them."""
    return as_text([_listed("", sites)])


def _listed(title: str, sites: Sequence[SESite]) -> Part:
    if not sites:
        return "no SE"
    rows = []
    for group in groups(sites, lambda s: (s.stage, s.channels, s.rd_channels, s.params, _origin(s)), lambda s: s.path):
        first = group[0]
        paths, width = compact([site.path for site in group]), shape(first.channels, first.rd_channels)
        params = sum(site.params for site in group)
        rows.append((first.stage, paths, len(group), width, f"{params:,}", _origin(first)))
    return Section(title, [">stage", "SE", ">number", "channels -> hidden", ">parameters", "origin"], rows)


def _origin(site: SESite) -> str:
    return site.origin if site.is_module else f"{site.origin}, written out in a forward"


def gates_parts(found: Excitations) -> list[Part]:
    """The gates of a model's SEs: their mean and its spread over the channels, their variances, the saturated share."""
    rows = []
    for gates in found:
        between, saturated = gates.between, gates.saturated
        spread = gates.mean.std(correction=0)
        rows.append(
            (
                gates.site.stage,
                gates.site.path,
                gates.site.channels,
                f"{gates.mean.mean():.3f} +- {spread:.3f}",
                f"{gates.variance.mean():.2e}",
                f"{between.mean():.2e}" if between is not None else "-",
                f"{saturated.mean():.1%}" if saturated is not None else "-",
            )
        )
    headers = [">stage", "SE", ">channels", ">mean gate", ">variance over inputs", ">between classes", ">saturated"]
    title = f"{count(len(found), 'SE')} over {count(found.sites[0].count, 'input')}"
    if found.labels:
        title += f" of {len(found.labels)} {'class' if len(found.labels) == 1 else 'classes'}"
    reasons: dict[str, list[str]] = {}
    for path, reason in found.skipped:
        reasons.setdefault(reason, []).append(path)
    return [Section(title, headers, rows), _reasons("No gates", reasons) if reasons else ""]


def tradeoff_parts(found: Tradeoff) -> list[Part]:
    """SEs by what the score loses for each parameter that they free, and what was taken out."""
    rows = []
    for worth in found.ranked:
        site = worth.site
        folded = "-" if worth.folded is None else f"{worth.folded:+.4f}"
        frees = (f"{site.params:,}", f"{site.macs:,}", f"{worth.seconds * 1e3:.3f}")
        rows.append((site.stage, site.path, *frees, f"{worth.stripped:+.4f}", folded, _fate(found, worth)))
    headers = [">stage", "SE", ">parameters", ">multiply-adds", ">ms", ">lost: stripped", ">folded", "taken out"]
    title = f"{count(len(found.worths), 'SE')}, {found.parameters:,} parameters; score {found.score:.4f}"
    parts: list[Part] = [Section(title, headers, rows)]
    if found.result is not None:
        freed = sum(worth.site.params for worth in found.worths if worth.site.path in found.taken)
        parts.append(
            f"Taken out: {count(len(found.taken), 'SE')}, {freed:,} parameters. Score then: {found.result:.4f}."
        )
    if found.left:
        shown = ", ".join(compact(group) for group in groups([path for path, _ in found.left], lambda _: None, str))
        parts.append(f"Left alone, because they are written out in forwards and no modules: {shown}.")
    return parts


def _fate(found: Tradeoff, worth: Worth) -> str:
    return worth.way if worth.site.path in found.taken else ""


def exam_text(exam: Exam) -> str:
    """What a model is made of: its units by stage and kind, the placements it has, its SEs, and other joins."""
    units = Counter((exam.stage_of(unit), unit.kind) for unit in exam.units.found)
    rows = [(stage, kind, number) for (stage, kind), number in sorted(units.items())]
    places = [(placement, number) for placement, number in exam.places.items()]
    rejected: dict[str, list[str]] = {}
    for reject in (reject for reject in dict.fromkeys(exam.units.rejected) if reject.kind != "outside"):
        rejected.setdefault(reject.reason, []).append(reject.path)
    return as_text(
        [
            Section(count(len(exam.units.found), "unit"), [">stage", "kind", ">number"], rows),
            Section("Units with a place", ["placement", ">number"], places),
            f"Joins of maps: {exam.units.census}." if exam.units.census.joins else "",
            _listed(count(len(exam.existing), "SE"), exam.existing) if exam.existing else "0 SEs",
            _reasons("Joins that are no units", rejected) if rejected else "",
            _outside(reject.path for reject in exam.units.rejected if reject.kind == "outside"),
        ]
    )


def _totals(plan: Plan) -> list[Part]:
    """The parameters before, added and after, by both ways to count, and the multiply-adds and activations added."""
    rows = []
    for label, extra in (("parameters", 0), ("with running statistics", plan.buffers_before)):
        before = plan.params_before + extra
        share = f"{plan.params_added / before:+.2%}" if before else ""
        rows.append((label, f"{before:,}", f"{plan.params_added:+,}", f"{before + plan.params_added:,}", share))
    size = " x ".join(map(str, plan.image))
    macs, activations = (f"{number:,} ({number / 1e6:.2f} M)" for number in (plan.macs_added, plan.activations_added))
    added = f"Added for one image of {size}: {macs} multiply-adds, {activations} activations."
    if plan.census.joins:
        added += f"\nJoins of maps: {plan.census}."
    return [Section("", ["", ">before", ">added", ">after", ">"], rows), added]


def options_text(options: Options) -> str:
    """Placement and r, and every other option that is not what it is by default."""
    default = Options()
    names = [f.name for f in fields(options)]
    changed = [name for name in names if getattr(options, name) != getattr(default, name)]
    told = {name: getattr(options, name) for name in ("placement", "r", *changed)}
    return ", ".join(f"{name}={_value(value)}" for name, value in told.items() if value is not None)


def _value(value: Any) -> str:
    return getattr(value, "__name__", str(value)) if callable(value) else str(value)


def _sites(sites: Sequence[Site]) -> Section:
    rows = []
    for group in groups(sites, lambda s: (s.stage, s.kind, s.spec, s.size, bool(s.replaces)), lambda s: s.path):
        first = group[0]
        size = " x ".join(map(str, first.size))
        params = f"{sum(site.params for site in group):,}"
        # Other kinds of attention make of the width what they like, some nothing.
        width = shape(first.channels, first.rd_channels if first.spec.attn == "se" else None)
        rows.append((first.stage, compact([s.path for s in group]), len(group), first.kind, size, width, params))
    headers = [">stage", "SE", ">number", "unit", ">map", "channels -> hidden", ">parameters"]
    return Section(f"{count(len(sites), 'SE')} to put in", headers, rows)


def _existing(plan: Plan) -> list[Part]:
    gone = {path for site in plan.sites for path in site.replaces}
    return [
        _listed(f"{count(len(those), 'SE')} there already, to be {fate}", those)
        for fate, those in (
            ("replaced", [se for se in plan.existing if se.path in gone]),
            ("left alone", [se for se in plan.existing if se.path not in gone]),
        )
        if those
    ]


def _skipped(plan: Plan) -> Part:
    """Everything that gets no SE, by reason; what was asked for and cannot be done comes first."""
    by_reason: dict[tuple[bool, str], list[str]] = {}
    skipped = [skip for skip in plan.skipped if skip.kind != "outside"]
    for skip in skipped:
        # Which SE a unit holds is in the table of those that are there.
        by_reason.setdefault((skip.blocking, skip.summary), []).append(skip.unit)
    ordered = sorted(by_reason.items(), key=lambda item: not item[0][0])
    told = {f"add_se refuses: {reason}" if blocking else reason: units for (blocking, reason), units in ordered}
    return _reasons(f"{count(len(skipped), 'candidate')} skipped", told) if skipped else ""


def _outside(paths: Iterable[str]) -> str:
    """The convolutions with k > 1 that are in no unit."""
    shown = ", ".join(compact(group) for group in groups(list(dict.fromkeys(paths)), lambda _: None, str))
    return f"Outside of all units (stem, downsampling, head): {shown}." if shown else ""


def _reasons(title: str, units: Mapping[str, Sequence[str]]) -> Section:
    """The paths that go with every reason."""
    rows = []
    for reason, those in units.items():
        rows.append((len(those), reason, ", ".join(compact(group) for group in groups(those, lambda _: None, str))))
    return Section(title, [">number", "reason", "where"], rows)


def _no_sites(plan: Plan) -> str:
    places = ", ".join(f"{placement} {count}" for placement, count in plan.places.items() if count)
    held = (
        " existing='replace' or 'stack' operates on units that hold one."
        if any(skip.kind == "held" for skip in plan.skipped)
        else ""
    )
    return f"No SE to put in. Units with a place: {places or 'none'}.{held}"
