"""Taking SEs out: ours leave the model that was before, native ones leave the same network with its SEs bypassed."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import toys
from patients import (
    assert_differs,
    assert_same,
    build,
    copied,
    differences,
    images,
    is_native_se,
    pass_through,
    randomise,
    run,
    snapshot,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from se_surgery import PatientError, SqueezeExcite, SurgeryError, add_se, apply_recipe, find_se, recipe_of, strip_se

# A ResNet-18 of 0.25 million parameters: stages of 8, 16, 32, 64 channels, two blocks each.
NARROW = {"channels": (8, 16, 32, 64)}
NARROW_MODELS = ("resnet18", "seresnet18")


class Branches(nn.Module):
    """Parallel branches that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(toys.conv(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(toys.conv(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), toys.conv(4, 8), nn.ReLU())
        self.three = nn.Sequential(nn.MaxPool2d(3, 1, 1), toys.conv(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x), self.three(x)], 1)


class Inception(toys.Trunk):
    def __init__(self) -> None:
        super().__init__(Branches(), outputs=24)


def patient(name: str) -> nn.Module:
    if name == "Inception":
        torch.manual_seed(1)
        return randomise(Inception()).eval()
    return build(name, **(NARROW if name in NARROW_MODELS else {}))


def size_of(name: str) -> tuple[int, ...]:
    if name == "Inception":
        return Inception.SIZE
    return getattr(toys, name.removeprefix("toy/")).SIZE if name.startswith("toy/") else (3, 64, 64)


def trained(model: nn.Module) -> nn.Module:
    """With gates that are not one any more."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SqueezeExcite):
                module.fc2.weight.copy_(torch.randn(module.fc2.weight.shape, generator=generator))
                if module.mix is not None:
                    module.mix.fill_(0.5)
    return model


def ours(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, SqueezeExcite)]


def structure(model: nn.Module) -> list[Any]:
    """Every module's path, class, attributes, children in their order, and mode."""
    return [
        (path, type(module), set(module.__dict__), list(module._modules), list(module._buffers), module.training)
        for path, module in model.named_modules()
    ]


def assert_equals(model: nn.Module, base: nn.Module, x: Tensor) -> None:
    """In class, attributes, keys, their order, values and outputs."""
    assert structure(model) == structure(base)
    assert repr(model) == repr(base)
    mine, theirs = model.state_dict(), base.state_dict()
    assert list(mine) == list(theirs)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in base.named_parameters()]
    for key, value in theirs.items():
        assert mine[key].dtype == value.dtype and torch.equal(mine[key], value), key
    assert_same(run(model, x), run(base, x))
    assert_same(run(copied(model), x, training=True), run(copied(base), x, training=True))


# -------------------------------------------------------------------------------------------------- ours, to the letter


