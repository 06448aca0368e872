"""Pruning by torch-pruning: hidden layers of SEs, whole operated networks; saved, loaded, and taken back on errors.

`python -m pytest -m sweep tests/test_prune.py` prunes SE-ResNet-50, SE-MobileNetV2 and SE-DenseNet-121.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
import toys
from patients import assert_differs, assert_same, build, differences, images, randomise, run, snapshot
from timm.layers import SEModule
from torch import Tensor, nn

from se_surgery import (
    DataError,
    NothingToDoError,
    OptionError,
    PatientError,
    SqueezeExcite,
    SurgeryError,
    add_se,
    apply_recipe,
    find_se,
    from_pretrained,
    prune_se,
    recipe_of,
    record_pruning,
    save_pretrained,
    strip_se,
    to_pruner_args,
)

NARROW = {"channels": (8, 16, 32, 64), "num_classes": 10}
SIZE = (3, 64, 64)


def operated(**options: Any) -> nn.Module:
    """SEs with hidden layers of 4, 8, 16 and 32 channels, two of each; their weights are away from the start."""
    model = add_se(build("resnet18", **NARROW), r=2, **{"init": "paper", "example_input": SIZE, **options})
    with torch.no_grad():
        for site in find_se(model, SIZE):
            if options.get("attn") is None:
                model.get_submodule(site.path).fc2.weight.normal_()
    return model


def data() -> list[tuple[Tensor, Tensor]]:
    return [(images(batch=4), torch.tensor([1, 5, 0, 9])), (images((3, 96, 96)), torch.tensor([2, 2]))]


def hidden(model: nn.Module) -> dict[str, int | None]:
    return {site.path: site.rd_channels for site in find_se(model, SIZE)}


# ---------------------------------------------------------------------------------------------------- SEs alone


def test_what_goes_is_the_least_important_of_all_and_the_rest_stays_as_it_was() -> None:
    """Importance by hand: the norm of a channel's weights in and out, relative to the mean of its SE."""
    model = operated()
    before = {path: copy.deepcopy(model.get_submodule(path)) for path in hidden(model)}
    importance = {}
    for path, se in before.items():
        ins, outs = se.fc1.weight.flatten(1).square().sum(1), se.fc2.weight.flatten(1).square().sum(0)
        score = (ins + outs) / 2
        importance[path] = score / score.mean()
    prune_se(model, 0.5, example_input=SIZE)
    ranked = sorted((v, path, i) for path, score in importance.items() for i, v in enumerate(score.tolist()))
    gone = {(path, i) for _, path, i in ranked[: len(ranked) // 2]}
    assert len(ranked) == 2 * (4 + 8 + 16 + 32)
    for path, se in before.items():
        kept = [i for i in range(se.fc1.out_channels) if (path, i) not in gone]
        assert len({se.fc1.out_channels for se in before.values()}) == 4 and kept
        pruned = model.get_submodule(path)
        assert isinstance(pruned, SqueezeExcite) and not pruned.training
        assert torch.equal(pruned.fc1.weight, se.fc1.weight[kept])
        assert torch.equal(pruned.fc2.weight, se.fc2.weight[:, kept])
    assert sum(hidden(model).values()) == len(ranked) // 2


def test_a_channel_that_does_nothing_goes_and_the_outputs_stay() -> None:
    """With a loader: channels whose weights out are zero have no gradient and no effect, however large those in."""
    model = operated(bias=(True, False))
    dead = {"layer1.0.se": [1, 2], "layer3.1.se": list(range(10)), "layer4.0.se": list(range(20))}
    with torch.no_grad():
        for path in hidden(model):
            se = model.get_submodule(path)
            se.fc1.bias.fill_(1.0)
            for channel in dead.get(path, []):
                se.fc1.weight[channel] *= 100
                se.fc2.weight[:, channel] = 0
    expected, widths = run(model, images()), hidden(model)
    by_magnitude = prune_se(copy.deepcopy(model), 32 / 120, example_input=SIZE)
    left = by_magnitude.layer1[0].se.fc2.weight.flatten(1).abs().sum(0)
    assert (left == 0).sum() == 2, "by magnitude those are the best"
    prune_se(model, 32 / 120, data(), example_input=SIZE)
    assert hidden(model) == {path: width - len(dead.get(path, [])) for path, width in widths.items()}
    for one, other in zip(run(model, images()), expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_every_se_keeps_one_and_the_flags_stay() -> None:
    model = operated()
    with torch.no_grad():
        model.layer1[0].se.fc1.weight.mul_(1e-6)
        model.layer1[0].se.fc2.weight.mul_(1e-6)
    model.layer2[0].se.fc1.weight.requires_grad_(False)
    prune_se(model, 0.9, data(), example_input=SIZE)
    assert all(width >= 1 for width in hidden(model).values()) and sum(hidden(model).values()) == 12
    assert not model.layer2[0].se.fc1.weight.requires_grad and model.layer2[0].se.fc2.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    model(images()).sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_every_module_trains_or_evaluates_as_before(training: bool) -> None:
    model = operated().train(training)
    model.layer1[0].se.fc1.train(not training)
    before = {path: module.training for path, module in model.named_modules()}
    prune_se(model, 0.5, example_input=SIZE)
    assert {path: module.training for path, module in model.named_modules()} == before


def test_an_se_in_two_places_is_narrowed_in_both() -> None:
    model = timm.create_model("seresnet18")
    model.layer1[1].se = model.layer1[0].se
    before = model.layer1[0].se.fc1.out_channels
    prune_se(model, 0.9, where="layer1.0.se", example_input=SIZE)
    assert model.layer1[1].se is model.layer1[0].se and model.layer1[0].se.fc1.out_channels < before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("loader", [None, data()], ids=["magnitude", "gradients"])
def test_where_gradients_are_off_the_same_goes(mode: Any, loader: Any) -> None:
    model, other = operated(), operated()
    prune_se(model, 0.5, loader, example_input=SIZE)
    with mode():
        prune_se(other, 0.5, loader, example_input=SIZE)
    assert hidden(model) == hidden(other)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]) and not value.is_inference()
    other(images()).sum().backward()


class WithNorm(toys.Trunk):
    """timm's SE with a normalisation between its layers."""

    def __init__(self) -> None:
        super().__init__(toys.Basic(8, 8), SEModule(8, rd_channels=4, norm_layer=nn.BatchNorm2d))
        randomise(self.eval())


# Models with SEs of other kinds, and their origin.
OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm": (lambda: build("seresnet18", **NARROW), "timm"),
    "timm's EfficientNet": (lambda: build("mobilenetv3_small_050"), "timm"),
    "torchvision": (lambda: build("torchvision/mobilenet_v3_small"), "torchvision"),
    "a norm inside": (WithNorm, "timm"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_ses_of_any_kind_are_narrowed_and_come_back_from_the_recipe(name: str) -> None:
    make, origin = OTHERS[name]
    model, base = make(), make()
    before, recorded = hidden(model), len(recipe_of(base)["operations"])
    prune_se(model, 0.25, origin=origin, example_input=SIZE)
    after = hidden(model)
    assert sum(before.values()) - sum(after.values()) == int(0.25 * sum(before.values()))
    model(images()).sum().backward()
    recipe = json.loads(json.dumps(recipe_of(model)))
    assert len(recipe["operations"]) == recorded + 1
    recipe["operations"] = recipe["operations"][recorded:]
    again = apply_recipe(base, recipe, SIZE)
    again.load_state_dict(model.state_dict())
    assert_same(run(again, images()), run(model, images()))


# ------------------------------------------------------------------------------------------------------ whole networks


def pruned(model: nn.Module, ratio: float = 0.5) -> nn.Module:
    score = tp.importance.GroupMagnitudeImportance()
    with warnings.catch_warnings():
        # Of an SE's scalar, which it leaves alone.
        warnings.filterwarnings("ignore", "Unwrapped parameters detected", UserWarning)
        pruner = tp.pruner.BasePruner(model, importance=score, pruning_ratio=ratio, **to_pruner_args(model, SIZE))
    with record_pruning(model, SIZE):
        pruner.step()
    return model


def assert_lives(name: str, model: nn.Module, folder: Path, base_args: dict[str, Any]) -> None:
    """Forward, backward, save, load; timm's methods; and the SEs can be taken out again."""
    model.train()(images(batch=2)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    expected = run(model.eval(), images())
    save_pretrained(model, folder, base=name, base_args=base_args, license="apache-2.0", example_input=SIZE)
    loaded = from_pretrained(folder).eval()
    assert_same(run(loaded, images()), expected)
    assert recipe_of(loaded)["operations"] == recipe_of(model)["operations"]
    assert [(n, p.shape) for n, p in loaded.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    for patient in (model, loaded):
        features = patient.forward_intermediates(images(), intermediates_only=True)
        assert [f.shape[1] for f in features] == [entry["num_chs"] for entry in patient.feature_info]
        other = copy.deepcopy(patient)
        other.reset_classifier(7)
        assert other(images()).shape == (2, 7)
        strip_se(other, example_input=SIZE)
        assert not find_se(other, SIZE) and other(images()).shape == (2, 7)
    add_se(model, existing="stack", example_input=SIZE)
    assert_same(run(model, images()), expected)


@pytest.mark.parametrize(
    ("name", "options", "base_args"),
    [
        ("resnet26", {"bias": True, "init": "paper"}, {"num_classes": 9}),
        ("mobilenetv2_035", {"gate": "tanh"}, {}),
    ],
)
def test_small_operated_networks_are_pruned_whole(tmp_path: Path, name: str, options: dict, base_args: dict) -> None:
    model = add_se(timm.create_model(name, **base_args), example_input=SIZE, **options)
    before = sum(p.numel() for p in model.parameters())
    pruned(model)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    assert all(site.channels % 2 == 0 for site in find_se(model, SIZE))
    assert_lives(name, model, tmp_path, base_args)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2_100", "densenet121"])
def test_operated_networks_are_pruned_whole(tmp_path: Path, name: str) -> None:
    model = add_se(timm.create_model(name), bias=True, init="paper", example_input=SIZE)
    before = sum(p.numel() for p in model.parameters())
    pruned(model)
    assert sum(p.numel() for p in model.parameters()) < 0.4 * before
    assert_lives(name, model, tmp_path, {})


def test_pruning_after_pruning_and_in_any_order() -> None:
    """SEs first, then all, then SEs again; each is an operation, and all are done again on a fresh base."""
    base = build("resnet18", **NARROW)
    model = add_se(copy.deepcopy(base), r=2, example_input=SIZE)
    prune_se(model, 0.3, example_input=SIZE)
    prune_se(pruned(model, 0.25), 0.3, stages=4, example_input=SIZE)
    assert [operation["op"] for operation in recipe_of(model)["operations"]] == ["add", "prune", "prune", "prune"]
    again = apply_recipe(base, recipe_of(model), SIZE)
    again.load_state_dict(model.state_dict())
    assert_same(run(again, images()), run(model, images()))


def test_ses_that_were_pruned_are_stripped_as_others_are() -> None:
    base = build("resnet18", **NARROW)
    model = add_se(copy.deepcopy(base), r=2, example_input=SIZE)
    strip_se(prune_se(model, 0.5, example_input=SIZE), origin="se_surgery", example_input=SIZE)
    assert recipe_of(model)["operations"] == [] and repr(model) == repr(base)
    assert_same(run(model, images()), run(base, images()))
    stripped = strip_se(pruned(add_se(model, r=2, example_input=SIZE)), origin="se_surgery", example_input=SIZE)
    assert [operation["op"] for operation in recipe_of(stripped)["operations"]] == ["add", "prune", "strip"]
    assert_differs([base.fc.weight], [stripped.fc.weight])


def test_native_ses_from_before_the_pruning_do_not_come_back() -> None:
    model = add_se(build("seresnet18", **NARROW), r=2, existing="replace", example_input=SIZE)
    pruned(model)
    before = snapshot(model)
    with pytest.raises(PatientError, match=r"'layer1.0.se' was replaced before the network was pruned"):
        strip_se(model, origin="se_surgery", example_input=SIZE)
    assert differences(before, snapshot(model)) == []
    assert find_se(strip_se(model, example_input=SIZE), SIZE) == []


# ------------------------------------------------------------------------------------------------------------- refused


def grows(model: nn.Module) -> None:
    model.extra = nn.Linear(2, 2)


def half_way(model: nn.Module) -> None:
    for conv in (model.layer1[0].conv1, model.layer1[0].bn1):
        tp.prune_conv_out_channels(conv, [0]) if isinstance(conv, nn.Conv2d) else tp.prune_batchnorm_out_channels(
            conv, [0]
        )
    model.eval()
    raise KeyError("half-way")


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda model: None, NothingToDoError, "Nothing was pruned"),
        (grows, SurgeryError, "'extra' came or went"),
        (half_way, KeyError, "half-way"),
    ],
)
def test_what_goes_wrong_in_the_block_is_taken_back(act: Any, error: type[Exception], text: str) -> None:
    model = operated().train()
    before = snapshot(model)
    with pytest.raises(error, match=text), record_pruning(model, SIZE):
        act(model)
    assert differences(before, snapshot(model)) == []


BAD: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "nothing": (operated, (0.0,), {}, OptionError, "ratio=0.0 is no share"),
    "all": (operated, (1.0,), {}, OptionError, "ratio=1.0 is no share"),
    "text": (operated, ("half",), {}, OptionError, "ratio='half' is no share"),
    "true": (operated, (True,), {}, OptionError, "ratio=True is no share"),
    "too little": (operated, (0.001,), {}, NothingToDoError, "of 120 hidden channels, one of each SE kept, is none"),
    "no SE": (lambda: build("resnet18", **NARROW), (0.5,), {}, NothingToDoError, "No SE of two layers"),
    "no hidden layer": (lambda: operated(attn="eca"), (0.5,), {}, NothingToDoError, "No SE of two layers"),
    "other attention": (lambda: operated(attn="gc", stages=4), (0.5,), {}, NothingToDoError, "No SE of two layers"),
    "a stage without": (lambda: operated(stages=1), (0.5,), {"stages": 4}, NothingToDoError, "No SE of two layers"),
    "no such stage": (operated, (0.5,), {"stages": 9}, SurgeryError, "There is no stage 9"),
    "no such origin": (operated, (0.5,), {"origin": "keras"}, OptionError, "origin='keras' is not known"),
    "empty loader": (operated, (0.5, []), {}, SurgeryError, "gave no images"),
    "no labels": (operated, (0.5, [images()]), {}, SurgeryError, "gives no labels"),
    "labels out of range": (
        operated,
        (0.5, [(images(), [0, 10])]),
        {},
        DataError,
        "label 10, and the model has scores",
    ),
    "bytes": (
        operated,
        (0.5, [(images().byte(), [0, 1])]),
        {},
        DataError,
        "batch 1 of shape .2, 3, 64, 64., torch.uint8",
    ),
    "NaN": (operated, (0.5, [(images() * float("nan"), [0, 1])]), {}, SurgeryError, "not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_pruned_is_refused_and_the_model_left_alone(name: str) -> None:
    make, given, options, error, text = BAD[name]
    model = make().train()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        prune_se(model, *given, **options, example_input=SIZE)
    assert differences(before, snapshot(model)) == []


def test_without_torch_pruning_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(SurgeryError, match=r"pip install 'se-surgery\[prune\]'"):
        prune_se(operated(), 0.5, example_input=SIZE)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"path": "layer9"}, "narrows 'layer9', and here is no such module"),
        ({"shapes": {"weight": [5, 8, 1]}}, "'weight' of 'layer1.0.se.fc1' to"),
        ({"shapes": {"weight": [500, 8, 1, 1]}}, "'weight' of 'layer1.0.se.fc1' to"),
        ({"shapes": {"weight": [0, 8, 1, 1]}}, "'weight' of 'layer1.0.se.fc1' to"),
        ({"shapes": {"gamma": [1]}}, "'gamma' of 'layer1.0.se.fc1' to"),
        ({"attributes": {"forward": 1}}, "'forward' of 'layer1.0.se.fc1' to 1, and here it is None"),
        ({"attributes": {"training": 1}}, "'training' of 'layer1.0.se.fc1' to 1, and here it is"),
        ({"attributes": {"out_channels": "3"}}, "The recipe is damaged"),
        ({"attributes": {"out_channels": -3}}, "The recipe is damaged"),
        ({"shapes": 3}, "The recipe is damaged"),
        ({"size": 3}, "The recipe is damaged"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_and_the_base_left_alone(change: dict[str, Any], text: str) -> None:
    base = build("resnet18", **NARROW)
    recipe = recipe_of(prune_se(add_se(copy.deepcopy(base), r=2, example_input=SIZE), 0.5, example_input=SIZE))
    recipe = json.loads(json.dumps(recipe))
    first = recipe["operations"][-1]["sites"][0]
    assert first["path"] == "layer1.0.se.fc1" and set(first) == {"path", "shapes", "attributes"}
    first.update(change)
    before = snapshot(base)
    with pytest.raises(SurgeryError, match=text):
        apply_recipe(base, recipe, SIZE)
    assert differences(before, snapshot(base)) == []
