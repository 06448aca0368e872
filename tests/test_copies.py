"""A copy shares nothing with its original that a forward could write to."""

from __future__ import annotations

import copy
import functools
import random
import types
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
import torch
from patients import build, images, randomise
from torch import Tensor, nn

from se_surgery.reading.copies import Copier, copied_on

Pair = namedtuple("Pair", "module notes")


class Keeper:
    """A small object of a user's own."""

    def __init__(self, module: Any = None) -> None:
        self.module = module
        self.notes: list[Any] = []

    def note(self, value: Any) -> None:
        self.notes.append(value)


class Slotted:
    __slots__ = ("__notes", "module")

    def __init__(self, module: Any) -> None:
        self.module = module
        self.__notes: list[Any] = []

    @property
    def notes(self) -> list[Any]:
        return self.__notes


class Owner(nn.Module):
    """A module with one child, and in `held` something that leads to that child or to a container."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.notes: list[Any] = []
        self.held: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def note(self, value: Any) -> None:
        self.notes.append(value)


def counter(module: nn.Module) -> Any:
    notes: list[Any] = []

    def count(value: Any) -> None:
        notes.append(module)

    return count, notes


def notes_in(function: Any) -> list[Any]:
    (notes,) = (c.cell_contents for c in function.__closure__ if isinstance(c.cell_contents, list))
    return notes


# What holds the child, and how to get it out again.
LEADS_TO_THE_CHILD = {
    "attribute": (lambda m: m.conv, lambda held: held),
    "list": (lambda m: [1, m.conv], lambda held: held[1]),
    "tuple": (lambda m: (1, (m.conv,)), lambda held: held[1][0]),
    "named tuple": (lambda m: Pair(m.conv, []), lambda held: held.module),
    "dict": (lambda m: {"a": {"b": m.conv}}, lambda held: held["a"]["b"]),
    "key of a dict": (lambda m: {m.conv: 1}, lambda held: next(iter(held))),
    "set": (lambda m: {m.conv}, lambda held: next(iter(held))),
    "ordered": (lambda m: OrderedDict(a=m.conv), lambda held: held["a"]),
    "defaultdict": (lambda m: defaultdict(list, a=[m.conv]), lambda held: held["a"][0]),
    "deque": (lambda m: deque([m.conv], maxlen=3), lambda held: held[0]),
    "bound method": (lambda m: m.conv.forward, lambda held: held.__self__),
    "partial": (lambda m: functools.partial(print, m.conv, end=m.conv), lambda held: held.keywords["end"]),
    "closure": (lambda m: (lambda c: lambda x: c(x))(m.conv), lambda held: held.__closure__[0].cell_contents),
    "default": (lambda m: lambda x, c=m.conv: c(x), lambda held: held.__defaults__[0]),
    "keyword default": (lambda m: lambda x, *, c=m.conv: c(x), lambda held: held.__kwdefaults__["c"]),
    "weak reference": (lambda m: weakref.ref(m.conv), lambda held: held()),
    "weak proxy": (lambda m: weakref.proxy(m.conv), lambda held: held.__repr__.__self__),
    "object": (lambda m: Keeper(m.conv), lambda held: held.module),
    "object with slots": (lambda m: Slotted(m.conv), lambda held: held.module),
    "namespace": (lambda m: types.SimpleNamespace(c=m.conv), lambda held: held.c),
}


@pytest.mark.parametrize("device", ["meta", None])
@pytest.mark.parametrize("case", LEADS_TO_THE_CHILD.values(), ids=LEADS_TO_THE_CHILD)
def test_what_leads_to_a_child_leads_to_its_copy(case, device):
    make, child = case
    model = nn.Sequential(Owner())
    model[0].held = None
    object.__setattr__(model[0], "held", make(model[0]))
    other = copied_on(model, device)
    assert child(other[0].held) is other[0].conv is not model[0].conv
    assert child(model[0].held) is model[0].conv
    assert type(other[0].held) is type(model[0].held)


# What a forward could write to, and how to read what is in it.
MAY_BE_WRITTEN_TO = {
    "list": (lambda m: [1], lambda held: held.append(2), lambda held: held),
    "list in a tuple": (lambda m: ([1],), lambda held: held[0].append(2), lambda held: held[0]),
    "dict": (lambda m: {}, lambda held: held.update(a=2), dict),
    "set": (lambda m: {1}, lambda held: held.add(2), set),
    "defaultdict": (lambda m: defaultdict(list), lambda held: held["a"].append(2), dict),
    "deque": (lambda m: deque([1], maxlen=1), lambda held: held.append(2), list),
    "method of a list": (lambda m: m.notes.append, lambda held: held(2), lambda held: held.__self__),
    "method of a dict": (lambda m: {}.__setitem__, lambda held: held(1, 2), lambda held: held.__self__),
    "method of a module": (lambda m: m.note, lambda held: held(2), lambda held: held.__self__.notes),
    "object": (lambda m: Keeper(), lambda held: held.note(2), lambda held: held.notes),
    "object with slots": (lambda m: Slotted(m), lambda held: held.notes.append(2), lambda held: held.notes),
    "closure": (lambda m: counter(m)[0], lambda held: held(2), notes_in),
    "default": (lambda m: lambda x, seen=[]: seen.append(x), lambda held: held(2), lambda held: held.__defaults__[0]),
    "numbers": (lambda m: random.Random(3), lambda held: held.random(), lambda held: held.getstate()),
    "generator": (
        lambda m: torch.Generator(),
        lambda held: torch.rand(2, generator=held),
        lambda held: held.get_state().tolist(),
    ),
    "tensor": (lambda m: torch.ones(3), lambda held: held.add_(1), lambda held: held.tolist()),
}


@pytest.mark.parametrize("case", MAY_BE_WRITTEN_TO.values(), ids=MAY_BE_WRITTEN_TO)
def test_what_a_forward_writes_to_is_the_copys_own(case):
    make, write, read = case
    model = Owner()
    model.held = make(model)
    before, other = copy.copy(read(model.held)), copied_on(model, None)
    assert type(other.held) is type(model.held) and read(other.held) == before
    write(other.held)
    assert read(other.held) != before and read(model.held) == before


def test_two_functions_share_a_variable_in_the_copy_too():
    def pair() -> tuple[Any, Any]:
        number = 0

        def add() -> None:
            nonlocal number
            number += 1

        return add, lambda: number

    model = Owner()
    model.held = pair()
    other = copied_on(model)
    other.held[0]()
    assert (other.held[1](), model.held[1]()) == (1, 0)


def test_shared_modules_and_tensors_stay_shared():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), Owner()])
    model.append(model[0])
    model[1].weight = model[0].weight
    model[2].held = [model[0].weight, model]
    other = copied_on(model)
    assert other[3] is other[0] and other[1].weight is other[0].weight is other[2].held[0]
    assert other[2].held[1] is other and other[0].weight.is_meta and isinstance(other[0].weight, nn.Parameter)


def test_functions_without_variables_and_what_is_large_or_has_its_own_ways_is_shared():
    class Ends:
        def __del__(self) -> None:
            pass

    large, own = Keeper(), Ends()
    large.notes = list(range(10_000))
    model = Owner()
    model.held = (large, own, torch.relu, len, nn.functional.max_pool2d, nn.ReLU)
    assert copied_on(model).held is model.held


def test_hooks_are_left_out_unless_they_are_asked_for():
    model = Owner()
    model.conv.register_forward_hook(lambda module, args, output: model.notes.append(output.shape))
    images = torch.zeros(1, 3, 5, 5)
    without, bound = copied_on(model, None), copied_on(model, None, hooks=True)
    without(images), bound(images)
    assert (without.notes, bound.notes, model.notes) == ([], [(1, 4, 3, 3)], [])


@pytest.mark.parametrize("name", ["toy/Digits", "toy/Functional", "resnet18", "hrnet_w18_small"])
def test_a_copy_with_values_computes_the_same(name):
    model = randomise(build(name)).eval()
    size = (1, 28, 28) if name == "toy/Digits" else (3, 64, 64)
    other = copied_on(model, None)
    with torch.no_grad():
        assert torch.equal(other(images(size)), model(images(size)))
    shared = zip(model.parameters(), other.parameters(), strict=True)
    assert all(one.data_ptr() == same.data_ptr() for one, same in shared)
    own = zip(model.buffers(), other.buffers(), strict=True)
    assert all(one.data_ptr() != same.data_ptr() for one, same in own)


def test_the_copies_are_found_by_the_originals():
    model = build("resnet18")
    copier = Copier()
    other = copier(model)
    paths = dict(other.named_modules())
    assert all(copier.of(module) is paths[path] for path, module in model.named_modules())
