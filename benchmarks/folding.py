"""Fold constant gates in every family of timm and torchvision, and write down what took them.

    python -m benchmarks.folding                     what is missing: docs/folding.jsonl, docs/folding.md
    python -m benchmarks.folding --names 'resnet*'   some names only
    python -m benchmarks.folding --fresh             all of it anew
    python -m benchmarks.folding --render            docs/folding.md from the rows there are

One network of each family, with SEs of every placement and with its own. All gates are made constants, another one for
each channel, and all SEs that can be folded are folded at once. A row that was made with the same sources and versions
is not made again. It exits with 1 where a row is a failure.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from se_surgery import PlacementError, add_se, strip_se
from se_surgery.folding.absorb import NoFold
from se_surgery.folding.fold import folding
from se_surgery.planning.exam import Exam
from se_surgery.planning.placements import PLACEMENTS
from se_surgery.proving.promises import randomise

from .coverage import zoo
from .coverage.pool import Answer, Pool, Task
from .coverage.rows import ROOT, Key, Row, append, is_current, key_of, read, stamp, write
from .coverage.running import PASS, outputs_of, smallest_input
from .coverage.table import grid, short

ROWS, DOCUMENT = ROOT / "docs" / "folding.jsonl", ROOT / "docs" / "folding.md"
OWN = "own"
PARTS = (OWN, *PLACEMENTS)
NONE = "none"
# How far outputs may be off, relative to the largest. In double precision, stripping without the fold has to be a
# thousand times as far off: in the deepest networks of random weights little of the image is left at the end.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5}
_CONTRAST = 1000


def fold_bodies(name: str, parts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What comes of folding the constant gates of a network, for SEs of every placement in `parts`."""
    torch.manual_seed(0)
    base = zoo.build(name)
    randomise(base)
    args = smallest_input(base.eval())
    for part in parts:
        try:
            yield _body(base, part, args)
        except Exception as error:  # whatever goes wrong is what the row is for
            yield {"status": f"fail: {type(error).__name__}: {error}"}


def _body(base: nn.Module, placement: str, args: tuple[Any, ...]) -> dict[str, Any]:
    model, origin = copy.deepcopy(base), None
    if placement != OWN:
        try:
            add_se(model, placement, bias=True, init="paper", existing="stack", example_input=args)
        except PlacementError as error:
            return {"status": NONE, "why": str(error)}
        origin = "se_surgery"
    exam = Exam(model, args)
    sites = [site for site in exam.existing if origin in (None, site.origin)]
    if not sites:
        return {"status": NONE, "why": "It has no SE of its own."}
    hold_gates(model, [site.path for site in sites])
    paths, folded, refused = [site.path for site in sites], [], Counter[str]()
    for site in sites:
        try:
            folding(exam, site, paths)
            folded.append(site.path)
        except NoFold as reason:
            refused[_nameless(str(reason))] += 1
    body: dict[str, Any] = {"ses": len(sites), "folded": len(folded), "refused": dict(refused), "status": PASS}
    if folded:
        body |= _differences(model, folded, args, base if placement != OWN and not refused else None)
        body["status"] = _verdict(body)
    return body


def _nameless(reason: str) -> str:
    """A reason without the paths of modules, so that those of one kind are counted together."""
    return re.sub(r"'[^']*'( \(\w+\))?", r"a module\1", reason)


@torch.no_grad()
def hold_gates(model: nn.Module, paths: Iterable[str]) -> None:
    """Make the gates of SEs constants: the last layer keeps nothing but a bias, another one for each channel."""
    generator = torch.Generator().manual_seed(11)
    for path in paths:
        layers = [m for m in model.get_submodule(path).modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))]
        layers[-1].weight.zero_()
        if layers[-1].bias is not None:
            layers[-1].bias.uniform_(-1.0, 1.0, generator=generator)


def _differences(model: nn.Module, paths: list[str], args: tuple[Any, ...], base: nn.Module | None) -> dict[str, Any]:
    """How far off the folded model is, and the one that is stripped without a fold; whether the base is left."""
    found: dict[str, Any] = {}
    for name in TOLERANCES:
        given = tuple(arg.to(getattr(torch, name)) for arg in args)
        patient = copy.deepcopy(model).to(getattr(torch, name))
        expected = outputs_of(patient, given)
        strip_se(patient, where=paths, fold="mean", loader=[given[0]], example_input=given)
        found[name] = _distance(outputs_of(patient, given), expected)
        if name == "float64":
            bare = strip_se(copy.deepcopy(model).double(), where=paths, example_input=given)
            found["stripped"] = _distance(outputs_of(bare, given), expected)
    if base is not None:
        found["base"] = repr(patient) == repr(base) and _shapes(patient) == _shapes(base)
    return found


def _shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(key, tuple(value.shape)) for key, value in model.state_dict().items()]


