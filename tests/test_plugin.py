"""The plugin: timm's registry has this library's names, and what it builds under them is timm's kind of model."""

from __future__ import annotations

import functools
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from patients import OLD_TIMM, assert_differs, assert_same, build, copied, images, randomise, run
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models import (
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    group_parameters,
    is_model,
    list_modules,
    model_entrypoint,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import se_surgery
from se_surgery import SqueezeExcite, SurgeryError, add_se, find_se, recipe_of, register_se, unregister_se
from se_surgery.models.bases import create_base
from se_surgery.models.catalog import named_bases, recipe_names, shipped_recipe
from se_surgery.surgery.schema import check_recipe

ZOO = Path(__file__).parent / "zoo"
NAMES = named_bases()

# One of each kind of `features_only`: timm's list of modules (flattened too), hooks, getter, and classes of their own.
SMALL = ["resnet10t", "test_convnext", "densenet121", "cspnext_tiny", "xception41p", "mobilenetv2_050", "hardcorenas_b"]
REPRESENTATIVES = [
    name
    for library in ("timm", "se_surgery")
    for name in (ZOO / f"{library}_reps.txt").read_text().split()
    if name in NAMES["timm"]
]
# What runs by default, and what a sweep adds.
FAMILIES = [
    *SMALL,
    *(pytest.param(name, marks=pytest.mark.sweep) for name in REPRESENTATIVES if name not in SMALL),
]


@functools.cache
def size(name: str) -> tuple[int, int, int]:
    """The smallest image that a network's own pooling and strides leave more than one position of, or its own."""
    own = get_pretrained_cfg(name).input_size
    fixed = name.startswith(("inception", "nasnet", "pnasnet", "legacy_xception", "vgg", "lowformer", "focalnet"))
    return own if fixed else (3, 96, 96)


@functools.cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A base, and the model of its `se_` name with the same weights, in evaluation mode."""
    base = build(name)
    model = timm.create_model(f"se_{name}").eval()
    share(base, model)
    return base, model


def share(base: nn.Module, model: nn.Module) -> None:
    """Give a model its base's weights; nothing but SEs may be missing."""
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert not result.unexpected_keys and result.missing_keys
    assert all(any(part.startswith("se") for part in key.split(".")) for key in result.missing_keys)


def spoil(model: nn.Module) -> nn.Module:
    """Make every gate differ from one."""
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            nn.init.normal_(module.fc2.weight, generator=torch.Generator().manual_seed(5))
    return model


# ------------------------------------------------------------------------------------------------------- registration


def test_every_listed_base_has_its_name():
    listed = set(timm.list_models(module="se_models"))
    bases = [base for base in NAMES["timm"] if is_model(base) or not OLD_TIMM]
    for base in bases:
        assert f"se_{base}" in listed and is_model(f"se_{base}")
    for base in NAMES["torchvision"]:
        assert f"se_tv_{base}" in listed
    assert listed >= {"se_surgery", "se_resnext50_32x4d_custom", *recipe_names()}
    assert len(listed) == len(bases) + len(NAMES["torchvision"]) + len(recipe_names()) + 1


def test_the_names_are_those_that_were_planned_with_a_site():
    """`python -m benchmarks.names` writes the file from these rows."""
    rows = [
        json.loads(line) for line in (Path(__file__).parent.parent / "docs/coverage.jsonl").read_text().splitlines()
    ]
    plans = [row for row in rows if row["kind"] == "plan" and "target" in row["roles"] and row["status"] == "sites"]
    assert {row["name"] for row in plans} == {*NAMES["timm"], *(f"torchvision/{name}" for name in NAMES["torchvision"])}
    targets = {row["name"] for row in rows if row["kind"] == "plan" and "target" in row["roles"]}
    assert {f"torchvision/{name}" for name in NAMES["facts"]} == {name for name in targets if "torchvision/" in name}


def test_a_network_with_an_se_in_every_unit_takes_timms_arguments_too():
    """It has no name of its own, and the place for another SE is where its own ones are."""
    model = timm.create_model(
        "se_surgery", base="torchvision/regnet_y_400mf", se_existing="replace", num_classes=5, in_chans=1
    )
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 5)
    assert {site.origin for site in find_se(model, (1, 64, 64))} == {"se_surgery"}


def test_timm_tells_our_names_by_their_module():
    assert "se_models" in list_modules()
    ours = set(timm.list_models(module="se_models"))
    assert not ours & set(timm.list_models(exclude_filters=["se_*"]))
    assert set(timm.list_models()) == ours | set(timm.list_models(exclude_filters=["se_*"]))
    assert model_entrypoint("se_resnet50").__name__ == "se_resnet50"
    assert model_entrypoint("se_resnet50", module_filter="se_models") is se_surgery.models.se_models.se_resnet50


