"""Bad input gets a SurgeryError that says what, which and what to do, and leaves the model bit-equal to before."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import torchvision
import toys
from patients import assert_same, build, differences, images, run, snapshot
from torch import Tensor, nn

from se_surgery import (
    NothingToDoError,
    OptionError,
    PatientError,
    PlacementError,
    ProbeError,
    SqueezeExcite,
    StageError,
    SurgeryError,
    VerifyError,
    add_se,
    apply_recipe,
    export_se,
    find_se,
    freeze_base,
    from_pretrained,
    load_se,
    plan_se,
    push_to_hub,
    recipe_of,
    register_se,
    save_pretrained,
    strip_se,
    verify,
)
from se_surgery.records import CODE
from se_surgery.surgery.generated import subclass

SIZE = (3, 64, 64)
NAN, INF = float("nan"), float("inf")
PLACEMENTS = ("standard", "pre", "post", "identity", "inner", "inception")


def resnet(name: str = "resnet18") -> nn.Module:
    """A ResNet-18 of 0.25 million parameters: 8 units, 4 stages."""
    return build(name, channels=(8, 16, 32, 64))


REMEDY = re.compile(r"(Take|Give|Leave|Name|Operate|Load|Widen|Run|Put|Count|It has places for)\b")


def assert_refused(
    model: Any, act: Callable[[], Any], error: type[SurgeryError], *named: str, remedy: str = ""
) -> SurgeryError:
    """The call raises just this error, its text names what is wrong and what to do, and nothing has changed."""
    before = snapshot(model, random=True)
    with pytest.raises(SurgeryError) as caught:
        act()
    text = str(caught.value)
    assert type(caught.value) is error, text
    assert all(part in text for part in named), text
    assert remedy in text and text.endswith("."), text
    assert remedy or REMEDY.search(text), f"says nothing of what to do: {text}"
    assert differences(before, snapshot(model, random=True)) == []
    return caught.value


# -------------------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class Bad:
    """Options that are refused, the error, what its text names of them, and what it says to do."""

    options: dict[str, Any]
    error: type[SurgeryError]
    named: str
    remedy: str

    def __str__(self) -> str:
        return "-".join(f"{name}={value!r:.30}" for name, value in self.options.items())


NOT_WHOLE = (0, -1, NAN, INF, 1.5, 16.0, True, False, "16", [16], (16,), torch.tensor(16), 1 + 0j)
BAD_OPTIONS = (
    *(
        Bad({"placement": value}, PlacementError, repr(value), "standard, pre, post, identity, inner, inception")
        for value in ("sideways", "Standard", "", 3, ["standard"], {}, True)
    ),
    *(
        Bad({option: value}, OptionError, f"{option}={value!r}", "Give one, 16 for instance")
        for option in ("r", "rd_channels", "rd_divisor")
        for value in NOT_WHOLE
    ),
    # With the identity start its one hidden unit is closed for half of all inputs.
    Bad({"rd_channels": 1}, OptionError, "rd_channels=1", "2"),
    Bad({"r": None}, OptionError, "r=None", "Give one, 16 for instance"),
    Bad({"rd_divisor": None}, OptionError, "rd_divisor=None", "Give one, 16 for instance"),
    Bad({"r": {}}, OptionError, "r={}", "{4: 16} for instance"),
    *(
        Bad({"r": {2: value}}, OptionError, f"r[2]={value!r}", "Give one, 16 for instance")
        for value in (0, NAN, 1.5, True, "8", None)
    ),
    *(Bad({"r": {value: 16}}, StageError, repr(value), "from 1") for value in (0, True, "2", "layer2", 1.0, None)),
    *(
        Bad({option: {stage: 16} if option == "r" else stage}, StageError, str(stage), "stages 1 to 4. Name one")
        for option in ("r", "stages")
        for stage in (5, -5, 99)
    ),
    Bad({"r": {1: 8, 9: 8}}, StageError, "9", "stages 1 to 4. Name one"),
    Bad({"stages": 0}, StageError, "0", "from 1"),
    *(
        Bad({"stages": value}, StageError, repr(value[-1]), "from 1")
        for value in ([0], [1, 0], [True], ["2"], [None], [1.0], ("layer2",))
    ),
    *(
        Bad({"stages": value}, StageError, f"stages={value!r}", "from 1")
        for value in (True, False, "2", "layer2", "", [], (), {}, 1.0, NAN)
    ),
    Bad({"stages": [1, 9]}, StageError, "9", "stages 1 to 4. Name one"),
    *(
        Bad({"where": value}, OptionError, f"where={value!r}", "Give a glob such as 'layer4.*'")
        for value in ("", [], (), {}, 5, 0, True, [1], ["layer1.*", None], 1.5)
    ),
    *(
        Bad({"bias": value}, OptionError, f"bias={value!r}", "Give (False, True)")
        for value in (None, 1, 0, "True", "ab", (True,), (True, False, True), (1, 0), [None, True], [])
    ),
    *(
        Bad({"squeeze": value}, OptionError, f"squeeze={value!r}", "avg, max")
        for value in ("mean", "", None, 2, ["avg"], torch.mean)
    ),
    *(
        Bad({"act": value}, OptionError, f"act={value!r}", "relu, silu or gelu")
        for value in ("nope", "", None, 5, ["relu"], nn.ReLU, nn.ReLU())
    ),
    *(
        Bad({"gate": value}, OptionError, f"gate={value!r}", "sigmoid, hard_sigmoid, tanh, relu")
        for value in ("softmax", "", None, 5, ["sigmoid"], nn.Sigmoid)
    ),
    *(
        Bad({"gate_scale": value}, OptionError, f"gate_scale={value!r}", "Give one, or leave it out")
        for value in (0, 0.0, -1, NAN, INF, -INF, True, "2", [2.0], torch.tensor(2.0))
    ),
    Bad({"gate_scale": 1.0}, OptionError, "gate_scale=1.0", 'take init="paper"'),
    Bad({"gate": "hard_sigmoid", "gate_scale": 3}, OptionError, "hard_sigmoid gate start at 1.5", "Leave gate_scale"),
    *(
        Bad({"init": value}, OptionError, f"init={value!r}", "identity, paper")
        for value in ("zero", "", None, 0, True, ["paper"])
    ),
    *(
        Bad({"attn": value}, OptionError, f"attn={value!r}", "Take one of se, ")
        for value in ("nope", "", None, "sk", "splat", "bottleneck", 5, ["eca"])
    ),
    *(
        Bad({"attn": "eca", name: value}, OptionError, f"{name}={value!r} is about an SE", 'or take attn="se"')
        for name, value in {"squeeze": "max", "act": "silu", "gate": "tanh", "gate_scale": 2.0}.items()
    ),
    Bad({"attn": "gc", "bias": True}, OptionError, "bias=(True, True) is about an SE", 'or take attn="se"'),
    *(
        Bad({"existing": value}, OptionError, f"existing={value!r}", "skip, replace, stack, error")
        for value in ("keep", "", None, True, ["skip"])
    ),
    *(
        Bad({"name": value}, OptionError, f"name={value!r}", "Give a plain identifier such as 'se'")
        for value in ("", "a.b", "__x", "_se", "se 2", "2se", "se-2", ".", None, 5, ["se"], "class", "None", "self")
    ),
)


@functools.lru_cache(maxsize=1)
def kept() -> nn.Module:
    return resnet()


@pytest.fixture
def narrow() -> Iterator[nn.Module]:
    """One ResNet-18 for all tests that may not change it; they check that themselves."""
    yield kept()
    if any(isinstance(module, SqueezeExcite) for module in kept().modules()):
        kept.cache_clear()


@pytest.mark.parametrize("verb", [add_se, plan_se], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("bad", BAD_OPTIONS, ids=str)
def test_a_bad_option_is_refused_by_name(bad, verb, narrow):
    act = functools.partial(verb, narrow, example_input=SIZE, **bad.options)
    assert_refused(narrow, act, bad.error, bad.named, remedy=bad.remedy)


@pytest.mark.parametrize("name", ["conv1", "forward", "training", "bn2", "T_destination"])
def test_a_name_that_the_block_uses_already_is_not_taken_from_it(name):
    model = resnet()
    block = model.layer1[0]
    before, attribute = run(model, images(SIZE)), block.__dict__.get(name, block._modules.get(name))
    add_se(model, name=name, example_input=SIZE)
    assert block.__dict__.get(name, block._modules.get(name)) is attribute
    assert [path for path, module in block.named_modules() if isinstance(module, SqueezeExcite)] == [f"{name}_standard"]
    assert_same(run(model, images(SIZE)), before)


@pytest.mark.parametrize("name", ["x", "torch", "math", "inf", "add", "shortcut", "print", "super", "weight"])
def test_a_name_of_something_else_in_the_forward_works(name):
    model = resnet()
    before = run(model, images(SIZE))
    add_se(model, name=name, example_input=SIZE)
    assert isinstance(model.layer4[1].get_submodule(name), SqueezeExcite)
    assert_same(run(model, images(SIZE)), before)


# Choices that leave nothing, and what the text says of them.
NOTHING_LEFT = {
    "glob": ({"where": "layer9.*"}, "where leaves it out"),
    "globs": ({"where": ["head", "stem.*"]}, "where leaves it out"),
    "predicate": ({"where": lambda site: site.channels > 64}, "where leaves it out"),
    "where-in-another-stage": ({"where": "layer1.*", "stages": 2}, "stage 1 was not asked for"),
    "r-in-another-stage": ({"r": {1: 16}, "stages": 2}, "stage 2 was not asked for"),
}


@pytest.mark.parametrize("case", NOTHING_LEFT.values(), ids=NOTHING_LEFT)
def test_a_choice_that_leaves_no_site_is_an_error_of_add_and_an_empty_plan(case):
    options, reason = case
    model = resnet()
    remedy = "Widen stages or where"
    act = lambda: add_se(model, example_input=SIZE, **options)  # noqa: E731
    error = assert_refused(model, act, NothingToDoError, reason, remedy=remedy)
    assert "outside of all units" not in str(error)  # the stem is, but that is no reason
    plan = plan_se(model, example_input=SIZE, **options)
    assert plan.sites == () and len(plan.skipped) == 8 + 1  # and the stem


def test_a_predicate_that_fails_leaves_the_model():
    model = resnet()
    before = snapshot(model, random=True)
    seen = []

    def fails(site: Any) -> bool:
        seen.append(site.path)
        raise KeyError("mine") if len(seen) == 3 else None

    with pytest.raises((KeyError, TypeError)):
        add_se(model, where=fails, example_input=SIZE)
    assert differences(before, snapshot(model, random=True)) == []


# ------------------------------------------------------------------------------------------------ one thing for another

# A model where something else belongs, as where arguments change places, and what the one line says that comes of it.
MIXED_UP: dict[str, tuple[Callable[[Any], Any], type[SurgeryError], str]] = {
    "add_se": (lambda model: add_se("standard", model), PlacementError, "There is no placement ResNet("),
    "add_se-r": (lambda model: add_se(model, "pre", model), OptionError, "r=ResNet("),
    "save_pretrained": (lambda model: save_pretrained("folder", model), OptionError, "is no path of a folder. Name"),
    "from_pretrained": (from_pretrained, OptionError, "is no folder and no repository. Give a path"),
    "push_to_hub": (lambda model: push_to_hub("user/net", model), OptionError, "Name it as 'user/model'"),
    "register_se": (lambda model: register_se("mine", model), OptionError, "Give base='resnet50'"),
    "freeze_base": (lambda model: freeze_base(model, head=model.layer4), OptionError, "head=Sequential("),
    "fold": (lambda model: strip_se(model, fold=model, loader=[]), OptionError, "fold=ResNet("),
    "recipe_of": (lambda model: recipe_of("resnet18", model), PatientError, "'str' is not an nn.Module. Give"),
    "apply_recipe": (lambda model: apply_recipe(recipe_of(model), model), PatientError, "'dict' is not an nn.Module."),
    "apply_recipe-file": (lambda model: apply_recipe(model, "a.json"), SurgeryError, "'a.json' has not the format"),
    "apply_recipe-none": (
        lambda model: apply_recipe(model, None),
        SurgeryError,
        "Give what recipe_of returned",
    ),
}


@pytest.mark.parametrize("case", MIXED_UP.values(), ids=MIXED_UP)
def test_one_thing_given_for_another_is_named_in_a_line(case, narrow):
    act, error, text = case
    caught = assert_refused(narrow, lambda: act(narrow), error, text, remedy=" ")
    assert len(str(caught)) < 300 and "\n" not in str(caught)


@pytest.mark.parametrize("value", ["no", "", 1, 0, None], ids=repr)
def test_what_is_neither_true_nor_false_is_refused(value, narrow, tmp_path):
    (tmp_path / "mine").write_text("to be kept")
    operated = operated_on(resnet())
    for name, model, act in (
        ("lean", narrow, lambda: add_se(narrow, lean=value, example_input=SIZE)),
        ("inplace", narrow, lambda: add_se(narrow, inplace=value, example_input=SIZE)),
        ("inplace", operated, lambda: strip_se(operated, inplace=value, example_input=SIZE)),
        ("thorough", operated, lambda: verify(operated, SIZE, thorough=value)),
        ("base", operated, lambda: load_se(operated, operated.state_dict(), base=value)),
        ("base", operated, lambda: export_se(operated, base=value)),
        ("overwrite", operated, lambda: save_pretrained(operated, tmp_path, overwrite=value)),
    ):
        assert_refused(model, act, OptionError, f"{name}={value!r} is neither True nor False", remedy="Leave it out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# -------------------------------------------------------------------------------------------------------- probing input


def inputs() -> dict[str, tuple[Any, str]]:
    """Probing inputs that a ResNet of three channels does not take, and what the text names of them."""
    x = torch.zeros(2, *SIZE)
    return {
        "channels": ((5, 64, 64), "(2, 5, 64, 64)"),
        "no-channels": ((0, 64, 64), "0, 64, 64)"),
        "one-dimension": ((3, 64), "(2, 3, 64)"),
        "three-dimensions": ((3, 64, 64, 64), "(2, 3, 64, 64, 64)"),
        "empty": ((3, 0, 0), "3, 0, 0)"),
        "negative": ((3, -1, 5), "(3, -1, 5)"),
        "too-large": ((3, 10**7, 10**7), "10000000"),
        "floats": ((3.0, 64.0, 64.0), "3.0"),
        "tensor-of-other-channels": (torch.zeros(2, 5, 64, 64), "(2, 5, 64, 64)"),
        "tensor-without-batch": (torch.zeros(*SIZE), "(3, 64, 64)"),
        "vector": (torch.zeros(3), "(3,)"),
        "whole-numbers": (x.long(), "int64"),
        "empty-batch": (x[:0], "(0, 3, 64, 64)"),
        "string": ("garbage", "'garbage'"),
        "strings": (("a", "b"), "'a', 'b'"),
        "number": (7, "7"),
        "bool": (True, "True"),
        "dict": ({}, "{}"),
        "dict-of-tensors": ({"x": x}, "{'x': tensor([[[[0., 0., 0., ..., 0., 0., 0.], [0., 0.,  ..., which"),
        "empty-tuple": ((), "()"),
        "empty-list": ([], "[]"),
        "tuple-of-none": ((None,), "None"),
        "too-many": ((x, torch.zeros(1)), "(2, 3, 64, 64) torch.float32, (1,)"),
    }


@pytest.mark.parametrize("verb", [add_se, plan_se, find_se, strip_se], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("case", inputs().values(), ids=inputs())
def test_an_input_that_the_model_refuses_is_named(case, verb, narrow):
    example_input, named = case
    assert_refused(narrow, lambda: verb(narrow, example_input=example_input), ProbeError, named)


class Picky(toys.Trunk):
    """Takes one size that is among none of the usual ones."""

    def __init__(self) -> None:
        super().__init__(toys.Basic(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (41, 43):
            raise ValueError("41 by 43, please")
        return super().forward(x)


def test_a_model_that_takes_none_of_the_usual_inputs_asks_for_one():
    model = Picky()
    assert_refused(
        model, lambda: add_se(model), ProbeError, "(2, 3, 224, 224)", "41 by 43, please", remedy="as example_input"
    )
    add_se(model, example_input=(3, 41, 43))
    assert isinstance(model.blocks[0].se, SqueezeExcite)


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 16, 16), (3, 1, 1)], ids=str)
def test_an_input_on_which_maps_shrink_to_nothing_loses_no_unit(size):
    """Where the last maps have one position, the unit is a unit still; or the input is refused, and named."""
    model = resnet()
    before = snapshot(model, random=True)
    try:
        plan = plan_se(model, example_input=size)
    except ProbeError as error:
        assert str(size[1:])[1:-1] in str(error)
        assert differences(before, snapshot(model, random=True)) == []
        return
    assert [site.unit for site in plan.sites] == [site.unit for site in plan_se(model, example_input=SIZE).sites]
    assert plan.stages == 4


# ------------------------------------------------------------------------------------------------ models that cannot be


class LazyConvolution(toys.Trunk):
    def __init__(self) -> None:
        super().__init__(toys.Basic(8, 8))
        self.stem[0] = nn.LazyConv2d(8, 3, padding=1)


class LazyInside(toys.Trunk):
    def __init__(self) -> None:
        super().__init__(toys.Basic(8, 8))
        self.blocks[0].conv2 = nn.LazyConv2d(8, 3, padding=1)


class LazyHead(toys.Trunk):
    def __init__(self) -> None:
        super().__init__(toys.Basic(8, 8))
        self.head = nn.LazyLinear(10)


def with_child(path: str, change: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """A ResNet-18 with one of its parts replaced."""

    def make() -> nn.Module:
        model = resnet()
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, change(model.get_submodule(path)))
        return model

    return make


def compiled_in_place(path: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = resnet()
        model.get_submodule(path).compile()
        return model

    return make


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        return torch.jit.script(module)


def traced(module: nn.Module, channels: int = 3) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        return torch.jit.trace(module, torch.zeros(1, channels, 16, 16))


class DistributedDataParallel(nn.Module):
    """Stands for torch's, by its name; the real one is tried below."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def with_own_forward(path: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = resnet()
        block = model.get_submodule(path)
        block.forward = types.MethodType(type(block).forward, block)
        return model

    return make


