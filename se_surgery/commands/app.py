"""The command line's application, and what its commands share: opening a model, saying what goes on, writing.

In: a model by name, folder or repository. Out: the model; lines on stdout and stderr; a folder. Exit codes: 0 done,
1 refused (the message says why), 2 a mistake in the command line itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
import typer
from rich.console import Console
from torch import nn
from typer.core import TyperGroup

from .. import __version__
from ..errors import OptionError, SurgeryError
from ..files.config import read_config
from ..files.hub import is_repo
from ..files.pretrained import from_pretrained, locate, save_pretrained
from ..models.bases import TORCHVISION, create_base, is_base
from ..models.registry import is_own
from ..planning.options import Options, check_options
from ..records import base_of
from ..showing.tables import count
from ..surgery.graft import add_se
from ..surgery.recipe import recipe_of
from ..surgery.strip import strip_se

_stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def examples(*lines: str) -> str:
    """The end of a command's help: how it is called."""
    return "\n\n".join(("Examples:", *lines))


# The commands in the order of the help.
_COMMANDS = """
plan add strip list inspect recipe verify cost bench excitations tradeoff push pull paper
""".split()


class _Group(TyperGroup):
    """Commands whose `SurgeryError`s are messages and not tracebacks."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_COMMANDS.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SurgeryError as error:
            typer.echo(f"se-surgery: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    epilog=examples(
        "se-surgery plan resnet50 --placement pre",
        "se-surgery add resnext50_32x4d --r 16 -o se_resnext50_32x4d",
        "se-surgery strip se_resnext50_32x4d --stages -1 -o without_last_stage",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"se-surgery {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Put squeeze-and-excitation modules into CNNs of timm and torchvision, and take them out again."""


@dataclass(frozen=True)
class Patient:
    """A model that a command works on, and what it was made from."""

    model: nn.Module
    base: str
    base_args: dict[str, Any] = field(default_factory=dict)


def open_model(name: str, pretrained: bool = False) -> Patient:
    """The model of that name, or in that folder or repository, in evaluation mode.

    A known name is never taken for a folder, and a folder never for a repository.
    """
    with progress(f"Building {name}"):
        if is_own(name):
            model = timm.create_model(name, pretrained=pretrained).eval()
            return Patient(model, base_of(model) or name)
        if is_base(name) or not (_is_path(name) or _is_repo(name)):
            return Patient(create_base(name, pretrained).eval(), name)
        if pretrained:
            raise OptionError(f"{name!r} has weights of its own. Leave --pretrained out.")
        folder = locate(name)
        recipe = read_config(folder)["model_args"]["recipe"]
        return Patient(from_pretrained(folder).eval(), recipe["base"], recipe["base_args"])


def _is_path(name: str) -> bool:
    return os.path.exists(name) or name.startswith((".", "~", os.sep))


def _is_repo(name: str) -> bool:
    return is_repo(name) and not name.startswith(TORCHVISION)


def compared(
    patient: nn.Module, before: nn.Module, own: int, size: Any, options: Mapping[str, Any]
) -> tuple[str, bool]:
    """Make of two equal models one without SEs and one with them.

    Args:
        patient: The model; where it has no SEs, or options ask for more, they are put in here.
        before: The same; else its own are taken out here.
        own: How many it has.
        size: The size of the images, or None.
        options: `add_se`'s.

    Returns:
        What is compared, in words, and whether SEs were put in.
    """
    if own and check_options(**options) == Options():
        strip_se(before, example_input=size)
        return f"without its {count(own, 'SE')} and with them", False
    add_se(patient, **options, example_input=size)
    sites = recipe_of(patient)["operations"][-1]["sites"]
    return f"before and after {count(len(sites), 'SE')} are put in", True


def check_file(path: Path) -> None:
    """Refuse a file that could not be written, before what it would hold is there.

    Raises:
        OptionError: It is a folder, or in none.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise OptionError(f"{str(path)!r} cannot be written: it is a folder or in none. Name a file in a folder.")


def write(patient: Patient, output: Path, overwrite: bool, size: Any) -> None:
    """Write a model to a folder, over what is in it or not; `size` is that of the images to look at it with."""
    given = {"base": patient.base, "base_args": patient.base_args, "example_input": size}
    with progress(f"Writing {output}"):
        save_pretrained(patient.model, output, **given, overwrite=overwrite)


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Say on stderr what takes its time: a spinner on a terminal, else a line."""
    if sys.stderr.isatty():  # and not what rich takes for a terminal where colours are forced
        with _stderr.status(what):
            yield
    else:
        _stderr.print(f"{what} ...")
        yield


def say(as_json: bool, data: Any, text: str) -> None:
    """Print plain data as JSON, or a text."""
    typer.echo(json.dumps(data, indent=2) if as_json else text)
