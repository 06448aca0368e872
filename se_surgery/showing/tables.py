"""Tables: text for people to read, of paragraphs and tables, and many paths as one.

In: parts, paths, numbers. Out: text without colours. Rows that differ in one number of their path are one,
`layer3.[0-35].se`; nothing is left out.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

# Columns apart by spaces, a rule under the header; ASCII, because a pipe may not take anything else.
_BOX = "    \n    \n -- \n    \n    \n    \n    \n    \n"
_WIDTH = 120
_NUMBER = re.compile(r"(\d+)")
_T = TypeVar("_T")


class Section(NamedTuple):
    """A table with its title; a header that begins with `>` is that of a column of numbers."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


# A paragraph, or a table.
Part = str | Section


def as_text(parts: Iterable[Part]) -> str:
    """Parts as text; empty ones are left out."""
    return "\n\n".join(part if isinstance(part, str) else _section_text(part) for part in parts if part)


def _section_text(section: Section) -> str:
    body = table(section.headers, section.rows)
    return f"{section.title}\n{body}" if section.title else body


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as text; a header that begins with `>` is that of a column of numbers."""
    # Here and not above: it takes as long to import as half of this library, and most processes print no table.
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        box=Box(_BOX, ascii=True),
        pad_edge=False,
        header_style="",
        highlight=False,
        show_header=any(header.strip(">") for header in headers),
    )
    for header in headers:
        right = header.startswith(">")
        drawn.add_column(Text(header.removeprefix(">")), justify="right" if right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    width = shutil.get_terminal_size((_WIDTH, 24)).columns
    console = Console(
        file=io.StringIO(), width=max(width, 40), color_system=None, force_terminal=False, legacy_windows=False
    )
    with console.capture() as captured:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


def groups(items: Iterable[_T], key: Callable[[_T], Hashable], path: Callable[[_T], str]) -> list[list[_T]]:
    """Runs of consecutive items of equal key whose paths differ in one number and the same one."""
    found: list[list[_T]] = []
    where: int | None = None
    for item in items:
        last = found[-1] if found else None
        moved = _moved(path(last[-1]), path(item)) if last and key(last[-1]) == key(item) else None
        if last and moved is not None and (len(last) == 1 or moved == where):
            last.append(item)
            where = moved
        else:
            found.append([item])
    return found


def compact(paths: Sequence[str]) -> str:
    """The paths of one group as one.

    Examples:
        >>> compact(["layer1.0.se", "layer1.1.se", "layer1.2.se"]), compact(["features.2", "features.5"])
        ('layer1.[0-2].se', 'features.[2,5]')
    """
    if len(paths) == 1:
        return paths[0] or "(the model itself)"
    split = [_NUMBER.split(path) for path in paths]
    position = _moved(paths[0], paths[1])
    if position is None:
        return ", ".join(paths)
    numbers = [int(parts[position]) for parts in split]
    return "".join([*split[0][:position], "[", _ranges(numbers), "]", *split[0][position + 1 :]])


def shape(channels: int, hidden: int | None) -> str:
    """Channels and hidden width of an SE."""
    return f"{channels} -> {hidden}" if hidden is not None else str(channels)


def _moved(first: str, second: str) -> int | None:
    """Which part of a path (text, number, text, ...) is a number and larger in the second; None if more differs."""
    a, b = _NUMBER.split(first), _NUMBER.split(second)
    differ = [i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other]
    if len(a) != len(b) or len(differ) != 1 or differ[0] % 2 == 0:
        return None
    return differ[0] if int(b[differ[0]]) > int(a[differ[0]]) else None


def _ranges(numbers: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def count(number: int, noun: str) -> str:
    """A number of things, in words.

    Examples:
        >>> count(1, "stage"), count(4, "stage")
        ('1 stage', '4 stages')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
