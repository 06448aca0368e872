"""Weights of SE networks made elsewhere: onto a grafted model bit for bit, back again, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from patients import (
    assert_differs,
    assert_same,
    build,
    differences,
    images,
    randomise,
    run,
    snapshot,
)
from timm.models.resnet import Bottleneck
from timm.models.senet import SENet, SEResNeXtBottleneck
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import SqueezeExcitation
from toys import ExcitationSE, ExpandSE, FunctionalBlock, HoldsSE, SequenceSE, Trunk, TwoLayerSE

from se_surgery import (
    CheckpointError,
    NothingToDoError,
    OptionError,
    PatientError,
    SurgeryError,
    add_se,
    export_se,
    find_se,
    load_se,
    recipe_of,
    verify,
)

# A ResNet-18 of stages of 16 to 128 channels.
NARROW = {"channels": (16, 32, 64, 128)}
PLAIN = {"bias": True, "init": "paper"}
TIMM = {**PLAIN, "rd_divisor": 8}


def resnet18(**options):
    return add_se(build("resnet18", **NARROW), **{**TIMM, **options}).eval()


def assert_values(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Every value of the model is the one expected, bit for bit, and none else is."""
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert not [key for key, value in state.items() if not torch.equal(value, expected[key])]


# ------------------------------------------------------------------------------------------- whole networks, elsewhere