@pytest.mark.parametrize("base", ["resnet50", "convnext_tiny", "mobilenetv2_100", "vgg16"])
def test_a_name_has_the_weights_of_its_base_by_the_same_tags(base):
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]
    assert [name.partition(".")[2] for name in timm.list_pretrained(f"se_{base}.*")] == tags != []
    for tag in tags:
        own, theirs = get_pretrained_cfg(f"se_{base}.{tag}"), get_pretrained_cfg(f"{base}.{tag}")
        assert (own.hf_hub_id, own.url, own.license) == (theirs.hf_hub_id, theirs.url, theirs.license)
        assert own.architecture == f"se_{base}" and own.tag == tag
    assert get_pretrained_cfg(f"se_{base}").tag == get_pretrained_cfg(base).tag
    # The base's own entries are as they were.
    assert all(config.architecture == base for config in get_arch_pretrained_cfgs(base).values())


def test_importing_builds_nothing_and_warns_of_nothing():
    script = (
        "import timm, torch; made = []; init = torch.nn.Module.__init__\n"
        "torch.nn.Module.__init__ = lambda self, *a, **k: (made.append(type(self)), init(self, *a, **k))[1]\n"
        "before = timm.list_models()\n"
        "import se_surgery\n"
        "assert set(made) <= {torch.nn.Module}, made  # an empty one, for what every module has\n"
        "mine = [timm.list_models(module=name) for name in ('se_models', *se_surgery.backbones.__all__)]\n"
        "assert set(before) == set(timm.list_models()) - set(sum(mine, []))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------- what timm promises of a model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_keeps_timms_conventions_with_its_bases_values(name):
    """The identity start makes every value comparable: each way in gives the base's, bit for bit."""
    base, model = pair(name)
    x = images(size(name))
    assert_same(run(base, x), run(model, x))
    assert (model.num_classes, model.num_features) == (base.num_classes, base.num_features)
    config, keys = model.default_cfg, model.state_dict().keys()
    assert config["architecture"] == f"se_{name}" and config == model.pretrained_cfg
    assert {**base.pretrained_cfg, "architecture": ""} == {**config, "architecture": ""}
    heads = config["classifier"] if isinstance(config["classifier"], (tuple, list)) else [config["classifier"]]
    firsts = config["first_conv"] if isinstance(config["first_conv"], (tuple, list)) else [config["first_conv"]]
    for path in [*heads, *firsts]:
        assert f"{path}.weight" in keys
    with torch.no_grad():
        ours, theirs = model.forward_features(x), base.forward_features(x)
        assert_same([ours], [theirs])
        assert_same([model.forward_head(ours, pre_logits=True)], [base.forward_head(theirs, pre_logits=True)])
        if hasattr(base, "forward_intermediates"):
            assert_same(model.forward_intermediates(x)[1], base.forward_intermediates(x)[1])
    assert_differs(run(spoil(copied(model)), x), run(base, x))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_trains_with_42_classes_and_resets_its_classifier(name):
    base = build(name, num_classes=42)
    model = timm.create_model(f"se_{name}", num_classes=42)
    share(base, model)
    x = images(size(name))
    trained = copied(model)
    trained.train()(x).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained.parameters())
    model.eval().reset_classifier(0)
    base.reset_classifier(0)
    assert model.get_classifier() is None or not list(model.get_classifier().parameters())
    assert_same(run(model, x), run(base, x))
    try:
        base.reset_classifier(0, "")
    except AssertionError as refused:  # InceptionNeXt's classifier has a pool of its own
        with pytest.raises(AssertionError, match=str(refused)):
            model.reset_classifier(0, "")
        return
    model.reset_classifier(0, "")
    pooled = run(model, x)
    assert pooled[0].dim() == 4
    assert_same(pooled, run(base, x))


@pytest.mark.parametrize("name", FAMILIES)
def test_features_only_gives_the_bases_features(name):
    """By timm's own class for each base: keys, channels, reductions, values."""
    base = randomise(timm.create_model(name, features_only=True)).eval()
    model = timm.create_model(f"se_{name}", features_only=True).eval()
    assert type(model) is type(base)
    share(base, model)
    assert model.feature_info.channels() == base.feature_info.channels()
    assert model.feature_info.reduction() == base.feature_info.reduction()
    assert model.pretrained_cfg == {
        **base.pretrained_cfg,
        "architecture": f"se_{name}",
    }
    x = images(size(name))
    assert_same(run(base, x), run(model, x))
    assert_differs(run(base, x), run(spoil(model), x))


FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: ("resnet10t", {"feature_cls": kind, "out_indices": (1, 3)}) for kind in ("dict", "hook", "fx", "getter")},
    "feature_cfg": ("resnet10t", {"feature_cfg": {"feature_cls": "hook", "out_indices": (2,)}}),
    "flat unless by getter": ("test_convnext", {"feature_cls": "getter"}),
    "channels last unless by getter": ("mambaout_femto", {"feature_cls": "getter"}),
    "the last two levels": ("test_convnext", {"out_indices": (-2, -1)}),
    "a number of levels": ("regnetx_002", {"out_indices": 2}),
    "dilated": ("repvgg_a0", {"output_stride": 16}),
    "four channels, no classes": ("cspnext_tiny", {"in_chans": 4, "num_classes": 0}),
    "no class of its own": ("mobilenetv2_050", {"feature_cls": "hook"}),
    "inside the blocks": ("mobilenetv2_050", {"feature_location": "expansion", "output_stride": 16}),
    "dilated behind features_only alone": ("mobilenetv3_small_050", {"output_stride": 8, "out_indices": (-1, 0)}),
    "the same of HardCoRe-NAS": ("hardcorenas_b", {"output_stride": 16}),
}


@pytest.mark.parametrize(("name", "arguments"), FEATURES.values(), ids=FEATURES)
def test_features_only_takes_the_bases_arguments(name, arguments):
    base, model = (timm.create_model(n, features_only=True, **copied(arguments)) for n in (name, f"se_{name}"))
    assert type(model).__name__ == type(base).__name__
    share(randomise(base), model)
    assert model._model_args == {**arguments, **({} if OLD_TIMM else {"features_only": True})}
    x = images((arguments.get("in_chans", 3), 64, 64))
    expected = run(base.eval(), x)
    assert_same(run(model.eval(), x), expected)
    assert_same(run(pickle.loads(pickle.dumps(model)), x), expected)
    if arguments.get("feature_cls") != "fx":  # a graph has the layers of SEs and no SE to spoil
        assert_differs(run(spoil(model), x), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_chans": 1, "num_classes": 5},
        {"output_stride": 8},
        {"global_pool": "avgmax", "drop_rate": 0.2, "drop_path_rate": 0.1},
        {"num_classes": 0, "global_pool": ""},
        {"scriptable": True, "exportable": True},
        {"act_layer": "silu"},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_arguments_reach_the_base(arguments):
    base, model = (timm.create_model(name, **arguments) for name in ("resnet10t", "se_resnet10t"))
    share(randomise(base), model)
    x = images((arguments.get("in_chans", 3), 64, 64))
    assert_same(run(base, x), run(model, x))
    assert_same(run(base, x, training=True), run(model, x, training=True))
    assert repr(model.layer1[0].act1) == repr(base.layer1[0].act1)


def test_what_timm_does_with_a_model_it_does_with_these():
    """Data configuration, layer groups, moving averages, pruning of stages, pickle: as with the base."""
    base, model = pair("resnet10t")
    assert resolve_data_config(model=model) == resolve_data_config(model=base)
    groups, theirs = (group_parameters(m, m.group_matcher()) for m in (model, base))
    assert {key: [name for name in names if ".se." not in name] for key, names in groups.items()} == theirs
    assert all(f"layer{k}.0.se.fc1.weight" in groups[k] for k in (1, 2, 3, 4))
    expected = run(model, images())
    average = ModelEmaV3(model, decay=0.5)
    average.update(spoil(copied(model)))
    change = model.layer1[0].se.fc2.weight
    assert torch.equal(change, torch.zeros_like(change)) and average.module.layer1[0].se.fc2.weight.abs().max() > 0
    again = pickle.loads(pickle.dumps(model))
    assert_same(run(again, images()), expected)
    assert (recipe_of(again), again.pretrained_cfg) == (recipe_of(model), model.pretrained_cfg)
    left, less = copied(model), copied(base)
    for each in (left, less):
        each.prune_intermediate_layers([1, 2], prune_head=True)
    assert [site.path for site in find_se(left, (3, 64, 64))] == ["layer1.0.se", "layer2.0.se"]
    assert_same(run(left, images()), run(less, images()))


# ------------------------------------------------------------------------------------------------------------- options


def test_flat_arguments_are_add_ses_options():
    given = {"placement": "pre", "r": 8, "stages": [3, 4], "init": "paper", "bias": True, "name": "gate"}
    model = timm.create_model("se_resnet10t", **{f"se_{option}": value for option, value in given.items()})
    asked = add_se(timm.create_model("resnet10t"), **given)
    assert recipe_of(model) == recipe_of(asked, "resnet10t")
    by_stage = timm.create_model("se_resnet10t", se_r={"3": 4, "-1": 8})
    assert [site.rd_channels for site in find_se(by_stage)] == [256 // 4, 512 // 8]


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "option": ("se_resnet10t", {"se_ratio": 8}, "no option 'se_ratio'"),
    "value": ("se_resnet10t", {"se_r": 0}, "r=0"),
    "placement": ("se_resnet10t", {"se_placement": "inception"}, "inception"),
    "argument": ("se_resnet10t", {"nosuch": 3}, "nosuch=3"),
    "tag": ("se_resnet10t.nosuch", {}, "no weights 'nosuch'. Take one of c3_in1k"),
    "tag by an argument": ("se_resnet10t", {"pretrained_cfg": "nosuch"}, "no weights 'nosuch'. Take one of c3_in1k"),
    "levels of a whole network": ("se_tv_resnet18", {"out_indices": (1,)}, "out_indices=(1,)"),
    "no dropout": ("se_tv_resnet18", {"drop_rate": 0.1}, "no dropout that drop_rate=0.1"),
    "no levels": ("se_surgery", {"base": "torchvision/r3d_18", "features_only": True}, "Leave features_only out"),
    "no tags": ("se_surgery", {"base": "torchvision/r3d_18", "pretrained_cfg": "x"}, "Leave pretrained_cfg out"),
    "no base": ("se_surgery", {}, "base=None"),
    "unknown base": ("se_surgery", {"base": "resnet51"}, "no model 'resnet51'"),
    "a path": ("se_surgery", {"base": "../resnet18"}, "no model '../resnet18'"),
    "a source": ("se_surgery", {"base": "hf-hub:timm/resnet18"}, "colon"),
    "itself": ("se_surgery", {"base": "se_surgery"}, "no model 'se_surgery'"),
    "one of ours": ("se_surgery", {"base": "se_resnet18"}, "no model 'se_resnet18'"),
    "a pickle": ("se_surgery", {"base": "torchvision/resnet18", "weights": "DEFAULT"}, "'weights'"),
    "no recipe": ("se_surgery", {"base": "resnet18", "recipe": {"format": "other"}}, "not a recipe"),
    "recipe by no name": ("se_surgery", {"base": "resnet18", "recipe": "se_nosuch"}, "no recipe 'se_nosuch'"),
    "another base": ("se_surgery", {"base": "resnet18", "recipe": "se_resnet50_pre"}, "'resnet18' is not the recipe's"),
    "options too": ("se_resnet50_pre", {"se_r": 8}, "Leave it out"),
}


@pytest.mark.parametrize(("name", "arguments", "text"), BAD.values(), ids=BAD)
def test_what_means_nothing_is_refused(name, arguments, text):
    with pytest.raises(SurgeryError, match="(?s)" + re.escape(text)):
        timm.create_model(name, **arguments)


def test_the_generic_name_takes_a_recipe_and_a_base():
    recipe = recipe_of(add_se(timm.create_model("resnet10t"), r=8, stages=-1))
    model = timm.create_model("se_surgery", recipe=json.loads(json.dumps(recipe)), num_classes=7)
    assert (model.num_classes, model.pretrained_cfg["architecture"]) == (7, "se_surgery")
    assert recipe_of(model) == recipe
    assert model._model_args == {"num_classes": 7, **({} if OLD_TIMM else {"recipe": recipe})}
    by_options = timm.create_model("se_surgery", base="resnet10t", se_r=8, se_stages=-1)
    assert recipe_of(by_options) == recipe


# ------------------------------------------------------------------------------------------------------ names by users


@pytest.fixture
def alias():
    register_se("mine_resnet10t", "resnet10t", placement="post", r=4, where=lambda site: site.stage > 2)
    yield "mine_resnet10t"
    if timm.is_model("mine_resnet10t"):
        unregister_se("mine_resnet10t")


def test_a_users_name_saves_under_the_generic_one(alias):
    model = timm.create_model(alias, num_classes=3)
    assert [site.path for site in find_se(model)] == ["layer3.0.se", "layer4.0.se"]
    assert model.pretrained_cfg["architecture"] == "se_surgery"
    again = timm.create_model("se_surgery", **json.loads(json.dumps(model._model_args)))
    assert again.num_classes == 3 and recipe_of(again) == recipe_of(model)
    assert list(again.state_dict()) == list(model.state_dict())
    assert alias in timm.list_models(module="se_models")
    assert timm.list_pretrained("mine_*") == [f"{alias}.{tag}" for tag in ("c3_in1k",)]


def test_unregistering_leaves_no_trace(alias):
    unregister_se(alias)
    assert not timm.is_model(alias) and alias not in timm.list_models("*")
    assert not timm.list_pretrained(f"{alias}*") and not timm.list_models(f"{alias}*", include_tags=True)
    assert not hasattr(se_surgery.models.se_models, alias) and alias not in se_surgery.models.se_models.__all__
    with pytest.raises(SurgeryError, match="was not registered by register_se"):
        unregister_se(alias)
    register_se(alias, "resnet10t")
    assert len(find_se(timm.create_model(alias))) == 4


@pytest.mark.parametrize(
    ("name", "base", "options", "text"),
    [
        ("resnet50", "resnet18", {}, "has a model 'resnet50' already"),
        ("se_resnet50", "resnet50", {}, "has a model 'se_resnet50' already"),
        ("a.b", "resnet18", {}, "plain identifier"),
        ("a/b", "resnet18", {}, "plain identifier"),
        (None, "resnet18", {}, "plain identifier"),
        ("fresh", "nosuch", {}, "no model 'nosuch'"),
        ("fresh", "resnet81", {}, "Did you mean resnet18"),
        ("fresh", None, {}, "base=None is not the name of a model"),
        ("fresh", "se_resnet18", {}, "no model 'se_resnet18'"),
        ("fresh", "resnet18", {"ratio": 8}, "no option 'ratio'"),
        ("fresh", "resnet18", {"r": 0}, "r=0"),
        ("fresh", "resnet18", {"placement": "sideways"}, "sideways"),
    ],
)
def test_a_name_that_cannot_be_registered(name, base, options, text):
    before = timm.list_models(include_tags=True)
    with pytest.raises(SurgeryError, match=text):
        register_se(name, base, **options)
    assert timm.list_models(include_tags=True) == before


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def saved(folder: Path, name: str, model: nn.Module, **changes: Any) -> str:
    """The file of a model's state dict; a change of None leaves a key out."""
    tensors: dict[str, Tensor] = {key: value.clone() for key, value in model.state_dict().items()}
    tensors.update(changes)
    path = folder / f"{name}.safetensors"
    save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata={"format": "pt"})
    return str(path)


