"""Measure: rows of what networks save for the backward pass, of their time, and of the time of surgery.

In: names of bases. Out: rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import nn

from se_surgery.measuring.bench import action, saved_bytes, timed

from .. import surgery_time
from .peers import COMPILED, PEERS
from .rows import Row, machine

# Memory that is the base's by construction is not counted for these.
_SAME = ("base again", "stripped", "folded")


def saved(name: str, side: int, batch: int) -> Row:
    """What each peer's forward in training saves for the backward pass, in bytes.

    On the meta device, where the number is the same: nothing is computed.
    """
    found: dict[str, int] = {}
    for peer, make in PEERS.items():
        model = None if peer in _SAME else make(name)
        if model is not None:
            images = torch.empty(batch, 3, side, side, device="meta")
            found[peer] = saved_bytes(model.to("meta").train(), images)
    return {"kind": "saved", "model": name, "side": side, "batch": batch, "bytes": found, "machine": machine()}


def times(name: str, mode: str, side: int, batch: int, rounds: int, compiled: bool) -> Row:
    """The seconds of every round of every peer, interleaved.

    With one thread it is the time that the processor worked for this process, and else that of the clock on the wall.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=generator)
    networks = dict(_networks(name, images, compiled))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = timed({peer: action(network, mode, images) for peer, network in networks.items()}, rounds, clock)
    return {
        "kind": "compiled" if compiled else "time",
        "model": name,
        "mode": mode,
        "side": side,
        "batch": batch,
        "clock": clock.__name__,
        "seconds": {peer: [round(second, 5) for second in listed] for peer, listed in seconds.items()},
        "machine": machine(),
    }


def _networks(name: str, images: torch.Tensor, compiled: bool) -> Iterable[tuple[str, nn.Module]]:
    for peer, make in (COMPILED if compiled else PEERS).items():
        network = make(name, images)
        if network is not None:
            yield peer, network


def surgery(rounds: int) -> Row:
    """The seconds of every round of construction and of surgery on ResNets of every depth."""
    surgery_time.one_round()
    listed = [surgery_time.one_round() for _ in range(rounds)]
    seconds = {what: [round(one[what], 5) for one in listed] for what in listed[0]}
    return {"kind": "surgery", "model": "resnet", "seconds": seconds, "machine": machine()}
