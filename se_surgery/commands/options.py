"""The command line's arguments: their names and their help.

In: a command. Out: the same with an argument for each option of `add_se`, or of what is done with a data set. How the
text of an argument is read is in `values`; what a value means is checked where it is used.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OptionError
from ..planning.options import DEFAULT_PLACEMENT, EXISTING, Options
from ..planning.placements import PLACEMENTS
from ..se.excite import GATES, INITS, LIGHT_ATTENTION, SQUEEZES
from ..surgery.strip import ORIGINS
from .values import read_budget, read_numbers, read_ratios, read_size


def _one_of(names: Any) -> str:
    return ", ".join(names)


_SURGERY = "Surgery"
_SE = "The SE module"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm name (resnet50), torchvision/NAME, a folder written by add, strip or pull (./DIR if DIR is a "
        "name), or a repository of the Hugging Face Hub (USER/MODEL, USER/MODEL@REVISION).",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds something already.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load the library's weights for the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Quick = Annotated[bool, typer.Option("--quick", help="Leave out compilers and exporters.")]
Size = Annotated[
    Any,
    typer.Option(
        "--size",
        metavar="C,H,W or N",
        parser=read_size,
        help="Size of the image to look at the model with; N for 3,N,N. By default what fits it.",
        show_default=False,
    ),
]
Stages = Annotated[
    Any,
    typer.Option(
        "--stages", metavar="N,...", parser=read_numbers, help="Stages, from 1; -1 is the last.", show_default="all"
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="GLOB",
        help="Only SEs whose path, or whose unit's, fits. May be repeated.",
        show_default=False,
    ),
]
Placement = Annotated[
    str | None,
    typer.Option(
        "--placement",
        "-p",
        help=f"{_one_of(PLACEMENTS)}. With --existing replace: where the SE is that goes",
        rich_help_panel=_SURGERY,
        show_default=DEFAULT_PLACEMENT,
    ),
]
Ratio = Annotated[
    Any,
    typer.Option(
        "--r",
        metavar="N or STAGE=N,...",
        parser=read_ratios,
        help="Reduction ratio, for all stages or for each one named.",
        rich_help_panel=_SURGERY,
    ),
]
Existing = Annotated[
    str, typer.Option("--existing", help=f"In a unit that holds an SE: {_one_of(EXISTING)}", rich_help_panel=_SURGERY)
]
Init = Annotated[
    str,
    typer.Option(
        "--init", help=f"How SEs start: {_one_of(INITS)}; identity keeps the outputs.", rich_help_panel=_SURGERY
    ),
]
Name = Annotated[str, typer.Option("--name", help="Name of the child module.", rich_help_panel=_SURGERY)]
Heads = Annotated[
    bool, typer.Option("--heads", help="Operate on heads, necks and decoders, too.", rich_help_panel=_SURGERY)
]
Bias = Annotated[bool, typer.Option("--bias/--no-bias", help="Biases in both layers.", rich_help_panel=_SE)]
Divisor = Annotated[
    int, typer.Option("--rd-divisor", help="Round the hidden width to a multiple (timm: 8).", rich_help_panel=_SE)
]
Hidden = Annotated[
    int | None,
    typer.Option("--rd-channels", help="Hidden width, instead of --r.", rich_help_panel=_SE, show_default=False),
]
Squeeze = Annotated[str, typer.Option("--squeeze", help=_one_of(SQUEEZES), rich_help_panel=_SE)]
Act = Annotated[str, typer.Option("--act", help="Activation, by timm's name.", rich_help_panel=_SE)]
GateOption = Annotated[str, typer.Option("--gate", help=_one_of(GATES), rich_help_panel=_SE)]
GateScale = Annotated[
    float | None,
    typer.Option("--gate-scale", help="Factor on the gate.", rich_help_panel=_SE, show_default="what init asks for"),
]
Attention = Annotated[
    str, typer.Option("--attn", help=f"se, or {_one_of(LIGHT_ATTENTION)} of timm", rich_help_panel=_SE)
]
Origin = Annotated[
    str | None,
    typer.Option("--origin", help=f"Only SEs of one origin: {_one_of(ORIGINS)}", show_default=False),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="The file to write; without it, stdout.", show_default=False),
]
Title = Annotated[str | None, typer.Option("--title", help="What the model is, in a line.", show_default=False)]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="A repository: USER/MODEL.", show_default=False)]
Private = Annotated[
    bool | None,
    typer.Option("--private/--public", help="Who may read a new repository.", show_default="as the account has it"),
]
Branch = Annotated[str | None, typer.Option("--branch", help="The branch to push to.", show_default="main")]
Tag = Annotated[str | None, typer.Option("--tag", help="A name for the commit, v1 for instance.", show_default=False)]
License = Annotated[
    str | None, typer.Option("--license", help="The model's licence.", show_default="that of the base's weights")
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="REPO",
        help="Repository of the weights it was made from; '' if they were random.",
        show_default="that of the base's weights",
    ),
]
CardTag = Annotated[
    list[str] | None,
    typer.Option("--card-tag", help="A tag for the model card. May be repeated.", show_default=False),
]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="PNG", help="A picture of its excitations.", show_default=False)
]
Draw = Annotated[
    Path | None,
    typer.Option("--draw", metavar="FILE", help="Draw it, too: an .svg, .png or .pdf file.", show_default=False),
]
Message = Annotated[str, typer.Option("--message", "-m", help="The commit's message.")]
Source = Annotated[str | None, typer.Option("--source", help="Where it comes from.", show_default=False)]

_DATA = "Data"
_DATA_HELP = "A folder with one folder of images for each class, or timm's name of a data set (torch/cifar10, ...)"
Data = Annotated[str, typer.Argument(metavar="DATA", help=f"{_DATA_HELP}.", show_default=False)]
Fold = Annotated[
    str | None,
    typer.Option(
        "--fold",
        metavar="DATA",
        help=f"Put the mean gates over some images into the layers beside the SEs. {_DATA_HELP}.",
        show_default=False,
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--root", help="Where the files of a data set by name are.", rich_help_panel=_DATA, show_default=False
    ),
]
Split = Annotated[
    str,
    typer.Option("--split", help="Part of the data; in a folder with parts, that one.", rich_help_panel=_DATA),
]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        "--class-map",
        metavar="FILE",
        help="Names of the model's classes, one in every line; folders of other names are left out. By default the "
        "data's own names in natural order.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch a data set by name that is not there yet.", rich_help_panel=_DATA)
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images at a time.", rich_help_panel=_DATA)]
Limit = Annotated[
    int | None,
    typer.Option("--images", help="How many images, evenly spread.", rich_help_panel=_DATA, show_default="all"),
]
Workers = Annotated[int, typer.Option("--workers", help="Processes that read images.", rich_help_panel=_DATA)]
Device = Annotated[
    str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1, ...", rich_help_panel=_DATA)
]
GatesFile = Annotated[
    Path | None,
    typer.Option("--save", metavar="FILE", help="Write all statistics for Excitations.load.", show_default=False),
]
Figure = Annotated[
    Path | None,
    typer.Option("--plot", metavar="PNG", help="Draw them; the ending says the format.", show_default=False),
]
Budget = Annotated[
    Any,
    typer.Option(
        "--budget",
        metavar="N or SHARE",
        parser=read_budget,
        help="Parameters that the SEs may keep, or the share of what they have, 0.5 for instance: the best set goes.",
        show_default=False,
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        "--resume", metavar="FILE", help="Keep every score in this file, and go on from it.", show_default=False
    ),
]
TakenOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Folder for the model without them.", show_default=False),
]

# The options of `add_se`, as arguments of a command.
_SURGERY_OPTIONS: dict[str, Any] = {
    "placement": Placement,
    "r": Ratio,
    "stages": Stages,
    "where": Where,
    "rd_channels": Hidden,
    "rd_divisor": Divisor,
    "bias": Bias,
    "squeeze": Squeeze,
    "act": Act,
    "gate": GateOption,
    "gate_scale": GateScale,
    "init": Init,
    "attn": Attention,
    "existing": Existing,
    "name": Name,
    "heads": Heads,
}


# What to do with a data set, as arguments of a command: those of `open_pictures`, and where the model runs.
_DATA_OPTIONS: dict[str, tuple[Any, Any]] = {
    "root": (DataRoot, None),
    "split": (Split, "validation"),
    "class_map": (ClassMap, None),
    "download": (Download, False),
    "batch_size": (BatchSize, 64),
    "images": (Limit, None),
    "workers": (Workers, min(4, os.cpu_count() or 1)),
    "device": (Device, "cpu"),
}


def refuse_data(options: Mapping[str, Any], asker: str) -> None:
    """Refuse options that say what to do with a data set where none is named.

    Raises:
        OptionError: One is not at its default; the message names it, and the option that would name the data.
    """
    odd = next((name for name, (_, default) in _DATA_OPTIONS.items() if options[name] != default), None)
    if odd is not None:
        raise OptionError(
            f"--{odd.replace('_', '-')} is about the images of {asker}. Give {asker}, too, or leave it out."
        )


def takes_surgery(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, which collects them in its `**options`, an argument for each option of `add_se`."""
    defaults = {**Options().__dict__, "r": str(Options().r), "bias": False}
    return _taking(command, {name: (annotation, defaults[name]) for name, annotation in _SURGERY_OPTIONS.items()})


def takes_data(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, which collects them in its `**options`, an argument for each of what is done with a data set."""
    return _taking(command, _DATA_OPTIONS)


def _taking(command: Callable[..., None], options: Mapping[str, tuple[Any, Any]]) -> Callable[..., None]:
    """A command with more arguments, by name what they are and their defaults."""

    @functools.wraps(command)
    def taking(**arguments: Any) -> None:
        command(**arguments)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in options.items()
    ]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *added)]
    taking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    taking.__annotations__ = {p.name: p.annotation for p in parameters}
    return taking