@pytest.fixture(scope="module")
def base_file(folder):
    return saved(folder, "base", build("resnet10t"))


@pytest.fixture(scope="module")
def trained():
    """An operated model whose gates are not one."""
    return spoil(add_se(build("resnet10t"), r=8))


@pytest.fixture(scope="module")
def se_file(folder, trained):
    return saved(folder, "trained", trained)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_classes": 10},
        {"in_chans": 1},
        {"num_classes": 0},
        {"features_only": True},
        {"in_chans": 1, "features_only": True},
        {"features_only": True, "out_indices": (-1,), "feature_cls": "hook"},
    ],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
def test_pretrained_takes_the_bases_weights_and_starts_as_good(base_file, arguments):
    """With another number of classes timm draws a new classifier: what comes before it is compared."""
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": base_file}, **arguments}
    base, model = (timm.create_model(name, **given).eval() for name in ("resnet10t", "se_resnet10t"))
    x = images((arguments.get("in_chans", 3), 64, 64))
    if arguments.get("num_classes"):
        for each in (base, model):
            each.reset_classifier(0)
    assert_same(run(base, x), run(model, x))
    fresh = timm.create_model("se_resnet10t", **arguments).eval()
    assert_differs(run(fresh, x), run(model, x))


def test_pretrained_by_a_tag_takes_what_timm_has_under_it(base_file, monkeypatch):
    """Each tag's own weights, through the base's own entry: the address is the base's."""
    asked: list[Any] = []

    def download(repo: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(repo)
        return build("resnet18").state_dict()

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", download)
    model = timm.create_model("se_resnet18.a3_in1k", pretrained=True).eval()
    assert asked == ["timm/resnet18.a3_in1k"]
    assert model.pretrained_cfg["tag"] == "a3_in1k" and model.pretrained_cfg["architecture"] == "se_resnet18"
    assert_same(run(model, images()), run(build("resnet18"), images()))


def test_the_bases_own_filter_reads_its_checkpoints(folder):
    """ConvNeXt's published weights have other names than timm's: the base's function knows them."""
    model = build("test_convnext")
    theirs = {}
    for key, value in model.state_dict().items():
        key = key.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".").replace(".conv_dw.", ".dwconv.")
        key = key.replace(".mlp.fc1.", ".pwconv1.").replace(".mlp.fc2.", ".pwconv2.").replace("head.norm.", "norm.")
        parts = key.split(".")
        if "downsample" in parts:
            key = ".".join(["downsample_layers", parts[1], *parts[3:]])
        theirs[key.replace("head.fc.", "head.")] = value
    torch.save({"model": theirs}, folder / "theirs.pth")
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(folder / "theirs.pth")}}
    assert_same(run(timm.create_model("se_test_convnext", **given), images()), run(model, images()))


