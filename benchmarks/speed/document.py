"""Document: docs/benchmarks.md and its figure, from the rows.

In: rows. Out: Markdown, and an image by matplotlib.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from se_surgery.measuring.bench import MODES, Spread, ratio

from .. import readme
from ..coverage.table import grid
from ..surgery_time import UNITS
from .peers import AGAIN, BASE, OURS, PEERS, PLAIN
from .rows import DOCS, Row, of_kind

DOCUMENT, FIGURE = "benchmarks.md", "benchmarks.svg"
_MEBI = 2**20
_TITLES = {"training": "A training step", "inference": "Inference"}
# Those who are compared with; the others are the base itself.
RIVALS = tuple(peer for peer in PEERS if peer not in (BASE, AGAIN, OURS, PLAIN, "stripped", "folded"))

_HEAD = """# Benchmarks

What SEs cost in time and memory: put in by this library, in timm's own networks with SEs, and as they are written by
hand elsewhere. Made by `python -m benchmarks.speed`; `--render` makes it again from the rows in benchmarks.jsonl.

{machine}

| name | what it is |
| --- | --- |
| base | the network of timm without SEs |
| base again | another instance of it, measured as if it were a peer: what is no difference at all |
| this library | `add_se(model)`: `standard`, r = 16 |
| this library, plain | `add_se(model, lean=False)` |
| timm's own | its network of that kind: seresnet18, seresnet50, seresnext50_32x4d; for the others it has none |
| torchvision's module | `torchvision.ops.SqueezeExcitation`, on the same sites by hand |
| Linear layers | the block of most write-ups (pooling, two Linear layers, the product), on the same sites |
| Composer's method | an SE behind every convolution with at least 128 channels in and out; the method of its \
`SqueezeExcite`, written down anew |
| stripped, folded | `strip_se(add_se(model))`, and with `fold="mean"`: the base again |
"""

_HOW = {
    "saved": """What a forward in training saves for the backward pass: the storages of all tensors saved, each once,
without parameters and running statistics. It is an exact number, the same in each run. First the base's, then by how
much the others' is larger.""",
    "time": """Ratios to the base's time, taken within a round in which every network runs once, in an order that is
drawn anew: the median of {rounds} rounds, and in brackets their quartiles. What lies inside those of "base again" is no
difference.""",
    "compiled": """Both compiled by `torch.compile`, ratios to the compiled base.""",
    "means": """Geometric means of the medians over the networks that a peer has, and this library's over the same. What
a lean SE does in Python takes its time whatever the map's size: it shows where maps are small, and saves passes over
memory where they are large.""",
}


def text(rows: Sequence[Row]) -> str:
    """The document."""
    parts = [_HEAD.format(machine=_machine(rows)), _saved(of_kind(rows, "saved"))]
    parts += [f"![What SEs cost beside the base]({FIGURE})\n"]
    for mode in reversed(MODES):
        parts.append(_timed(_TITLES[mode], of_kind(rows, "time", mode)))
    parts.append(_means({mode: of_kind(rows, "time", mode) for mode in reversed(MODES)}, of_kind(rows, "saved")))
    parts += [_compiled(rows), _surgery(of_kind(rows, "surgery"))]
    return "\n".join(part for part in parts if part)


def _machine(rows: Iterable[Row]) -> str:
    """One sentence for each machine that rows come from."""
    machines = {tuple(row["machine"].items()): row["machine"] for row in rows if row["kind"] != "saved"}
    lines = []
    for of in machines.values():
        versions = ", ".join(f"{name} {of[name]}" for name in ("torch", "timm", "torchvision"))
        threads = f"{of['cores']} cores, {of['threads']} thread{'s' if of['threads'] > 1 else ''} used"
        lines.append(f"Measured on: {of['processor']}, {threads}; Python {of['python']}, {versions}.")
    return "\n".join(lines)