def partly_on_meta(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = resnet()
        holder, _, tensor = name.rpartition(".")
        module = model.get_submodule(holder)
        found = getattr(module, tensor).detach().to("meta")
        setattr(module, tensor, nn.Parameter(found) if tensor in module._parameters else found)
        return model

    return make


def without_channels() -> nn.Module:
    """What timm makes of `in_chans=0`."""
    model = resnet()
    model.get_submodule("conv1").weight = nn.Parameter(torch.empty(64, 0, 7, 7))
    return model


def operated_on(model: nn.Module) -> nn.Module:
    return add_se(model, example_input=SIZE)


@dataclass(frozen=True)
class Unfit:
    """A model that cannot be operated on."""

    make: Callable[[], Any]
    error: type[SurgeryError]
    named: tuple[str, ...]
    remedy: str
    options: dict[str, Any] = field(default_factory=dict)


BARE = "Operate on the bare model first, then wrap it"
UNFIT: dict[str, Unfit] = {
    # No CNN.
    "vit": Unfit(lambda: build("test_vit"), PlacementError, ("test_vit",), "nothing to operate on"),
    "mixer": Unfit(
        lambda: timm.models.MlpMixer(img_size=64, patch_size=16, num_blocks=2, embed_dim=32),
        PlacementError,
        ("MlpMixer",),
        "nothing to operate on",
    ),
    "no-convolution": Unfit(toys.NoConvolution, PlacementError, ("NoConvolution",), "nothing to operate on"),
    "identity": Unfit(nn.Identity, PlacementError, ("Identity",), "nothing to operate on"),
    "empty": Unfit(nn.Sequential, PlacementError, ("Sequential",), "nothing to operate on"),
    "one-convolution": Unfit(lambda: nn.Conv2d(3, 8, 3), PlacementError, ("Conv2d",), "nothing to operate on"),
    # No module.
    **{
        f"not-a-module-{label}": Unfit(lambda value=value: value, PatientError, (named,), "Give the model itself")
        for label, value, named in (
            ("none", None, "NoneType"),
            ("number", 5, "int"),
            ("name", "resnet18", "str"),
            ("state-dict", dict(nn.Linear(2, 2).state_dict()), "dict"),
            ("list", [nn.Conv2d(3, 8, 3)], "list"),
            ("class", timm.models.ResNet, "type"),
            ("function", resnet, "function"),
            ("tensor", torch.zeros(2, 3, 64, 64), "Tensor"),
        )
    },
    # Not all there.
    **{
        f"partly-on-meta-{name}": Unfit(partly_on_meta(name), PatientError, (name, "meta"), "Load all weights first")
        for name in ("layer3.0.conv1.weight", "layer3.0.bn1.running_mean", "fc.bias", "conv1.weight")
    },
    "no-channels": Unfit(without_channels, PatientError, ("'conv1'", "no channels"), "Give the model channels"),
    "lazy-first-convolution": Unfit(LazyConvolution, PatientError, ("lazy",), "on one batch"),
    "lazy-convolution-inside": Unfit(LazyInside, PatientError, ("lazy",), "on one batch"),
    "lazy-head": Unfit(LazyHead, PatientError, ("lazy",), "on one batch"),
    # Wrapped, compiled, scripted: the whole or a part.
    "data-parallel": Unfit(lambda: nn.DataParallel(resnet()), PatientError, ("DataParallel",), BARE),
    "part-in-data-parallel": Unfit(
        with_child("layer2", nn.DataParallel), PatientError, ("'layer2'", "DataParallel"), BARE
    ),
    "distributed-by-name": Unfit(
        lambda: DistributedDataParallel(resnet()), PatientError, ("DistributedDataParallel",), BARE
    ),
    "part-distributed-by-name": Unfit(
        with_child("layer4", DistributedDataParallel), PatientError, ("'layer4'", "DistributedDataParallel"), BARE
    ),
    "compiled": Unfit(lambda: torch.compile(resnet()), PatientError, ("torch.compile",), BARE),
    "part-compiled": Unfit(with_child("layer3", torch.compile), PatientError, ("'layer3'", "torch.compile"), BARE),
    "compiled-in-place": Unfit(compiled_in_place(""), PatientError, ("torch.compile",), BARE),
    "part-compiled-in-place": Unfit(compiled_in_place("layer1.1"), PatientError, ("'layer1.1'", "torch.compile"), BARE),
    "scripted": Unfit(
        lambda: scripted(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())), PatientError, ("torch.jit",), BARE
    ),
    "traced": Unfit(lambda: traced(toys.Functional().eval()), PatientError, ("torch.jit",), BARE),
    "part-traced": Unfit(
        with_child("layer2", lambda part: traced(part, 8)), PatientError, ("'layer2'", "torch.jit"), BARE
    ),
    # One module in two places.
    "shared-block": Unfit(
        toys.SharedBlock, PatientError, ("'blocks.0'", "shared", "blocks.2"), "Leave it out with where"
    ),
    "shared-activation": Unfit(
        toys.SharedActivation, PatientError, ("'2'", "shared", "2 and 5"), "Leave it out with where"
    ),
    "called-twice": Unfit(toys.CalledTwice, PatientError, ("'block'", "2 times"), "Leave it out with where"),
    # A forward that no class reaches, or that is no one graph.
    "own-forward": Unfit(
        with_own_forward("layer2.1"), PatientError, ("'layer2.1'", "on the instance"), "operate on a submodule"
    ),
    "own-forward-in-a-toy": Unfit(
        toys.InstanceForward, PatientError, ("'blocks.0'", "on the instance"), "Leave it out with where"
    ),
    "forward-that-depends-on-values": Unfit(
        lambda: build("toy/DataDependent"), PatientError, ("'blocks.0'", "goes by x.mean() > 0"), "Give it a forward"
    ),
    # An SE that is there already.
    "operated-on-already": Unfit(
        lambda: operated_on(resnet()), NothingToDoError, ("layer1.0.se", "holds an SE already"), "say with existing"
    ),
    "native-se": Unfit(
        lambda: resnet("seresnet18"), NothingToDoError, ("layer1.0.se", "holds an SE already"), "say with existing"
    ),
    "native-se-and-existing-error": Unfit(
        lambda: resnet("seresnet18"),
        SurgeryError,
        ("'layer1.0'", "layer1.0.se"),
        "Take existing='skip', 'replace' or 'stack'",
        {"existing": "error"},
    ),
    "own-se-and-existing-error": Unfit(
        lambda: add_se(resnet(), stages=3, example_input=SIZE),
        SurgeryError,
        ("'layer3.0'", "layer3.0.se"),
        "Take existing='skip', 'replace' or 'stack'",
        {"existing": "error"},
    ),
}


