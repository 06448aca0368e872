"""All or nothing: an exception anywhere in a verb that changes a model leaves it as it was, and comes out.

    python -m pytest -m sweep tests/test_injection.py -s     lines and calls of every verb, evenly, and the table
    python tests/injection.py [--every 4]                    every one of them, or every fourth
    python -m pytest tests/test_injection.py                 a few dozen of them

What changes something, and which journal has it:

| what is changed | where | the journal of |
| --- | --- | --- |
| children, class, attributes, records | `surgery.edits` | `add_se`, `strip_se`, `apply_recipe`, `tradeoff` |
| a native SE that was kept aside: dtype, device, mode | `surgery.edits.like` | `strip_se`, `apply_recipe`, `add_se` |
| random numbers that are drawn for new SEs | `surgery.graft._built` | `add_se`, `apply_recipe` |
| values of the layers that take a mean gate | `surgery.strip._scale` | `strip_se`, `tradeoff` |
| widths and timm's notes of them | `pruning.widths` | `apply_recipe`, `record_pruning` |
| SEs that are replaced by narrower ones | `pruning.prune._put` | `prune_se` |
| all, by torch-pruning and the user | the block of `record_pruning` | `record_pruning` |
| modes, hooks and forwards while gates are measured | `gates` | `strip_se`, `tradeoff` |
| flags of parameters while importance is measured | `pruning.prune._gradients` | `prune_se` |
| values | `files.values` | `load_se` |
| flags of parameters, modes, `train` | `training.freezing` | `freeze_base`, `unfreeze_base` |

`timm.create_model`, `from_pretrained`, `verify` and what measures or shows change models of their own only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import injection
import pytest
import torch
from injection import ERRORS, Place
from injection_cases import CASES, SIZE, held, operate, plain
from torch import nn

from se_surgery import PatientError, SurgeryError, add_se, freeze_base, load_se, strip_se
from se_surgery.surgery.journal import Journal, guarded

NAMED = {case.name: case for case in CASES}
# Verbs that are quick, each with every so many of its lines.
QUICK = {"add_se lean=False": 20, "strip_se origin=se_surgery": 14, "load_se": 16, "freeze_base": 6, "unfreeze_base": 4}


@pytest.mark.sweep
def test_lines_of_every_verb():
    """The table is printed; 0 changed, 0 swallowed."""
    script = Path(injection.__file__)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])}
    told = subprocess.run([sys.executable, str(script), "--every", "16"], env=env, capture_output=True, text=True)
    print("\n" + told.stdout)
    assert told.returncode == 0, told.stdout + told.stderr[-2000:]
    (whole,) = [line.split() for line in told.stdout.splitlines() if line.startswith("all ")]
    assert int(whole[3]) >= 1400 and whole[4:] == ["0", "0"]


@pytest.mark.parametrize("name", QUICK)
def test_some_lines(name):
    """Of the changing side: the line raises, the model is as before, and what comes out is what was raised."""
    case = NAMED[name]
    # What is kept from one run to the next is not run again.
    case.make()[1]()
    lines = sorted(injection.lines_of(case, case.make()[1]).items())
    lines = [(place, count) for place, count in lines if str(place).startswith(("surgery/", "training/", "files/"))]
    chosen = lines[:: QUICK[name]]
    assert len(chosen) >= 5
    for number, (place, count) in enumerate(chosen):
        outcome = injection.raise_at(*case.make(), place, count, ERRORS[number % len(ERRORS)])
        assert outcome.reached, place
        assert (outcome.changed, outcome.swallowed) == ([], ""), place


def test_a_change_is_seen():
    """The picture shows what a verb without an error does, and that it does: the trials can fail."""
    model = plain()
    before, alive = injection.picture(model)
    assert injection.differences(before, injection.picture(model)[0]) == []
    freeze_base(operate(model))
    assert injection.differences(before, injection.picture(model)[0])
    del alive


def write_half(journal: Journal, model: nn.Module) -> None:
    """Change something of every kind, then fail."""
    journal.open_all(model)
    journal.draw()
    torch.rand(3)
    journal.flag(model.head.bias).requires_grad_(False)
    journal.write(model.head.weight, torch.full_like(model.head.weight, float("nan")))
    journal.move(model.blocks).to(torch.float64)
    model.blocks.add_module("other", nn.Identity())
    model.blocks[0].__class__ = nn.Identity
    model.register_forward_hook(print)
    model.train(False)
    del model.num_features
    raise KeyError("half-way")


def test_every_kind_of_change_is_put_back():
    model = plain()
    before, alive = injection.picture(model)
    with pytest.raises(KeyError, match="half-way"):
        guarded(write_half, model)
    assert injection.differences(before, injection.picture(model)[0]) == []
    del alive


def test_an_interrupt_of_the_undoing_itself():
    """At every line of the journal's own, once more: all is put back first, and the interrupt comes out."""
    file = f"{injection.PACKAGE}/surgery/journal.py"
    undo = Journal.undo
    lines = set()

    def listing(frame, event, arg):
        if frame.f_code.co_filename != file:
            return None
        lines.update([Place(file, frame.f_lineno)] if event == "line" else [])
        return listing

    def begin(tracer):
        def traced(journal):
            sys.settrace(tracer)
            try:
                undo(journal)
            finally:
                sys.settrace(None)

        return traced

    def attempt(tracer):
        model = plain()
        before, alive = injection.picture(model)
        Journal.undo = begin(tracer)
        try:
            guarded(write_half, model)
        except (KeyError, KeyboardInterrupt) as error:
            return error, injection.differences(before, injection.picture(model)[0]), alive
        finally:
            Journal.undo = undo

    assert isinstance(attempt(listing)[0], KeyError)
    assert len(lines) > 30
    for place in sorted(lines):
        raised = []

        def once(frame, event, arg, place=place, raised=raised):
            if frame.f_code.co_filename != file:
                return None
            if event == "line" and frame.f_lineno == place.line and not raised:
                raised.append(place)
                raise KeyboardInterrupt
            return once

        error, changed, _ = attempt(once)
        assert raised and isinstance(error, KeyboardInterrupt), place
        assert changed == [], place


