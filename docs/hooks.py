"""MkDocs calls this: the page of the command line is made from its help."""

from __future__ import annotations

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from se_surgery.commands.main import app


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    command = typer.main.get_command(app)
    context = command.make_context("se-surgery", [], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="se-surgery", title="Command line")
    files.append(File.generated(config, "cli.md", content=text))
    return files