def size_for(model: Any) -> tuple[int, ...] | None:
    return getattr(type(model), "SIZE", SIZE) if isinstance(model, nn.Module) else None


@pytest.mark.parametrize("case", UNFIT.values(), ids=UNFIT)
def test_an_unfit_model_is_refused_with_what_to_do(case):
    model = case.make()
    assert_refused(
        model,
        lambda: add_se(model, example_input=size_for(model), **case.options),
        case.error,
        *case.named,
        remedy=case.remedy,
    )


@pytest.mark.parametrize(
    "case", [case for case in UNFIT.values() if "lazy" in case.named], ids=[n for n in UNFIT if n.startswith("lazy")]
)
def test_a_lazy_model_is_operated_on_after_one_batch(case):
    model = case.make()
    model(torch.randn(2, 3, 32, 32))
    add_se(model, example_input=(3, 32, 32))
    assert isinstance(model.blocks[0].se, SqueezeExcite)


NOT_LOOKED_AT = [name for name, case in UNFIT.items() if case.remedy in (BARE, "Give the model itself")]


@pytest.mark.parametrize("verb", [plan_se, find_se, strip_se, verify], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("name", NOT_LOOKED_AT)
def test_what_cannot_be_looked_at_is_refused_by_every_verb(name, verb):
    case = UNFIT[name]
    model = case.make()
    assert_refused(model, lambda: verb(model), PatientError, *case.named, remedy=case.remedy)


@pytest.mark.parametrize("name", ["shared-block", "own-forward", "called-twice"])
def test_a_plan_of_an_unfit_model_names_the_unit_and_the_reason(name):
    """And leaves it as found, like all that only looks."""
    case = UNFIT[name]
    model = case.make()
    before = snapshot(model, random=True)
    plan = plan_se(model, example_input=size_for(model))
    (skip,) = (skip for skip in plan.skipped if skip.blocking)
    assert repr(skip.unit) == case.named[0]
    assert case.named[1] in skip.reason
    assert differences(before, snapshot(model, random=True)) == []


@pytest.mark.parametrize(
    "where",
    [["layer[134].*", "layer2.0"], lambda site: site.unit != "layer2.1"],
    ids=["globs", "predicate"],
)
def test_the_rest_of_an_unfit_model_is_operated_on_with_where(where):
    model = with_own_forward("layer2.1")()
    before = run(model, images(SIZE))
    add_se(model, where=where, example_input=SIZE)
    assert sum(isinstance(module, SqueezeExcite) for module in model.modules()) == 7
    assert "se" not in model.layer2[1]._modules
    assert_same(run(model, images(SIZE)), before)


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("path", ["", "layer2"])
def test_a_model_in_distributed_data_parallel_is_refused(one_process, path):
    wrap = nn.parallel.DistributedDataParallel
    model = with_child(path, wrap)() if path else wrap(resnet())
    named = repr(path) if path else "The model"
    for verb in (add_se, plan_se, find_se, strip_se):
        assert_refused(model, lambda verb=verb: verb(model), PatientError, named, wrap.__name__, remedy=BARE)


@pytest.mark.parametrize("path", ["", "layer2"])
def test_a_model_in_fully_sharded_data_parallel_is_refused(one_process, path):
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # torch before 2.6
        from torch.distributed._composable.fsdp import fully_shard

    model = resnet()
    fully_shard(model.get_submodule(path), mesh=init_device_mesh("cpu", (1,)))
    classes = [type(module) for module in model.modules()]
    for verb in (add_se, plan_se, find_se, strip_se):
        with pytest.raises(PatientError, match="FSDP") as caught:
            verb(model)
        assert (repr(path) if path else "The model") in str(caught.value) and BARE in str(caught.value)
        assert [type(module) for module in model.modules()] == classes


# ----------------------------------------------------------------------------------------------------------------- meta


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "test_convnext"])
def test_a_model_wholly_on_meta_gets_the_structure_of_a_real_one(name):
    options = {"existing": "replace"} if name.startswith("mobile") else {}
    real = add_se(timm.create_model(name), example_input=SIZE, **options)
    with torch.device("meta"):
        model = timm.create_model(name)
    add_se(model, example_input=SIZE, **options)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    theirs, ours = ([(k, t.shape, t.dtype) for k, t in m.state_dict().items()] for m in (real, model))
    assert ours == theirs
    assert repr(model) == repr(real)
    model.load_state_dict(real.state_dict(), assign=True)
    assert_same(run(model.eval(), images(SIZE)), run(real.eval(), images(SIZE)))


