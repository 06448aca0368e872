"""Models by name: which there are, and that a name is never anything else."""

import importlib

import pytest
import timm
import torch
import torchvision

from se_surgery import OptionError, SurgeryError
from se_surgery.models.bases import create_base, is_base

KNOWN = ["resnet18", "resnet18.a1_in1k", "test_resnet", "torchvision/resnet18", "torchvision/shufflenet_v2_x0_5"]
UNKNOWN = [
    "resnet_18",
    "resnet18.",
    "resnet18.nosuch",
    "timm/resnet18",
    "torchvision/resnet_18",
    "torchvision",
    "./resnet18",
    "/tmp/resnet18",
    "..\\resnet18",
    "hf-hub:timm/resnet18.a1_in1k",
    "hf_hub:timm/resnet18.a1_in1k",
    "local-dir:resnet18",
    "timm:resnet18",
    "*",
    "",
]


@pytest.mark.parametrize("name", KNOWN)
def test_known(name):
    assert is_base(name)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name):
    assert not is_base(name)
    with pytest.raises(OptionError, match=r"There is no model|is not the name"):
        create_base(name)


@pytest.mark.parametrize("name", [None, 18, b"resnet18", ("resnet18",)])
def test_not_a_name(name):
    with pytest.raises(OptionError, match="is not the name of a model"):
        create_base(name)


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("test_resnet", lambda: timm.create_model("test_resnet")),
        ("torchvision/squeezenet1_1", lambda: torchvision.models.squeezenet1_1()),
    ],
)
def test_it_is_the_librarys_own(name, original):
    torch.manual_seed(1)
    mine = create_base(name)
    torch.manual_seed(1)
    theirs = original()
    assert type(mine) is type(theirs)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/squeezenet1_1"])
def test_arguments_reach_the_function(name):
    assert create_base(name, num_classes=7)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("resnet_50", "resnet50 or torchvision/resnet50"),
        ("ResNet50", "resnet50 or torchvision/resnet50"),
        ("googlenet", "torchvision/googlenet"),
        ("torchvision/efficientnet_lite0", "efficientnet_lite0"),
        ("resnet50.a1", "resnet50.a1_in1k"),
        ("resnet50.zzz", "resnet50."),
        ("seresnext50", "seresnext50_32x4d"),
    ],
)
def test_close_names_are_named(name, suggestion):
    with pytest.raises(OptionError) as caught:
        create_base(name)
    message = str(caught.value)
    assert f"There is no model {name!r}" in message
    assert suggestion in message.split("Did you mean ")[1].split("?")[0]


def test_nothing_is_close():
    with pytest.raises(OptionError, match=r"Nothing there is called anything like it\. .*list_models\(\)"):
        create_base("qqqqqqqq")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("test_resnet", {"nosuch": 1}), ("torchvision/resnet18", {"nosuch": 1}), ("resnet10t", {"block": 1})],
)
def test_arguments_that_do_not_fit(name, arguments):
    key, value = next(iter(arguments.items()))
    with pytest.raises(SurgeryError, match=f"{name!r} cannot be created with {key}={value}") as caught:
        create_base(name, **arguments)
    assert caught.value.__cause__ is not None


def test_weights_that_there_are_not():
    with pytest.raises(SurgeryError, match=r"cannot be created with pretrained=True .* or leave pretrained out"):
        create_base("resnet50_mlp", pretrained=True)


def test_without_torchvision(monkeypatch):
    def missing(name, *args, real=importlib.import_module):
        if name.startswith("torchvision"):
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert not is_base("torchvision/resnet18")
    with pytest.raises(OptionError, match=r"'torchvision/resnet18' needs torchvision.*se-surgery\[torchvision\]"):
        create_base("torchvision/resnet18")
    with pytest.raises(OptionError, match="There is no model 'resnet_18'"):
        create_base("resnet_18")
    assert create_base("test_resnet") is not None
