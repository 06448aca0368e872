"""Figures: what the gates are, and what they are worth, drawn with matplotlib.

In: `Excitations`, or a `Tradeoff`. Out: an image file. matplotlib is an extra, and imported only here.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, SurgeryError, shorten

if TYPE_CHECKING:
    from ..gates.excited import Excitations
    from ..gates.worth import Tradeoff

_COLUMNS = 4
# More names than these do not fit beside a figure.
_NAMED = 12
# What is written of a figure, by format: its title, and not the time, which matplotlib would add.
_TOLD = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}


def blank(width: float, height: float, **options: Any) -> Any:
    """An empty figure, in inches, which no window and no global state of matplotlib knows of.

    Raises:
        SurgeryError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SurgeryError(
            "Drawing needs matplotlib, which is not installed. Install it with: pip install 'se-surgery[plot]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained", **options)


def check_format(path: Path) -> None:
    """Refuse a file that no figure could be written to, before what it would show is measured.

    Raises:
        SurgeryError: matplotlib is missing, or the file's ending is that of no format.
    """
    known = blank(1, 1).canvas.get_supported_filetypes()
    ending = path.suffix.lower().removeprefix(".")
    if ending not in known:
        raise OptionError(
            f"{str(path)!r} has the ending {ending!r}, and figures are written as {', '.join(sorted(known))}. "
            f"Name such a file, drawn.png say."
        )


def written(figure: Any, path: Path, title: str) -> Path:
    """Write a figure, without the date and with the same names inside every time.

    Raises:
        SurgeryError: The file cannot be written, or its ending is that of no format.
    """
    import matplotlib

    check_format(path)  # matplotlib would give a file without an ending another name
    undated = _TOLD.get(path.suffix.lower())
    metadata = None if undated is None else {"Title": title, **undated}
    try:
        with matplotlib.rc_context({"svg.hashsalt": "se-surgery", "svg.fonttype": "none"}):
            figure.savefig(path, metadata=metadata)
    except (OSError, ValueError) as error:
        raise SurgeryError(f"{str(path)!r} cannot be written ({error}). Name an image file, drawn.png say.") from error
    return path


def draw_gates(found: Excitations, path: Path, classes: Collection[int | str] | None) -> Path:
    """Draw the mean gate against the channel: a panel for every SE, a line for each class and one for all.

    Figure 9 of the paper.
    """
    rows = _rows(found, classes)
    columns = min(_COLUMNS, len(found))
    height = math.ceil(len(found) / columns)
    figure = blank(3.2 * columns + 1, 2.2 * height + 0.4)
    axes = figure.subplots(height, columns, squeeze=False)
    for panel, gates in zip(axes.flat, found, strict=False):
        for row in rows:
            panel.plot(gates.class_means[row].numpy(), linewidth=0.8, label=found.names[row])
        panel.plot(gates.mean.numpy(), linewidth=1.4, color="black", label="all")
        panel.set_title(gates.site.path, fontsize=8)
        panel.tick_params(labelsize=6)
        panel.margins(x=0)
    for panel in list(axes.flat)[len(found) :]:
        panel.remove()
    figure.supxlabel("channel")
    figure.supylabel("mean gate")
    if len(rows) <= _NAMED:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return written(figure, path, "The gates of every SE")


def _rows(found: Excitations, classes: Collection[int | str] | None) -> list[int]:
    """The rows of the classes to draw."""
    if classes is None:
        return list(range(len(found.labels)))
    if isinstance(classes, str) or not isinstance(classes, Collection):
        raise OptionError(f"classes={shorten(classes)} is not a list of classes. Give names or labels in one.")
    known: dict[int | str, int] = {label: row for row, label in enumerate(found.labels)}
    known |= {name: row for row, name in enumerate(found.names)}
    unknown = next((name for name in classes if name not in known), None)
    if unknown is not None:
        seen = ", ".join(found.names[:20]) or "none"
        raise OptionError(f"There are no gates of a class {unknown!r}. Take some of those that were seen: {seen}.")
    return [known[name] for name in classes]


def draw_tradeoff(found: Tradeoff, path: Path) -> Path:
    """Draw what is lost against the parameters that are kept: each SE alone, and the best sets, whose losses add up."""
    figure = blank(6.4, 4.2)
    panel = figure.subplots()
    whole = found.parameters
    sets = [(whole - one.freed, one.loss) for one in found.front]
    panel.plot(*zip(*sets, strict=True), drawstyle="steps-pre", color="black", label="best sets, losses added up")
    for way, marker in (("strip", "o"), ("fold", "s")):
        alone = [worth for worth in found.worths if worth.way == way]
        kept = [whole - worth.site.params for worth in alone]
        panel.scatter(kept, [worth.loss for worth in alone], marker=marker, s=18, label=f"one SE, {way}")
    if found.result is not None:
        kept_now = sum(worth.site.params for worth in found.worths if worth.site.path not in found.taken)
        panel.scatter([kept_now], [found.score - found.result], marker="*", s=120, color="red", label="taken, measured")
    panel.set_xlabel("parameters of the SEs that stay")
    panel.set_ylabel("loss of score")
    panel.legend(fontsize=7)
    return written(figure, path, "What the SEs are worth")
