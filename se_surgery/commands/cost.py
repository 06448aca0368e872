"""The command `se-surgery cost`: what a model costs, part by part, before and after an operation.

In: a model by name or folder, and options of `add`. Out: tables (or JSON) on stdout. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..measuring.bench import saved_bytes
from ..measuring.cost import Count, count_costs, on_meta
from ..measuring.cost_text import costs_text
from ..planning.exam import find_se
from . import options as cli
from .app import app, compared, examples, open_model, progress, say


@app.command(
    epilog=examples(
        "se-surgery cost resnet50",
        "se-surgery cost seresnet50",
        "se-surgery cost mobilenetv1_100 --r 8 --stages 3,4 --json",
    )
)
@cli.takes_surgery
def cost(model: cli.Model, size: cli.Size = None, as_json: cli.Json = False, **options: Any) -> None:
    """Count parameters, multiply-adds and activations of every stage, without SEs and with them.

    And, for the whole, what a forward in training saves for the backward pass. A model that has some is counted
    without its own and with them; any other, and one for which options ask for more, before they are put in and
    after.
    """
    patient = open_model(model).model
    with progress("Counting"):
        found = count_costs(patient, size)
        base = on_meta(patient)
        what, more = compared(patient, base, len(find_se(patient, size)), size, options)
        before, after = (found.parts, count_costs(patient, size).parts) if more else (found.base, found.parts)
        saved = [_saved(network, found.image) for network in (base, on_meta(patient))]
    data = {"image": list(found.image), "before": _plain(before), "after": _plain(after), "saved_bytes": saved}
    say(as_json, data, f"{model}, {what}\n\n{costs_text(before, after, found.image)}{_saved_text(*saved)}")


def _saved(network: nn.Module, image: Sequence[int]) -> int | None:
    """Bytes an image that a forward in training saves for the backward pass; None where it trains on more than images.

    Args:
        network: A network on the meta device, which is trained there for a moment.
        image: The shape of an image.
    """
    try:
        return saved_bytes(network.train(), torch.empty(2, *image, device="meta")) // 2
    except Exception:  # whatever the model's own code raises
        return None


def _saved_text(before: int | None, after: int | None) -> str:
    if not before or not after:
        return "\n\nSaved for the backward pass in training: not counted, because it does not train on images alone."
    first, second = (f"{number / 2**20:.2f} MiB" for number in (before, after))
    return f"\n\nSaved for the backward pass in training: {first} before, {second} after ({after / before - 1:+.2%})."


def _plain(costs: Mapping[str, Count]) -> dict[str, dict[str, int]]:
    return {part: asdict(spent) for part, spent in {**costs, "whole": sum(costs.values(), Count())}.items()}
