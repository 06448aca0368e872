"""On real networks, and on users' own: what surgery promises, for every placement a network has a place for.

The numbers of sites are counted by hand from how each architecture is defined; the comments say how.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import timm
import torch
import toys
from patients import assert_same, build, calls, copied, images, is_native_se, pass_through, run
from torch import Tensor, nn
from toys import five

from se_surgery import NothingToDoError, PatientError, PlacementError, SqueezeExcite, add_se, find_se, plan_se

PLACEMENTS = ("standard", "pre", "post", "identity", "inner", "inception")


@dataclass(frozen=True)
class Row:
    """One network with its expected number of sites by placement.

    `size` is the smallest comfortable input, `train` the one for the training forward where that needs more.
    """

    name: str
    sites: dict[str, int]
    existing: str = "skip"
    size: tuple[int, ...] = (3, 64, 64)
    train: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name if self.existing == "skip" else f"{self.name}-{self.existing}"


RESNET50 = five(3 + 4 + 6 + 3)
# 3 of block A, 1 reduction, 4 of block C, 1 reduction, 2 of block E.
INCEPTION_V3 = {"standard": 11, "inception": 11}
# One depthwise-separable block and 6 groups of 2, 3, 4, 3, 3, 1 inverted residuals; the first of each group has no
# shortcut, nor has the depthwise-separable one.
MOBILENET_V2 = five(1 + 2 + 3 + 4 + 3 + 3 + 1, identity=1 + 2 + 3 + 2 + 2)
# Groups of 1, 2, 2, 3, 3, 4, 1 blocks, the first of each without a shortcut.
EFFICIENTNET_B0 = five(1 + 2 + 2 + 3 + 3 + 4 + 1, identity=1 + 1 + 2 + 2 + 3)
# A layer's new maps are gated before they are joined: a dense net has no addition and no shortcut.
DENSENET121 = five(6 + 12 + 24 + 16, post=0, identity=0)

TIMM = (
    Row("resnet18", five(2 + 2 + 2 + 2)),
    Row("resnet18:gray", five(8), size=(1, 64, 64)),
    Row("resnet50", RESNET50),
    Row("resnet152", five(3 + 8 + 36 + 3)),
    Row("resnext50_32x4d", RESNET50),
    Row("resnetv2_50", RESNET50),
    Row("vgg16_bn", {"standard": 2 + 2 + 3 + 3 + 3}),
    Row("inception_v3", INCEPTION_V3, size=(3, 96, 96)),
    # Concatenations: Mixed_4a, 4 A, reduction, 7 B, reduction, 3 C; Mixed_3a and Mixed_5a join one convolution with a
    # pooled map, a residual by concatenation.
    Row(
        "inception_v4",
        {"standard": 17 + 2, "inception": 1 + 4 + 1 + 7 + 1 + 3, **dict.fromkeys("pre post identity inner".split(), 2)},
        size=(3, 96, 96),
    ),
    # Block35, Block17 and Block8 are residual, each with a concatenation inside; Mixed_5b, 6a and 7a concatenate.
    Row("inception_resnet_v2", {**five(10 + 20 + 10, standard=40 + 3), "inception": 3}, size=(3, 96, 96)),
    Row("mobilenetv1_100", five(13, identity=0)),
    Row("mobilenetv2_100", MOBILENET_V2),
    # 11 blocks, of which 9 hold an SE; the two that do not are the second group's, the first of them strided.
    Row("mobilenetv3_small_100", five(2, identity=1)),
    # Groups of 1, 2, 3, 2, 3; in all but the fourth group the first is strided, there it widens: no shortcuts.
    Row("mobilenetv3_small_100", five(11, identity=1 + 2 + 1 + 2), existing="stack"),
    Row("efficientnet_b0", EFFICIENTNET_B0, existing="replace"),
    Row("efficientnet_b0", EFFICIENTNET_B0, existing="stack"),
    Row("regnetx_008", five(1 + 3 + 7 + 5)),
    # 2, 2, 14, 2 blocks, every other one (from the first) with an SE; 3 downsamplings of a block and a feed-forward
    # part. The depthwise convolution is outside the residual branch, which has 1x1 convolutions only.
    Row("repvit_m0_9", five(20 + 3 * 2 - 10, inner=0)),
    Row("repvit_m0_9", five(20 + 3 * 2, inner=0), existing="stack"),
    Row("densenet121", DENSENET121),
    Row("dpn68", five(3 + 4 + 12 + 3)),
    # 1 tree of 2 blocks, 2 trees of 2, 2 of 2, 1 of 2; their roots only join.
    Row("dla34", five(2 + 4 + 4 + 2)),
    # 2, 2, 2, 2 bottlenecks; their bilinear attention is a residual of its own, inside the branch.
    Row("bat_resnext26ts", five(8), size=(3, 256, 256)),
    # A stage has one block; the last stage's has no shortcut.
    Row("cspnext_tiny", five(1 + 1 + 1 + 1, identity=3)),
    # 1, 1, 5, 8, 1 plain blocks; the SE stands before the activation.
    Row("repvgg_a0", {"standard": 1 + 2 + 4 + 14 + 1}),
    Row("convnext_atto", five(2 + 2 + 6 + 2)),
    Row("convnext_atto:half", five(12)),
    # 1, 2, 8, 2 blocks; the k x k convolution is in a module with a forward of its own on the instance.
    Row("fasternet_t0", five(1 + 2 + 8 + 2, inner=0)),
    Row("nf_resnet50", RESNET50),
    Row("nf_resnet50:half", RESNET50),
    Row("res2net50_26w_4s", RESNET50),
    # 1 bottleneck, then 2 blocks on each of 2, 3 and 4 branches, then 4 bottlenecks that widen; fusions get none.
    Row("hrnet_w18_small", five(1 + 2 * (2 + 3 + 4) + 4)),
    # 3 entry blocks, 8 in the middle, 1 strided, 1 without a shortcut.
    Row("xception41p", five(3 + 8 + 1 + 1, identity=12)),
    # 16 blocks, SE from the third group on; of the first three blocks one has a shortcut.
    Row("rexnet_100", five(1 + 2, identity=1)),
    # Groups of 1, 2, 2, 3, 3, 5: no shortcut in the first, nor in the strided ones that begin groups 2, 3, 4 and 6.
    Row("rexnet_100", five(16, identity=16 - 5), existing="stack"),
    # 16 blocks, all with a shortcut; 2 + 2 + 1 + 2 with an SE.
    Row("ghostnet_100", five(16 - 7)),
    Row("ghostnet_100", five(16), existing="stack"),
    Row("cspresnet50", five(3 + 3 + 5 + 2)),
    # 1, 1, 2, 2 blocks, the last of each stage with an SE; the second of a stage has a shortcut, and an SE.
    Row("ese_vovnet39b", five(2, identity=0)),
    Row("ese_vovnet39b", five(6, identity=2), existing="stack"),
)
TORCHVISION = (
    Row("torchvision/resnet50", RESNET50),
    Row("torchvision/resnext50_32x4d", RESNET50),
    Row("torchvision/vgg16_bn", {"standard": 13}),
    Row("torchvision/googlenet", {"standard": 2 + 5 + 2, "inception": 2 + 5 + 2}),
    # The auxiliary head takes a 17x17 map, in training only.
    Row("torchvision/inception_v3", INCEPTION_V3, size=(3, 96, 96), train=(3, 299, 299)),
    Row("torchvision/mobilenet_v2", MOBILENET_V2),
    Row("torchvision/efficientnet_b0", EFFICIENTNET_B0, existing="replace"),
    Row("torchvision/efficientnet_b0", EFFICIENTNET_B0, existing="stack"),
    Row("torchvision/densenet121", DENSENET121),
    # The depthwise convolution stands in a Sequential without an activation behind it that could hold an SE.
    Row("torchvision/shufflenet_v2_x1_0", five(4 + 8 + 4, inner=0)),
    Row("torchvision/regnet_x_400mf", five(1 + 2 + 7 + 12)),
    # Depthwise convolution, permutation and norm stand in a Sequential, again without an activation.
    Row("torchvision/convnext_tiny", five(3 + 3 + 9 + 3, inner=0)),
)
TOYS = tuple(
    Row(f"toy/{toy.__name__}", toy.PLACES, "stack" if toy is toys.WriteUps else "skip", toy.SIZE) for toy in toys.SOUND
)
ROWS = (*TIMM, *TORCHVISION, *TOYS)
CASES = [(row, placement) for row in ROWS for placement in row.sites if row.sites[placement]]


def _in_turn(row: Row, placement: str) -> bool:
    """Whether a case is tried by default: two placements of each network, another second one from row to row."""
    second = list(row.sites)[1 + ROWS.index(row) % (len(row.sites) - 1)] if len(row.sites) > 1 else ""
    return row.name.startswith("toy") or placement in (next(iter(row.sites)), second)


OPERATIONS = [pytest.param(case, marks=() if _in_turn(*case) else pytest.mark.sweep) for case in CASES]


@functools.lru_cache(maxsize=1)
def base_of(name: str) -> nn.Module:
    """The network before surgery; tests only look at it."""
    return build(name)


@dataclass(frozen=True)
class Outcome:
    """What one forward returned, and the buffers (running statistics) it left."""

    outputs: list[Tensor]
    buffers: dict[str, Tensor]


def outcome(model: nn.Module, x: Tensor, training: bool) -> Outcome:
    model = copied(model) if training else model
    return Outcome(run(model, x, training), dict(model.named_buffers()))


@functools.lru_cache(maxsize=2)
def outcome_before(name: str, replaced: tuple[str, ...], size: tuple[int, ...], training: bool) -> Outcome:
    """What the network does before surgery; SEs of its own that surgery replaces have their gates at one here."""
    base = base_of(name)
    if replaced:
        base = copied(base)
        gone = [base.get_submodule(path) for path in replaced]
        assert pass_through(base, lambda module: any(module is se for se in gone)) == len(replaced)
    return outcome(base, images(size, like=base), training)


class Operated:
    """One network after surgery; worked out once for all tests of it."""

    def __init__(self, row: Row, placement: str) -> None:
        self.row = row
        self.placement = placement
        self.base = base_of(row.name)
        self.model = add_se(copied(self.base), placement, existing=row.existing)
        self.new = [path for path, module in self.model.named_modules() if isinstance(module, SqueezeExcite)]
        native = [path for path, module in self.base.named_modules() if is_native_se(module)]
        self.replaced = tuple(path for path in native if not is_native_se(self.model.get_submodule(path)))

    def size(self, training: bool = False) -> tuple[int, ...]:
        return self.row.train if training and self.row.train else self.row.size

    def inputs(self, training: bool = False) -> Tensor:
        return images(self.size(training), like=self.base)

    def before(self, training: bool = False) -> Outcome:
        return outcome_before(self.row.name, self.replaced, self.size(training), training)


@pytest.fixture(scope="module", params=OPERATIONS, ids=lambda case: f"{case[0]}-{case[1]}")
def operated(request: pytest.FixtureRequest) -> Operated:
    return Operated(*request.param)


def test_every_unit_gets_one_se(operated):
    assert len(operated.new) == operated.row.sites[operated.placement]
    assert len(operated.replaced) == (len(operated.new) if operated.row.existing == "replace" else 0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_are_bit_equal_and_each_se_runs_once(operated, training):
    with calls(operated.model, operated.new) as counts:
        after = outcome(operated.model, operated.inputs(training), training)
    before = operated.before(training)
    assert_same(after.outputs, before.outputs)
    assert all(torch.equal(value, after.buffers[name]) for name, value in before.buffers.items())
    assert set(counts.values()) == {1}, counts


def test_old_keys_keep_their_order_and_values(operated):
    before, after = operated.base.state_dict(), operated.model.state_dict()
    mine = tuple(path + "." for path in operated.new)
    gone = tuple(f"{path}." for path in operated.replaced)
    kept = [key for key in before if not key.startswith(gone)] if gone else list(before)
    assert [key for key in after if not key.startswith(mine)] == kept
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in kept)


# By default each row with its first placement.
LIVES = [
    pytest.param((row, placement), marks=() if placement == next(iter(row.sites)) else pytest.mark.sweep)
    for row, placement in CASES
]


@pytest.mark.parametrize("operated", LIVES, indirect=True, ids=lambda case: f"{case[0]}-{case[1]}")
def test_no_se_is_born_dead(operated):
    """The second layer of every SE has a gradient at once, the first one after a step: it is in the data's way."""
    learn(operated.model, operated.new, operated.inputs(training=True))


