"""The command line: `se-surgery plan`, `add`, `strip`, `list`, `inspect`, `recipe`, `verify`; others have files.

In: a model by name, folder or repository, and options. Out: tables (or JSON) on stdout, progress and errors on stderr,
and a folder from `add` and `strip`. See `cli_app` for what all commands share.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer

from ..errors import OptionError, SurgeryError
from ..files.replace import check_directory
from ..planning.exam import Exam, find_se
from ..planning.options import Options, check_options
from ..planning.planner import plan_se
from ..proving.promises import Report, trials
from ..proving.promises import verify as verify_model
from ..records import OPERATIONS
from ..showing.show import plan_text, sites_text
from ..showing.tables import count
from ..surgery.graft import add_se, graft
from ..surgery.journal import guarded
from ..surgery.recipe import recipe_of
from ..surgery.strip import strip_se
from . import bench, cost, gates, hub, paper  # noqa: F401 - they add their commands
from . import options as cli
from .app import Patient, app, check_file, examples, open_model, progress, say, write
from .report import State, checks, costs, costs_text, inspected, inspected_text, outputs_text, same_outputs, state_of

__all__ = ["app"]


@app.command(
    epilog=examples(
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
    patient = open_model(model, pretrained)
    with progress("Looking at the model"):
        planned = plan_se(patient.model, **options, example_input=size)
    if draw is not None:
        with progress(f"Drawing {draw}"):
            planned.draw(draw)
    say(as_json, planned.to_dict(), plan_text(planned))


@app.command(
    epilog=examples(
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
    patient = open_model(model, pretrained)
    with progress("Looking at the model"):
        planned = plan_se(patient.model, **options, example_input=size)
    before = _run(patient, planned.exam, "Running the model")
    guarded(graft, patient.model, planned)
    after = _run(patient, planned.exam, "Running the operated model")
    with progress("Verifying the operated model"):
        report = verify_model(patient.model, example_input=size, thorough=False)
    equal = same_outputs(before, after)
    # An SE that replaces another takes that one's effect away, and the paper's start is random.
    if not all(equal.values()) and options["init"] == "identity" and not any(site.replaces for site in planned.sites):
        raise SurgeryError(f"The outputs of {model!r} have changed. Nothing was written; please report this as a bug.")
    write(patient, output, overwrite, size)
    data = {**planned.to_dict(), **costs(before, after), "outputs_equal": equal, "checks": checks(report)}
    parts = [plan_text(planned), costs_text(before, after), f"Verified\n{report}", outputs_text(equal)]
    say(as_json, {**data, "output": str(output)}, "\n\n".join([*parts, f"Written to {output}."]))


@app.command(
    epilog=examples(
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
    if fold is None:
        cli.refuse_data(options, "--fold")
    patient = open_model(model, pretrained)
    with progress("Looking at the model"):
        exam = Exam(patient.model, size)
    before = _run(patient, exam, "Running the model")
    folding: dict[str, Any] = {}
    if fold is not None:
        folding = {"fold": "mean", "loader": gates.shown_pictures(patient.model, fold, size, **options)}
    strip_se(patient.model, stages, where=where, origin=origin, **folding, example_input=size)
    patient.model.cpu()
    after = _run(patient, exam, "Running the stripped model")
    left = {site.path for site in find_se(patient.model, size)}
    removed = [site for site in exam.existing if site.path not in left]
    equal = same_outputs(before, after)
    write(patient, output, overwrite, size)
    data = {"removed": [asdict(site) for site in removed], **costs(before, after), "outputs_equal": equal}
    title = f"{len(removed)} of {count(len(exam.existing), 'SE')} taken out"
    title += "" if fold is None else f", the mean of their gates on {fold} folded"
    parts = [f"{title}\n{sites_text(removed)}", costs_text(before, after), outputs_text(equal)]
    say(as_json, {**data, "output": str(output)}, "\n\n".join([*parts, f"Written to {output}."]))


@app.command(
    "list", epilog=examples("se-surgery list seresnet50", "se-surgery list torchvision/efficientnet_b0 --json")
)
def list_(model: cli.Model, size: cli.Size = None, as_json: cli.Json = False) -> None:
    """List the SEs of a model, whoever put them there."""
    patient = open_model(model)
    with progress("Looking at the model"):
        sites = find_se(patient.model, size)
    say(as_json, [asdict(site) for site in sites], sites_text(sites))


@app.command(epilog=examples("se-surgery inspect resnet50", "se-surgery inspect user/se_resnext50_32x4d"))
def inspect(model: cli.Model, size: cli.Size = None, as_json: cli.Json = False) -> None:
    """Show a model's units, stages, SEs and the placements it has; for a folder or repository, what was done to it."""
    patient = open_model(model)
    with progress("Looking at the model"):
        exam = Exam(patient.model, size)
    data = inspected(patient.base, patient.model, exam, patient.model.__dict__.get(OPERATIONS, []))
    say(as_json, data, inspected_text(data, exam))


@app.command(
    epilog=examples(
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
    if output is not None and output.is_file() and not overwrite:
        raise OptionError(f"{str(output)!r} is there already. Name another file, or ask for --overwrite.")
    if output is not None:
        check_file(output)
    patient = open_model(model)
    if OPERATIONS not in patient.model.__dict__ or check_options(**options) != Options():
        with progress("Looking at the model"):
            add_se(patient.model, **options, example_input=size)
    about = {"title": title, "source": source, "sites": len(find_se(patient.model, size))}
    about["params"] = sum(parameter.numel() for parameter in patient.model.parameters())
    written = recipe_of(patient.model, patient.base, patient.base_args)
    text = json.dumps({**written, "about": {key: value for key, value in about.items() if value is not None}}, indent=1)
    if output is None:
        typer.echo(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SurgeryError(f"{str(output)!r} cannot be written ({error}). Name a file that can.") from error
    typer.echo(f"Written to {output}.")


@app.command(
    epilog=examples("se-surgery verify se_resnext50_32x4d", "se-surgery verify se_resnext50_32x4d --quick --json")
)
def verify(model: cli.Model, quick: cli.Quick = False, size: cli.Size = None, as_json: cli.Json = False) -> None:
    """Run an operated model and check every promise that was made of it, and every way into it."""
    patient = open_model(model)
    with progress("Looking at the model"):
        planned = trials(patient.model, size, thorough=not quick)
    tried = []
    for number, trial in enumerate(planned, 1):
        with progress(f"{number} of {len(planned)}: {trial.name}"):
            tried.append(trial.run())
        if not as_json:
            typer.echo(tried[-1])
    report = Report(tuple(tried))
    if as_json:
        say(as_json, checks(report), "")
    report.refuse_broken()


def _run(patient: Patient, exam: Exam, what: str) -> State:
    with progress(what):
        return state_of(patient.model, exam)