@dataclass(frozen=True)
class Graft:
    """An operation that is to be undone."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.options.values())])

    def base(self) -> nn.Module:
        return patient(self.name)

    def on(self, model: nn.Module) -> nn.Module:
        return trained(add_se(model, example_input=size_of(self.name), **self.options))

    def operated(self) -> nn.Module:
        return self.on(self.base())

    def x(self) -> Tensor:
        return images(size_of(self.name), like=self.base())


ADDED = (
    *(Graft("test_resnet", {"placement": p}) for p in ("standard", "pre", "post", "identity", "inner")),
    *(Graft("test_convnext", {"placement": p}) for p in ("standard", "inner")),
    *(Graft("toy/OwnSlot", {"placement": p}) for p in ("standard", "inner")),
    *(Graft(f"toy/{toy}") for toy in ("PlainSequential", "RootAdds", "TwoUnits", "FunctionalDropPath", "OddlyCalled")),
    Graft("Inception", {"placement": "inception"}),
    Graft("toy/NHWC", {"gate": "tanh", "bias": True}),
    Graft("toy/Volumes", {"squeeze": "max"}),
    Graft("test_resnet", {"attn": "cbam"}),
    Graft("mobilenetv3_small_050"),
    Graft("seresnet18", {"existing": "stack"}),
    Graft("mobilenetv3_small_050", {"existing": "stack", "placement": "inner"}),
    Graft("torchvision/mobilenet_v3_small", {"existing": "stack"}),
)
REPLACED = tuple(
    Graft(name, {"existing": "replace", "placement": placement})
    for name, placements in {
        "mobilenetv3_small_050": ("standard", "inner", "post"),
        "tf_mobilenetv3_small_075": ("standard", "inner"),
        "test_efficientnet": ("standard", "inner", "pre"),
        "seresnet18": ("standard", "identity"),
        "torchvision/mobilenet_v3_small": ("standard", "inner"),
        "ese_vovnet19b_slim_dw": ("standard",),
        "test_nfnet": ("standard",),
        "ghostnet_050": ("standard",),
        "toy/WriteUps": ("standard", "inner"),
    }.items()
    for placement in placements
)


@pytest.mark.parametrize("graft", [*ADDED, *REPLACED], ids=str)
def test_strip_undoes_add_to_the_letter(graft):
    model, x = graft.base(), graft.x()
    before, outputs = snapshot(model), run(model, x)
    graft.on(model)
    if "attn" not in graft.options:
        assert_differs(run(model, x), outputs)
    assert differences(before, snapshot(model))
    assert strip_se(model, origin="se_surgery", example_input=size_of(graft.name)) is model
    assert differences(before, snapshot(model)) == []
    assert_equals(model, graft.base(), x)
    assert recipe_of(model)["operations"] == []


def in_half(model: nn.Module) -> nn.Module:
    return model.half()


def in_double(model: nn.Module) -> nn.Module:
    return model.to(torch.float64)


def in_training(model: nn.Module) -> nn.Module:
    return model.train()


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


ALTERATIONS = (in_half, in_double, in_training, pickled, copied)
ALTERED = (
    *(Graft("mobilenetv3_small_050", {"existing": "replace", "placement": p}) for p in ("standard", "inner")),
    Graft("torchvision/mobilenet_v3_small", {"existing": "replace", "placement": "standard"}),
    Graft("toy/OwnSlot", {"placement": "inner"}),
    Graft("toy/WriteUps", {"existing": "replace"}),
)


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__)
@pytest.mark.parametrize("graft", ALTERED, ids=str)
def test_what_happened_to_the_model_meanwhile_happened_to_the_native_ses_too(graft, alter):
    """They are kept aside, where .half() and .train() of the model do not reach."""
    model = alter(graft.operated())
    strip_se(model, origin="se_surgery", example_input=size_of(graft.name))
    base = alter(graft.base())
    assert_equals(model, base, graft.x().to(next(base.parameters()).dtype))


def test_native_ses_are_back_as_the_same_modules():
    graft = REPLACED[0]
    model = graft.base()
    natives = {path: module for path, module in model.named_modules() if is_native_se(module)}
    graft.on(model)
    assert not any(is_native_se(module) for module in model.modules())
    assert natives.keys() and not any(key.startswith(tuple(natives)) for key in model.state_dict() if ".fc" not in key)
    strip_se(model, origin="se_surgery")
    assert {path: module for path, module in model.named_modules() if is_native_se(module)} == natives


def test_a_block_parametrised_after_surgery_is_stripped_once_it_is_no_more():
    """torch puts a subclass of its own on the block, over the one that surgery gave it."""
    base = patient("toy/NHWC")
    x, model = images(size_of("toy/NHWC")), trained(add_se(copied(base)))
    register_parametrization(model.blocks[0], "gamma", nn.Identity())
    before, outputs = snapshot(model), run(model, x)
    with pytest.raises(PatientError, match=r"'blocks.0'.*ParametrizedNHWCBlock.*Take that off first"):
        strip_se(model, origin="se_surgery")
    assert differences(before, snapshot(model)) == []
    assert_same(run(copied(model), x), outputs)
    remove_parametrizations(model.blocks[0], "gamma")
    strip_se(model, origin="se_surgery")
    assert_same(run(model, x), run(base, x))


def test_a_block_parametrised_before_surgery_is_stripped():
    base = patient("toy/NHWC")
    register_parametrization(base.blocks[0], "gamma", nn.Identity())
    before, outputs = snapshot(base), run(base, images(size_of("toy/NHWC")))
    model = trained(add_se(base))
    assert_differs(run(model, images(size_of("toy/NHWC"))), outputs)
    strip_se(model, origin="se_surgery")
    assert differences(before, snapshot(model)) == []


# Two operations on one model, each with what identifies its SEs.
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-in-first-out", "last-in-first-out"])
@pytest.mark.parametrize(
    ("name", "placements"),
    {
        "resnet18": ("standard", "pre"),
        "test_convnext": ("standard", "post"),
        "toy/OwnSlot": ("inner", "standard"),
        "toy/TwoUnits": ("post", "standard"),
    }.items(),
)
def test_two_operations_are_undone_in_any_order(name, placements, order):
    model, size = patient(name), size_of(name)
    before = snapshot(model)
    paths: list[list[str]] = []
    for placement in placements:
        known = {path for found in paths for path in found}
        add_se(model, placement, existing="stack", example_input=size)
        paths.append([path for path in ours(model) if path not in known])
    assert all(paths)
    trained(model)
    for i, left in zip(order, (1, 0), strict=True):
        strip_se(model, where=paths[i], origin="se_surgery", example_input=size)
        assert ours(model) == (paths[1 - i] if left else [])
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("placements", [("standard", "inner"), ("inner", "standard"), ("standard", "standard")])
def test_natives_come_back_after_two_replacements(placements):
    model = patient("mobilenetv3_small_050")
    before = snapshot(model)
    for placement in placements:
        add_se(model, placement, existing="replace", example_input=(3, 64, 64))
        assert len(ours(model)) == 11 if placement != "inner" else len(ours(model)) >= 9
    strip_se(model, origin="se_surgery", example_input=(3, 64, 64))
    assert differences(before, snapshot(model)) == []


def test_an_operation_on_the_stripped_model_is_that_on_a_fresh_one():
    x = images()
    for graft in (Graft("resnet18"), *ALTERED[:3]):
        fresh = graft.base()
        torch.manual_seed(5)
        add_se(fresh, example_input=size_of(graft.name), **graft.options)
        again = graft.operated()
        strip_se(again, origin="se_surgery", example_input=size_of(graft.name))
        torch.manual_seed(5)
        add_se(again, example_input=size_of(graft.name), **graft.options)
        assert_equals(trained(again), trained(fresh), x)
        assert recipe_of(again) == recipe_of(fresh)


# ---------------------------------------------------------------------------------------------------------- a part only

# Which SEs of a narrow ResNet-18, operated under `standard`, each choice takes: `layer<stage>.<block>`.
CHOICES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "stage-2": ({"stages": 2}, {"2.0", "2.1"}),
    "stages-1-and-3": ({"stages": [1, 3]}, {"1.0", "1.1", "3.0", "3.1"}),
    "last-stage": ({"stages": -1}, {"4.0", "4.1"}),
    "positional": ({"stages": (3, -1)}, {"3.0", "3.1", "4.0", "4.1"}),
    "glob-on-path": ({"where": "layer?.0.se"}, {"1.0", "2.0", "3.0", "4.0"}),
    "glob-on-unit": ({"where": "layer3.*"}, {"3.0", "3.1"}),
    "list-of-globs": ({"where": ["layer1.0", "layer4.1.se"]}, {"1.0", "4.1"}),
    "predicate": ({"where": lambda site: site.channels < 20}, {"1.0", "1.1", "2.0", "2.1"}),
    "stage-and-glob": ({"stages": [2, 3], "where": "*.1"}, {"2.1", "3.1"}),
}


@pytest.mark.parametrize("origin", [None, "se_surgery"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_part_of_the_ses_is_taken_and_the_others_go_on(choice, origin):
    options, gone = choice
    model, x = trained(add_se(patient("resnet18"), example_input=(3, 64, 64))), images()
    ses = {path: model.get_submodule(path) for path in ours(model)}
    bypassed = copied(model)
    for block in gone:
        bypassed.get_submodule(f"layer{block}.se").register_forward_hook(lambda module, args, output: args[0])
    assert_differs(run(bypassed, x), run(model, x))
    strip_se(model, **options, origin=origin, example_input=(3, 64, 64))
    left = {path: se for path, se in ses.items() if path.removeprefix("layer").removesuffix(".se") not in gone}
    assert {path: model.get_submodule(path) for path in ours(model)} == left
    assert_same(run(model, x), run(bypassed, x))
    fresh = patient("resnet18")
    for block in gone:
        assert type(model.get_submodule(f"layer{block}")) is type(fresh.get_submodule(f"layer{block}"))


def test_natives_come_back_where_their_replacement_goes_and_only_there():
    base = patient("mobilenetv3_small_050")
    model = trained(add_se(copied(base), existing="replace", example_input=(3, 64, 64)))
    kept = {path: model.get_submodule(path) for path in ours(model) if not path.startswith("blocks.4.")}
    strip_se(model, -1, origin="se_surgery", example_input=(3, 64, 64))
    natives = [path for path, module in model.named_modules() if is_native_se(module)]
    assert natives == [f"blocks.4.{i}.se" for i in range(3)]
    assert {path: model.get_submodule(path) for path in ours(model)} == kept
    x = images()
    for path in kept:
        model.get_submodule(path).register_forward_hook(lambda module, args, output: args[0])
    earlier = [p for p, m in base.named_modules() if is_native_se(m) and not p.startswith("blocks.4.")]
    for path in earlier:
        base.get_submodule(path).register_forward_hook(lambda module, args, output: args[0])
    assert_same(run(model, x), run(base, x))


def test_without_origin_the_replaced_natives_go_too():
    base = patient("mobilenetv3_small_050")
    model = strip_se(trained(add_se(copied(base), existing="replace")))
    bare = strip_se(copied(base))
    assert find_se(model) == []
    assert list(model.state_dict()) == list(bare.state_dict())
    assert_same(run(model, images()), run(bare, images()))


# ---------------------------------------------------------------------------------------------------------- native ones

# Models with SEs of their own, and how many.
NATIVE = {
    "seresnet18": 8,
    "legacy_seresnet18": 8,
    "mobilenetv3_small_050": 9,
    "test_efficientnet": 2,
    "tf_mobilenetv3_small_075": 9,
    "efficientnet_b0": 16,
    "ese_vovnet19b_slim": 4,
    "regnety_002": 13,
    "ghostnet_050": 7,
    "torchvision/mobilenet_v3_small": 9,
    "toy/WriteUps": 4,
}


def is_se(module: nn.Module) -> bool:
    kinds = (toys.SequenceSE, toys.ExpandSE, toys.ExcitationSE, toys.TwoLayerSE)
    return is_native_se(module) or isinstance(module, kinds)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NATIVE)
def test_native_ses_gone_is_native_ses_bypassed(name, training):
    base, x = patient(name), images(size_of(name))
    model = strip_se(copied(base), example_input=size_of(name))
    assert_differs(run(copied(model), x, training), run(copied(base), x, training))
    assert pass_through(base, is_se) == NATIVE[name]
    assert_same(run(model, x, training), run(base, x, training))


@pytest.mark.parametrize("name", NATIVE)
def test_all_other_keys_keep_their_order_and_values(name):
    base = patient(name)
    model = strip_se(copied(base), example_input=size_of(name))
    gone = tuple(f"{path}." for path, module in base.named_modules() if is_se(module))
    before, after = base.state_dict(), model.state_dict()
    assert list(after) == [key for key in before if not key.startswith(gone)]
    assert all(torch.equal(before[key], after[key]) for key in after)
    assert find_se(model, size_of(name)) == []


@pytest.mark.parametrize("name", NATIVE)
def test_a_model_in_evaluation_mode_is_wholly_so_after_the_strip(name):
    model = strip_se(patient(name).eval(), example_input=size_of(name))
    assert [path for path, module in model.named_modules() if module.training] == []


@pytest.mark.parametrize("name", NATIVE)
def test_blocks_that_lose_a_native_se_keep_their_class(name):
    base = patient(name)
    model = strip_se(copied(base), example_input=size_of(name))
    modules = dict(base.named_modules())
    for path, module in model.named_modules():
        assert type(module) is (nn.Identity if is_se(modules[path]) else type(modules[path]))


def test_seresnet18_stripped_is_resnet18():
    """Same keys in the same order; ResNet-18 loads the weights and gives the same outputs."""
    stripped = strip_se(patient("seresnet18"))
    plain = patient("resnet18")
    x = images()
    assert list(stripped.state_dict()) == list(plain.state_dict())
    assert_differs(run(stripped, x), run(plain, x))
    plain.load_state_dict(stripped.state_dict(), strict=True)
    assert_same(run(stripped, x), run(plain, x))
    assert_same(run(stripped, x, training=True), run(plain, x, training=True))


def test_eca_is_stripped_like_an_se():
    base = build("resnet18", **NARROW, block_args={"attn_layer": "eca"})
    plain = patient("resnet18")
    model = strip_se(base)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert_same(run(model, images()), run(plain, images()))


def test_a_part_of_the_native_ses_is_taken():
    base, x = patient("seresnet18"), images()
    model = strip_se(copied(base), stages=[2, -1], where="*.1", example_input=(3, 64, 64))
    assert [path for path, module in model.named_modules() if is_native_se(module)] == [
        *(f"layer{i}.{j}.se" for i, j in ((1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (4, 0))),
    ]
    for path in ("layer2.1.se", "layer4.1.se"):
        base.get_submodule(path).register_forward_hook(lambda module, args, output: args[0])
    assert_same(run(model, x), run(base, x))


class GivenSE(toys.FunctionalBlock):
    """A block that is given its SE; others may be given the same one."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__(8)
        self.se = se

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.se(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))))


