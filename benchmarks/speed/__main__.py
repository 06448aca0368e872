"""Measure the time and memory of networks with SEs beside the base and beside what others make.

    python -m benchmarks.speed                                      all networks, then docs/benchmarks.md
    python -m benchmarks.speed --models resnet50 --repeats 21       one of them
    python -m benchmarks.speed --compiled --models resnet50         compiled ones; takes minutes
    python -m benchmarks.speed --what saved --models resnet18       memory alone, which takes seconds
    python -m benchmarks.speed --render                             docs/benchmarks.md from the rows there are

Rows go to docs/benchmarks.jsonl, each in the place of the one before it. --size 224 is what `saved` is always for.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from se_surgery.measuring.bench import MODES

from . import document, measure
from .rows import DOCS, Row, add, read

MODELS = ("resnet50", "resnext50_32x4d", "mobilenetv2_100", "densenet121", "convnext_atto", "efficientnet_lite0")
# Whose memory is counted besides.
ALSO_SAVED = ("resnet18", "wide_resnet50_2", "regnetx_032")
WHATS = ("saved", "time", "surgery")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and write the document."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if min(options.repeats, options.size, options.batch, options.threads) < 1 or options.batch < 2:
        parser.error("--repeats, --size and --threads take 1 or more, --batch 2 or more")
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    if not options.render:
        for row in _measured(options, console):
            add(row, options.docs)
    document.write(read(options.docs), options.docs)
    console.print(f"Written: {document.DOCUMENT}, {document.FIGURE}")


def _measured(options: argparse.Namespace, console: Console) -> Iterator[Row]:
    models = options.models.split(",") if options.models else list(MODELS)
    if "saved" in options.what:
        for name in models if options.models else [*models, *ALSO_SAVED]:
            console.print(f"{name}: saved for the backward pass")
            yield measure.saved(name, 224, options.batch)
    if "time" in options.what:
        for name in models:
            for mode in MODES:
                console.print(f"{name}: {mode}{', compiled' if options.compiled else ''}")
                yield measure.times(name, mode, options.size, options.batch, options.repeats, options.compiled)
    if "surgery" in options.what and not options.models:
        console.print("surgery")
        yield measure.surgery(options.repeats)


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed", None, summary, details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_option = parser.add_argument
    add_option("--models", metavar="NAME,...", help=f"timm's names (default: {','.join(MODELS)})")
    add_option("--what", nargs="+", choices=WHATS, default=WHATS, help="what to measure (default: all)")
    add_option("--repeats", type=int, default=15, help="rounds (default: 15)")
    add_option("--size", type=int, default=224, help="side of the images that time is taken with (default: 224)")
    add_option("--batch", type=int, default=4, help="images in a batch (default: 4)")
    add_option("--threads", type=int, default=1, help="threads of torch (default: 1)")
    add_option("--compiled", action="store_true", help="time compiled networks, and not those in eager mode")
    add_option("--docs", type=Path, default=DOCS, help="folder of the rows and the document (default: docs)")
    add_option("--render", action="store_true", help="measure nothing")
    return parser


if __name__ == "__main__":
    main()