@pytest.mark.parametrize(
    "arguments", [{}, {"num_classes": 10}, {"in_chans": 1}, {"num_classes": 0}], ids=lambda a: "-".join(a) or "plain"
)
def test_an_operated_models_weights_come_back(se_file, trained, arguments):
    model = timm.create_model(
        "se_resnet10t", se_r=8, pretrained=True, pretrained_cfg_overlay={"file": se_file}, **arguments
    )
    expected = trained.state_dict()
    for key, value in model.state_dict().items():
        if not key.startswith(("fc.", "conv1.0.")) or not arguments:
            assert torch.equal(value, expected[key]), key
    if not arguments:
        assert_same(run(model, images()), run(trained, images()))


@pytest.mark.parametrize(("channels", "wanted"), [(4, 4), (4, 1), (4, 6), (1, 3), (3, 4)])
def test_an_operated_models_weights_for_images_of_other_channels(folder, channels, wanted):
    """By timm's rule: one channel is the sum of all; several are the old ones in turn, scaled to sum up to as much."""
    trained = spoil(add_se(build("resnet10t", in_chans=channels)))
    source = {"file": saved(folder, f"of_{channels}", trained), "input_size": (channels, 64, 64)}
    model = timm.create_model("se_resnet10t", pretrained=True, pretrained_cfg_overlay=source, in_chans=wanted)
    key = "conv1.0.weight"
    old, new = trained.state_dict(), model.state_dict()
    turns = old[key][:, [i % channels for i in range(wanted)]] * (channels / wanted)
    torch.testing.assert_close(new[key], old[key].sum(1, keepdim=True) if wanted == 1 else turns)
    assert all(torch.equal(value, old[other]) for other, value in new.items() if other != key)


