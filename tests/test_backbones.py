"""The backbones that this library brings along: their papers' figures, timm's ways into them, and SEs in them."""

from __future__ import annotations

import pytest
import timm
import torch
from patients import assert_differs, assert_same, build, copied, images, run
from torch import nn

import se_surgery
from se_surgery import OptionError, SqueezeExcite, add_se, find_se, plan_se, strip_se, verify
from se_surgery.backbones.bn_inception import TABLE, Inception
from se_surgery.backbones.shufflenet import WIDTHS, ChannelShuffle, ShuffleNet, ShuffleUnit
from se_surgery.measuring.cost import multiply_adds, parameters
from se_surgery.models.bases import create_base, is_base
from se_surgery.planning.placements import PLACEMENTS

# With the reductions of their levels.
REDUCTIONS = {"bn_inception": [2, 4, 8, 16, 32], "resnet20_cifar": [1, 2, 4], "shufflenet_g3": [2, 4, 8, 16, 32]}
NAMES = list(REDUCTIONS)
# The placements they have, and the number of SEs.
PLACES = {
    "bn_inception": {"standard": 10, "inception": 10},
    "resnet20_cifar": dict.fromkeys(("standard", "pre", "post", "identity", "inner"), 9),
    "shufflenet_g3": {"standard": 16, "pre": 16, "post": 16, "identity": 16, "inner": 16},
}
CASES = [(name, placement) for name, places in PLACES.items() for placement in places]


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


# ----------------------------------------------------------------------------------------------------- papers' figures


def conv(area: int, fan_in: int, channels: int) -> tuple[int, int]:
    """Multiply-adds and parameters of a convolution and its norm."""
    return area * fan_in * channels, fan_in * channels + 2 * channels


def total(layers: list[tuple[int, int]], features: int, classes: int = 1000) -> tuple[int, int]:
    """Those of a network of these layers and a classifier."""
    macs, params = (sum(column) for column in zip(*layers, strict=True))
    return macs + classes * features, params + classes * features + classes


def bn_inception_by_hand() -> tuple[int, int]:
    """Figure 5: each module by input channels, filters (1x1, 3x3 reduce, 3x3, double reduce, double, pool) and size."""
    layers = [conv(112**2, 49 * 3, 64), conv(56**2, 64, 64), conv(56**2, 9 * 64, 192)]
    for chs, (one, reduce, three, reduce2, double, pool), side in (
        (192, (64, 64, 64, 64, 96, 32), 28),
        (256, (64, 64, 96, 64, 96, 64), 28),
        (576, (224, 64, 96, 96, 128, 128), 14),
        (576, (192, 96, 128, 96, 128, 128), 14),
        (576, (160, 128, 160, 128, 160, 128), 14),
        (608, (96, 128, 192, 160, 192, 128), 14),
        (1056, (352, 192, 320, 160, 224, 128), 7),
        (1024, (352, 192, 320, 192, 224, 128), 7),
    ):
        area = side**2
        layers += [conv(area, chs, one), conv(area, chs, reduce), conv(area, 9 * reduce, three), conv(area, chs, pool)]
        layers += [conv(area, chs, reduce2), conv(area, 9 * reduce2, double), conv(area, 9 * double, double)]
    for chs, (reduce, three, reduce2, double), side in ((320, (128, 160, 64, 96), 28), (608, (128, 192, 192, 256), 14)):
        before, after = side**2, side**2 // 4
        layers += [conv(before, chs, reduce), conv(after, 9 * reduce, three)]
        layers += [conv(before, chs, reduce2), conv(before, 9 * reduce2, double), conv(after, 9 * double, double)]
    return total(layers, 1024)


