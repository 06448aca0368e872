"""Try surgery on every name of timm and torchvision, and write down what came of it.

    python -m benchmarks.coverage                                  what is missing: plans of all names, runs of some
    python -m benchmarks.coverage --names 'resnet*' --kinds run    one family's runs
    python -m benchmarks.coverage --kinds thorough --jobs 1        compilers and exporters; takes long
    python -m benchmarks.coverage --representatives all            runs of every target; takes a night
    python -m benchmarks.coverage --render                         docs/coverage.md and README.md from the rows

A row that was made with the same sources and versions is not made again, so that a run that was interrupted (Ctrl-C)
goes on where it was. It exits with 1 where a row of those chosen is a failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from se_surgery.planning.placements import PLACEMENTS

from . import render
from .pool import Pool, Task
from .rows import KINDS, ROWS, Key, Row, append, is_current, key_of, read, write
from .tasks import REPRESENTATIVES, Choice, dropped, failure, plan_tasks, row_of, value_tasks, work


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.render:
        rows = read(options.rows)
        if not rows:
            parser.error(f"--render: there are no rows in {options.rows}")
        render.write(rows.values())
        return 0
    if options.jobs < 0 or options.timeout <= 0 or options.memory_limit <= 0:
        parser.error("--jobs takes 0 or more, --timeout and --memory-limit more than 0")
    choice = Choice(
        kinds=_listed(parser, "--kinds", options.kinds, KINDS),
        names=options.names,
        family=options.family,
        placements=_listed(parser, "--placements", options.placements, tuple(PLACEMENTS)),
        representatives=options.representatives,
    )
    if not choice.entries():
        parser.error(f"no name is chosen by --names {options.names!r} --family {options.family!r}")
    rows = read(options.rows)
    if options.fresh:
        rows = dropped(choice, rows)
    write(options.rows, rows.values())
    is_done = (lambda row: True) if options.keep_other_digests else is_current
    pool_options = {"jobs": options.jobs, "timeout": options.timeout, "memory": options.memory_limit}
    console = Console(stderr=True)
    try:
        made = _tried(console, rows, options.rows, plan_tasks(choice, rows, is_done), **pool_options)
        made += _tried(console, rows, options.rows, value_tasks(choice, rows, is_done), **pool_options)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on from here.")
        return 130
    write(options.rows, rows.values())
    if options.write:
        render.write(rows.values())
    failed = sum(bool(failure(row)) for row in made)
    console.print(f"{len(made)} rows made, {failed} of them failures; {len(rows)} in {options.rows}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.coverage", None, summary, details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kinds", default="plan,run", help="of plan, run and thorough (default: plan,run)")
    add("--names", default="*", metavar="GLOB", help="names; torchvision's begin with torchvision/")
    add("--family", default="*", metavar="GLOB", help="modules that define models: resnet, torchvision/resnet, ...")
    add("--placements", default=",".join(PLACEMENTS), help="of the runs (default: all six)")
    add("--representatives", choices=REPRESENTATIVES, default="classes", help="whose runs (default: classes)")
    add("--jobs", type=int, default=2, help="processes (default: 2); 0 runs everything in this one")
    add("--timeout", type=float, default=900.0, help="seconds for one row (default: 900)")
    add("--memory-limit", type=float, default=8.0, metavar="GB", help="for all processes together (default: 8)")
    add("--rows", type=Path, default=ROWS, help="the file of rows (default: docs/coverage.jsonl)")
    add("--fresh", action="store_true", help="make the chosen rows anew")
    add("--keep-other-digests", action="store_true", help="leave rows of other sources and versions as they are")
    add("--write", action="store_true", help="write docs/coverage.md and README.md, too")
    add("--render", action="store_true", help="write those two from the rows there are, and do nothing else")
    return parser


def _listed(parser: argparse.ArgumentParser, option: str, value: str, known: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(value.split(","))
    strange = [one for one in chosen if one not in known]
    if strange:
        parser.error(f"{option} {strange[0]!r}: take some of {','.join(known)}")
    return chosen


def _tried(console: Console, rows: dict[Key, Row], path: Path, tasks: Sequence[Task], **pool_options: Any) -> list[Row]:
    """Do tasks, add their rows to the file and to `rows` as they come, and show how it goes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} {task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[running]}"),
    )
    made: list[Row] = []
    failed = 0
    with Progress(*columns, console=console) as progress, Pool(work, **pool_options) as pool:
        bar = progress.add_task("rows", total=sum(len(t.parts) for t in tasks), rate="", failed=0, running="")
        for answer in pool.answers(tasks):
            if answer is not None:
                row = row_of(answer)
                append(path, row)
                rows[key_of(row)] = row
                made.append(row)
                fault = failure(row)
                failed += bool(fault)
                if fault:
                    what = " ".join(filter(None, key_of(row)))
                    console.print(f"{what}: {fault[:300]}", markup=False, highlight=False, soft_wrap=True)
            speed = progress.tasks[bar].finished_speed or progress.tasks[bar].speed
            rate = f"{60 * speed:.0f}/min" if speed else ""
            progress.update(bar, completed=len(made), failed=failed, rate=rate, running=", ".join(pool.running))
    return made


if __name__ == "__main__":
    sys.exit(main())
