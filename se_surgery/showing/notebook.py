"""Notebook: what a plan, costs, gates and the like look like in a notebook: the tables that `print` shows, as HTML.

In: parts, as `show` makes them. Out: HTML that takes nothing from elsewhere and runs nothing, every text in it escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from .tables import Part, Section

_RIGHT = ' style="text-align: right"'


def html(parts: Iterable[Part]) -> str:
    """Parts as HTML; empty ones are left out.

    Examples:
        >>> html(["2 < 3"])
        '<div><p>2 &lt; 3</p></div>'
    """
    return f"<div>{''.join(_paragraph(p) if isinstance(p, str) else _table(p) for p in parts if p)}</div>"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text).replace(chr(10), '<br>')}</p>"


def _table(section: Section) -> str:
    rights = [header.startswith(">") for header in section.headers]
    head = _row("th", [header.removeprefix(">") for header in section.headers], rights)
    body = "".join(_row("td", row, rights) for row in section.rows)
    caption = f"<p><strong>{escape(section.title)}</strong></p>" if section.title else ""
    return f"{caption}<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: Sequence[Any], rights: Sequence[bool]) -> str:
    told = (
        f"<{tag}{_RIGHT if right else ''}>{escape(str(cell))}</{tag}>"
        for cell, right in zip(cells, rights, strict=True)
    )
    return f"<tr>{''.join(told)}</tr>"