class ByHand(BasicBlock):
    """What a user of torchvision writes: its own SE in its own block."""

    NAME = "attention"

    def __init__(self, inplanes, planes, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.add_module(self.NAME, SqueezeExcitation(planes, planes // 16))

    def forward(self, x):
        out = self.get_submodule(self.NAME)(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def by_hand(block):
    torch.manual_seed(5)
    return randomise(ResNet(block, [1, 1, 1, 1])).eval()


def of_tinynet():
    """Hidden widths of timm's SEs are a quarter of what goes into the block, which is expanded by six."""
    return add_se(
        build("tinynet_e"), "inner", r={1: 4, 2: 24, 3: 24, 4: 24, 5: 24}, act="silu", existing="replace", **PLAIN
    )


def of_mobilenet():
    model = build("torchvision/mobilenet_v3_small")
    units = [site.unit for site in find_se(model)]
    return add_se(model, "inner", r=4, where=units, gate="hard_sigmoid", existing="replace", **TIMM)


# A network made elsewhere, ours for its weights, and where in its units its SEs are.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "seresnet18": (lambda: build("seresnet18", **NARROW), resnet18, "layer1.0.se.fc1"),
    "legacy_seresnet18": (
        lambda: build("legacy_seresnet18"),
        lambda: add_se(build("legacy_seresnet18"), existing="replace", **PLAIN),
        "layer1.0.se_module.fc1",
    ),
    "torchvision by hand": (
        lambda: by_hand(ByHand),
        lambda: add_se(by_hand(BasicBlock), **PLAIN),
        "layer1.0.attention.fc1",
    ),
    "tinynet_e": (lambda: build("tinynet_e"), of_tinynet, "blocks.0.0.se.conv_reduce"),
    "mobilenet_v3_small": (
        lambda: build("torchvision/mobilenet_v3_small"),
        of_mobilenet,
        "features.1.block.1.fc1",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name):
    """Logits are bit-equal to those of the network that the weights are of, in both modes."""
    create, operate, layer = NETWORKS[name]
    theirs, ours = create(), operate().eval()
    assert_differs(run(ours, images()), run(theirs, images()))
    state = theirs.state_dict()
    report = load_se(ours, state)
    assert f"{layer}.weight" in report.ses[0].keys.values()
    taken = [*report.base, *(key for se in report.ses for key in se.keys.values())]
    assert sorted(taken) == sorted(state), "every tensor of theirs is in the report once"
    assert not report.kept and not report.aside
    for training in (False, True):
        assert_same(run(ours, images(), training), run(theirs, images(), training))


def test_linear_layers_of_write_ups():
    """Four forms of Linear and 1x1 layers, with both biases, none, or one, onto as many operations."""
    forms = (SequenceSE, ExpandSE, ExcitationSE, TwoLayerSE)
    theirs = randomise(Trunk(*(HoldsSE(8, form(8)) for form in forms))).eval()
    ours = Trunk(*(HoldsSE(8, nn.Identity()) for _ in forms))
    for i, bias in enumerate((False, True, True, (False, True))):
        add_se(ours, r=4, where=f"blocks.{i}", bias=bias, init="paper")
    report = load_se(ours.eval(), theirs.state_dict())
    assert [(se.source, se.layers) for se in report.ses] == [
        ("blocks.0.attention.sequence", ("0", "2")),
        ("blocks.1.attention.fc", ("0", "2")),
        ("blocks.2.attention.excitation", ("0", "2")),
        ("blocks.3.attention", ("fc0", "fc1")),
    ]
    linear, ses = theirs.blocks[3].attention, [block.get_submodule("se") for block in ours.blocks]
    assert torch.equal(ses[3].fc1.weight, linear.fc0.weight[:, :, None, None])
    assert torch.equal(ses[3].fc2.weight, linear.fc1.weight[:, :, None, None])
    assert torch.equal(ses[3].fc2.bias, linear.fc1.bias) and ses[3].fc1.bias is None
    assert torch.equal(ses[0].fc2.weight.flatten(1), theirs.blocks[0].attention.sequence[2].weight)
    x = images((3, 32, 32))
    # A Linear layer and a convolution of one position may add in another order.
    torch.testing.assert_close(run(ours, x)[0], run(theirs, x)[0], rtol=1e-5, atol=1e-6)


def test_a_legacy_senet_is_no_resnet():
    """Its base has all the shapes of a ResNet and pools otherwise, so that only its SEs are taken. In a ResNet that is
    made to pool as it does, its whole function comes out bit-equal.
    """
    torch.manual_seed(5)
    theirs = randomise(SENet(SEResNeXtBottleneck, (1, 1, 1, 1), groups=32, reduction=16)).eval()
    ours = add_se(randomise(timm.models.resnet.ResNet(Bottleneck, (1, 1, 1, 1), cardinality=32, base_width=4)), **PLAIN)
    state = theirs.state_dict()
    text = refusal(ours.eval(), state)
    assert "timm's legacy_senet or Cadene's" in text and text.endswith("take its SEs alone with base=False.")
    report = load_se(ours, state, base=False)
    assert not report.base and len(report.aside) == len(state) - 4 * 4
    named = {key.replace("layer0.", "").replace("last_linear.", "fc."): state[key] for key in report.aside}
    missing, unexpected = ours.load_state_dict(named, strict=False)
    assert not unexpected and len(missing) == 4 * 4
    assert_differs(run(ours, images()), run(theirs, images()))
    ours.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    assert_same(run(ours, images()), run(theirs, images()))


def test_ses_alone_leave_the_base_as_it_is():
    """SEs in a Sequential around a norm, which gives the base other names: with base=False these stay aside."""
    theirs, ours = by_hand(BasicBlock), add_se(by_hand(BasicBlock), stages=[3, 4], **PLAIN)
    for layer in (theirs.layer3, theirs.layer4):
        planes = layer[0].bn2.num_features
        layer[0].bn2 = nn.Sequential(layer[0].bn2, SqueezeExcitation(planes, planes // 16))
    assert_differs(run(ours, images()), run(theirs, images()))
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    refusal(ours, theirs.state_dict())
    report = load_se(ours, theirs.state_dict(), base=False)
    assert [(se.path, se.source) for se in report.ses] == [
        ("layer3.0.se", "layer3.0.bn2.1"),
        ("layer4.0.se", "layer4.0.bn2.1"),
    ]
    assert "layer3.0.bn2.0.weight" in report.aside and "fc.weight" in report.aside
    assert_values(ours, {**before, **{k: theirs.state_dict()[key] for se in report.ses for k, key in se.keys.items()}})
    assert_same(run(ours, images()), run(theirs, images()))


# --------------------------------------------------------------------------------------------------------- a small one


def small(**options):
    """Two residual units of 8 channels, each with an SE of 8 -> 4, as fast as it gets."""
    return add_se(build("toy/Functional"), **{"r": 2, **PLAIN, **options})


def trained(**options):
    torch.manual_seed(99)
    model = small(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def foreign(style="legacy", base=True, **options):
    return export_se(trained(**options), style, base=base)


def without(state: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in keys}


def only_ses(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if ".se" in key}


def test_ses_only_take_ses_only():
    ours = small()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    report = load_se(ours, foreign(base=False))
    assert not report.base and not report.aside
    assert_values(ours, {**before, **only_ses(trained().state_dict())})


def test_layers_as_wide_as_the_map_are_told_apart_by_number_or_name():
    """With r=1 shapes tell nothing: the number or the word in the names does, in whatever order the file has them."""
    theirs = foreign(r=1)
    ours = small(r=1)
    load_se(ours, dict(reversed(theirs.items())))
    assert_values(ours, trained(r=1).state_dict())
    for names in (("reduce", "expand"), ("squeeze", "excite"), ("excite", "squeeze"), ("left", "right")):
        named = {renamed(key, dict(zip(("fc1", "fc2"), names, strict=True))): value for key, value in theirs.items()}
        if names[0] in ("reduce", "squeeze"):
            ours = small(r=1)
            load_se(ours, dict(reversed(named.items())))
            assert_values(ours, trained(r=1).state_dict())
    text = refusal(small(r=1), named)
    assert "SEs that cannot be told apart: blocks.0.se (8 -> 8 -> 8, the checkpoint has" in text
    assert "Rename the tensors of each" in text


def renamed(key: str, names: Mapping[str, str]) -> str:
    return ".".join(names.get(name, name) for name in key.split("."))


# Where others write an SE out in a block's own forward: what its layers are called below the block.
WRITTEN_OUT = {
    "efficientnet_pytorch, smp, MONAI": ("_se_reduce", "_se_expand"),
    "one module in another": ("se.reduce.conv", "se.expand.conv"),
    "squeeze and excite": ("squeeze", "excite"),
    "numbers": ("fc1", "fc2"),
}


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("names", WRITTEN_OUT.values(), ids=WRITTEN_OUT)
def test_layers_that_lie_in_the_block_itself(names, r):
    """In a file that has them in another order."""
    state = trained(r=r).state_dict()
    first, second = names
    theirs = {key.replace(".se.fc1.", f".{first}.").replace(".se.fc2.", f".{second}."): state[key] for key in state}
    ours = small(r=r)
    report = load_se(ours, dict(reversed(theirs.items())))
    assert_values(ours, state)
    assert {key for se in report.ses for key in se.keys.values()} == theirs.keys() - state.keys()


def test_a_pair_of_names_is_told_from_other_layers_of_its_widths():
    state = trained().state_dict()
    theirs = {key.replace(".se.fc1.", "._se_reduce.").replace(".se.fc2.", "._se_expand."): state[key] for key in state}
    for key in [key for key in theirs if "_se_" in key]:
        theirs[key.replace("_se_expand", "_project_conv").replace("_se_reduce", "_expand_conv")] = theirs[key] + 1
    ours = small()
    load_se(ours, theirs, base=False)
    assert_values(ours, {**small().state_dict(), **only_ses(state)})


def test_other_ranks_of_weights():
    """Linear, and convolutions of one, two and three dimensions."""
    for ones in range(4):
        state = {
            key: value.reshape(*value.shape[:2], *[1] * ones) if value.dim() == 4 and ".se_" in key else value
            for key, value in foreign().items()
        }
        ours = small()
        load_se(ours, state)
        assert_values(ours, trained().state_dict())


def test_precision_follows_the_model():
    halves = {key: value.half() if value.is_floating_point() else value for key, value in foreign().items()}
    ours = small()
    load_se(ours, halves)
    assert ours.blocks[0].se.fc1.weight.dtype == torch.float32
    assert torch.equal(ours.blocks[0].se.fc1.weight, halves["blocks.0.se_module.fc1.weight"].float())
    half = add_se(build("toy/Functional:half"), r=2, **PLAIN)
    load_se(half, foreign())
    assert torch.equal(half.blocks[1].se.fc2.weight, foreign()["blocks.1.se_module.fc2.weight"].half())


def test_counters_that_old_checkpoints_lack_stay_as_they_are():
    ours, state = small(), {key: value for key, value in foreign().items() if "num_batches" not in key}
    ours.stem[1].num_batches_tracked.fill_(7)
    report = load_se(ours, state)
    assert len(report.kept) == 5 and all("num_batches" in key for key in report.kept)
    assert ours.stem[1].num_batches_tracked.item() == 7


def test_training_goes_on():
    """Parameters stay the optimizer's, with their gradients and flags, and modules in their modes."""
    state, ours = foreign(), small().train()
    ours.blocks[0].se.fc1.weight.grad = torch.ones_like(ours.blocks[0].se.fc1.weight)
    ours.stem[0].weight.requires_grad_(False)
    ours.blocks[0].eval()
    kept = [(id(p), p.requires_grad, None if p.grad is None else p.grad.sum().item()) for p in ours.parameters()]
    modes, random = [module.training for module in ours.modules()], torch.get_rng_state()
    load_se(ours, state)
    assert kept == [
        (id(p), p.requires_grad, None if p.grad is None else p.grad.sum().item()) for p in ours.parameters()
    ]
    assert modes == [module.training for module in ours.modules()]
    assert torch.equal(random, torch.get_rng_state())
    verify(ours, thorough=False)


# ------------------------------------------------------------------------------------------------------------- the way

AROUND: dict[str, tuple[Callable[[dict], Any], str]] = {
    "as it is": (lambda state: state, ""),
    "DataParallel": (lambda state: {f"module.{key}": value for key, value in state.items()}, "without 'module.'"),
    "compiled in Lightning": (
        lambda state: {"epoch": 3, "state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()}},
        "its 'state_dict', without 'model._orig_mod.'",
    ),
    "a script's": (lambda state: {"model": state, "optimizer": {"lr": 0.1}, "args": None}, "its 'model'"),
    "parameters": (lambda state: {key: nn.Parameter(v, v.is_floating_point()) for key, v in state.items()}, ""),
}


@pytest.mark.parametrize("case", AROUND)
def test_what_is_around_is_gone_through(case):
    wrap, said = AROUND[case]
    ours = small()
    report = load_se(ours, wrap(foreign()))
    assert_values(ours, trained().state_dict())
    assert str(report).startswith(f"The state dict{f' ({said})' if said else ''}: 2 SEs loaded\n")


def test_a_beginning_that_the_model_has_too_is_a_name():
    """SEs of one stage alone share a beginning, and it is theirs."""
    torch.manual_seed(1)
    theirs = add_se(build("toy/Functional"), where="blocks.1", r=2, **PLAIN)
    ours = add_se(build("toy/Functional"), where="blocks.1", r=2, **PLAIN)
    assert load_se(ours, export_se(theirs, base=False)).ses[0].source == "blocks.1.se"


@pytest.mark.parametrize("ending", ["safetensors", "pth", "pt", "bin", "pth.tar", "PTH"])
def test_files(ending, tmp_path):
    path, state, ours = tmp_path / f"weights.{ending}", foreign(), small()
    if ending == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 1}, path)
    report = load_se(ours, path if ending == "pt" else str(path))
    assert report.source.startswith(f"weights.{ending}")
    assert_values(ours, trained().state_dict())


def test_the_report():
    ours = small()
    report = load_se(ours, {**foreign(base=False), "head.weight": torch.zeros(3)}, base=False)
    assert str(report) == repr(report)
    assert [line.strip() for line in str(report).splitlines()] == [
        "The state dict: 2 SEs loaded",
        "from                     layers     SE                number   channels -> hidden   bias",
        "----------------------------------------------------------------------------------------",
        "blocks.[0-1].se_module   fc1, fc2   blocks.[0-1].se        2   8 -> 4               both",
        "",
        "The base's, as they were: 32 tensors "
        "(stem.0.weight, stem.1.weight, stem.1.bias, stem.1.running_mean, stem.1.running_var, and 27 more).",
        "",
        "The checkpoint's, left aside: 1 tensor (head.weight).",
        "",
        "Not in any checkpoint, and taken as the model has it: squeeze avg, activation ReLU, gate Sigmoid.",
    ]


def test_the_report_is_logged_and_nothing_is_printed(caplog, capsys):
    with caplog.at_level(logging.INFO, "se_surgery"):
        report = load_se(small(), foreign())
    assert [record.getMessage() for record in caplog.records] == [str(report)]
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------- gate scale


def test_gates_of_another_scale_are_refused():
    ours = small(init="identity")
    text = refusal(ours, foreign())
    assert "gates of another scale: blocks.0.se (2, the checkpoint's 1), blocks.1.se (2, the checkpoint's 1)" in text
    assert 'init="paper" or gate_scale=1.0' in text and text.endswith("so: load_se(gate_scale=2.0).")
    assert "blocks.0.se (1, the checkpoint's 2)" in refusal(small(), foreign(), gate_scale=2)
    load_se(small(init="identity", gate_scale=None), trained(init="identity").state_dict(), gate_scale=2)


def test_hard_sigmoids_have_a_scale_too():
    assert "gates of another scale" in refusal(small(gate="hard_sigmoid", init="identity"), foreign())
    load_se(small(gate="hard_sigmoid"), foreign())


def saved(model, path, recipe=None):
    """As this library writes a file of safetensors: with the recipe in the metadata."""
    recipe = json.dumps(recipe_of(model)) if recipe is None else recipe
    safetensors.torch.save_file(model.state_dict(), path, metadata={"format": "pt", "se_surgery": recipe})
    return path


def test_a_file_of_this_library_says_its_scale(tmp_path):
    path = saved(trained(init="identity"), tmp_path / "a.safetensors")
    ours = small(init="identity")
    load_se(ours, path)
    assert_values(ours, trained(init="identity").state_dict())
    assert "blocks.0.se (1, the checkpoint's 2)" in refusal(small(), path)
    load_se(small(), path, gate_scale=1.0)
    config = json.dumps({"architecture": "se_surgery", "model_args": {"recipe": recipe_of(ours)}})
    load_se(ours, saved(ours, tmp_path / "config.safetensors", config))
    mixed = add_se(add_se(build("toy/Functional"), r=2, where="blocks.0", **PLAIN), r=2, where="blocks.1", bias=True)
    load_se(mixed, saved(mixed, tmp_path / "mixed.safetensors"))
    assert "gates of another scale: blocks.1.se (2, the checkpoint's 1)" in refusal(mixed, foreign())


def test_own_parameters_beyond_the_layers(tmp_path):
    """A mix, and an activation that learns: this library's own state dicts have them."""
    for options in ({"gate": "tanh", "init": "identity"}, {"act": "prelu"}):
        ours = small(**options)
        load_se(ours, saved(trained(**options), tmp_path / "a.safetensors"))
        assert_values(ours, trained(**options).state_dict())
        assert "parameters that no SE made elsewhere has: blocks.0.se." in refusal(ours, foreign())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{", "The recipe in a.safetensors is damaged"),
        ("[]", "a.safetensors: This is not a recipe"),
        ('{"model_args": {}}', "a.safetensors: This is not a recipe"),
        ('{"format": "se_surgery.recipe", "version": 99}', "version 99"),
        ("[" * 100_000, "The recipe in a.safetensors is damaged"),
    ],
    ids=["no JSON", "no recipe", "a configuration without", "a newer one", "deep"],
)
def test_a_file_with_a_damaged_recipe(recipe, message, tmp_path):
    assert message in refusal(small(), saved(trained(), tmp_path / "a.safetensors", recipe))


@pytest.mark.parametrize("options", [{"gate": "no"}, {"gate_scale": "two"}, {"gate": []}], ids=str)
def test_a_recipe_with_odd_options(options, tmp_path):
    recipe = recipe_of(trained())
    recipe["operations"][0]["options"].update(options)
    text = refusal(small(), saved(trained(), tmp_path / "a.safetensors", json.dumps(recipe)))
    assert "recipe" in text and "is damaged" in text


# -------------------------------------------------------------------------------------------------------------- refused


def refusal(model: nn.Module, source: Any, error: type[SurgeryError] = CheckpointError, **options: Any) -> str:
    """The text of the error; the model is what it was, bit for bit."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        load_se(model, source, **options)
    assert not differences(before, snapshot(model))
    assert str(caught.value).endswith("."), "the last sentence says what to do"
    return str(caught.value)


SE = "blocks.1.se_module."
NAN = float("nan")


def changed(**values: Any) -> Callable[[dict], dict]:
    """Some tensors of the second SE replaced, or with None left out; `fc1__bias` is `fc1.bias`."""
    named = {SE + key.replace("__", "."): value for key, value in values.items()}
    return lambda state: {key: value for key, value in {**state, **named}.items() if value is not None}


# What is done to a good checkpoint, and parts of what is said of it.
SPOILED: dict[str, tuple[Callable[[dict], Any], tuple[str, ...]]] = {
    "an SE without tensors": (
        changed(fc1__weight=None, fc1__bias=None, fc2__weight=None, fc2__bias=None),
        ("SEs without tensors: blocks.1.se.", "Operate on just the units"),
    ),
    "an SE more": (
        lambda state: {**state, **{key.replace("blocks.1", "blocks.2"): v for key, v in only_ses(state).items()}},
        ("tensors of SEs that the model lacks: blocks.2.se_module.fc1.weight", "Operate on just the units"),
    ),
    "half an SE": (changed(fc2__weight=None), ("SEs of other widths: blocks.1.se (8 -> 4 -> 8, the checkpoint has",)),
    "no layers": (
        changed(fc1__weight=torch.ones(4), fc2__weight=torch.ones(8, 4, 3, 3)),
        ("the checkpoint has no Linear layer and no convolution of one position)",),
    ),
    "another width": (
        changed(fc1__weight=torch.ones(2, 8, 1, 1), fc2__weight=torch.ones(8, 2, 1, 1)),
        (f"the checkpoint has {SE}fc1 8 -> 2 and {SE}fc2 2 -> 8)", "with r, rd_channels or rd_divisor."),
    ),
    "the other way round": (
        changed(fc1__weight=torch.ones(8, 8, 1, 1), fc2__weight=torch.ones(4, 8, 1, 1)),
        ("SEs of other widths",),
    ),
    "three layers": (
        changed(fc3__weight=torch.ones(8, 4)),
        ("SEs that cannot be told apart: blocks.1.se", f"{SE}fc2 4 -> 8 and {SE}fc3 4 -> 8", "Rename the tensors"),
    ),
    "no bias": (
        changed(fc1__bias=None),
        ("other biases: blocks.1.se (bias=(True, True), the checkpoint's (False, True))", "checkpoint's biases"),
    ),
    "a bias of another width": (changed(fc1__bias=torch.ones(8)), (f"{SE}fc1.bias is (8,) and not (4,)",)),
    "a normalisation inside": (changed(bn__weight=torch.ones(4)), (f"tensors that are nobody's: {SE}bn.weight.",)),
    "an unknown tensor": (lambda state: {**state, "odd": torch.ones(1)}, ("nobody's: odd.", "with base=False.")),
    "a part of the base": (
        lambda state: without(state, "head.weight", "stem.1.bias"),
        ("tensors of the base that are missing: stem.1.bias, head.weight.", "with base=False."),
    ),
    "another classifier": (
        lambda state: {**state, "head.bias": torch.ones(3)},
        ("tensors that do not fit: head.bias is (3,) and not (10,).",),
    ),
    "a base's tensor in another layout": (
        lambda state: {**state, "head.weight": state["head.weight"][:, :, None, None]},
        ("head.weight is (10, 8, 1, 1) and not (10, 8)",),
    ),
    "not a number": (changed(fc1__bias=torch.tensor([0, NAN, 0, 0])), (f"{SE}fc1.bias holds NaN or infinity",)),
    "infinity in the base": (
        lambda state: {**state, "head.bias": torch.full((10,), float("inf"))},
        ("head.bias holds NaN or infinity",),
    ),
    "too large": (
        lambda state: {**state, "head.bias": torch.full((10,), 1e300, dtype=torch.float64)},
        ("head.bias is too large for torch.float32",),
    ),
    "integers": (changed(fc1__bias=torch.ones(4, dtype=torch.int64)), (f"{SE}fc1.bias is of torch.int64",)),
    "booleans": (
        lambda state: {**state, "stem.1.num_batches_tracked": torch.tensor(True)},
        ("stem.1.num_batches_tracked is of torch.bool",),
    ),
    "fractions as counters": (
        lambda state: {**state, "stem.1.num_batches_tracked": torch.tensor(0.5)},
        ("stem.1.num_batches_tracked is of torch.float32",),
    ),
    "complex numbers": (changed(fc1__bias=torch.ones(4, dtype=torch.cfloat)), (f"{SE}fc1.bias is of torch.complex64",)),
    "a negative variance": (
        lambda state: {**state, "stem.1.running_var": -state["stem.1.running_var"]},
        ("stem.1.running_var is a negative variance",),
    ),
    "no values": (changed(fc1__bias=torch.ones(4, device="meta")), (f"{SE}fc1.bias has no values to read",)),
    "sparse": (changed(fc1__bias=torch.ones(4).to_sparse()), (f"{SE}fc1.bias has no values to read",)),
    "a number among the tensors": (lambda state: {**state, "epoch": 3}, ("holds no state dict ('epoch' is int)",)),
    "a number as a name": (lambda state: {**state, 3: torch.ones(1)}, ("holds no state dict (3 is Tensor)",)),
    "nothing": (lambda state: {}, ("The state dict is dict and holds no state dict.",)),
    "two state dicts": (
        lambda state: {"state_dict": state, "state_dict_ema": state},
        ("holds 2 state dicts, 'state_dict', 'state_dict_ema'. Load it, and give one of them.",),
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled(case):
    spoil, parts = SPOILED[case]
    text = refusal(small(), spoil(foreign()))
    missing = [part for part in parts if part not in text]
    assert not missing, text


def test_all_that_is_wrong_is_said_at_once():
    """Five of a kind, and how many more there are."""
    state = without(foreign(), SE + "fc1.bias", "head.weight")
    text = refusal(small(init="identity"), {**state, **{f"odd{i}": torch.ones(1) for i in range(7)}})
    assert text.startswith("The state dict does not fit this Functional. It has gates of another scale: blocks.0.se")
    assert "SEs with other biases: blocks.1.se" in text and "base that are missing: head.weight" in text
    assert "nobody's: odd0, odd1, odd2, odd3, odd4, and 2 more." in text


def test_ses_of_the_same_make_are_not_left_aside():
    """With base=False whatever is not an SE's stays aside, but not the SE of a unit that has none here."""
    ours = add_se(build("toy/Functional"), where="blocks.0", r=2, **PLAIN)
    text = refusal(ours, foreign(), base=False)
    assert f"tensors of SEs that the model lacks: {SE}fc1.weight, {SE}fc1.bias, {SE}fc2.weight, {SE}fc2.bias." in text


def test_two_ses_in_a_unit():
    """Only the model's own names tell them apart."""
    ours = small()
    add_se(ours, "post", r=2, existing="stack", **PLAIN)
    state = {key: torch.randn_like(value) for key, value in only_ses(ours.state_dict()).items()}
    load_se(ours, state)
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in state.items())
    text = refusal(ours, {key.replace(".se.", ".gate."): value for key, value in state.items()})
    assert "cannot be told apart: blocks.0.gate.fc1.weight (of blocks.0.se or blocks.0.se_post)" in text
    assert "SEs without tensors: blocks.0.se, blocks.1.se" in text


MODELS: dict[str, tuple[Callable[[], Any], type[SurgeryError], str]] = {
    "no SE": (lambda: build("toy/Functional"), NothingToDoError, "This Functional holds no SE of this library"),
    "another attention": (lambda: small(attn="eca", bias=False), PatientError, "'blocks.0.se' is a Attention and not"),
    "wrapped": (lambda: nn.DataParallel(small()), PatientError, "wrapped or compiled by DataParallel"),
    "on meta": (lambda: small().to("meta"), PatientError, "on the meta device and has no values"),
    "no model": (lambda: nn.ParameterDict({"a": torch.ones(1)})["a"], PatientError, "is not an nn.Module"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_loaded_into(case):
    create, error, message = MODELS[case]
    for verb in (lambda model: load_se(model, foreign()), export_se):
        with pytest.raises(error, match=message):
            verb(create())


def test_a_place_that_cannot_be_written_to():
    """Found out half-way: what has been written by then is put back."""
    ours = small()
    ours.blocks[1].se.fc2.bias.data = torch.zeros(1).expand(8)
    assert "'blocks.1.se.fc2.bias' of the model cannot be written to" in refusal(ours, foreign(), PatientError)


@pytest.mark.parametrize("scale", [0, -1, float("inf"), NAN, "2", True])
def test_scales_that_mean_nothing(scale):
    assert "is no factor" in refusal(small(), foreign(), OptionError, gate_scale=scale)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_evil_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    hit = tmp_path / "hit"
    pickle.loads(pickle.dumps(Evil(hit)))
    assert hit.exists(), "it does run where it is let"
    hit.rmdir()
    for ending, zipped in (("pth", True), ("pt", False), ("bin", True), ("pth.tar", True)):
        path = tmp_path / f"evil.{ending}"
        torch.save({**foreign(), "evil": Evil(hit)}, path, _use_new_zipfile_serialization=zipped)
        text = refusal(small(), path)
        assert "cannot be read as tensors alone (UnpicklingError" in text and "No code of a file is run here" in text
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Evil(hit)))
    refusal(small(), tmp_path / "bare.pth")
    assert not hit.exists()


def a_whole_module(path):
    torch.save(nn.Linear(1, 1), path)


FILES: dict[str, tuple[str, Callable[[Any], Any], type[SurgeryError], str]] = {
    "missing": ("a.pth", lambda path: None, CheckpointError, "a.pth' cannot be read (No such file"),
    "missing safetensors": ("a.safetensors", lambda path: None, CheckpointError, "a.safetensors' cannot be read"),
    "empty": ("a.pt", lambda path: path.write_bytes(b""), CheckpointError, "cannot be read as tensors alone"),
    "cut": ("a.bin", lambda path: path.write_bytes(b"PK\x03\x04"), CheckpointError, "cannot be read as tensors alone"),
    "no safetensors": ("a.safetensors", lambda path: path.write_bytes(b"PK"), CheckpointError, "cannot be read"),
    "a module": ("a.pth", a_whole_module, CheckpointError, "save the state_dict() of what is in it"),
    "a list": ("a.pth", lambda path: torch.save([1], path), CheckpointError, "a.pth is list and holds no state dict"),
    "another ending": ("a.npz", lambda path: path.write_bytes(b""), OptionError, "has none of the endings"),
    "a folder": ("a", lambda path: path.mkdir(), OptionError, "has none of the endings"),
    "a folder of that name": ("a.pth", lambda path: path.mkdir(), CheckpointError, "cannot be read"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_none(case, tmp_path):
    name, write, error, message = FILES[case]
    write(tmp_path / name)
    assert message in refusal(small(), tmp_path / name, error)


def test_a_file_that_is_refused_does_not_come_with_how_to_run_its_code(tmp_path):
    a_whole_module(tmp_path / "a.pth")
    text = refusal(small(), tmp_path / "a.pth")
    assert "(UnpicklingError: Weights only load failed). No code" in text and "\x1b" not in text


@pytest.mark.parametrize("source", [3, None, [("a", torch.ones(1))], nn.Linear(1, 1)], ids=lambda s: type(s).__name__)
def test_what_is_no_checkpoint(source):
    assert f"A {type(source).__name__} is no checkpoint" in refusal(small(), source, OptionError)


# --------------------------------------------------------------------------------------------------------- the way back

STYLES = {
    "timm": ("blocks.0.se.fc1.weight", (4, 8, 1, 1)),
    "legacy": ("blocks.0.se_module.fc1.weight", (4, 8, 1, 1)),
    "torchvision": ("blocks.0.se.fc1.weight", (4, 8, 1, 1)),
    "linear": ("blocks.0.se.fc.0.weight", (4, 8)),
}


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_there_and_back(style, base):
    theirs, ours = trained(), small()
    state = export_se(theirs, style, base=base)
    name, shape = STYLES[style]
    assert tuple(state[name].shape) == shape
    assert len(state) == (32 if base else 0) + 2 * 4
    assert ("stem.0.weight" in state) == base
    expected = theirs.state_dict() if base else {**ours.state_dict(), **only_ses(theirs.state_dict())}
    assert_differs([ours.blocks[0].se.fc1.weight], [theirs.blocks[0].se.fc1.weight])
    load_se(ours, state)
    assert_values(ours, {key: value.clone() for key, value in expected.items()})


def test_what_is_exported_is_a_copy():
    model = trained()
    before = snapshot(model)
    for value in export_se(model, "linear").values():
        value.zero_()
    assert not differences(before, snapshot(model))


class ByHandNamed(ByHand):
    """The same with its SE under the name that the style has."""

    NAME = "se"


class LinearBlock(FunctionalBlock):
    def __init__(self, width):
        super().__init__(width)
        self.se = ExpandSE(width, 2)

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.se(y) + x)


# A style, ours, and the network that loads what comes of it, strictly.
READERS = {
    "timm": (resnet18, lambda: timm.create_model("seresnet18", **NARROW)),
    "legacy": (
        lambda: add_se(build("legacy_seresnet18"), existing="replace", **PLAIN),
        lambda: timm.create_model("legacy_seresnet18"),
    ),
    "torchvision": (lambda: add_se(by_hand(BasicBlock), **PLAIN), lambda: ResNet(ByHandNamed, [1, 1, 1, 1])),
    "linear": (trained, lambda: Trunk(LinearBlock(8), LinearBlock(8))),
}


@pytest.mark.parametrize("style", READERS)
def test_networks_made_elsewhere_load_it(style):
    operate, create = READERS[style]
    ours, theirs = operate().eval(), create().eval()
    theirs.load_state_dict(export_se(ours, style), strict=True)
    x = images((3, 32, 32))
    if style == "linear":
        torch.testing.assert_close(run(ours, x)[0], run(theirs, x)[0], rtol=1e-5, atol=1e-6)
    else:
        assert_same(run(ours, x), run(theirs, x))


def test_an_se_in_the_slot_of_the_bases_own_keeps_its_name():
    ours = add_se(Trunk(HoldsSE(8, nn.Identity())), name="attention", r=2, **PLAIN)
    assert "blocks.0.attention.fc1.weight" in export_se(ours, "timm", base=False)


REFUSED = {
    "a scale": ({"init": "identity"}, "timm", "multiplies its gate by 2, which no weights of a plain SE do"),
    "a mix": ({"init": "identity", "gate": "tanh"}, "linear", "has the parameter 'mix' beyond its two layers"),
    "an activation's": ({"act": "prelu"}, "linear", "has the parameter 'act.weight' beyond its two layers"),
    "a maximum": ({"squeeze": "max"}, "timm", "squeezes by 'max', and SEs elsewhere by the average"),
    "no bias": ({"bias": False}, "legacy", r"has bias=\(False, False\)"),
    "no bias, torchvision": ({"bias": False}, "torchvision", r"has bias=\(False, False\)"),
    "one bias": ({"bias": (False, True)}, "timm", r"has bias=\(False, True\)"),
    "an activation": ({"act": "silu"}, "legacy", "has SiLU and Sigmoid, not ReLU and Sigmoid"),
    "a gate": ({"gate": "hard_sigmoid"}, "legacy", "has ReLU and Hardsigmoid, not ReLU and Sigmoid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_style_cannot_express(case):
    options, style, message = REFUSED[case]
    model = small(**options)
    before = snapshot(model)
    with pytest.raises(
        CheckpointError, match=f"'?blocks.0.se'? cannot be written in the style '{style}': it {message}"
    ):
        export_se(model, style)
    assert not differences(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "style"),
    [
        ({"bias": False}, "timm"),
        ({"bias": (True, False)}, "linear"),
        ({"act": "silu", "gate": "tanh"}, "torchvision"),
    ],
)
def test_what_a_style_does_express(options, style):
    ours = small(**options)
    load_se(ours, export_se(trained(**options), style))
    assert_values(ours, trained(**options).state_dict())


@pytest.mark.parametrize("name", ["toy/NHWC", "toy/Volumes"])
def test_maps_of_other_layouts_have_linear_layers(name):
    """Channels last, and videos: no module of these styles works on them, but Linear layers do on anything pooled."""
    torch.manual_seed(1)
    theirs, ours = (add_se(build(name), **PLAIN) for _ in range(2))
    with pytest.raises(CheckpointError, match=r"it does not work on maps \(B, C, H, W\)\. Take style=\"linear\"\."):
        export_se(theirs, "timm")
    state = export_se(theirs, "linear")
    load_se(ours, state)
    assert_values(ours, theirs.state_dict())


def test_two_ses_in_a_block_have_no_names_elsewhere():
    ours = small()
    add_se(ours, "post", r=2, existing="stack", **PLAIN)
    with pytest.raises(CheckpointError, match=r"two tensors would be called 'blocks.0.se_module.fc1.weight'"):
        export_se(ours, "legacy")


def test_two_blocks_of_a_unit():
    """The names that a style has do not say which of the unit's two SEs is whose; the model's own do."""
    ours = build("torchvision/mobilenet_v3_small")
    for placement in ("standard", "inner"):
        add_se(ours, placement, where="features.2", existing="stack", **PLAIN)
    assert [site.path for site in find_se(ours) if site.origin == "se_surgery"] == [
        "features.2.block.1.2.se",
        "features.2.se",
    ]
    load_se(ours, export_se(ours, "timm"))
    with pytest.raises(CheckpointError, match=r"names do not tell whose they are: features\.2.*own state_dict\(\)\.$"):
        export_se(ours, "legacy")


def test_unknown_styles():
    for style in ("cadene", None, ["timm"]):
        with pytest.raises(OptionError, match=r"Take one of timm, legacy, torchvision, linear\."):
            export_se(small(), style)