def learn(model: nn.Module, paths: list[str], x: Tensor) -> None:
    # float16 values, but float32 arithmetic: float16 gradients want a scaled loss, which is not what is tested here.
    model, x = copied(model).float().requires_grad_(False), x.float()
    ses = {path: model.get_submodule(path).requires_grad_(True) for path in paths}
    optimizer = torch.optim.Adam([p for se in ses.values() for p in se.parameters()], lr=1e-3)
    for step, layer in enumerate(("fc2", "fc1")):
        optimizer.zero_grad()
        torch.manual_seed(5)
        model.train()
        out = model(x.clone())
        out = out if isinstance(out, Tensor) else out[0]
        out.float().square().mean().backward()
        grads = {path: getattr(se, layer).weight.grad for path, se in ses.items()}
        assert all(grad.isfinite().all() for grad in grads.values())
        dead = [path for path, grad in grads.items() if not grad.any()]
        assert not dead, f"no gradient in step {step} at {layer} of {dead}"
        optimizer.step()


def test_no_se_is_born_dead_in_narrow_mobilenetv2():
    """At r=16 its narrowest hidden layers have two units: with plain random rows, both may be closed for any input."""
    model = add_se(build("mobilenetv2_050"), r=16)
    paths = [site.path for site in find_se(model)]
    assert min(site.rd_channels for site in find_se(model)) == 2
    learn(model, paths, images())