def sharing() -> nn.Module:
    torch.manual_seed(3)
    se = toys.SequenceSE(8)
    return randomise(toys.Trunk(GivenSE(se), GivenSE(se))).eval()


def test_a_native_se_in_two_places_is_taken_out_of_both():
    base, x = sharing(), images((3, 32, 32))
    model = copied(base)
    assert [site.path for site in find_se(model)] == ["blocks.0.se"]
    strip_se(model)
    assert not find_se(model) and not any(isinstance(module, toys.SequenceSE) for module in model.modules())
    base.blocks[0].se.register_forward_hook(lambda module, args, output: args[0])
    assert_same(run(model, x), run(base, x))
    assert model.state_dict().keys() == apply_recipe(sharing(), recipe_of(model)).state_dict().keys()


def test_a_native_se_in_two_places_is_replaced_in_both_and_comes_back():
    base, x = sharing(), images((3, 32, 32))
    model = copied(base)
    with pytest.raises(SurgeryError, match="Nothing to do"):
        add_se(model)
    add_se(model, existing="replace")
    assert [site.origin for site in find_se(model)] == ["se_surgery", "se_surgery"]
    strip_se(model, origin="se_surgery")
    assert model.blocks[0].se is model.blocks[1].se
    assert_same(run(model, x), run(base, x))