def test_weights_for_a_base_that_cannot_be_made_without_values(folder):
    """Its constructor calculates with tensors, which the meta device refuses."""
    trained = spoil(add_se(build("torchvision/regnet_x_400mf")))
    source = {"file": saved(folder, "regnet", trained)}
    model = timm.create_model("se_tv_regnet_x_400mf", pretrained=True, pretrained_cfg_overlay=source).eval()
    assert_same(run(model, images()), run(trained, images()))


@pytest.mark.parametrize("levels", [(0, 1, 2, 3, 4), (1, -1)], ids=["all", "two"])
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_050"])
def test_features_only_of_an_operated_models_weights(folder, name, levels):
    trained = spoil(add_se(build(name)))
    file = saved(folder, f"trained_{name}", trained)
    arguments = {"features_only": True, "out_indices": levels}
    model = timm.create_model(f"se_{name}", pretrained=True, pretrained_cfg_overlay={"file": file}, **arguments).eval()
    with torch.no_grad():
        expected = trained.forward_intermediates(images(), intermediates_only=True)
    assert_same(run(model, images()), [expected[-5:][level] for level in levels])


SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "an SE's tensor missing": ({"layer2.0.se.fc2.weight": None}, "lacks 1 of the 8 tensors of the SEs"),
    "an SE's tensor of another width": (
        {"layer2.0.se.fc1.weight": torch.zeros(9, 128, 1, 1)},
        "layer2.0.se.fc1.weight",
    ),
    "a stage's tensor missing": ({"layer3.0.conv1.weight": None}, "layer3.0.conv1.weight is missing"),
    "a key of another model": ({"layer9.weight": torch.zeros(3)}, "layer9.weight is not the model's"),
    "not a number": ({"layer4.0.se.fc1.weight": torch.full((64, 512, 1, 1), float("nan"))}, "NaN"),
    "integers": ({"layer4.0.se.fc1.weight": torch.ones(64, 512, 1, 1, dtype=torch.int64)}, "int64"),
    "a negative variance": ({"bn1.running_var": torch.full((64,), -1.0)}, "negative variance"),
}