def test_verify_of_a_model_on_meta_asks_for_its_weights():
    with torch.device("meta"):
        model = add_se(timm.create_model("resnet18"), example_input=SIZE)
    assert_refused(model, lambda: verify(model, SIZE), PatientError, "meta", remedy="Load its weights")


# ---------------------------------------------------------------------------------------- placements that are not there

# Every network's placements, written down from its definition; all others are lacking.
HAS = {
    "resnet18": "standard pre post identity inner",
    "mobilenetv1_100": "standard pre post inner",
    "torchvision/vgg11": "standard",
    "densenet121": "standard pre inner",
    "torchvision/shufflenet_v2_x0_5": "standard pre post identity",
    "toy/ForkedInPlace": "standard post identity inner",
    "toy/PlainSequential": "standard",
}
LACKING = [(name, p) for name, has in HAS.items() for p in PLACEMENTS if p not in has.split()]


@pytest.mark.parametrize(("name", "placement"), LACKING, ids=[f"{name}-{placement}" for name, placement in LACKING])
def test_a_placement_the_model_lacks_is_refused_with_those_it_has(name, placement):
    model = resnet() if name == "resnet18" else on_meta(name)
    error = assert_refused(model, lambda: add_se(model, placement), PlacementError, repr(placement))
    named = str(error).rpartition("places for: ")[2].rstrip(".").split(", ")
    assert named == HAS[name].split()