@pytest.mark.parametrize("origin", ["timm", "se_surgery"])
def test_origin_chooses_whose_ses_are_taken(origin):
    model = trained(add_se(patient("seresnet18"), existing="stack", example_input=(3, 64, 64)))
    native, own = ([s.path for s in find_se(model, (3, 64, 64)) if s.origin == o] for o in ("timm", "se_surgery"))
    assert len(native) == len(own) == 8
    strip_se(model, origin=origin, example_input=(3, 64, 64))
    assert [site.path for site in find_se(model, (3, 64, 64))] == (own if origin == "timm" else native)


@pytest.mark.parametrize("name", ["seresnet18", "mobilenetv3_small_050", "toy/WriteUps"])
def test_ses_put_in_place_of_stripped_native_ones_run_once(name):
    model, size = strip_se(patient(name), example_input=size_of(name)), size_of(name)
    before = run(model, images(size))
    add_se(model, "inner" if "mobile" in name else "standard", example_input=size)
    count = []
    for path in ours(model):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: count.append(path))
    assert_same(run(model, images(size)), before)
    assert sorted(count) == sorted(ours(model)) and count
    strip_se(model, origin="se_surgery", example_input=size)
    assert_same(run(model, images(size)), before)
    bare = strip_se(patient(name), example_input=size)
    assert structure(model) == structure(bare) and list(model.state_dict()) == list(bare.state_dict())


