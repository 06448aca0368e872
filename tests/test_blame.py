"""Whose an error is that comes out while a model is looked at, and that no mode of torch's stays on behind one.

What a model's own code raises is an answer: another input is tried, or a block is left out with the reason. An error of
this library's own is none, and comes out as it is, whatever of the model ran around it.
"""

from __future__ import annotations

import functools

import injection
import pytest
import torch
import toys
from torch import Tensor, nn

from se_surgery import ProbeError, add_se, plan_se
from se_surgery.reading import block, trace, tracer
from se_surgery.reading.blame import handed, is_ours
from se_surgery.reading.draws import Undrawn
from se_surgery.reading.look import look
from se_surgery.reading.numbers import Numbers
from se_surgery.reading.recorder import Recorder
from se_surgery.reading.watch import Watch

SIZE = (3, 16, 16)
# What works while a model runs, is traced, or its graph is replayed: whose it is, and its name.
AT_WORK = {
    "an event is noted": (Recorder, "_note"),
    "a call is noted": (Recorder, "_enter"),
    "the end of a call is noted": (Recorder, "_leave"),
    "a function of torch's is run": (Recorder, "_run"),
    "a child is called": (Recorder, "call"),
    "draws are kept off": (Undrawn, "run"),
    "what is read is noted": (Watch, "_note"),
    "a node is made": (tracer.Tracer, "create_node"),
    "a child is called on a proxy": (tracer.Tracer, "call_module"),
    "an argument is made": (tracer.Tracer, "create_arg"),
    "numbers are watched": (Numbers, "__torch_function__"),
    "what is outside is read": (trace, "add_outer"),
    "calls are matched": (block, "replayed"),
}


class Copies(nn.Module):
    """Calls functions that are no events."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone().clone().clone()


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError, KeyError])
@pytest.mark.parametrize("what", AT_WORK)
def test_an_error_of_our_own_comes_out_as_it_is(monkeypatch, what, error):
    """And nothing is lost without a word: neither a block nor the input that was given."""
    owner, name = AT_WORK[what]
    raised = error("a fault of our own")
    real, calls = getattr(owner, name), []

    def fails(*args, **kwargs):
        calls.append(name)
        if len(calls) == 3:
            injection._raised_by("se_surgery.reading.somewhere")(raised)
        return real(*args, **kwargs)

    model = toys.Trunk(*(toys.Basic(8, 8) for _ in range(2)), toys.FunctionalBlock(8), toys.TwoUnitsBlock(8), Copies())
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(error) as found:
        add_se(model, r=2)
    assert found.value is raised


class Fussy(toys.Trunk):
    """A model that takes one size only, and says so in many ways."""

    def __init__(self, error: Exception) -> None:
        super().__init__(toys.Basic(8, 8))
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 32:
            raise self.error
        return super().forward(x)


class Doubles(nn.Module):
    """A block that cannot be traced, because of what its own code does with a proxy."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.conv1, self.conv2 = toys.conv(8, 8), toys.conv(8, 8)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(torch.relu(self.conv1(x)))
        if y.__class__ is not Tensor:
            raise self.error
        return x + y


THEIRS = [RuntimeError("their own"), TypeError("their own"), AttributeError("their own"), KeyError("their own")]


@pytest.mark.parametrize("error", THEIRS, ids=lambda error: type(error).__name__)
def test_an_error_of_theirs_is_an_answer(error):
    """The size is found that the model takes, and a block that cannot be traced is listed with what it raised."""
    assert look(Fussy(error)).size == (32, 32)
    with pytest.raises(ProbeError, match="their own"):
        look(Fussy(error), SIZE)
    plan = plan_se(toys.Trunk(toys.Basic(8, 8), Doubles(error)), example_input=SIZE)
    assert [site.path for site in plan.sites] == ["blocks.0.se"]
    assert any(skip.unit == "blocks.1" and "their own" in skip.reason for skip in plan.skipped)


def takes_two(x: Tensor, y: Tensor) -> Tensor:
    return x + y


class Calls(toys.Trunk):
    """A model that does something wrong with what torch or another module has."""

    def __init__(self, wrong) -> None:
        super().__init__(toys.Basic(8, 8))
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        self.wrong(self, x)
        return super().forward(x)


# What fails in a frame of this library, or of torch's at work for the model, and is the model's all the same.
WRONG = {
    "shapes": lambda self, x: torch.cat([x, x[:, :1]], 2),
    "a module is given too much": lambda self, x: self.stem(x, x),
    "a random number of no size": lambda self, x: torch.randn(-1),
    "a dropout of no share": lambda self, x: nn.functional.dropout(x, 7.0, True),
    "a method that is not there": lambda self, x: x.no_such_method(),
    "a function is given too little": lambda self, x: takes_two(x),
    "a setting of a shape": lambda self, x: setattr(x, "shape", (1,)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_fails_in_our_frames_may_be_theirs(wrong):
    with pytest.raises(ProbeError, match="does not run on"):
        look(Calls(WRONG[wrong]), SIZE)


def test_a_hook_that_fails_is_theirs():
    """One that is needed, so that the model is looked at with it."""
    model = Calls(lambda self, x: x + self.kept)
    model.register_forward_pre_hook(lambda module, args: [][0])
    with pytest.raises(ProbeError, match="It has forward hooks"):
        look(model, SIZE)


def test_blame_goes_by_who_called_last():
    def caught(function, *args):
        try:
            function(*args)
        except Exception as error:
            return error
        raise AssertionError

    ours = injection._raised_by("se_surgery.reading.somewhere")
    a_network = injection._raised_by("se_surgery.backbones.shufflenet")
    torchs = injection._raised_by("torch.nn.functional")
    error = ValueError("x")
    assert is_ours(caught(ours, error)) and not is_ours(caught(a_network, ValueError("x")))
    assert not is_ours(caught(handed, int, "x")) and not is_ours(caught(handed, torchs, ValueError("x")))
    assert not is_ours(caught(handed, takes_two)) and is_ours(caught(handed, ours, ValueError("x")))


def test_a_fault_while_a_larger_image_is_looked_at_is_no_answer(monkeypatch):
    """What is told on a map of one position is told again on a larger one, which the model may not take."""
    model, note = toys.Trunk(toys.Basic(8, 8)), Recorder._note
    assert look(model, (3, 1, 1)).size == (2, 2)

    def fails(recorder, kind, args, kwargs, result):
        if result.shape[-1] == 2:
            injection._raised_by("se_surgery.reading.recorder")(RuntimeError("a fault of our own"))
        note(recorder, kind, args, kwargs, result)

    monkeypatch.setattr(Recorder, "_note", fails)
    with pytest.raises(RuntimeError, match="a fault of our own"):
        look(model, (3, 1, 1))


@pytest.mark.parametrize("verb", ["look", "trace", "check"])
def test_no_mode_stays_on_behind_an_interrupt(verb):
    """At every line of a `with` that switches one on, when it begins and when it is over."""
    files = {
        "look": ("reading/look.py",),
        "trace": ("reading/trace.py", "reading/tracer.py"),
        "check": ("checking/check.py",),
    }[verb]
    act = functools.partial(add_se, toys.Trunk(toys.Basic(8, 8), toys.FunctionalBlock(8)), r=2, example_input=SIZE)
    tried = 0
    act(inplace=False)
    lines = injection.lines_of(injection.Case("", None, files), functools.partial(act, inplace=False))
    for place, count in sorted(lines.items()):
        outcome = injection.raise_at(act.args[0], act, place, count, KeyboardInterrupt)
        assert outcome == (True, [], ""), place
        tried += 1
    assert tried > 20
