"""The command `se-surgery bench`: what SEs cost a model in time and memory, measured here and now.

In: a model by name or folder, and options of `add`. Out: a table (or JSON) on stdout. Nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import OptionError, ProbeError
from ..measuring.bench import MODES, Spread, action, ratio, saved_bytes, spread, timed
from ..planning.exam import Exam
from ..se.excite import SqueezeExcite
from ..showing.tables import count, table
from ..surgery.graft import copied
from . import options as cli
from .app import app, compared, examples, open_model, progress, say

_WITHOUT, _AGAIN, _WITH, _PLAIN = "without", "without, again", "with", "with, plain form"
_LABELS = {"inference": "inference", "training": "training step"}
_MEBI = 2**20

Batch = Annotated[int, typer.Option("--batch", metavar="N", help="Images in a batch; training takes 2 or more.")]
Rounds = Annotated[int, typer.Option("--rounds", metavar="N", help="How often each one runs.")]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="Threads.", show_default="torch's own")]


@app.command(epilog=examples("se-surgery bench resnet50", "se-surgery bench seresnet50 --threads 1 --json"))
@cli.takes_surgery
def bench(
    model: cli.Model,
    size: cli.Size = None,
    batch: Batch = 4,
    rounds: Rounds = 10,
    threads: Threads = None,
    as_json: cli.Json = False,
    **options: Any,
) -> None:
    """Measure on this machine's processor what SEs cost in time and in memory for the backward pass.

    A model that has some is measured without its own and with them; any other, and one for which options ask for
    more, before they are put in and after. All run in turn in every round, and ratios are taken within a round.
    """
    if batch < 2 or rounds < 1 or (threads is not None and threads < 1):
        raise OptionError("--batch takes 2 or more, --rounds and --threads 1 or more. Take other numbers.")
    if threads is not None and threads > (os.cpu_count() or threads):
        raise OptionError(f"--threads {threads} is more than the {os.cpu_count()} that run at once here. Take fewer.")
    patient = open_model(model).model
    with progress("Looking at the model"):
        networks, images, what = _networks(patient, batch, size, options)
    with progress(f"Measuring in {count(rounds, 'round')}"), _threads(threads) as number:
        data = _measured(networks, images, rounds)
    shape = " x ".join(map(str, images[0].shape[1:]))
    title = f"{model}, {what}; {batch} images of {shape}, {count(number, 'thread')}"
    say(as_json, {"images": batch, "threads": number, **data}, f"{title}\n\n{_text(data, batch)}")


@contextmanager
def _threads(number: int | None) -> Iterator[int]:
    """Run with so many threads; how many these are."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number or before)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _networks(
    patient: nn.Module, batch: int, size: Any, options: Mapping[str, Any]
) -> tuple[dict[str, nn.Module], tuple[Any, ...], str]:
    """The networks by name, the inputs, and what is compared."""
    exam = Exam(patient, size)
    generator = torch.Generator().manual_seed(0)

    def drawn(images: Tensor) -> Tensor:
        return torch.randn(batch, *(size or images.shape[1:]), generator=generator).to(images.dtype)

    inputs = pytree.tree_map_only(Tensor, drawn, exam.seen.args)
    before = copied(patient)
    what, _ = compared(patient, before, len(exam.existing), size, options)
    networks = {_WITHOUT: before, _AGAIN: copied(before), _WITH: patient}
    if any(isinstance(module, SqueezeExcite) for module in patient.modules()):
        networks[_PLAIN] = copied(patient)
        for module in networks[_PLAIN].modules():
            if isinstance(module, SqueezeExcite):
                module.lean = False
    return networks, inputs, what


def _measured(networks: Mapping[str, nn.Module], inputs: tuple[Any, ...], rounds: int) -> dict[str, Any]:
    """Seconds and bytes of each network, and their ratios to those of the one without."""
    data: dict[str, Any] = {}
    try:
        for mode in MODES:
            times = timed({name: action(network, mode, *inputs) for name, network in networks.items()}, rounds)
            data[mode] = {
                name: {"seconds": spread(times[name]).median, "ratio": ratio(times, name, _WITHOUT)._asdict()}
                for name in networks
            }
        saved = {name: saved_bytes(network, *inputs) for name, network in networks.items()}
    except Exception as error:  # whatever the model's own code raises
        raise ProbeError(
            f"It does not run in {mode} on random images ({error}). "
            f"Give another --size; networks that train on more than images cannot be measured here."
        ) from error
    data["saved"] = {name: {"bytes": kept, "ratio": kept / saved[_WITHOUT]} for name, kept in saved.items()}
    return data


def _text(data: Mapping[str, Any], batch: int) -> str:
    rows = []
    names = list(data["saved"])
    for mode, label in _LABELS.items():
        first = f"{1e3 * data[mode][_WITHOUT]['seconds'] / batch:.2f}"
        rows.append([f"{label}, ms", first, *(str(Spread(**data[mode][name]["ratio"])) for name in names[1:])])
    saved = data["saved"]
    kept = [f"{saved[name]['ratio']:.3f}" for name in names[1:]]
    rows.append(["saved for backward, MiB", f"{saved[_WITHOUT]['bytes'] / batch / _MEBI:.2f}", *kept])
    note = 'An image\'s share, and ratios to it: medians and quartiles. What lies within "again" is no difference.'
    return table(["", *(f">{name}" for name in names)], rows) + f"\n\n{note}"
