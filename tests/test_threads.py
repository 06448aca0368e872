"""Looking at one model in one thread, and whatever another thread does meanwhile, do not disturb each other."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from patients import build, images
from torch import Tensor, nn

from se_surgery import add_se, find_se, from_pretrained, plan_se, recipe_of, save_pretrained, strip_se
from se_surgery.errors import SurgeryError, TraceError
from se_surgery.reading.anatomy import Anatomy
from se_surgery.reading.look import look


@contextlib.contextmanager
def beside(act: Callable[[], Any]) -> Iterator[list[Any]]:
    """Repeat something in another thread, which takes turns with this one often; what it returned, in order."""
    stop, results, errors = threading.Event(), [], []

    def repeat() -> None:
        try:
            while not stop.is_set():
                results.append(act())
        except Exception as error:
            errors.append(error)

    thread, interval = threading.Thread(target=repeat), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        yield results
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert errors == [] and results


# Generators of the whole process: how to seed each and how to draw from it.
GENERATORS = {
    "python": (random.seed, random.random),
    "numpy": (np.random.seed, np.random.rand),
    "torch": (torch.manual_seed, lambda: torch.rand(()).item()),
}


@pytest.mark.parametrize("generator", GENERATORS.values(), ids=GENERATORS)
def test_a_thread_that_draws_gets_its_numbers_and_every_site_is_found(generator):
    seed, draw = generator
    model = build("toy/Functional")
    expected = plan_se(model).sites
    seed(5)
    with beside(draw) as drawn:
        for _ in range(5):
            assert plan_se(model).sites == expected
    seed(5)
    assert drawn == [draw() for _ in drawn]


def draws(x: Tensor) -> float:
    return random.uniform(0, 1)


class Draws(nn.Module):
    """A residual block that draws numbers, in one of several ways."""

    def __init__(self, number: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(torch.relu(self.conv1(x)))
        return torch.relu(x + y * self.number(x))


NUMBERS = {
    "random": lambda x: random.random(),
    "a function of its own": draws,
    "numpy": lambda x: float(np.random.rand()),
    "torch": lambda x: float(torch.rand(())),
    "torch, a permutation": lambda x: float(torch.randperm(3)[0]),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_a_draw_is_refused_before_it_happens(number):
    anatomy = Anatomy(look(nn.Sequential(nn.Conv2d(3, 8, 3), Draws(number)), (3, 16, 16)))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(TraceError, match="random numbers of its own"):
        anatomy.block("1")
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert sys.getprofile() is None


def test_a_model_in_training_is_never_seen_in_another_state():
    model = build("resnet18", channels=(8, 16, 32, 64)).train()
    x = images()
    expected = model(x).shape
    tensors = list(model.state_dict(keep_vars=True).values())

    def train() -> bool:
        output = model(x)
        output.sum().backward()
        assert output.shape == expected and all(module.training for module in model.modules())
        held = model.state_dict(keep_vars=True).values()
        return all(one is other and not one.is_meta for one, other in zip(held, tensors, strict=True))

    with beside(train) as kept:
        counts = {len(plan_se(model, example_input=(3, 64, 64)).sites) for _ in range(5)}
        assert find_se(model, (3, 64, 64)) == [] and recipe_of(model)["operations"] == []
    assert counts == {8} and all(kept)


def test_operating_on_one_model_leaves_a_thread_that_trains_another_alone():
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Flatten())
    x = images()

    def step() -> float:
        return other(x).sum().item()

    torch.manual_seed(7)
    with beside(step) as results:
        for _ in range(3):
            model = build("toy/Digits")
            strip_se(add_se(model, init="identity"))
    assert len(results) > 3


def test_hooks_for_all_modules_see_the_other_thread_alone():
    seen: list[nn.Module] = []
    other = nn.Linear(2, 2)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        with beside(lambda: other(torch.zeros(2))) as results:
            for _ in range(3):
                plan_se(build("toy/Digits"))
    finally:
        hook.remove()
    assert len(seen) == len(results) and all(module is other for module in seen)


def test_two_models_are_saved_at_once(tmp_path):
    names = ("resnet18", "resnet26")
    models = {name: add_se(timm.create_model(name, num_classes=3), example_input=(3, 64, 64)) for name in names}
    errors: list[Exception] = []

    def save(name: str) -> None:
        try:
            save_pretrained(models[name], tmp_path / name, example_input=(3, 64, 64))
        except SurgeryError as error:
            errors.append(error)

    torch.manual_seed(3)
    dropout = nn.Dropout(0.5)
    threads = [threading.Thread(target=save, args=(name,)) for name in names]
    drawn = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        drawn.append(dropout(torch.ones(4)).tolist())
    for thread in threads:
        thread.join()
    assert errors == []
    torch.manual_seed(3)
    assert drawn == [dropout(torch.ones(4)).tolist() for _ in drawn]
    assert len(find_se(from_pretrained(tmp_path / "resnet26"), (3, 64, 64))) == len(find_se(models["resnet26"]))