@pytest.mark.parametrize(
    "arguments", [{}, {"num_classes": 10}, {"features_only": True}], ids=lambda a: "-".join(a) or "plain"
)
@pytest.mark.parametrize(("changes", "text"), SPOILED.values(), ids=SPOILED)
def test_weights_that_are_not_all_there_are_refused(folder, trained, changes, text, arguments):
    file = saved(folder, "spoiled", trained, **changes)
    with pytest.raises(SurgeryError, match=text):
        timm.create_model("se_resnet10t", se_r=8, pretrained=True, pretrained_cfg_overlay={"file": file}, **arguments)


def test_timms_checkpoint_path_takes_an_operated_models_weights(folder, trained):
    torch.save(trained.state_dict(), folder / "trained.pth")
    model = timm.create_model("se_resnet10t", se_r=8, checkpoint_path=str(folder / "trained.pth")).eval()
    assert_same(run(model, images()), run(trained, images()))


def test_a_pickle_that_would_run_code_is_refused(folder):
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "ran",))

    torch.save({"fc.weight": Evil()}, folder / "evil.pth")
    with pytest.raises(SurgeryError, match=r"evil\.pth' cannot be read"):
        timm.create_model("se_resnet10t", pretrained=True, pretrained_cfg_overlay={"file": str(folder / "evil.pth")})
    assert not (folder / "ran").exists()


def test_a_folder_that_names_the_generic_architecture(tmp_path, trained):
    recipe = {**recipe_of(trained), "base": "resnet10t"}
    saved(tmp_path, "model", trained)
    config = {key: value for key, value in trained.pretrained_cfg.items() if key in ("input_size", "mean", "std")}
    config.update(num_classes=1000, classifier="fc", first_conv="conv1.0")
    written = {"architecture": "se_surgery", "model_args": {"recipe": recipe}, "pretrained_cfg": config}
    (tmp_path / "config.json").write_text(json.dumps(written))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same(run(model, images()), run(trained, images()))
    smaller = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4)
    assert torch.equal(smaller.layer2[0].se.fc2.weight, trained.layer2[0].se.fc2.weight)


# --------------------------------------------------------------------------------------------------------- torchvision


TV_SMALL = ["resnet18", "mobilenet_v2", "googlenet"]
TV_REPRESENTATIVES = (ZOO / "torchvision_reps.txt").read_text().split()
TV = [
    *TV_SMALL,
    *(
        pytest.param(name, marks=pytest.mark.sweep)
        for name in TV_REPRESENTATIVES
        if name in NAMES["torchvision"] and name not in TV_SMALL
    ),
]
LOUD = pytest.mark.filterwarnings("ignore:The default weight initialization of:FutureWarning")