def test_seresnet18_stripped_and_operated_on_has_its_keys_again():
    base = patient("seresnet18")
    model = add_se(strip_se(copied(base)), bias=True, rd_divisor=8, init="paper")
    assert list(model.state_dict()) == list(base.state_dict())
    model.load_state_dict(base.state_dict(), strict=True)
    assert_same(run(model, images()), run(base, images()))


# ------------------------------------------------------------------------------------------------------------ on a copy


@pytest.mark.parametrize("graft", [Graft("seresnet18"), Graft("resnet18"), ALTERED[0]], ids=str)
def test_strip_of_a_copy_leaves_the_original(graft):
    original = graft.operated() if graft.name != "seresnet18" else graft.base()
    x, before = graft.x(), snapshot(original)
    stripped = strip_se(original, inplace=False, example_input=(3, 64, 64))
    assert stripped is not original
    assert differences(before, snapshot(original)) == []
    assert find_se(original, (3, 64, 64)) and not find_se(stripped, (3, 64, 64))
    assert not {p.data_ptr() for p in stripped.parameters()} & {p.data_ptr() for p in original.parameters()}
    outputs = run(stripped, x)
    assert_equals(strip_se(original, example_input=(3, 64, 64)), stripped, x)
    assert_same(run(stripped, x), outputs)


