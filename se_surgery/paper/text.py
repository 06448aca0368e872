"""The document: the tables as Markdown, docs/paper.md.

In: `Table`s. Out: text that depends on nothing else: no time, no machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .tables import Table

_HEAD = """\
# The paper, row by row

The figures of Hu et al., *Squeeze-and-Excitation Networks* ([arXiv 1709.01507](https://arxiv.org/abs/1709.01507)), with
what is counted here beside them. Made by `se-surgery paper`; a test compares it with this file.

"same" says that ours, rounded as the paper's figure is, has the same digits. Errors are the paper's alone: this library
ships no weights, and they stand here so that no row is missing."""

_TAIL = """\
## What is not counted

What trained gates do (figure 9): in early stages they are nearly the same for every class, in the paper's stages 4 and
5 they are specific to classes, and in the second block of stage 5 they do not recalibrate at all; without the SEs of
the last stage SE-ResNet-50 loses less than 0.1 % of top-5 accuracy. `excitations(model, loader)` measures the gates of
a trained model. The paper's stage k (conv k_x) is stage k - 1 here: its SE_5_2 is `layer4.1.se`, and
`strip_se(model, stages=-1)` takes the last stage's SEs out."""


def document(tables: Iterable[Table]) -> str:
    """The whole document."""
    return "\n\n".join([_HEAD, *(_section(table) for table in tables), _TAIL]) + "\n"


def _section(table: Table) -> str:
    notes = "\n".join(f"{number}. {note}" for number, note in enumerate(table.notes, 1))
    parts = [f"## {table.title}", table.text, _grid(table.columns, table.rows), notes]
    return "\n\n".join(part for part in parts if part)


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns padded so that it reads well as text, too."""
    headers = [column.removeprefix(">") for column in columns]
    widths = [max(3, *(len(row[i]) for row in (headers, *rows))) for i in range(len(headers))]
    right = [column.startswith(">") for column in columns]
    rule = ["-" * (width - 1) + ":" if is_right else "-" * width for width, is_right in zip(widths, right, strict=True)]
    lines = []
    for row in (headers, rule, *rows):
        cells = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