def on_meta(name: str) -> nn.Module:
    if name.startswith("toy/"):
        return build(name)
    library, _, short = name.rpartition("/")
    with torch.device("meta"):
        return torchvision.models.get_model(short) if library else timm.create_model(short)


# ---------------------------------------------------------------------------------------------------------------- strip

BAD_STRIPS = {
    "nothing-there": (resnet, {}, NothingToDoError, ("no SE",), "with add_se first"),
    "not-ours": (
        lambda: resnet("seresnet18"),
        {"origin": "se_surgery"},
        NothingToDoError,
        ("origin='se_surgery'", "8", "timm"),
        "Widen the choice",
    ),
    "where-matches-nothing": (
        lambda: resnet("seresnet18"),
        {"where": "head.*"},
        NothingToDoError,
        ("1, 2, 3, 4",),
        "Widen the choice",
    ),
    "stage-without-se": (
        lambda: add_se(resnet(), stages=3, example_input=SIZE),
        {"stages": 1},
        NothingToDoError,
        ("stages 3",),
        "Widen the choice",
    ),
    **{
        f"stage-{stage!r}": (lambda: resnet("seresnet18"), {"stages": stage}, StageError, (str(stage),), remedy)
        for stage, remedy in (
            *((5, "stages 1 to 4"), (-5, "stages 1 to 4"), (0, "from 1")),
            *((True, "from 1"), ("1", "from 1"), (1.0, "from 1")),
        )
    },
    **{
        f"origin-{origin!r}": (
            lambda: resnet("seresnet18"),
            {"origin": origin},
            OptionError,
            (f"origin={origin!r}",),
            "se_surgery, timm, torchvision, other",
        )
        for origin in ("keras", "", 5, True, ["timm"])
    },
    **{
        f"where-{where!r}": (
            lambda: resnet("seresnet18"),
            {"where": where},
            OptionError,
            (f"where={where!r}",),
            "Give a glob",
        )
        for where in ("", [], 5, [None])
    },
}