def test_what_cannot_be_put_back_is_said():
    """And does not keep the rest from it."""
    model = plain()

    def spoil(journal, model):
        journal.open(model)
        journal.write(model.head.weight, torch.zeros_like(model.head.weight))
        model.other = 1
        model.head.weight.data = torch.zeros(1).expand(10, 8)
        raise KeyError

    with pytest.raises(PatientError, match="could not be put back"):
        guarded(spoil, model)
    assert not hasattr(model, "other")


def test_a_native_se_kept_aside_is_not_converted_by_a_failure(monkeypatch):
    """It goes along to float64 and evaluation when it is put back; where that fails, it stays as it was kept."""
    model = operate(held(), existing="replace").double().eval()
    before, alive = injection.picture(model)
    monkeypatch.setattr("se_surgery.surgery.strip._record", fail)
    with pytest.raises(RuntimeError, match="injected"):
        strip_se(model, origin="se_surgery", example_input=SIZE)
    assert injection.differences(before, injection.picture(model)[0]) == []
    monkeypatch.undo()
    strip_se(model, origin="se_surgery", example_input=SIZE)
    assert model.blocks[0].attention.fc1.weight.dtype == torch.float64 and not model.blocks[0].attention.training
    del alive


def fail(*args, **kwargs):
    raise RuntimeError("injected")


@pytest.mark.parametrize("inplace", [True, False])
def test_random_numbers_are_rewound_only_where_some_were_drawn_for_nothing(monkeypatch, inplace):
    state = torch.get_rng_state()
    monkeypatch.setattr("se_surgery.surgery.graft.append_operation", fail)
    with pytest.raises(RuntimeError, match="injected"):
        operate(plain(), init="paper", inplace=inplace)
    model = plain()
    torch.set_rng_state(state)
    with pytest.raises(RuntimeError, match="injected"):
        operate(model, init="paper", inplace=inplace)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.undo()
    operate(model, init="paper", inplace=inplace)
    assert not torch.equal(torch.get_rng_state(), state)


def test_numbers_that_another_draws_while_nothing_was_drawn_here_stay_drawn(monkeypatch):
    """A verb that fails before it draws does not rewind what a user's own code has drawn meanwhile."""
    model = plain()
    state = torch.get_rng_state()

    def draw_and_fail(*args, **kwargs):
        torch.rand(1)
        raise RuntimeError("injected")

    monkeypatch.setattr("se_surgery.surgery.graft._keys", draw_and_fail)
    with pytest.raises(RuntimeError, match="injected"):
        operate(model)
    assert not torch.equal(torch.get_rng_state(), state)


def test_values_keep_their_parameters_and_their_memory():
    """A load that works writes in place, so that optimizers go on with the same parameters."""
    model = operate(plain(), init="paper", bias=True)
    theirs = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    pointers = {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.named_parameters()}
    load_se(model, theirs)
    assert {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.named_parameters()} == pointers
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_a_real_interrupt(monkeypatch):
    """As Ctrl-C does it, in the middle of a load: none of its values are there."""
    model = operate(plain(), init="paper", bias=True)
    theirs = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    before, alive = injection.picture(model)
    write, written = Journal.write, []

    def interrupted(journal, tensor, value):
        write(journal, tensor, value)
        written.append(tensor)
        if len(written) == 10:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Journal, "write", interrupted)
    # A process that was started in the background ignores the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            load_se(model, theirs)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(written) == 10
    assert injection.differences(before, injection.picture(model)[0]) == []
    del alive


def test_lean_is_a_part_of_what_is_undone(monkeypatch):
    model = plain()
    add_se(model, lean=False, example_input=SIZE)
    assert [vars(m)["lean"] for m in model.modules() if "lean" in vars(m)] == [False]
    other = plain()
    before, alive = injection.picture(other)
    monkeypatch.setattr("se_surgery.surgery.graft._check_keys", fail)
    with pytest.raises((RuntimeError, SurgeryError), match="injected"):
        add_se(other, lean=False, example_input=SIZE)
    assert injection.differences(before, injection.picture(other)[0]) == []
    del alive