def _saved(rows: Mapping[str, Row]) -> str:
    if not rows:
        return ""
    peers = _present(row["bytes"] for row in rows.values())
    lines = []
    for model, row in rows.items():
        base = row["bytes"][BASE]
        cells = [f"{row['bytes'][peer] / base:.3f}" if peer in row["bytes"] else "" for peer in peers[1:]]
        lines.append([model, f"{base / row['batch'] / _MEBI:.1f}", *cells])
    title = f"## Saved for the backward pass\n\n{_HOW['saved']}\nImages of {_sides(rows)}, MiB an image."
    return f"{title}\n\n{grid(['', '>base', *('>' + peer for peer in peers[1:])], lines)}\n"


def _timed(title: str, rows: Mapping[str, Row]) -> str:
    if not rows:
        return ""
    first = next(iter(rows.values()))
    peers = _present(row["seconds"] for row in rows.values())
    lines = [["base, ms an image", *(_milliseconds(row) for row in rows.values())]]
    lines += [[peer, *(_cell(row["seconds"], peer) for row in rows.values())] for peer in peers[1:]]
    how = _HOW["time"].format(rounds=_listed(len(row["seconds"][BASE]) for row in rows.values()))
    sizes = f"Batches of {_listed(row['batch'] for row in rows.values())}, images of {_sides(rows)}."
    if first["clock"] == "process_time":
        sizes += "\nTime is the processor's for this process: others ran on the same machine, and the spread is large."
    return f"## {title}\n\n{how} {sizes}\n\n{grid(['', *('>' + model for model in rows)], lines)}\n"


def _means(times: Mapping[str, Mapping[str, Row]], saved: Mapping[str, Row]) -> str:
    """The geometric means of every rival, beside this library's over the same networks."""
    if not all(times.values()):
        return ""
    lines = []
    for peer in (PLAIN, *RIVALS):
        lines.append([peer])
        for rows in times.values():
            shared = [row["seconds"] for row in rows.values() if peer in row["seconds"]]
            lines[-1] += [_mean([ratio(seconds, one, BASE).median for seconds in shared]) for one in (peer, OURS)]
        kept = [row["bytes"] for row in saved.values() if peer in row["bytes"] and row["model"] in times["training"]]
        lines[-1] += [_mean([one[who] / one[BASE] for one in kept]) for who in (peer, OURS)]
    headers = ["", *(f">{what}{who}" for what in (*times, "saved") for who in ("", ": this library"))]
    return f"## All networks together\n\n{_HOW['means']}\n\n{grid(headers, lines)}\n"


def _compiled(rows: Sequence[Row]) -> str:
    lines, sizes = [], ""
    for mode in MODES:
        found = of_kind(rows, "compiled", mode)
        sizes = f"Images of {_sides(found)}." if found else sizes
        for model, row in found.items():
            base, *others = row["seconds"]
            cells = {peer: str(ratio(row["seconds"], peer, base)) for peer in others}
            lines.append([f"{model}, {mode}", _milliseconds(row, base), *cells.values()])
            headers = ["", ">base, ms an image", *(f">{peer.partition(',')[0]}" for peer in cells)]
    return f"## Compiled\n\n{_HOW['compiled']} {sizes}\n\n{grid(headers, lines)}\n" if lines else ""


def _surgery(rows: Mapping[str, Row]) -> str:
    if not rows:
        return ""
    seconds = rows["resnet"]["seconds"]
    built, *depths = seconds
    lines = [["create_model('resnet50')", "", f"{1e3 * statistics.median(seconds[built]):.0f}", "", "1"]]
    for depth in depths:
        took, number = 1e3 * statistics.median(seconds[depth]), UNITS[int(depth)]
        each = f"{took / number:.1f}"
        lines.append([f"add_se on resnet{depth}", number, f"{took:.0f}", each, str(ratio(seconds, depth, built))])
    headers = ["", ">SEs", ">ms", ">ms an SE", ">of resnet50's construction"]
    return f"## Surgery\n\nBeside the construction of resnet50, round by round.\n\n{grid(headers, lines)}\n"


def _present(tables: Iterable[Mapping[str, Any]]) -> list[str]:
    """The peers that were measured, in the order of `PEERS`."""
    found = {peer for table in tables for peer in table}
    return [peer for peer in PEERS if peer in found]