@pytest.mark.parametrize("inplace", [True, False], ids=["in-place", "on-a-copy"])
@pytest.mark.parametrize("case", BAD_STRIPS.values(), ids=BAD_STRIPS)
def test_a_bad_strip_is_refused_and_leaves_the_model(case, inplace):
    make, options, error, named, remedy = case
    model = make()
    act = lambda: strip_se(model, example_input=SIZE, inplace=inplace, **options)  # noqa: E731
    assert_refused(model, act, error, *named, remedy=remedy)


# ----------------------------------------------------------------------------------------------- failures in the middle


class Broken(Exception):
    """What a bug would raise."""


@dataclass
class At:
    """A function that raises the `turn`-th time it is called."""

    function: Callable[..., Any]
    turn: int
    error: BaseException
    calls: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.turn:
            raise self.error
        return self.function(*args, **kwargs)


def break_at(monkeypatch: pytest.MonkeyPatch, name: str, turn: int, error: BaseException) -> None:
    """Let one of the library's functions fail at one of its calls, wherever it is looked up."""
    holders = [m for n, m in sys.modules.items() if n.startswith("se_surgery.") and callable(vars(m).get(name))]
    broken = At(vars(holders[0])[name], turn, error)
    for module in holders:
        monkeypatch.setattr(module, name, broken)


