"""Hold the library against networks of others, and write down what came of it.

    python -m benchmarks.others                         what is missing, of the packages that are installed
    python -m benchmarks.others --names 'monai3d/*'     one package's
    python -m benchmarks.others --write                 docs/coverage.md, too

A row that was made with the same sources and versions is not made again, so that a run that was interrupted (Ctrl-C)
goes on where it was. It exits with 1 where a row that was made is a failure.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

from ..coverage import render as document
from ..coverage import rows as coverage_rows
from ..coverage.pool import Pool, Task
from ..coverage.running import PASS
from . import zoo
from .rows import ROWS, Row, append, is_current, read, write
from .trying import row_of, work


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.jobs < 0 or options.timeout <= 0:
        parser.error("--jobs takes 0 or more, --timeout more than 0")
    chosen = [network for name, network in zoo.networks().items() if fnmatch.fnmatchcase(name, options.names)]
    if not chosen:
        parser.error(f"no network is chosen by --names {options.names!r}")
    rows = read(options.rows)
    installed = [network for network in chosen if network.version is not None]
    for package in sorted({network.package for network in chosen if network.version is None}):
        print(f"{package} is not installed: its networks are left out", file=sys.stderr)
    missing = [network for network in installed if options.fresh or not _has(rows, network)]
    try:
        made = _tried(missing, options)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    write(options.rows, {**rows, **made}.values())
    if options.write:
        document.write(coverage_rows.read(coverage_rows.ROWS).values())
    failed = sum(row["status"] != PASS for row in made.values())
    print(f"{len(made)} rows made, {failed} of them failures", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.others", None, summary, details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--names", default="*", metavar="GLOB", help="networks, as smp/Unet*")
    add("--jobs", type=int, default=1, help="processes (default: 1); 0 runs everything in this one")
    add("--timeout", type=float, default=900.0, help="seconds for one network (default: 900)")
    add("--rows", type=Path, default=ROWS, help="the file of rows (default: docs/others.jsonl)")
    add("--fresh", action="store_true", help="make the chosen rows anew")
    add("--write", action="store_true", help="write docs/coverage.md, too")
    return parser


def _has(rows: dict[str, Row], network: zoo.Network) -> bool:
    return network.name in rows and is_current(rows[network.name], network)


def _tried(networks: Sequence[zoo.Network], options: argparse.Namespace) -> dict[str, Row]:
    """Try networks, and add their rows to the file as they come."""
    made: dict[str, Row] = {}
    tasks = [Task("other", network.name, ("",)) for network in networks]
    with Pool(work, jobs=options.jobs, timeout=options.timeout) as pool:
        for answer in pool.answers(tasks):
            if answer is None:
                continue
            row = row_of(answer)
            append(options.rows, row)
            made[row["name"]] = row
            print(f"{len(made)} of {len(tasks)} {row['name']}: {row['status'][:300]}", flush=True)
    return made


if __name__ == "__main__":
    sys.exit(main())
