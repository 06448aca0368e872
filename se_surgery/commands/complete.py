"""Complete: what the shell's Tab key offers, without importing torch or timm, which take seconds.

In: `words.json`, the names of models, and what the shell says in the environment. Out: words on stdout. When the shell
does not ask for words, `main` is the command line itself.

`python -m benchmarks.words` writes the file, from the command line.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..models.catalog import named_bases, recipe_names

# What the scripts of `se-surgery --install-completion` set. When it is there, `se_surgery` gives timm no names.
ASKED = "_SE_SURGERY_COMPLETE"
WORDS = Path(__file__).resolve().parents[1] / "words.json"
# In the place of a list of values: those that name a model.
MODELS = "models"


def main() -> None:
    """Run the command line, or say what could come next in it."""
    if ASKED in os.environ:
        outline()(prog_name="se-surgery")
        return
    from .main import app

    app(prog_name="se-surgery")


def outline() -> typer.Typer:
    """A command line of the same commands, arguments and options, that does nothing."""
    app = typer.Typer(callback=lambda: None)
    for name, command in words()["commands"].items():
        app.command(name, help=command["help"])(_outline_of(command["parameters"]))
    return app


@functools.cache
def words() -> dict[str, Any]:
    """The commands with their parameters and these with their values, and the names of networks with units."""
    found: dict[str, Any] = json.loads(WORDS.read_text(encoding="utf-8"))
    return found


def models() -> Iterator[str]:
    """Names of models: bases with units, those with SEs, and those of the recipes."""
    yield from words()[MODELS]
    named = named_bases()
    yield from (f"se_{name}" for name in named["timm"])
    yield from (f"se_tv_{name}" for name in named["torchvision"])
    yield from recipe_names()


def _outline_of(parameters: list[dict[str, Any]]) -> Callable[..., None]:
    def command(**_: Any) -> None:
        """Nothing."""

    made = [
        inspect.Parameter(f"p{i}", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(**parameter))
        for i, parameter in enumerate(parameters)
    ]
    command.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in made}
    return command


def _annotation(names: list[str], help: str, flag: bool, values: str | list[str]) -> Any:
    def offered(incomplete: str) -> list[str]:
        these = dict.fromkeys(models()) if values == MODELS else values
        return [value for value in these if value.startswith(incomplete)]

    if not names:
        return Annotated[str | None, typer.Argument(help=help, autocompletion=offered)]
    if flag:
        return Annotated[bool | None, typer.Option(*names, help=help)]
    return Annotated[str | None, typer.Option(*names, help=help, autocompletion=offered)]