# Models and options that graft eight SEs.
GRAFTS = {
    "plain": (resnet, {}),
    "replace": (lambda: resnet("seresnet18"), {"existing": "replace"}),
    "replace-elsewhere": (lambda: resnet("seresnet18"), {"existing": "replace", "placement": "pre"}),
    "stack": (lambda: resnet("seresnet18"), {"existing": "stack", "placement": "identity"}),
    "second": (lambda: operated_on(resnet()), {"existing": "stack", "placement": "pre"}),
    "second-replaces-first": (lambda: operated_on(resnet()), {"existing": "replace", "placement": "post"}),
}
# Where they fail: when the n-th SE is built, the n-th block gets its class, its code is written, the record is written.
FAILURES = (
    *(("plain", name, turn) for name in ("build", "subclass") for turn in (1, 8)),
    ("plain", "method_code", 1),
    *((graft, "build", 5) for graft in GRAFTS),
    # An SE in the place of the block's own needs no code.
    *((graft, "subclass", 5) for graft in GRAFTS if graft != "replace"),
    *((graft, "append_operation", 1) for graft in GRAFTS),
)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: "-".join(map(str, failure)))
def test_a_failure_in_the_middle_of_a_graft_leaves_nothing(failure, monkeypatch):
    """But for the random numbers that SEs which were built before it have drawn."""
    graft, name, turn = failure
    make, options = GRAFTS[graft]
    model, x = make(), images(SIZE)
    before, outputs = snapshot(model), run(model, x)
    break_at(monkeypatch, name, turn, Broken("in the middle"))
    with pytest.raises(Broken):
        add_se(model, example_input=SIZE, **options)
    assert differences(before, snapshot(model)) == []
    assert_same(run(model, x), outputs)
    monkeypatch.undo()
    sites = [site.path for site in plan_se(model, example_input=SIZE, **options).sites]
    add_se(model, example_input=SIZE, **options)
    assert len(sites) == 8
    assert set(sites) <= {site.path for site in find_se(model, SIZE)}


