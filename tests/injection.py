"""Raise an exception at a line, or in a call, while a verb changes a model, and tell what is not as it was before.

    python tests/injection.py [--every N] [PART OF A NAME ...]

A `Case` makes a fresh model and the verb to try on it. `lines_of` lists what the verb runs through, `raise_at` runs it
once more with an exception at one of these lines, and `picture` says what a model and what is around it look like.
As a script it tries every line and every call of all cases, or of those named, and prints a table and what is wrong;
with `--every 3` every third of each case's trials.
Each trial has a process of its own: an exception in the wrong place may leave more than a model behind.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import os
import pickle
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from patients import digest
from timm.models import _registry
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

import se_surgery
from se_surgery import SurgeryError

PACKAGE = str(Path(se_surgery.__file__).parent)
# What raises in turn: what code may catch as an error, what it rarely does, and what it must not.
ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt)


@dataclass(frozen=True)
class Case:
    """A verb on a model.

    Attributes:
        name: What is tried, for the table.
        make: Makes a fresh model, of fresh classes, and the call of the verb on it.
        files: The beginnings of the names of the package's files whose lines are tried.
        calls: Functions whose calls are tried: what has it, its name, and what it is to raise in turn.
    """

    name: str
    make: Callable[[], tuple[Any, Callable[[], Any]]]
    files: tuple[str, ...]
    calls: tuple[tuple[Any, str, tuple[type[BaseException], ...]], ...] = ()


class Place(NamedTuple):
    """A line of a file of the package."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{Path(self.file).relative_to(PACKAGE)}:{self.line}"


class Outcome(NamedTuple):
    """What came of one trial: whether the exception was raised, what differs then, and what became of it."""

    reached: bool
    changed: list[str]
    swallowed: str


# ------------------------------------------------------------------------------------------------ what there is