def _cell(seconds: Mapping[str, Sequence[float]], peer: str) -> str:
    return _short(ratio(seconds, peer, BASE)) if peer in seconds else ""


def _short(found: Spread) -> str:
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"


def _milliseconds(row: Row, peer: str = BASE) -> str:
    return f"{1e3 * statistics.median(row['seconds'][peer]) / row['batch']:.1f}"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(values):.3f}" if values else ""


def _listed(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return " or ".join(map(str, found))


def _sides(rows: Mapping[str, Row]) -> str:
    return " or ".join(f"{side} x {side}" for side in sorted({row["side"] for row in rows.values()}))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw what is saved and what a training step takes, beside the base's, for every network."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Element names and dates that change from run to run would make it another file each time.
    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    saved, steps = of_kind(rows, "saved"), of_kind(rows, "time", "training")
    kept = {model: {p: b / row["bytes"][BASE] for p, b in row["bytes"].items()} for model, row in saved.items()}
    took = {
        model: {p: ratio(s, p, BASE).median for p in s} for model, s in ((m, r["seconds"]) for m, r in steps.items())
    }
    panels = {"saved for the backward pass": kept, "training step": took}
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, ratios) in zip(figure.subplots(2, 1), panels.items(), strict=True):
        _bars(axes, {model: found for model, found in ratios.items() if model in (steps or saved)})
        axes.set_ylabel(f"{title}\nbeside the base's")
    axes.legend(fontsize=7, ncols=3)
    figure.savefig(path, metadata={"Date": None})


def _bars(axes: Any, ratios: Mapping[str, Mapping[str, float]]) -> None:
    peers = (OURS, PLAIN, *RIVALS)
    width = 0.8 / len(peers)
    for place, peer in enumerate(peers):
        heights = [(number, found[peer]) for number, found in enumerate(ratios.values()) if peer in found]
        where = [number + (place + 0.5) * width - 0.4 for number, _ in heights]
        axes.bar(where, [h - 1 for _, h in heights], width, 1, label=peer)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(ratios)), list(ratios), fontsize=8)


def section(rows: Sequence[Row], model: str = "resnet50", peer: str = "timm's own") -> str:
    """The section of the README: one network, this library's SEs beside timm's own; empty where it was not measured."""
    saved, times = of_kind(rows, "saved").get(model), {mode: of_kind(rows, "time", mode).get(model) for mode in MODES}
    training, inference = times["training"], times["inference"]
    if saved is None or training is None or inference is None:
        return ""
    lines = []
    for name, one in (("this library's SEs", OURS), (f"{peer} network", peer)):
        kept = f"{saved['bytes'][one] / saved['bytes'][BASE]:.3f}"
        took = [f"{ratio(row['seconds'], one, BASE).median:.2f}" for row in (training, inference)]
        lines.append([name, kept, *took])
    machine, side = training["machine"], training["side"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    table = grid([f"times {model} without SEs", ">saved for backward", ">training step", ">forward"], lines)
    return (
        f"{table}\n\n{machine['processor']}, {threads}, {training['batch']} images of {side} x {side}; medians.\n"
        f"[docs/benchmarks.md](docs/benchmarks.md) has other networks and other people's modules, and\n"
        f"`se-surgery bench NAME` measures yours.\n\n"
    )


def write(rows: Sequence[Row], folder: Path = DOCS) -> None:
    """Write benchmarks.md and its figure and, with those of docs/, the section of the README."""
    (folder / DOCUMENT).write_text(text(rows), encoding="utf-8")
    draw(rows, folder / FIGURE)
    if folder.resolve() == DOCS.resolve():
        page = readme.README.read_text(encoding="utf-8")
        readme.README.write_text(with_section(page, rows), encoding="utf-8")


def with_section(page: str, rows: Sequence[Row]) -> str:
    """A README with its section made anew."""
    return readme.with_section(page, "speed", "python -m benchmarks.speed --render", section(rows))