@pytest.mark.parametrize("name", ["build", "subclass"])
def test_an_interrupt_in_the_middle_of_a_graft_leaves_nothing(name, monkeypatch):
    model = resnet()
    before = snapshot(model)
    break_at(monkeypatch, name, 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        add_se(model, example_input=SIZE)
    assert differences(before, snapshot(model)) == []


STRIPS = {
    "own": (lambda: operated_on(resnet()), {}),
    "own-by-origin": (lambda: operated_on(resnet()), {"origin": "se_surgery"}),
    "native": (lambda: resnet("seresnet18"), {}),
    "replaced": (lambda: add_se(resnet("seresnet18"), existing="replace", example_input=SIZE), {}),
    "restored": (
        lambda: add_se(resnet("seresnet18"), "pre", existing="replace", example_input=SIZE),
        {"origin": "se_surgery"},
    ),
}
STRIP_FAILURES = (
    *(("own", name, turn) for name in ("take_out", "rewrite") for turn in (1, 8)),
    *((strip, "take_out", 5) for strip in STRIPS),
    *((strip, "rewrite", 5) for strip in STRIPS if strip != "native"),
)


@pytest.mark.parametrize("failure", STRIP_FAILURES, ids=lambda failure: "-".join(map(str, failure)))
def test_a_failure_in_the_middle_of_a_strip_leaves_all_ses(failure, monkeypatch):
    strip, name, turn = failure
    make, options = STRIPS[strip]
    model, x = make(), images(SIZE)
    before, outputs = snapshot(model), run(model, x)
    break_at(monkeypatch, name, turn, Broken("in the middle"))
    with pytest.raises(Broken):
        strip_se(model, example_input=SIZE, **options)
    assert differences(before, snapshot(model)) == []
    assert_same(run(model, x), outputs)
    monkeypatch.undo()
    strip_se(model, example_input=SIZE, **options)


def test_a_failure_on_a_copy_leaves_the_original(monkeypatch):
    model = resnet()
    before = snapshot(model)
    break_at(monkeypatch, "build", 5, Broken("in the middle"))
    with pytest.raises(Broken):
        add_se(model, example_input=SIZE, inplace=False)
    assert differences(before, snapshot(model)) == []


class Uncopyable(toys.Trunk):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__(toys.Basic(8, 8))
        self.lines = (line for line in ())


def test_a_model_that_cannot_be_copied_is_named_and_operated_on_in_place():
    model = Uncopyable()
    act = lambda: add_se(model, inplace=False)  # noqa: E731
    assert_refused(model, act, PatientError, "Uncopyable", remedy="Operate in place")
    add_se(model)
    assert isinstance(model.blocks[0].se, SqueezeExcite)


# --------------------------------------------------------------------------------------------------------- users' hooks


def hooked(model: nn.Module, ran: list[str]) -> dict[str, int]:
    """Register hooks of every kind on some modules; returns how many there are by kind."""

    def note(kind: str) -> Callable[..., None]:
        return lambda *args, **kwargs: ran.append(kind)

    for path in ("", "layer1", "layer1.0", "layer1.0.conv1", "layer2.0.act2"):
        module = model.get_submodule(path)
        module.register_forward_hook(note("forward"))
        module.register_forward_hook(note("forward with keywords"), with_kwargs=True, always_call=True)
        module.register_forward_pre_hook(note("before"))
        module.register_forward_pre_hook(note("before with keywords"), with_kwargs=True)
        module.register_full_backward_hook(note("backward"))
        module.register_full_backward_pre_hook(note("before backward"))
        module.register_state_dict_pre_hook(note("before state dict"))
    return {"forward": 5, "forward with keywords": 5, "before": 5, "before with keywords": 5}


LOOKERS = {
    "plan": (resnet, lambda model: plan_se(model, example_input=SIZE)),
    "find": (lambda: resnet("seresnet18"), lambda model: find_se(model, SIZE)),
    "refused-placement": (resnet, lambda model: add_se(model, "inception", example_input=SIZE)),
    "refused-input": (resnet, lambda model: add_se(model, example_input=(5, 64, 64))),
    "refused-strip": (resnet, lambda model: strip_se(model, example_input=SIZE)),
}


@pytest.mark.parametrize("case", LOOKERS.values(), ids=LOOKERS)
def test_users_hooks_do_not_run_while_looking_and_remain(case):
    make, look = case
    model, ran = make(), []
    expected = hooked(model, ran)
    before = snapshot(model, random=True)
    with contextlib.suppress(SurgeryError):
        look(model)
    assert ran == []
    assert differences(before, snapshot(model, random=True)) == []
    run(model, images(SIZE))
    assert Counter(ran) == expected


class Drawing(toys.Trunk):
    """Draws random numbers in evaluation too."""

    def __init__(self) -> None:
        super().__init__(toys.HoldsSE(8, toys.SequenceSE(8)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + float(torch.rand(())))


@pytest.mark.parametrize("look", [plan_se, find_se], ids=lambda look: look.__name__)
def test_looking_leaves_the_random_numbers_that_a_forward_draws(look):
    model = Drawing()
    before = snapshot(model, random=True)
    assert look(model)
    assert differences(before, snapshot(model, random=True)) == []
    model(torch.zeros(2, 3, 32, 32))
    assert differences(before, snapshot(model, random=True))


@pytest.mark.parametrize("kind", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_global_hooks_do_not_run_while_planning(kind, narrow):
    ran = []
    handle = getattr(nn.modules.module, kind)(lambda *args: ran.append(args))
    try:
        plan_se(narrow, example_input=SIZE)
        assert ran == []
        run(narrow, images(SIZE))
        assert ran
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------- verify sees what is broken


# What a bug in the rewriting could write instead of the call of the SE, and the promise that it breaks.
WRITTEN_INSTEAD = {
    "never-called": ("bn2", "calls"),
    "called-twice": ("self.se(self.se(bn2))", "forward, evaluation"),
    "called-for-nothing": ("(self.se(bn2), bn2)[1]", "gradients"),
    "something-added": ("self.se(bn2) + 1", "forward, evaluation"),
    "training-forward-only": ("self.se(bn2) if self.training else bn2", "calls"),
    "evaluation-forward-only": ("bn2 if self.training else self.se(bn2)", "forward, training"),
    "training-forward-changed": ("self.se(bn2) * (2 if self.training else 1)", "forward, training"),
    "detached": ("self.se(bn2).detach()", "gradients"),
}


@pytest.mark.parametrize("case", WRITTEN_INSTEAD.values(), ids=WRITTEN_INSTEAD)
def test_verify_refuses_a_block_rewritten_wrongly_and_leaves_it(case):
    written, promise = case
    model = add_se(build("toy/Digits"))
    assert all(check.passed is not False for check in verify(model, thorough=False).checks)
    block = model.layers[1]
    code = original_code(block)
    call = "_tail(self.se, (self.bn2,), x)"
    assert code.source.count(call) == 1
    wrong = dataclasses.replace(code, source=code.source.replace(call, f"[bn2 := self.bn2(x), {written}][1]"))
    # Past the refusal of another class, as what changes objects from outside does.
    object.__setattr__(block, "__class__", subclass(toys.Basic, wrong))
    before = snapshot(model, random=True)
    with pytest.raises(VerifyError) as caught:
        verify(model, thorough=False)
    assert f"BROKEN  {promise}" in str(caught.value)
    assert differences(before, snapshot(model, random=True)) == []


def original_code(block: nn.Module) -> Any:
    return type(block).__dict__[CODE]


@pytest.mark.parametrize("paths", [["layers.0"], ["layers.1"], ["layers.0", "layers.1"]], ids=" and ".join)
def test_verify_refuses_a_block_that_has_its_old_class_back(paths):
    model = add_se(build("toy/Digits"))
    for path in paths:
        object.__setattr__(model.get_submodule(path), "__class__", toys.Basic)
    before = snapshot(model, random=True)
    with pytest.raises(VerifyError, match=f"{paths[0]}.se"):
        verify(model, thorough=False)
    assert differences(before, snapshot(model, random=True)) == []


def test_verify_of_a_model_without_our_ses_says_so():
    for name in ("resnet18", "seresnet18"):
        model = resnet(name)
        act = lambda model=model: verify(model, SIZE)  # noqa: E731
        assert_refused(model, act, NothingToDoError, "no SE of this library", remedy="Operate first")