def picture(model: Any) -> tuple[dict[str, Any], list[Any]]:
    """Everything that makes up a model and what is around it, and the objects that it names by their ids."""
    found: dict[str, Any] = {}
    alive: list[Any] = []
    _look_at("model", model, found, alive, set())
    found["random.torch"] = digest(torch.get_rng_state())
    found["random.python"] = hash(random.getstate())
    found["profiler"] = sys.getprofile()
    found["grad mode"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    for name, hooks in vars(module_hooks).items():
        if name.startswith("_global") and isinstance(hooks, dict):
            found[f"hooks.{name}"] = [(key, id(hook)) for key, hook in hooks.items()]
    for name, table in vars(_registry).items():
        if isinstance(table, (dict, set)) and not name.startswith("__"):
            found[f"timm.{name}"] = len(table), hash(frozenset(map(str, table)))
    return found, alive


def _look_at(path: str, value: Any, found: dict[str, Any], alive: list[Any], seen: set[int]) -> None:
    alive.append(value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        found[path] = (type(value), repr(value))
        return
    found[path] = (type(value), id(value))
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        found[path] += (value.dtype, value.requires_grad, value.data_ptr(), digest(value))
        _look_at(f"{path}.grad", value.grad if value.is_leaf else None, found, alive, seen)
    elif isinstance(value, dict):
        found[path] += (list(map(str, value)),)
        for key, item in value.items():
            _look_at(f"{path}[{key!r}]", item, found, alive, seen)
    elif isinstance(value, (list, tuple)):
        found[path] += (len(value),)
        for number, item in enumerate(value):
            _look_at(f"{path}[{number}]", item, found, alive, seen)
    elif isinstance(value, set):
        found[path] += (sorted(map(str, value)),)
    elif isinstance(value, nn.Module) or type(value).__module__.startswith("se_surgery"):
        # What is patched in a class while it is looked at; the other name is a note of Python's, for copies.
        found[f"{path}.__class__"] = sorted(vars(type(value)).keys() - {"__slotnames__"})
        _look_at(f"{path}.", dict(vars(value)), found, alive, seen)
        # The copy that was just made has another id each time.
        found[f"{path}."] = found[f"{path}."][2:]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs between two pictures."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


# ------------------------------------------------------------------------------------------------ trials


def lines_of(case: Case, act: Callable[[], Any]) -> Counter[Place]:
    """The lines of the case's files that its verb runs through, with how often."""
    found: Counter[Place] = Counter()
    wanted = tuple(f"{PACKAGE}/{name}" for name in case.files)

    def line(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            found[Place(frame.f_code.co_filename, frame.f_lineno)] += 1
        return line

    def enter(frame: Any, event: str, arg: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(wanted) else None

    with _traced(enter):
        act()
    return found


def raise_at(model: Any, act: Callable[[], Any], place: Place, hit: int, kind: type[BaseException]) -> Outcome:
    """Run a verb with an exception at the n-th time that a line is run."""
    error = kind(f"injected at {place}")
    hits = 0

    def line(frame: Any, event: str, arg: Any) -> Any:
        nonlocal hits
        if event == "line" and frame.f_lineno == place.line:
            hits += 1
            if hits == hit:
                _raised_by(frame.f_globals["__name__"])(error)
        return line

    def enter(frame: Any, event: str, arg: Any) -> Any:
        return line if _has(frame.f_code, place) else None

    with _traced(enter):
        outcome = outcome_of(model, act, error)
    return outcome._replace(reached=hits >= hit)


def outcome_of(model: Any, act: Callable[[], Any], error: BaseException) -> Outcome:
    """What a call that is to raise an exception leaves behind, and what becomes of the exception."""
    before, alive = picture(model)
    modes = _modes()
    swallowed = ""
    try:
        act()
        swallowed = "returned"
    except BaseException as found:  # whatever comes out is looked at
        if found is not error and not (isinstance(found, SurgeryError) and error in _causes(found)):
            swallowed = f"{type(found).__name__}: {found}"
        found.__traceback__ = None
    tracer = sys.gettrace()
    sys.settrace(None)
    left = [f"left on: {mode}" for mode in (_modes() - modes).elements()]
    # They would answer for what is asked of the tensors below.
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        changed = differences(before, picture(model)[0])
    del alive
    sys.settrace(tracer)
    # A verb that returns has changed the model as it should.
    return Outcome(True, left if swallowed == "returned" else left + changed, swallowed)


def calls_of(act: Callable[[], Any], owner: Any, name: str) -> int:
    """How often a verb calls a function."""
    with _raising(owner, name, 0, None) as count:
        act()
    return count[0]


def raise_in(model: Any, act: Callable[[], Any], owner: Any, name: str, nth: int, kind: type[BaseException]) -> Outcome:
    """Run a verb with an exception in the n-th call of a function, in the place of what it does."""
    error = kind(f"injected into call {nth} of {owner.__name__}.{name}")
    with _raising(owner, name, nth, error) as count:
        outcome = outcome_of(model, act, error)
    return outcome._replace(reached=count[0] >= nth)


@contextlib.contextmanager
def _raising(owner: Any, name: str, nth: int, error: BaseException | None) -> Iterator[list[int]]:
    own = vars(owner).get(name)
    real = getattr(owner, name)
    count = [0]

    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == nth and error is not None:
            _raised_by(getattr(real, "__module__", None) or "torch")(error)
        return real(*args, **kwargs)

    setattr(owner, name, staticmethod(call) if name == "__new__" else call)
    try:
        yield count
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


_lines_in: dict[CodeType, frozenset[int]] = {}


def _has(code: CodeType, place: Place) -> bool:
    if code.co_filename != place.file:
        return False
    if code not in _lines_in:
        _lines_in[code] = frozenset(line for _, _, line in code.co_lines() if line is not None)
    return place.line in _lines_in[code]


def _raise(error: BaseException) -> None:
    raise error


def _raised_by(module: str) -> Callable[[BaseException], None]:
    """What raises as if the code of that module did: by its last frame the package tells whose an error is."""
    return FunctionType(_raise.__code__, {"__name__": module})


@contextlib.contextmanager
def _traced(enter: Callable[..., Any]) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def _causes(error: BaseException) -> list[BaseException]:
    found = []
    cause = error.__cause__
    while cause is not None:
        found.append(cause)
        cause = cause.__cause__
    return found


def _modes() -> Counter[str]:
    """What is on torch's stacks of modes, each of which answers for every function of torch's while it is on."""
    stacks = (_get_current_dispatch_mode_stack(), _get_current_function_mode_stack())
    return Counter(type(mode).__name__ for stack in stacks for mode in stack)


# ------------------------------------------------------------------------------------------------ all of them


@dataclass
class Row:
    """What came of all trials of a case."""

    name: str
    lines: int = 0
    calls: int = 0
    trials: int = 0
    changed: list[str] = field(default_factory=list)
    swallowed: list[str] = field(default_factory=list)

    def note(self, told: str, outcome: Outcome) -> None:
        if outcome.changed:
            self.changed.append(f"{self.name}: {told}: {', '.join(outcome.changed[:3])}")
        if outcome.swallowed:
            self.swallowed.append(f"{self.name}: {told}: {outcome.swallowed[:200]}")

    def __str__(self) -> str:
        numbers = self.lines, self.calls, self.trials, len(self.changed), len(self.swallowed)
        return f"{self.name:40} {' '.join(f'{number:9}' for number in numbers)}"


def tried(case: Case, every: int = 1) -> Row:
    """Every line at its first and at its last run, and the calls of what is called; the exceptions take turns.

    Args:
        case: The verb.
        every: Of all these trials every so many are made.
    """
    model, act = case.make()
    row = Row(case.name)
    lines = sorted(next(in_child([lambda: lines_of(case, act)])).items())
    places = [(place, hit) for place, count in lines for hit in sorted({1, count})]
    trials: list[tuple[str, Any, Callable[[], Outcome]]] = []
    for (place, hit), kind in zip(places[::every], itertools.cycle(ERRORS)):
        work = functools.partial(raise_at, model, act, place, hit, kind)
        trials.append((f"{place} run {hit} {kind.__name__}", place, work))
    for owner, name, kinds in case.calls:
        numbers = range(1, 1 + next(in_child([functools.partial(calls_of, act, owner, name)])))
        for nth, kind in zip(numbers[::every], itertools.cycle(kinds)):
            work = functools.partial(raise_in, model, act, owner, name, nth, kind)
            trials.append((f"{owner.__name__}.{name} call {nth} {kind.__name__}", (owner.__name__, name, nth), work))
    reached = set()
    for told, place, outcome in _done(trials):
        if outcome.reached:
            reached.add(place)
            row.trials += 1
            row.note(told, outcome)
    row.lines = sum(isinstance(place, Place) for place in reached)
    row.calls = len(reached) - row.lines
    return row


def _done(trials: list[tuple[str, Any, Callable[[], Outcome]]]) -> Iterator[tuple[str, Any, Outcome]]:
    """The outcomes of trials, many in one process, but none behind one that has left something."""
    alone = []
    while trials:
        number = 0
        for outcome in in_child([work for _, _, work in trials], until=lambda one: one.changed or one.swallowed):
            told, place, work = trials[number]
            number += 1
            if outcome.reached:
                yield told, place, outcome
            else:
                # It ran before, and has left its result in a cache.
                alone.append((told, place, work))
        if not number:
            raise RuntimeError(f"the process of {trials[0][0]!r} ended before it had an outcome")
        trials = trials[number:]
    for told, place, work in alone:
        yield told, place, next(in_child([work]))


def in_child(works: list[Callable[[], Any]], until: Callable[[Any], Any] = bool) -> Iterator[Any]:
    """What some work returns in another process, which has all that there is here, up to what ends the process."""
    read, write = os.pipe()
    gc.collect()
    gc.freeze()
    child = os.fork()
    if not child:
        os.close(read)
        with os.fdopen(write, "wb") as pipe:
            for work in works:
                result = work()
                pickle.dump(result, pipe)
                if until(result):
                    break
        os._exit(0)
    os.close(write)
    try:
        with os.fdopen(read, "rb") as pipe, contextlib.suppress(EOFError):
            while True:
                yield pickle.load(pipe)
    finally:
        os.waitpid(child, 0)


def main(arguments: list[str]) -> int:
    """Print the table, then what is wrong."""
    from injection_cases import CASES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="try every so many of a case's lines and calls")
    parser.add_argument("names", nargs="*", help="parts of the names of cases")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    heads = ("lines", "calls", "trials", "changed", "swallowed")
    print(f"{'verb':40} {' '.join(f'{head:>9}' for head in heads)}", flush=True)
    rows = []
    for case in CASES:
        if not asked.names or any(name in case.name for name in asked.names):
            rows.append(tried(case, asked.every))
            print(rows[-1], flush=True)
    whole = Row("all", *(sum(getattr(row, head) for row in rows) for head in heads[:3]))
    whole.changed = [text for row in rows for text in row.changed]
    whole.swallowed = [text for row in rows for text in row.swallowed]
    print(whole)
    print(*(f"changed {text}" for text in whole.changed), sep="\n")
    print(*(f"swallowed {text}" for text in whole.swallowed), sep="\n")
    return 1 if whole.changed or whole.swallowed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