def _distance(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of each tensor."""
    pairs = zip(outputs, expected, strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def _verdict(body: dict[str, Any]) -> str:
    """What is wrong with a row."""
    far = [f"{name} is {body[name]:.1e} off" for name, limit in TOLERANCES.items() if not body[name] <= limit]
    if far:
        return f"fail: {', '.join(far)}"
    if not body["stripped"] > _CONTRAST * TOLERANCES["float64"]:
        return f"fail: stripped without the fold it is only {body['stripped']:.1e} off, and nothing is shown"
    return PASS if body.get("base", True) else "fail: what is left is not the base"


# ------------------------------------------------------------------------------------------------------------ the rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit code."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.folding", None, summary, details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", default="*", metavar="GLOB", help="names; torchvision's begin with torchvision/")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1); 0 runs everything in this one")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file of rows (default: docs/folding.jsonl)")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="what to write (default: docs/folding.md)")
    parser.add_argument("--fresh", action="store_true", help="make the chosen rows anew")
    parser.add_argument("--render", action="store_true", help="write the document, and make no rows")
    options = parser.parse_args(arguments)
    rows = read(options.rows)
    if not options.render:
        _run(rows, options)
        write(options.rows, rows.values())
    if not rows:
        parser.error(f"there are no rows in {options.rows}")
    options.document.write_text(document_text(rows.values()), encoding="utf-8")
    return 1 if any(_failed(row) for row in rows.values()) else 0


def _run(rows: dict[Key, Row], options: argparse.Namespace) -> None:
    """Make the rows that are missing, and add them to the file as they come."""
    wanted = [
        Task("fold", name, PARTS) for name in sorted(zoo.listed("family")) if fnmatch.fnmatch(name, options.names)
    ]
    tasks = [task for task in wanted if options.fresh or not all(_is_done(rows, task.name, part) for part in PARTS)]
    console = Console(stderr=True)
    with Pool(work, jobs=options.jobs) as pool:
        answers = (answer for answer in pool.answers(tasks) if answer is not None)
        for answer in track(answers, "rows", total=len(tasks) * len(PARTS), console=console):
            row = _row(answer)
            rows[key_of(row)] = row
            append(options.rows, row)
            if _failed(row):
                console.print(f"{row['name']} {row['placement']}: {row['status']}", markup=False, soft_wrap=True)


def _is_done(rows: dict[Key, Row], name: str, part: str) -> bool:
    key = ("fold", name, part)
    return key in rows and is_current(rows[key])


def work(task: Task) -> Iterator[dict[str, Any]]:
    """Answer one task: one body for every placement, with the seconds it took and what it depends on."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bodies = fold_bodies(task.name, task.parts)
    start = time.process_time()
    for body in bodies:
        yield {**body, "seconds": round(time.process_time() - start, 1), **stamp()}
        start = time.process_time()


def _row(answer: Answer) -> Row:
    entry = zoo.entries()[answer.task.name]
    row: Row = {"kind": "fold", "name": entry.name, "family": entry.family, "placement": answer.part}
    return {**row, **(answer.body if answer.body is not None else {"status": f"fail: {answer.trouble}", **stamp()})}


def _failed(row: Row) -> bool:
    return bool(row["status"] not in (PASS, NONE))


# -------------------------------------------------------------------------------------------------------- the document


def document_text(rows: Iterable[Row]) -> str:
    """docs/folding.md."""
    rows = sorted(rows, key=lambda row: (row["name"].startswith("torchvision/"), row["family"], row["placement"]))
    tried = [row for row in rows if row["status"] != NONE]
    failed = [row for row in tried if _failed(row)]
    folded = [row for row in tried if row.get("folded")]
    worst = {name: max((row[name] for row in folded if name in row), default=0.0) for name in TOLERANCES}
    parts = [
        "# What can be folded",
        "Made by `python -m benchmarks.folding` from the rows in [folding.jsonl](folding.jsonl); not to be edited by "
        "hand.",
        f"{sum(row.get('folded', 0) for row in tried):,} of {sum(row.get('ses', 0) for row in tried):,} SEs of "
        f"constant gates were folded, in {len(folded)} of {len(tried)} cases; {len(failed)} failed. Outputs were "
        f"off by {worst['float64']:.0e} at most in double precision and by {worst['float32']:.0e} in single, relative "
        f"to the largest ({TOLERANCES['float64']:.0e} and {TOLERANCES['float32']:.0e} are allowed); where all SEs of "
        f"this library were folded, modules, keys and shapes are the base's.",
        "".join(f"- {row['name']}, {row['placement']}: {short(row['status'])}\n" for row in failed),
        "How many of how many SEs were folded, by family and placement. `own`: the network's own SEs; `·`: it has none "
        "of this kind.",
        _families(rows),
        "## What was refused, and why",
        "Both ways have to be closed: to the layer in front of the SE, and to the one behind it. Names of modules are "
        "left out.",
        _reasons(tried),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _families(rows: Sequence[Row]) -> str:
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["placement"]] = row
    lines = [[name, *(_cell(found.get(part)) for part in PARTS)] for name, found in by_name.items()]
    return grid(["network", *(f">{part}" for part in PARTS)], lines)


def _cell(row: Row | None) -> str:
    if row is None or row["status"] == NONE:
        return "·"
    return "failed" if _failed(row) else f"{row['folded']} of {row['ses']}"


def _reasons(rows: Sequence[Row]) -> str:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        for reason, number in row.get("refused", {}).items():
            counts.setdefault((row["placement"], reason), Counter())[row["name"]] += number
    ordered = sorted(counts.items(), key=lambda item: (PARTS.index(item[0][0]), -item[1].total(), item[0]))
    lines = [[*key, found.total(), short(", ".join(sorted(found)))] for key, found in ordered]
    return grid(["placement", "reason", ">SEs", "networks"], lines)


if __name__ == "__main__":
    sys.exit(main())