ALL_PLACES = {row.name: row.sites for row in ROWS if row.existing != "skip"}
FIRST_ROWS = {row.name: row for row in reversed(ROWS)}.values()


@pytest.mark.parametrize("row", FIRST_ROWS, ids=lambda row: row.name)
def test_a_placement_the_model_lacks_is_named_with_those_it_has(row):
    model = base_of(row.name)
    expected = {placement: n for placement, n in ALL_PLACES.get(row.name, row.sites).items() if n}
    assert {placement: n for placement, n in plan_se(model).places.items() if n} == expected
    lacking = [placement for placement in PLACEMENTS if placement not in expected]
    if lacking:
        with pytest.raises(PlacementError) as caught:
            add_se(copied(model), lacking[0])
        named = str(caught.value).rpartition(" has places for: ")[2].rstrip(".").split(", ")
        assert repr(lacking[0]) in str(caught.value)
        assert set(named) == set(expected)


def test_a_graph_of_torch_fx_is_refused():
    """It is copied without its class: the SEs would be gone from any copy."""
    model = timm.create_model("resnet18", features_only=True, feature_cls="fx")
    with pytest.raises(PatientError, match=r"'graph_module'.*operate first, then graph it"):
        add_se(model)


TRANSFORMERS = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s16_224", "levit_128s", "volo_d1_224")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_is_refused(name):
    """Even where it has convolutions, with activations even: they only make its tokens."""
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = plan_se(model)
    assert plan.sites == () and plan.existing == ()
    with pytest.raises(PlacementError, match=r"no convolutional unit.*linear ones on tokens.*Give a CNN"):
        add_se(model)


