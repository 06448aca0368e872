"""Pickles of operated models name one module of this library, which never moves, and those made before it load.

The files in tests/pickles were written at version 0.1.0, before there was such a module. Their tensors are on the meta
device, so that they hold the structure of a model and none of its weights.
"""

from __future__ import annotations

import gzip
import importlib
import io
import pickle
from pathlib import Path

import pytest
import timm
import torch
from patients import assert_same, images, run
from torch import nn

from se_surgery import SqueezeExcite, _runtime, add_se, freeze_base, recipe_of, strip_se

OLD = Path(__file__).parent / "pickles"
RUNTIME = "se_surgery._runtime"


def small(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name).eval()


# How the models of the old files were made, and all forms that leave something else in a model.
MODELS = {
    "standard": lambda: add_se(small()),
    "identity_tanh": lambda: add_se(small(), "identity", gate="tanh", lean=False),
    "eca": lambda: add_se(small(), attn="eca"),
    "replaced": lambda: add_se(small("test_efficientnet"), "standard", existing="replace"),
    "frozen": lambda: freeze_base(add_se(small("test_convnext"))),
}
FORMS = {
    **MODELS,
    "twice": lambda: add_se(add_se(small(), "pre"), "post", name="again", existing="stack"),
    "stripped": lambda: strip_se(small("test_efficientnet")),
    "by name": lambda: timm.create_model("se_test_resnet").eval(),
    "resnet20_cifar": lambda: add_se(small("resnet20_cifar")),
    "bn_inception": lambda: add_se(small("bn_inception")),
    "shufflenet_g3": lambda: add_se(small("shufflenet_g3")),
}


class Names(pickle.Unpickler):
    """Notes what a pickle names while it loads it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.modules: set[str] = set()

    def find_class(self, module: str, name: str):
        self.modules.add(module)
        return super().find_class(module, name)


def ours(modules: set[str]) -> set[str]:
    return {module for module in modules if module.partition(".")[0] == "se_surgery"}


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_names_the_module_that_never_moves_and_no_other_of_this_library(form):
    model = FORMS[form]()
    names = Names(pickle.dumps(model))
    again = names.load()
    assert ours(names.modules) <= {RUNTIME}
    origins = {origin[1] for module in again.modules() for origin in getattr(module, "_se_code", _Nothing).origins}
    assert ours(origins) <= {RUNTIME}
    assert_same(run(again, images()), run(model, images()))


class _Nothing:
    origins = ()


@pytest.mark.parametrize("form", MODELS)
def test_pickles_made_before_there_was_such_a_module_load_and_run(form):
    old = pickle.loads(gzip.decompress((OLD / f"{form}.pickle.gz").read_bytes()))
    new = MODELS[form]()
    assert list(old.state_dict()) == list(new.state_dict()) and repr(old) == repr(new)
    assert recipe_of(old) == recipe_of(new)
    old.to_empty(device="cpu").load_state_dict(new.state_dict())
    # What is in no state dict was on the meta device, too: none of these networks has such a buffer.
    assert set(dict(old.named_buffers())) <= set(old.state_dict())
    assert_same(run(old.eval(), images()), run(new, images()))
    assert Names(pickle.dumps(old)).load() is not None


def test_every_name_of_the_module_is_at_home_there_and_found_by_its_name():
    for name in _runtime.__all__:
        thing = getattr(importlib.import_module(RUNTIME), name)
        assert (thing.__module__, thing.__qualname__) == (RUNTIME, name)
    assert SqueezeExcite is _runtime.SqueezeExcite
