"""The command `se-surgery paper`: the paper's tables, with what is counted here beside its figures.

In: nothing. Out: docs/paper.md, or JSON, on stdout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import typer

from . import cli_options as cli


def add_to(
    app: typer.Typer,
    progress: Callable[[str], AbstractContextManager[None]],
    say: Callable[[bool, Any, str], None],
) -> None:
    """Give the command line this command.

    Args:
        app: The command line.
        progress: Says what takes its time.
        say: Prints plain data as JSON, or a text.
    """

    @app.command(epilog="Examples:\n\nse-surgery paper\n\nse-surgery paper --json")
    def paper(as_json: cli.Json = False) -> None:
        """Print the paper's tables with this library's figures beside the paper's, and why where they differ."""
        from .paper.tables import tables
        from .paper.text import document

        with progress("Counting the paper's networks"):
            made = tables()
        say(as_json, [table._asdict() for table in made], document(made).rstrip("\n"))
