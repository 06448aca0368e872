"""Gated: ways into a model in which its modules call each other, with all gates forced to one.

In: a way to go, and a `Pair`. Out: an `Outcome`: whether the operated model did what its base did, bit for bit, and
called every SE as often as its block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..reading.layout import is_under
from .compare import (
    Outcome,
    blocked,
    counted,
    deviation,
    force_gates,
    is_telling,
    miscalled,
    no_way,
    outputs_of,
    same_tensors,
)
from .pair import Pair, twin

Judge = Callable[[Pair], Outcome]
# A way into a model other than calling it: a function of a twin, which it may change, and the inputs.
Go = Callable[..., Any]


class _Trip(NamedTuple):
    """What one model did on one way: its outputs, how often each module ran, and the buffers it left."""

    outputs: list[Tensor]
    ran: Counter[str]
    buffers: dict[str, Tensor]


def gated(go: Go | None = None, training: bool = False, gradients: bool = False) -> Judge:
    """The judge of a way in which modules call each other: with all gates at one everything is as in the base.

    Args:
        go: Goes the way; by default the forward.
        training: The mode.
        gradients: Whether outputs can be differentiated.
    """

    def trip(model: nn.Module, pair: Pair, sites: tuple[str, ...]) -> _Trip:
        model = force_gates(twin(model).train(training), sites)
        ran, buffers = counted(model), dict(model.named_buffers())
        return _Trip(outputs_of(model, pair.inputs, go, gradients), ran, buffers)

    def judge(pair: Pair) -> Outcome:
        # Any error at all says that the base cannot go this way: which it is, is up to the model.
        try:
            expected = trip(pair.base, pair, ())
        except Exception as error:
            return no_way(error)
        try:
            return _judged(trip(pair.operated, pair, pair.sites), expected, pair.sites)
        except Exception as error:
            return blocked(error)

    return judge


def _judged(trip: _Trip, expected: _Trip, sites: tuple[str, ...]) -> Outcome:
    due = calls_due(sites, expected.ran)
    wrong = miscalled(trip.ran, due)
    if wrong is not None:
        return wrong
    if not same_tensors(trip.outputs, expected.outputs):
        return Outcome(False, f"with gates at one the outputs {_off(trip.outputs, expected.outputs)}")
    changed = [name for name, buffer in expected.buffers.items() if not same_tensors([trip.buffers[name]], [buffer])]
    if changed:
        return Outcome(False, f"with gates at one {changed[0]} is left with other values than in the base")
    if not is_telling(expected.outputs):
        return Outcome(None, "the base's outputs are all one value, or none, so that comparing them shows nothing")
    return Outcome(True, f"with gates at one bit-equal to the base; {often(due)}")


def calls_due(sites: Iterable[str], ran: Counter[str]) -> dict[str, int]:
    """How often each SE has to run: as often as its block did in the base, or once where only parts of the block did.

    A way that ends before a block, as a feature extractor's may, goes without its SE as well. In a siamese network a
    block runs once for each input.
    """
    hosts = {site: site.rpartition(".")[0] for site in sites}
    return {site: ran[host] or int(any(is_under(path, host) for path in ran)) for site, host in hosts.items()}


def often(due: dict[str, int]) -> str:
    """How many SEs a way calls, and how often, in words."""
    reached = sum(map(bool, due.values()))
    times = "each once" if set(due.values()) <= {0, 1} else "each as often as its block"
    return f"{len(due)} SEs, {times}" if reached == len(due) else f"{reached} of {len(due)} SEs are on it, {times}"


def _off(outputs: list[Tensor], expected: list[Tensor]) -> str:
    off = deviation(outputs, expected)
    return "have other shapes than the base's" if off == float("inf") else f"differ from the base's by {off:.1e}"


def method(name: str) -> Go:
    """Goes into a model by a method of its own."""
    return lambda model, *inputs: getattr(model, name)(*inputs)


def head(model: nn.Module, *inputs: Any) -> Any:
    """Goes through `forward_features` and `forward_head`, timm's two halves of a forward."""
    return model.forward_head(model.forward_features(*inputs))  # type: ignore[operator]


def wrapped(wrap: Callable[[nn.Module, tuple[int, ...]], nn.Module]) -> Go:
    """Goes into a model through one of timm's feature extractors, for all the features the model has."""
    return lambda model, *inputs: wrap(model, tuple(range(len(model.feature_info)))).eval()(*inputs)


def flattened(wrapper: Callable[..., nn.Module]) -> Go:
    """As `wrapped` does, with the model's Sequentials flattened where its features are entries of one."""

    def wrap(model: nn.Module, out_indices: tuple[int, ...]) -> nn.Module:
        try:
            return wrapper(model, out_indices)
        except AssertionError:
            return wrapper(model, out_indices, flatten_sequential=True)

    return wrapped(wrap)
