"""The command line: `se-surgery plan`, `add`, `strip`, `list`, `inspect`, `recipe`, `verify`, `cost`, `bench`, ...

In: a model by name, folder or repository, and options. Out: tables (or JSON) on stdout, progress and errors on stderr,
a folder from `add`, `strip` and `pull`, and a commit from `push`. Exit codes: 0 done, 1 refused (the message says why),
2 a mistake in the command line itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
import typer
from rich.console import Console
from timm.models import is_model_in_modules
from torch import nn
from typer.core import TyperGroup

from . import __version__, cli_bench, cli_cost, cli_gates, cli_paper
from . import cli_options as cli
from .bases import OWN_MODULE, TORCHVISION, create_base, is_base
from .cli_report import (
    State,
    checks,
    costs,
    costs_text,
    inspected,
    inspected_text,
    outputs_text,
    same_outputs,
    state_of,
)
from .config import read_config
from .errors import OptionError, SurgeryError
from .exam import Exam, find_se
from .graft import add_se, graft
from .hub import is_repo
from .options import Options, check_options
from .planner import plan_se
from .pretrained import from_pretrained, locate, pull_from_hub, push_to_hub, save_pretrained
from .promises import Report, trials
from .promises import verify as verify_model
from .recipe import recipe_of
from .records import OPERATIONS, base_of
from .replace import check_directory
from .show import count, plan_text, sites_text
from .strip import strip_se

_stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class _Group(TyperGroup):
    """Commands whose `SurgeryError`s are messages and not tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SurgeryError as error:
            typer.echo(f"se-surgery: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    epilog=cli.examples(
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


@app.command(
    epilog=cli.examples(
        "se-surgery plan resnet50",
        "se-surgery plan efficientnet_b0 --existing replace --r 3=8,4=16 --json",
        "se-surgery plan densenet121 --placement inner --draw densenet121.svg",
    )
)
@cli.takes_surgery
def plan(
    model: cli.Model,
    size: cli.Size = None,
    pretrained: cli.Pretrained = False,
    draw: cli.Draw = None,
    as_json: cli.Json = False,
    **options: Any,
) -> None:
    """Show where SEs would go, and change nothing."""
    patient = _patient(model, pretrained, size)
    with _progress("Looking at the model"):
        planned = plan_se(patient.model, **options, example_input=size)
    if draw is not None:
        with _progress(f"Drawing {draw}"):
            planned.draw(draw)
    _say(as_json, planned.to_dict(), plan_text(planned))


@app.command(
    epilog=cli.examples(
        "se-surgery add resnext50_32x4d --r 16 -o se_resnext50_32x4d",
        "se-surgery add torchvision/resnet50 --pretrained --placement pre --stages 3,4 -o se_resnet50_pre",
    )
)
@cli.takes_surgery
def add(
    model: cli.Model,
    output: cli.Output,
    size: cli.Size = None,
    pretrained: cli.Pretrained = False,
    overwrite: cli.Overwrite = False,
    as_json: cli.Json = False,
    **options: Any,
) -> None:
    """Put SEs in, prove that everything else is as it was, and write the model to a folder."""
    check_directory(output, overwrite)
    patient = _patient(model, pretrained, size)
    with _progress("Looking at the model"):
        planned = plan_se(patient.model, **options, example_input=size)
    before = _run(patient, planned.exam, "Running the model")
    graft(patient.model, planned)
    after = _run(patient, planned.exam, "Running the operated model")
    with _progress("Verifying the operated model"):
        report = verify_model(patient.model, example_input=size, thorough=False)
    equal = same_outputs(before, after)
    # An SE that replaces another takes that one's effect away, and the paper's start is random.
    if not all(equal.values()) and options["init"] == "identity" and not any(site.replaces for site in planned.sites):
        raise SurgeryError(f"The outputs of {model!r} have changed. Nothing was written; please report this as a bug.")
    _write(patient, output, overwrite, size)
    data = {**planned.to_dict(), **costs(before, after), "outputs_equal": equal, "checks": checks(report)}
    parts = [plan_text(planned), costs_text(before, after), f"Verified\n{report}", outputs_text(equal)]
    _say(as_json, {**data, "output": str(output)}, "\n\n".join([*parts, f"Written to {output}."]))


@app.command(
    epilog=cli.examples(
        "se-surgery strip seresnet50 --stages -1 -o without_last_stage",
        "se-surgery strip se_resnext50_32x4d --origin se_surgery -o resnext50_32x4d_again",
        "se-surgery strip seresnet50 --pretrained --stages -1 --fold imagenet -o folded",
    )
)
@cli.takes_data
def strip(
    model: cli.Model,
    output: cli.Output,
    stages: cli.Stages = None,
    where: cli.Where = None,
    origin: cli.Origin = None,
    fold: cli.Fold = None,
    size: cli.Size = None,
    pretrained: cli.Pretrained = False,
    overwrite: cli.Overwrite = False,
    as_json: cli.Json = False,
    **options: Any,
) -> None:
    """Take SEs out, whoever put them there, and write the model to a folder."""
    check_directory(output, overwrite)
    patient = _patient(model, pretrained, size)
    with _progress("Looking at the model"):
        exam = Exam(patient.model, size)
    before = _run(patient, exam, "Running the model")
    folding: dict[str, Any] = {}
    if fold is not None:
        folding = {"fold": "mean", "loader": cli_gates.shown_pictures(patient.model, fold, size, _progress, **options)}
    strip_se(patient.model, stages, where=where, origin=origin, **folding, example_input=size)
    patient.model.cpu()
    after = _run(patient, exam, "Running the stripped model")
    left = {site.path for site in find_se(patient.model, size)}
    removed = [site for site in exam.existing if site.path not in left]
    equal = same_outputs(before, after)
    _write(patient, output, overwrite, size)
    data = {"removed": [asdict(site) for site in removed], **costs(before, after), "outputs_equal": equal}
    title = f"{len(removed)} of {count(len(exam.existing), 'SE')} taken out"
    title += "" if fold is None else f", the mean of their gates on {fold} folded"
    parts = [f"{title}\n{sites_text(removed)}", costs_text(before, after), outputs_text(equal)]
    _say(as_json, {**data, "output": str(output)}, "\n\n".join([*parts, f"Written to {output}."]))


@app.command(
    "list", epilog=cli.examples("se-surgery list seresnet50", "se-surgery list torchvision/efficientnet_b0 --json")
)
def list_(model: cli.Model, size: cli.Size = None, as_json: cli.Json = False) -> None:
    """List the SEs of a model, whoever put them there."""
    patient = _patient(model, False, size)
    with _progress("Looking at the model"):
        sites = find_se(patient.model, size)
    _say(as_json, [asdict(site) for site in sites], sites_text(sites))


@app.command(epilog=cli.examples("se-surgery inspect resnet50", "se-surgery inspect user/se_resnext50_32x4d"))
def inspect(model: cli.Model, size: cli.Size = None, as_json: cli.Json = False) -> None:
    """Show a model's units, stages, SEs and the placements it has; for a folder or repository, what was done to it."""
    patient = _patient(model, False, size)
    with _progress("Looking at the model"):
        exam = Exam(patient.model, size)
    data = inspected(patient.base, patient.model, exam, patient.model.__dict__.get(OPERATIONS, []))
    _say(as_json, data, inspected_text(data, exam))


@app.command(
    epilog=cli.examples(
        "se-surgery recipe resnet50 --placement pre --r 8 -o registry/se_resnet50_pre_r8.json",
        "se-surgery recipe se_resnext50_32x4d_custom",
    )
)
@cli.takes_surgery
def recipe(
    model: cli.Model,
    output: cli.RecipeFile = None,
    title: cli.Title = None,
    source: cli.Source = None,
    overwrite: cli.Overwrite = False,
    size: cli.Size = None,
    **options: Any,
) -> None:
    """Write a recipe: what putting SEs into a base comes to, or what was done to a folder's model or a named one."""
    if output is not None and output.exists() and not overwrite:
        raise OptionError(f"{str(output)!r} is there already. Name another file, or ask for --overwrite.")
    patient = _patient(model, False, size)
    if OPERATIONS not in patient.model.__dict__ or check_options(**options) != Options():
        with _progress("Looking at the model"):
            add_se(patient.model, **options, example_input=size)
    about = {"title": title, "source": source, "sites": len(find_se(patient.model, size))}
    about["params"] = sum(parameter.numel() for parameter in patient.model.parameters())
    written = recipe_of(patient.model, patient.base, patient.base_args)
    text = json.dumps({**written, "about": {key: value for key, value in about.items() if value is not None}}, indent=1)
    if output is None:
        typer.echo(text)
        return
    output.write_text(text + "\n", encoding="utf-8")
    typer.echo(f"Written to {output}.")


@app.command(
    epilog=cli.examples("se-surgery verify se_resnext50_32x4d", "se-surgery verify se_resnext50_32x4d --quick --json")
)
def verify(model: cli.Model, quick: cli.Quick = False, size: cli.Size = None, as_json: cli.Json = False) -> None:
    """Run an operated model and check every promise that was made of it, and every way into it."""
    patient = _patient(model, False, size)
    with _progress("Looking at the model"):
        planned = trials(patient.model, size, thorough=not quick)
    tried = []
    for number, trial in enumerate(planned, 1):
        with _progress(f"{number} of {len(planned)}: {trial.name}"):
            tried.append(trial.run())
        if not as_json:
            typer.echo(tried[-1])
    report = Report(tuple(tried))
    if as_json:
        _say(as_json, checks(report), "")
    report.refuse_broken()


@app.command(
    epilog=cli.examples(
        "se-surgery push se_resnext50_32x4d user/se_resnext50_32x4d --tag v1",
        "se-surgery push se_resnet50_pre user/se_resnet50_pre --private --license apache-2.0",
    )
)
def push(
    model: cli.Model,
    repo: cli.Repo,
    private: cli.Private = None,
    branch: cli.Branch = None,
    tag: cli.Tag = None,
    license: cli.License = None,
    base_model: cli.BaseModel = None,
    card_tag: cli.CardTag = None,
    plot: cli.Plot = None,
    message: cli.Message = "Save the model with se-surgery",
    size: cli.Size = None,
    pretrained: cli.Pretrained = False,
    as_json: cli.Json = False,
) -> None:
    """Push a model to the Hugging Face Hub, with a model card, in one commit."""
    patient = _patient(model, pretrained, size)
    with _progress(f"Pushing to {repo}"):
        made = push_to_hub(
            patient.model,
            repo,
            base=patient.base,
            base_args=patient.base_args,
            private=private,
            revision=branch,
            tag=tag,
            message=message,
            license=license,
            base_model=base_model,
            tags=card_tag or (),
            plot=plot,
            example_input=size,
        )
    name = f"{repo}@{tag or branch}" if tag or branch else repo
    text = f"Pushed as {made}.\nLoad it with: import se_surgery; timm.create_model('hf-hub:{name}', pretrained=True)"
    _say(as_json, {"commit": made, "model": f"hf-hub:{name}"}, text)


@app.command(
    epilog=cli.examples(
        "se-surgery pull user/se_resnext50_32x4d -o se_resnext50_32x4d",
        "se-surgery pull user/se_resnext50_32x4d@v1 -o first --overwrite",
    )
)
def pull(repo: cli.Repo, output: cli.Output, overwrite: cli.Overwrite = False, as_json: cli.Json = False) -> None:
    """Fetch a model from the Hugging Face Hub, check it, and write it to a folder."""
    with _progress(f"Fetching {repo}"):
        commit = pull_from_hub(repo, output, overwrite=overwrite)
    _say(as_json, {"commit": commit, "output": str(output)}, f"{commit} written to {output}.")


@dataclass(frozen=True)
class _Patient:
    """A model, and what it was made from."""

    model: nn.Module
    base: str
    base_args: dict[str, Any] = field(default_factory=dict)


def _patient(name: str, pretrained: bool, size: Any) -> _Patient:
    """The model of that name, or in that folder or repository, in evaluation mode.

    A known name is never taken for a folder, and a folder never for a repository.
    """
    with _progress(f"Building {name}"):
        if is_model_in_modules(name.partition(".")[0], [OWN_MODULE]):
            model = timm.create_model(name, pretrained=pretrained).eval()
            return _Patient(model, base_of(model) or name)
        if is_base(name) or not (os.path.isdir(name) or _is_repo(name)):
            return _Patient(create_base(name, pretrained).eval(), name)
        if pretrained:
            raise OptionError(f"{name!r} has weights of its own. Leave --pretrained out.")
        folder = locate(name)
        recipe = read_config(folder)["model_args"]["recipe"]
        return _Patient(from_pretrained(folder).eval(), recipe["base"], recipe["base_args"])


def _is_repo(name: str) -> bool:
    return is_repo(name) and not name.startswith(TORCHVISION)


def _run(patient: _Patient, exam: Exam, what: str) -> State:
    with _progress(what):
        return state_of(patient.model, exam)


def _write(patient: _Patient, output: Path, overwrite: bool, size: Any) -> None:
    given = {"base": patient.base, "base_args": patient.base_args, "example_input": size}
    with _progress(f"Writing {output}"):
        save_pretrained(patient.model, output, **given, overwrite=overwrite)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Say on stderr what takes its time: a spinner on a terminal, else a line."""
    if sys.stderr.isatty():  # and not what rich takes for a terminal where colours are forced
        with _stderr.status(what):
            yield
    else:
        _stderr.print(f"{what} ...")
        yield


def _say(as_json: bool, data: Any, text: str) -> None:
    typer.echo(json.dumps(data, indent=2) if as_json else text)


cli_bench.add_to(app, _patient, _progress, _say)
cli_cost.add_to(app, _patient, _progress, _say)
cli_gates.add_to(app, _patient, _progress, _say, _write)
cli_paper.add_to(app, _progress, _say)
