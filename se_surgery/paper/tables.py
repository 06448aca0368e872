"""Tables: the paper's figures and ours side by side, with a verdict on each.

In: nothing but what is printed. Out: `Table`s of text. A figure is `same` where ours, rounded as the paper's, is the
paper's digit by digit; where it is not, the row points to the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ..planning.options import Options
from ..planning.plan import Plan
from ..se.costs import parameter_count
from ..se.excite import SESpec
from .counted import Counted, Networks
from .printed import NETWORKS, PLACEMENTS, SENET_154, TABLE_10, VARIANTS, WHERE, WIDTHS, Network

SAME = "same"


class Table(NamedTuple):
    """A table of the document.

    Attributes:
        title: Its heading.
        text: What it shows and how that was counted.
        columns: Headers; one that begins with `>` is that of numbers.
        rows: The cells.
        notes: The reasons that rows point to by number.
    """

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def tables() -> list[Table]:
    """All tables, in the order of the document."""
    networks = Networks()
    counted = [(network, networks.count(network)) for network in NETWORKS]
    return [
        _ratios(networks),
        _multiply_adds(counted),
        _strides(counted),
        _parameters(counted),
        _placements(networks),
        _variants(networks),
        _others(networks),
        _errors(),
    ]


_Networks = Sequence[tuple[Network, Counted]]


def _ratios(networks: Networks) -> Table:
    rows = []
    for variant in TABLE_10:
        found = networks.count_variant(variant)
        ours = found.as_printed / 1e6
        verdict = SAME if f"{ours:.1f}" == variant.parameters else "differs"
        trained = f"{found.parameters / 1e6:.2f}"
        rows.append((variant.title, variant.parameters, f"{ours:.2f}", verdict, trained, variant.top1, variant.top5))
    return Table(
        "Table 10: reduction ratios",
        "Parameters of SE-ResNet-50 in millions, and errors in percent. The paper's figures are those of "
        "`add_se(model, r=r, bias=True)`, with BatchNorm's running statistics counted in. Without them and without "
        "biases, which is the default here, those of the column `trained` are left.",
        ("r", ">paper", ">here", "", ">trained", ">top-1 error", ">top-5 error"),
        rows,
    )


def _multiply_adds(counted: _Networks) -> Table:
    rows, notes = [], []
    for network, cost in counted:
        base, with_se = network.gflops
        digits = len(base.partition(".")[2])
        ours, total = (f"{macs / 1e9:.{digits}f}" for macs in (cost.macs, cost.macs + cost.macs_added))
        # Each of the two printed figures may be off by half a unit of its last digit.
        unit, printed = 10.0 ** (3 - digits), 1e3 * (float(with_se) - float(base))
        low, high, added = max(printed - unit, 0.0), printed + unit, cost.macs_added / 1e6
        verdict = SAME if low <= added <= high else "more"
        if network.note:
            notes.append(f"{network.title}: " + network.note.format(total=(cost.macs + cost.macs_added) / 1e9))
            verdict += f", note {len(notes)}"
        within = f"{low:.0f} to {high:.0f}"
        rows.append((network.title, base, ours, with_se, total, within, f"{added:.2f}", verdict))
    return Table(
        "Tables 2 and 3: multiply-adds",
        "Billions for one image of 224 x 224 (Inception-ResNet-v2: 299 x 299), r = 16, without biases. What SE adds, "
        "in millions, is its two layers and a multiplication for every value that is scaled; pooling is free. It is "
        "the same where it lies between the two numbers that the paper's figures, rounded as they are, allow for. Why "
        "bases differ is in the notes and in the table after this one.",
        ("", ">base: paper", ">here", ">with SE: paper", ">here", ">SE adds: paper", ">here", ""),
        rows,
        notes,
    )


def _strides(counted: _Networks) -> Table:
    rows = []
    for network, cost in counted:
        if cost.additions and not network.note:
            printed, both = network.gflops[0], cost.macs_strided + cost.additions
            off = round(both / 1e9, 2) - float(printed)
            billions = [f"{number / 1e9:.3f}" for number in (cost.macs, cost.macs_strided, both)]
            rows.append((network.title, printed, *billions, f"{off:+.2f}" if abs(off) > 0.001 else SAME))
    return Table(
        "Where the base differs",
        "In the paper's ResNets a unit has its stride in the first 1x1 convolution, in timm's and torchvision's in the "
        "3x3 one; in ResNeXts it is in the 3x3 one everywhere. With the stride where the paper has it, and with one "
        "addition for every value of a sum counted as well, ours are the paper's figures, but for the last digit of "
        "ResNeXt-101. Networks without sums need neither.",
        ("", ">paper", ">here", ">the paper's stride", ">and additions", ""),
        rows,
    )


def _parameters(counted: _Networks) -> Table:
    rows = []
    for network, cost in counted:
        if network.parameters is not None:
            numbers = (cost.parameters, cost.parameters + cost.parameters_added)
            for title, printed, number in zip(("", "SE-"), network.parameters, numbers, strict=True):
                verdict = SAME if f"{number / 1e6:.1f}" == printed else f"note 1: {int(number / 1e5) / 10} if cut off"
                rows.append((title + network.title, printed, f"{number / 1e6:.2f}", f"{number:,}", verdict))
    return Table(
        "Table 3: parameters",
        "Millions, trained ones, without biases.",
        ("", ">paper", ">here", ">exactly", ""),
        rows,
        ["All four of the paper's figures are ours with the digits after the first cut off; two of them also rounded."],
    )


def _placements(networks: Networks) -> Table:
    rows = []
    for variant in PLACEMENTS:
        found = networks.count_variant(variant)
        ours = found.as_printed / 1e6
        verdict = (SAME if f"{ours:.1f}" == variant.parameters else "differs") if variant.parameters else ""
        model, sites = f"`{variant.recipe}`", str(found.sites)
        where = WHERE[variant.title]
        rows.append((variant.title, where, model, sites, variant.parameters, f"{ours:.2f}", verdict, variant.top1))
    return Table(
        "Tables 13 and 14: placements",
        "ResNet-50 unless the model is another one, r = 16; parameters in millions, counted as in table 10. The paper "
        "gives them for some placements only. All placements before the addition come close to each other; after it "
        "the error is larger.",
        ("placement", "where", "model", ">SEs", ">paper", ">here", "", ">top-1 error"),
        rows,
    )


def _variants(networks: Networks) -> Table:
    rows = []
    for variant in VARIANTS:
        trained = f"{networks.count_variant(variant).parameters / 1e6:.2f}"
        rows.append((variant.title, f"`{variant.recipe}`", trained, variant.top1, variant.top5))
    return Table(
        "Tables 11 and 12: squeeze and gate",
        "SE-ResNet-50, r = 16. No variant changes a layer: all have the same number of parameters, here in millions, "
        "trained ones without biases.",
        ("", "model", ">trained", ">top-1 error", ">top-5 error"),
        rows,
    )


def _others(networks: Networks) -> Table:
    resnet, resnext = networks.plan("resnet50"), networks.plan("resnext50_32x4d")
    early = networks.plan("resnet50", Options(stages=(1, 2, 3)))
    as_timm = networks.plan("resnet50", Options(bias=(True, True), rd_divisor=8))
    senet = networks.plan("senet154", Options(bias=(True, True), existing="replace"))
    stages = {site.stage: (site.rd_channels, site.channels) for site in resnet.sites}
    units = Counter(site.stage for site in resnet.sites)
    formula = 2 * sum(units[stage] * outer**2 for stage, (_, outer) in stages.items()) // 16
    widths = ", ".join(f"{list(stages[stage])} x{number}" for stage, number in units.items())
    second_bias = parameter_count(SESpec(64, 4, bias=(False, True)))
    seresnet = networks.plan("seresnet50").params_before
    rows = [
        _added("SE-ResNet-50: parameters added", "about 2.5 M, 10 %", resnet),
        _exact("by the formula (2/r) * sum of N_s * C_s^2", formula, resnet.params_added),
        _added("without the SEs of the last stage", "about 4 %", early),
        _exact("SE-ResNet-50: hidden and outer widths (table 1)", WIDTHS, widths),
        _exact("ResNeXt-50 32x4d: parameters", 25_028_904, resnext.params_before),
        _exact("SE-ResNeXt-50 32x4d: parameters", 27_543_848, _total(resnext)),
        _exact("SE of 64 channels, r = 16, a bias in the second layer only", 576, second_bias),
        _exact("timm's `seresnet50`: biases, widths in multiples of 8", seresnet, _total(as_timm)),
        _exact(f"timm's `senet154`, our SEs in place of its {len(senet.existing)}", senet.params_before, _total(senet)),
    ]
    return Table(
        "Other figures of the paper and of write-ups",
        "Parameters, without biases where nothing else is said; for timm's networks theirs, and ours made to match.",
        ("", ">printed", ">here", ""),
        rows,
    )


def _total(plan: Plan) -> int:
    return plan.params_before + plan.params_added


def _exact(what: str, printed: int | str, ours: int | str) -> tuple[str, ...]:
    shown = [f"{value:,}" if isinstance(value, int) else value for value in (printed, ours)]
    return (what, *shown, SAME if printed == ours else "differs")


def _added(what: str, printed: str, plan: Plan) -> tuple[str, ...]:
    """What SE adds, beside a printed share that ends in a whole number of percent."""
    share = plan.params_added / plan.params_before
    verdict = SAME if printed.endswith(f" {share:.0%}".replace("%", " %")) else "differs"
    return (what, printed, f"{plan.params_added:,}, {share:.2%}", verdict)


def _errors() -> Table:
    rows = [(network.title, *network.top1, *network.top5) for network in NETWORKS]
    rows += [(f"SENet-154, {size}", "", top1, "", top5) for size, top1, top5 in SENET_154]
    return Table(
        "Tables 2 and 3, and SENet-154: errors",
        "Percent, of one crop of each image of ImageNet's validation set.",
        ("", ">top-1", ">with SE", ">top-5", ">with SE"),
        rows,
    )