@LOUD
@pytest.mark.parametrize("name", TV)
def test_torchvisions_networks_take_timms_arguments(name):
    x = images(named_bases()["facts"][name]["input_size"])
    base = build(f"torchvision/{name}")
    model = timm.create_model(f"se_tv_{name}").eval()
    share(base, model)
    assert_same(run(base, x), run(model, x))
    config = model.pretrained_cfg
    assert (model.num_classes, config["architecture"]) == (1000, f"se_tv_{name}")
    head = config["classifier"] if isinstance(config["classifier"], str) else config["classifier"][0]
    assert model.get_submodule(head).weight.shape[:2] == (1000, model.num_features)
    small = timm.create_model(f"se_tv_{name}", num_classes=5, in_chans=1).eval()
    assert run(small, x[:, :1])[0].shape == (2, 5)
    features = timm.create_model(f"se_tv_{name}", features_only=True).eval()
    maps = run(features, x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    sizes = [round(x.shape[-1] / m.shape[-1]) for m in maps]
    assert all(abs(s / r - 1) < 0.2 for s, r in zip(sizes, features.feature_info.reduction(), strict=True))


def test_torchvisions_weights_by_tag(monkeypatch):
    import torchvision

    def download(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(self.url)
        return torchvision.models.resnet50().state_dict()

    asked: list[str] = []
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", download)
    model = timm.create_model("se_tv_resnet50.imagenet1k_v1", pretrained=True, num_classes=3, in_chans=1)
    weights = torchvision.models.ResNet50_Weights
    assert asked == [weights.IMAGENET1K_V1.url]
    assert model.fc.out_features == 3 and model.conv1.weight.shape[1] == 1
    assert timm.list_pretrained("se_tv_resnet50.*") == ["se_tv_resnet50.imagenet1k_v1", "se_tv_resnet50.imagenet1k_v2"]
    assert get_pretrained_cfg("se_tv_resnet50").url == weights.DEFAULT.url
    with pytest.raises(SurgeryError, match="no weights 'nosuch'"):
        timm.create_model("se_surgery", base="torchvision/resnet50", pretrained_cfg="nosuch")


def test_torchvisions_networks_take_what_timms_training_script_says():
    """It says drop_rate=0.0 where it was told nothing."""
    model = timm.create_model("se_tv_mobilenet_v2", drop_rate=0.0, drop_path_rate=None, scriptable=False)
    assert model.classifier[0].p == 0.0
    googlenet = timm.create_model("se_tv_googlenet", drop_rate=0.4, init_weights=False)
    assert (googlenet.dropout.p, googlenet.aux1.dropout.p) == (0.4, 0.7)
    dense = timm.create_model("se_tv_densenet121", drop_rate=0.1)
    assert dense.features.denseblock1.denselayer1.drop_rate == 0.1
    described = timm.create_model("se_tv_resnet18", drop_rate=0.0, pretrained_cfg={"num_classes": 5, "mean": (0, 0, 0)})
    assert described.fc.out_features == described.num_classes == 5
    assert (described.pretrained_cfg["mean"], described.pretrained_cfg["classifier"]) == ((0, 0, 0), "fc")


def test_a_network_of_torchvision_without_a_name_fetches_nothing_unasked(monkeypatch):
    import torchvision

    def download(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"fetches {self.url}")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", download)
    base = create_base("torchvision/lraspp_mobilenet_v3_large", num_classes=2)
    values = randomise(base).state_dict()
    again = create_base(
        "torchvision/lraspp_mobilenet_v3_large", True, pretrained_cfg_overlay={"state_dict": values}, num_classes=2
    )
    assert_same(run(again, images()), run(base, images()))


# -------------------------------------------------------------------------------------------------------- the registry


def test_the_registry_holds_recipes_and_a_text_only():
    files = list(se_surgery.models.catalog.registry_dir().iterdir())
    assert {path.suffix for path in files} == {".json", ".md"} and len(files) == len(recipe_names()) + 1


@LOUD
@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_comes_to_what_it_says(name):
    """On the meta device: sites, parameters, and that planning it anew today gives the same recipe."""
    recipe = shipped_recipe(name)
    check_recipe(recipe)
    with torch.device("meta"):
        model = timm.create_model(name)
    about = recipe.pop("about")
    assert about["title"] and about["source"]
    assert len(find_se(model)) == about["sites"]
    assert sum(parameter.numel() for parameter in model.parameters()) == about["params"]
    assert recipe_of(model) == recipe
    assert model.pretrained_cfg["architecture"] == name


# Counted by hand from the paper: table 10 without biases, table 1's widths, and the 13 separable blocks of MobileNet.
PAPER = {
    "se_resnext50_32x4d_custom": (16, 27_543_848),
    "se_resnext50_32x4d_paper": (16, 27_543_848),
    "se_resnet50_paper": (16, 28_071_976),
    "se_resnet50_r4": (16, 35_616_808),
    "se_resnet50_r8": (16, 30_586_920),
    "se_resnet50_r32": (16, 26_814_504),
    "se_mobilenetv1_100_paper": (13, 4_711_720),
    "se_vgg16_bn_paper": (13, 138_365_992 + 2 * (2 * 64**2 + 2 * 128**2 + 3 * 256**2 + 6 * 512**2) // 16),
    "se_resnet101_paper": (33, 44_549_160 + 2 * (3 * 256**2 + 4 * 512**2 + 23 * 1024**2 + 3 * 2048**2) // 16),
    "se_resnet152_paper": (50, 60_192_808 + 2 * (3 * 256**2 + 8 * 512**2 + 36 * 1024**2 + 3 * 2048**2) // 16),
    "se_resnet20_cifar_paper": (9, 272_474 + 3 * 2 * (16 * 2 + 32 * 2 + 64 * 4)),
    "se_senet154_paper": (50, 115_088_984),
    "se_resnet50_last_stage_stripped": (13, 28_071_976 - 1_572_864),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_the_papers_figures(name):
    assert (shipped_recipe(name)["about"]["sites"], shipped_recipe(name)["about"]["params"]) == PAPER[name]


def test_a_plan_in_json_is_a_recipe():
    model = timm.create_model("resnet10t")
    given = json.loads(se_surgery.plan_se(model, "pre", r={3: 8, 4: 4}).to_json())
    check_recipe(given)
    se_surgery.apply_recipe(model, given)
    assert recipe_of(model)["operations"] == given["operations"] and given["base"] == "resnet10t"
