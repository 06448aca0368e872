"""The command `se-surgery paper`: the paper's tables, with what is counted here beside its figures.

In: nothing. Out: docs/paper.md, or JSON, on stdout.
"""

from __future__ import annotations

from . import options as cli
from .app import app, examples, progress, say


@app.command(epilog=examples("se-surgery paper", "se-surgery paper --json"))
def paper(as_json: cli.Json = False) -> None:
    """Print the paper's tables with this library's figures beside the paper's, and why where they differ."""
    from ..paper.tables import tables
    from ..paper.text import document

    with progress("Counting the paper's networks"):
        made = tables()
    say(as_json, [table._asdict() for table in made], document(made).rstrip("\n"))