# -------------------------------------------------------------------------------------------------------------- recipes


Operations = tuple[Callable[[nn.Module], nn.Module], ...]


def add(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: add_se(model, **options)


def strip(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: strip_se(model, **options)


# Base, operations, and how many SEs of ours they leave.
HISTORIES: dict[str, tuple[str, Operations, int]] = {
    "add-strip-add": ("resnet18", (add(r=4), strip(stages=-1), add(placement="inner", existing="stack", r=8)), 6 + 8),
    "strip-own-partly": ("resnet18", (add(), strip(where="layer1.*", origin="se_surgery")), 6),
    "strip-native-add": ("seresnet18", (strip(stages=[3, 4]), add(bias=True, squeeze="max")), 4),
    "replace-restore-partly": (
        "mobilenetv3_small_050",
        (
            add(existing="replace"),
            strip(stages=-1, origin="se_surgery"),
            add(placement="post", stages=[4], existing="stack"),
        ),
        8 + 3,
    ),
    "replace-strip-for-good": (
        "mobilenetv3_small_050",
        (add(existing="replace", placement="inner"), strip(stages=[1, 3]), add(existing="skip", gate="tanh")),
        11,
    ),
    "ratio-by-stage": ("resnet18", (add(r={2: 4, -1: 8}), strip(stages=2), add(stages=2, r=2, act="silu")), 4),
    "plain": ("toy/PlainSequential", (add(), strip(where="6.se"), add(r=2)), 3),
    "nothing": ("resnet18", (), 0),
    "all-undone": ("resnet18", (add(), strip(origin="se_surgery")), 0),
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_a_recipe_replays_all_operations(history):
    name, operations, count = history
    model = patient(name)
    torch.manual_seed(5)
    for operation in operations:
        operation(model)
    assert len(ours(model)) == count
    recipe = json.loads(json.dumps(recipe_of(model, name)))
    again = patient(name)
    torch.manual_seed(5)
    apply_recipe(again, recipe)
    assert_equals(trained(again), trained(model), images(size_of(name)))
    assert recipe_of(again, name) == recipe_of(model, name)


def test_a_recipe_is_not_changed_by_applying_it():
    recipe = recipe_of(HISTORIES["add-strip-add"][1][0](patient("resnet18")))
    before = copy.deepcopy(recipe)
    apply_recipe(patient("resnet18"), recipe)
    assert recipe == before


def recipe() -> dict[str, Any]:
    """A sound one, of an addition and a strip."""
    model = strip_se(add_se(patient("resnet18"), r=4), stages=-1)
    return json.loads(json.dumps(recipe_of(model, "resnet18")))


def edited(*path: Any, to: Any) -> Callable[[], Any]:
    """A sound recipe with one entry changed, at `path`."""

    def make() -> Any:
        changed = recipe()
        inner = changed
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = to
        return changed

    return make


def without(*path: Any) -> Callable[[], Any]:
    def make() -> Any:
        changed = recipe()
        inner = changed
        for step in path[:-1]:
            inner = inner[step]
        del inner[path[-1]]
        return changed

    return make


SITE = ("operations", 0, "sites", 3)
# What is wrong, and what the message has to name.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "recipe_of"),
    "a-list": (lambda: [], "recipe_of"),
    "a-name": (lambda: "resnet18", "recipe_of"),
    "another-format": (edited("format", to="other"), "'se_surgery.recipe'"),
    "no-format": (without("format"), "'se_surgery.recipe'"),
    "version-2": (edited("version", to=2), "2"),
    "version-0": (edited("version", to=0), "0"),
    "version-as-text": (edited("version", to="1"), "'1'"),
    "no-version": (without("version"), "None"),
    "unknown-key-inside": (edited("operations", 0, "path", to="layer1"), "operations[0] has the unknown key 'path'"),
    "unknown-key": (edited("colour", to="red"), "'colour'"),
    "no-operations": (without("operations"), "operations"),
    "operations-as-text": (edited("operations", to="add"), "operations"),
    "operation-as-text": (edited("operations", 1, to="strip"), "operations"),
    "unknown-operation": (edited("operations", 1, "op", to="amputate"), "operations"),
    "no-sites": (without("operations", 0, "sites"), "sites"),
    "no-options": (without("operations", 0, "options"), "operations[0] lacks 'options'"),
    "unknown-option": (edited("operations", 0, "options", "colour", to="red"), "colour"),
    "lost-option": (without("operations", 0, "options", "gate"), "gate"),
    "bad-r": (edited("operations", 0, "options", "r", to=0), "operations[0].options.r is 0"),
    "bad-stage-of-r": (edited("operations", 0, "options", "r", to={"first": 4}), "first"),
    "bad-placement": (edited("operations", 0, "options", "placement", to="sideways"), "'sideways'"),
    "site-elsewhere": (edited(*SITE, "path", to="layer2.1.gate"), "'layer2.1.gate'"),
    "site-in-no-such-block": (edited(*SITE, "path", to="layer9.1.se"), "'layer9.1.se'"),
    "site-with-other-channels": (edited(*SITE, "channels", to=99), "'layer2.1.se'"),
    "site-with-another-width": (edited(*SITE, "rd_channels", to=99), "'layer2.1.se'"),
    "site-of-another-unit": (edited(*SITE, "unit", to="layer2.0"), "'layer2.1.se'"),
    "site-as-text": (edited(*SITE, to="layer2.1.se"), "operations[0].sites[3] is 'layer2.1.se'"),
    "site-without-path": (without(*SITE, "path"), "operations[0].sites[3] lacks 'path'"),
    "no-sites-left": (edited("operations", 0, "sites", to=[]), "operations[0].sites is []"),
    "strip-of-no-se": (edited("operations", 1, "sites", 1, "path", to="layer4.1.gate"), "'layer4.1.gate'"),
    "strip-as-text": (edited("operations", 1, "sites", 1, to="layer4.1.se"), "operations[1].sites[1] is 'layer4.1.se'"),
    "strip-without-path": (without("operations", 1, "sites", 1, "path"), "operations[1].sites[1] lacks 'path'"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_wrong_recipe_is_refused_and_leaves_the_model(case):
    """Also where it is wrong in its second operation, after the first was done."""
    make, named = case
    given, model = make(), patient("resnet18")
    before = snapshot(model)
    with pytest.raises(SurgeryError) as caught:
        apply_recipe(model, given)
    assert named in str(caught.value)
    assert differences(before, snapshot(model)) == []


OTHER_BASES = {
    "other-channels": lambda: build("resnet18", channels=(8, 16, 32, 48)),
    "other-depth": lambda: build("resnet14t", channels=(8, 16, 32, 64), stem_type=""),
    "other-blocks": lambda: build("test_resnet"),
    "other-architecture": lambda: build("test_convnext"),
    "operated-on-already": lambda: add_se(patient("resnet18")),
    "natives-in-the-places": lambda: patient("seresnet18"),
}


@pytest.mark.parametrize("make", OTHER_BASES.values(), ids=OTHER_BASES)
def test_a_recipe_is_refused_where_its_sites_would_come_out_otherwise(make):
    model, given = make(), recipe()
    before = snapshot(model)
    with pytest.raises(SurgeryError, match="Operation 1"):
        apply_recipe(model, given)
    assert differences(before, snapshot(model)) == []
