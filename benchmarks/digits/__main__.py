"""Study SEs on scikit-learn's handwritten digits, and write down what came of it.

    python -m benchmarks.digits                                    what is missing of all three studies, five seeds
    python -m benchmarks.digits --write                            the same, and docs/digits.md with its plots
    python -m benchmarks.digits --studies gates --seeds 10         one study, ten seeds
    python -m benchmarks.digits --studies retrofit --arms 'identity *'
    python -m benchmarks.digits --render                           those from the rows that there are

It prints the tables of the studies. A row that was made with the same setting and versions is not made again, so that a
run that was interrupted (Ctrl-C) goes on where it was. All of it takes one core half an hour.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import figures, render
from .evidence import Evidence
from .rows import ROWS, Key, Row, append, is_current, key_of, read, stamp, write
from .setting import Setting
from .studies import STUDIES

SETTING = Setting()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: take 1 or more")
    torch.set_num_threads(1)
    rows = read(options.rows)
    if not options.render:
        keys = wanted(options.studies, options.seeds, options.arms)
        if not keys:
            parser.error(f"no arm is chosen by --arms {options.arms!r}")
        try:
            _run(rows, [key for key in keys if options.fresh or not _is_done(rows.get(key))], options.rows)
        except KeyboardInterrupt:
            Console(stderr=True).print("Interrupted. The same command goes on from here.")
            return 130
        write(options.rows, rows.values())
    if options.write or options.render:
        if not rows:
            parser.error(f"--render: there are no rows in {options.rows}")
        render.write(rows.values(), options.rows.with_suffix(".md"), SETTING)
        figures.write(rows.values(), options.rows.parent, SETTING)
    evidence = Evidence(rows.values())
    print("\n\n".join(render.section_text(evidence, study, SETTING) for study in options.studies))
    return 0


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.digits", None, summary, details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--studies", nargs="+", choices=tuple(STUDIES), default=list(STUDIES), help="default: all three")
    add("--seeds", type=int, default=5, help="seeds, from 0 (default: 5)")
    add("--arms", default="*", metavar="GLOB", help="arms of the studies: base, 'identity standard 16', ...")
    add("--rows", type=Path, default=ROWS, help="the file of rows (default: docs/digits.jsonl)")
    add("--fresh", action="store_true", help="make the chosen rows anew")
    add("--write", action="store_true", help="write the document and the plots beside the rows, too")
    add("--render", action="store_true", help="write those from the rows there are, and do nothing else")
    return parser


def wanted(studies: Sequence[str], seeds: int, glob: str = "*") -> list[Key]:
    """The keys of what was chosen, seed by seed, so that what is there after an interruption is of whole seeds."""
    return [
        (study, seed, arm)
        for study in studies
        for seed in range(seeds)
        for arm in STUDIES[study][0]()
        if fnmatch.fnmatchcase(arm, glob)
    ]


def _is_done(row: Row | None) -> bool:
    return row is not None and is_current(row, SETTING)


def _run(rows: dict[Key, Row], keys: Sequence[Key], path: Path) -> None:
    """Make rows, add them to the file and to `rows` as they come, and show how it goes."""
    arms: dict[tuple[str, int], list[str]] = {}
    for study, seed, arm in keys:
        arms.setdefault((study, seed), []).append(arm)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[last]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    write(path, rows.values())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("arms", total=len(keys), last="")
        for (study, seed), chosen in arms.items():
            for arm, body in STUDIES[study][1](seed, chosen, SETTING):
                row = {"study": study, "seed": seed, "arm": arm, **body, **stamp(SETTING)}
                append(path, row)
                rows[key_of(row)] = row
                told = f"{study} {seed} {arm}: {body['accuracy']:.2f} %"
                progress.update(bar, advance=1, last=told)


if __name__ == "__main__":
    sys.exit(main())
