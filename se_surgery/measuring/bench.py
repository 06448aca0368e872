"""Bench: what networks take, side by side: the time of a forward or a training step, and what is saved for backward.

In: networks by name, and inputs. Out: seconds of every round, ratios, bytes. All networks run in turn in every round,
each round in another order, and a ratio is taken within a round: a slow moment of the machine meets all alike.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

MODES = ("inference", "training")
Times = Mapping[str, Sequence[float]]


class Spread(NamedTuple):
    """A number that was measured several times: its median, and the quarter and three quarters of the values."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def saved_bytes(model: nn.Module, *inputs: Any) -> int:
    """Bytes that one forward saves for the backward pass, besides the model's own parameters and buffers.

    Every storage counts once and whole. On the meta device it is the same number, and nothing is computed.

    Args:
        model: The model, in the mode and on the device that it is in; its running statistics are updated.
        inputs: The arguments of its forward.
    """
    own = {_identity(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _identity(tensor) not in own:
            # Kept alive, too, so that no other storage comes to the same place.
            saved[_identity(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    return sum(storage.nbytes() for storage in saved.values())


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def action(model: nn.Module, mode: str, *inputs: Any) -> Callable[[], None]:
    """What is timed: a forward in evaluation without gradients, or one in training with its backward pass.

    The mode is set here, once: models are not to be shared between actions of different modes.
    """
    model.train(mode == "training")

    @torch.no_grad()
    def infer() -> None:
        model(*inputs)

    def step() -> None:
        outputs = [leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
        model.zero_grad(set_to_none=True)

    return step if mode == "training" else infer


def timed(
    actions: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """The time of each action in every round, after one round to warm up.

    Args:
        actions: What is timed, by name.
        rounds: How often.
        clock: What time it is, in seconds. `time.process_time` leaves out what other processes take, and is the
            same as the time by the wall only with one thread on a machine that has nothing else to do.
    """
    names, order = list(actions), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _without_collector() as collect:
        for number in range(rounds + 1):
            collect()
            for name in order.sample(names, len(names)):
                start = clock()
                actions[name]()
                took = clock() - start
                if number:
                    times[name].append(took)
    return times


@contextmanager
def _without_collector() -> Iterator[Callable[[], Any]]:
    """Run without the garbage collector; what collects what has come since, and looks at nothing else."""
    collecting, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        yield gc.collect
    finally:
        if not frozen:
            gc.unfreeze()
        if collecting:
            gc.enable()


def ratio(times: Times, name: str, to: str) -> Spread:
    """What one action takes of another's time, round by round."""
    return spread([one / other for one, other in zip(times[name], times[to], strict=True)])


def spread(values: Sequence[float]) -> Spread:
    """The median and the quartiles of some numbers; of fewer than two, that number three times."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return Spread(middle, low, high)