def shufflenet_by_hand(groups: int = 3, width: int = 240) -> tuple[int, int]:
    """Table 1: three stages of 4, 8 and 4 units, the first of each at twice the resolution until its 3x3."""
    layers, chs, area = [conv(112**2, 9 * 3, 24)], 24, 56**2
    for stage, units in enumerate((4, 8, 4)):
        out = width * 2**stage
        layers += [conv(area, chs if stage == 0 else chs // groups, out // 4), conv(area // 4, 9, out // 4)]
        layers += [conv(area // 4, out // 4 // groups, out - chs)]
        chs, area = out, area // 4
        unit = [conv(area, chs // groups, chs // 4), conv(area, 9, chs // 4), conv(area, chs // 4 // groups, chs)]
        layers += unit * (units - 1)
    return total(layers, chs)


def resnet_by_hand(depth: int) -> tuple[int, int]:
    """He et al., section 4.2: 6n + 2 layers; two of the stages begin with a 1x1 convolution in the shortcut."""
    layers = [conv(32**2, 9 * 3, 16)]
    for number, chs in enumerate((16, 32, 64)):
        area, before = (32 >> number) ** 2, chs // 2 if number else chs
        layers += [conv(area, 9 * before, chs)] + [conv(area, 9 * chs, chs)] * ((depth - 2) // 3 - 1)
        layers += [conv(area, before, chs)] if number else []
    return total(layers, 64, classes=10)


# By hand, and as the papers print them: Hu et al., tables 2 and 3; Zhang et al., table 1; He et al., table 6.
FIGURES = {
    "bn_inception": (bn_inception_by_hand(), "2.03 G"),
    "shufflenet_g3": (shufflenet_by_hand(), "137 M"),
    "resnet20_cifar": (resnet_by_hand(20), "0.27 M parameters"),
    "resnet56_cifar": (resnet_by_hand(56), "0.86 M parameters"),
    "resnet110_cifar": (resnet_by_hand(110), "1.73 M parameters"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_parameters_and_multiply_adds_are_the_papers(name):
    (macs, params), printed = FIGURES[name]
    model = on_meta(name)
    assert (multiply_adds(model), parameters(model)[0]) == (macs, params)
    assert printed in (f"{macs / 1e9:.2f} G", f"{macs / 1e6:.0f} M", f"{params / 1e6:.2f} M parameters")


def test_other_numbers_of_groups():
    """Table 1 of ShuffleNet's paper: 143, 140, 137, 133 and 137 M; each of ours is within 1.5 M of it."""
    for groups, printed in {1: 143, 2: 140, 3: 137, 4: 133, 8: 137}.items():
        with torch.device("meta"):
            model = ShuffleNet(groups)
        macs = multiply_adds(model)
        assert (macs, parameters(model)[0]) == shufflenet_by_hand(groups, WIDTHS[groups])
        assert abs(macs / 1e6 - printed) < 1.5
    with pytest.raises(OptionError, match=r"groups=5 is not in ShuffleNet's table\. Take one of 1, 2, 3, 4, 8\."):
        ShuffleNet(5)


# --------------------------------------------------------------------------------------------------------------- units


def test_channels_are_dealt_out_to_all_groups():
    x = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 3, 3)
    assert ChannelShuffle(3)(x)[0, :, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert ChannelShuffle(2)(ChannelShuffle(3)(x)).equal(x)


def test_a_shuffle_unit_adds_or_concatenates():
    """With a branch of zeros only the shortcut is left: the input itself, or its average over 3 x 3 first."""
    x = images((12, 8, 8))
    for stride in (1, 2):
        unit = ShuffleUnit(12, 12 * stride, stride, groups=3, first_groups=3).eval()
        full = unit(x)
        nn.init.zeros_(unit.conv_pwl.conv.weight)
        if stride == 1:
            assert unit(x).equal(x.relu())
        else:
            pooled = nn.functional.avg_pool2d(x, 3, 2, padding=1).relu()
            assert unit(x).equal(torch.cat([pooled, torch.zeros_like(pooled)], dim=1))
        assert not unit(x).equal(full)


def test_an_inception_module_joins_its_branches_in_the_tables_order():
    x = images((6, 8, 8))
    row = TABLE[0][0]._replace(conv1=2, conv3=3, conv33=4, pool=5)
    module = Inception(6, row).eval()
    assert [branch[-1].conv.out_channels for branch in module.branches] == [2, 3, 4, 5]
    assert module(x).equal(torch.cat([branch(x) for branch in module.branches], 1))
    halving = Inception(6, TABLE[1][0]).eval()
    assert halving(x)[:, 160 + 96 :].equal(nn.functional.max_pool2d(x, 3, 2, padding=1))


# ---------------------------------------------------------------------------------------------- what timm expects of it


def test_they_are_names_of_timm_and_bases():
    for name in NAMES:
        assert name in timm.list_models(module=timm.model_entrypoint(name).__module__.rpartition(".")[2])
        assert timm.list_models(f"{name}.*", include_tags=True) == [f"{name}.untrained"]
        assert not timm.list_pretrained(f"*{name}*")
        assert is_base(name) and is_base(f"{name}.untrained") and not is_base(f"{name}.nosuch")
        assert timm.is_model(f"se_{name}") and timm.is_model(f"se_{name}_paper")
        with pytest.raises(RuntimeError, match="No pretrained weights exist"):
            timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", NAMES)
def test_levels_by_every_way_are_the_same_maps(name):
    model, x = build(name), images()
    last, maps = model.forward_intermediates(x)
    assert last.equal(model.forward_features(x)) and last.equal(maps[-1])
    assert model.forward_head(last).equal(model(x))
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [
        (each.shape[1], 64 // each.shape[2]) for each in maps
    ]
    assert [info["reduction"] for info in model.feature_info] == REDUCTIONS[name]
    for cls in ("list", "hook", "getter"):
        features = timm.create_model(name, features_only=True, feature_cls=cls).eval()
        load_levels(features, model)
        assert_same(run(features, x), maps)
    some = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert_same(some, maps[:2])
    with pytest.raises(OptionError, match="output_fmt='NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def load_levels(features: nn.Module, model: nn.Module) -> None:
    """Give a feature network its whole network's values: it names modules `stages_0.1` or `model.stages.0.1`."""
    values = model.state_dict()
    known = {key.replace("stem.", "stem_", 1).replace("stages.", "stages_", 1): key for key in values}
    keys = {key: known.get(key, key.removeprefix("model.")) for key in features.state_dict()}
    features.load_state_dict({key: values[whole] for key, whole in keys.items()})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_needed_is_pruned(name):
    model, x = build(name), images()
    whole = model.forward_intermediates(x, intermediates_only=True)
    kept = len(whole) - 2
    assert model.prune_intermediate_layers([0, kept]) == [0, kept]
    assert len(model.stages) == 2 and model.num_features == model.feature_info[kept]["num_chs"]
    assert isinstance(model.get_classifier(), nn.Identity)
    assert_same(model.forward_intermediates(x, [0, kept], intermediates_only=True), [whole[0], whole[kept]])
    assert model(x).equal(whole[kept])
    model.prune_intermediate_layers([0])
    assert len(model.stem) + len(model.stages) == (2 if name.startswith("resnet") else 1)
    assert model(x).equal(whole[0])


@pytest.mark.parametrize("name", NAMES)
def test_classifier_channels_and_configuration(name):
    model = build(name, num_classes=7, in_chans=1)
    config = model.default_cfg
    assert model.get_submodule(config["first_conv"]).weight.shape[1] == 1 == model.in_chans
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    x = images((1, 64, 64))
    assert [tuple(out.shape) for out in run(model, x)] == [(2, 7)]
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.equal(model.forward_features(x).mean((2, 3)))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert model(x).equal(pooled)
    model.reset_classifier(0, "")
    assert model(x).equal(model.forward_features(x))


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_computes_the_same_gradients(name):
    plain, x = build(name).train(), images()
    checkpointed = copied(plain)
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        model(x).square().mean().backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is not None and one.grad.equal(other.grad)
    groups = timm.models.group_parameters(plain, plain.group_matcher())
    assert len(groups) == 2 + sum(len(stage) for stage in plain.stages)


# -------------------------------------------------------------------------------------------------------- SEs in them


@pytest.mark.parametrize("name", NAMES)
def test_the_placements_they_have(name):
    model = on_meta(name)
    assert plan_se(model).places == {placement: PLACES[name].get(placement, 0) for placement in PLACEMENTS}
    sites = plan_se(model).sites
    kinds = {
        "bn_inception": ["inception"] * 10,
        "resnet20_cifar": ["residual"] * 9,
        "shufflenet_g3": ["concat_residual", *["residual"] * 3],
    }
    assert [site.kind for site in sites][: len(kinds[name])] == kinds[name]
    assert [site.stage for site in sites] == {
        "bn_inception": [1] * 2 + [2] * 5 + [3] * 3,
        "resnet20_cifar": [1] * 3 + [2] * 3 + [3] * 3,
        "shufflenet_g3": [1] * 4 + [2] * 8 + [3] * 4,
    }[name]


def shut(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            module.gate_scale = 0.0
    return model


def test_se_gates_the_whole_of_an_inception_module():
    """After the concatenation: a gate of zero leaves nothing of the module, what is passed through included."""
    model, x = build("bn_inception"), images()
    base = copied(model)
    assert_same(run(add_se(model), x), run(base, x))
    maps = shut(model).forward_intermediates(x, intermediates_only=True)
    assert_same(maps[:2], base.forward_intermediates(x, [0, 1], intermediates_only=True))
    assert all(not each.any() for each in maps[2:])


def test_se_gates_the_branch_of_a_shuffle_unit():
    """Before the addition or concatenation: a gate of zero leaves the shortcut, pooled where the unit has a stride."""
    model, x = build("shufflenet_g3"), images()
    base = copied(model)
    assert_same(run(add_se(model), x), run(base, x))
    maps = shut(model).forward_intermediates(x, intermediates_only=True)
    expected = maps[1]
    for stage in maps[2:]:
        pooled = nn.functional.avg_pool2d(expected, 3, 2, padding=1)
        expected = torch.cat([pooled, torch.zeros_like(pooled).repeat(1, 9, 1, 1)], dim=1)[:, : stage.shape[1]]
        assert stage.equal(expected)


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        # timm's own blocks, of which other tests try every placement.
        pytest.param(*case, marks=pytest.mark.sweep) if case[0] == "resnet20_cifar" and case[1] != "standard" else case
        for case in CASES
    ],
)
def test_identity_start_and_strip(name, placement):
    model, x = build(name), images()
    base, keys = copied(model), list(model.state_dict())
    add_se(model, placement, init="paper")
    assert len(find_se(model)) == PLACES[name][placement]
    assert_differs(run(model, x), run(base, x))
    strip_se(model)
    assert list(model.state_dict()) == keys
    assert_same(run(model, x), run(base, x))


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "placement"), CASES)
def test_every_promise_holds(name, placement):
    model = add_se(build(name), placement, init="paper")
    verify(model, example_input=(3, 64, 64), thorough=placement == "standard")


def test_quick_promises_hold():
    verify(add_se(create_base("shufflenet_g3"), init="paper"), example_input=(3, 64, 64), thorough=False)


def test_an_se_name_is_the_base_with_ses():
    model = timm.create_model("se_shufflenet_g3", num_classes=5, se_r=8)
    assert se_surgery.recipe_of(model)["base"] == "shufflenet_g3"
    assert [site.rd_channels for site in find_se(model)][:2] == [216 // 8, 240 // 8]
    assert model(images()).shape == (2, 5)