HYBRIDS = {
    # The residual MBConv and ConvNeXt blocks; what is beside an attention in its block is a transformer's.
    "coatnext_nano_rw_224": 3 + 4,
    "efficientformer_l1": 14,
    "visformer_tiny": 7,
    "edgenext_xx_small": 2 + 2 + 6 + 2,
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids(name):
    base = build(name)
    x = images(base.pretrained_cfg["input_size"], batch=1)
    model = add_se(copied(base))
    paths = [path for path, module in model.named_modules() if isinstance(module, SqueezeExcite)]
    assert len(paths) == HYBRIDS[name]
    with calls(model, paths) as counts:
        assert_same(run(model, x), run(base, x))
    assert set(counts.values()) == {1}


def test_every_convolution_is_in_a_unit_or_named():
    """MobileNetV4's first two stages are plain convolutions: no units, and those with k > 1 are named."""
    with torch.device("meta"):
        plan = plan_se(timm.create_model("mobilenetv4_conv_small_035"))
    skipped = {skip.unit: skip.reason for skip in plan.skipped}
    assert "outside of all units" in skipped["conv_stem"]
    assert {path.rpartition(".")[0] for path in skipped if path.startswith("blocks.0")} == {"blocks.0.0"}


def test_a_stage_without_units_is_named_with_those_that_hold_some():
    with torch.device("meta"):
        model = timm.create_model("mobilenetv4_conv_small_035")
    with pytest.raises(NothingToDoError, match=r"no unit in stages 1, 2: its units are in stages 3, 4\. Name one"):
        add_se(model, stages=[1, 2])
