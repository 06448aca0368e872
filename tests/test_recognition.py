"""Units are recognised by what a forward computes: toys of every kind, each with the places that are right.

Where an SE sits is told by values that do not come from the plan: with its gates at one half, the map that it is on is
halved, and nothing else (`gated`). The right value is written by hand, from the toy's own layers.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from patients import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from se_surgery import PlacementError, SqueezeExcite, SurgeryWarning, add_se, plan_se, recipe_of, verify

SIZE = (3, 32, 32)
X = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))


def block(inputs: int, outputs: int, k: int = 3, stride: int = 1, act: bool = True, groups: int = 1) -> nn.Sequential:
    """A convolution with its normalisation, and with an activation where asked for."""
    layers = [nn.Conv2d(inputs, outputs, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


class Net(nn.Module):
    """A stem, some blocks and a classifier."""

    def __init__(self, *blocks: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem = block(3, 8)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Pair(nn.Module):
    """A body that returns its branch and the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        active = torch.relu(self.norm(x))
        return self.second(torch.relu(self.first(active))), active


class OfPair(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = Pair(inputs, outputs, stride)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        branch, active = self.body(x)
        return scale * branch + (x if self.short is None else self.short(active))


class ActiveShortcut(nn.Module):
    """An activation behind the shortcut's projection."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(block(inputs, outputs, 3, stride), block(outputs, outputs))
        self.short = block(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.relu(scale * self.body(x) + self.short(x))


class Concurrent(nn.Sequential):
    """One class for every kind of parallel branches."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * torch.cat([branch(x) for branch in self], 1)


class Reduction(Concurrent):
    """The same class does something else here: an SE is on the convolution's side alone."""


def inception(inputs: int) -> Concurrent:
    pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), block(inputs, 8, 1))
    return Concurrent(block(inputs, 8, 1), block(inputs, 8), nn.Sequential(block(inputs, 8, 1), block(8, 8)), pooled)


class TwoWay(nn.Module):
    """A two-way dense layer: what was there goes on untouched."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = block(inputs, 8)
        self.two = nn.Sequential(block(inputs, 8), block(8, 8))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.cat((x, scale * self.one(x), scale * self.two(x)), 1)


class Poly(nn.Module):
    """x + f(x) + g(f(x)): f is a part of g's branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = block(channels, channels)
        self.g = block(channels, channels)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        made = self.f(x)
        return torch.relu(x + made + scale * self.g(made))


class Fork(nn.Module):
    """x + f(x) + g(x): two branches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = block(channels, channels)
        self.g = block(channels, channels)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.f(x) + scale * self.g(x)


class Reversible(nn.Module):
    """Two halves, each with the other's branch added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = block(channels // 2, channels // 2)
        self.g = block(channels // 2, channels // 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        one, two = x.chunk(2, 1)
        one = one + scale * self.f(two)
        two = two + scale * self.g(one)
        return torch.cat((one, two), 1)


class Choice(nn.Module):
    """Dense layers that each take a choice of those before (HarDNet): every layer is one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = block(channels, 8)
        self.two = block(8 + channels, 8)
        self.three = block(8, 8)
        self.four = block(16 + channels, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        one = scale * self.one(x)
        two = scale * self.two(torch.cat((one, x), 1))
        three = scale * self.three(two)
        four = scale * self.four(torch.cat((three, two, x), 1))
        return torch.cat((one, three, four), 1)


class Ghost(nn.Module):
    """Half of the channels are made cheaply of the other half: one convolution, and no unit."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one = block(inputs, outputs // 2, 1)
        self.cheap = block(outputs // 2, outputs // 2, groups=outputs // 2)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        return torch.cat((one, self.cheap(one)), 1)


class Dual(nn.Module):
    """A dual-path block: a part of the branch is added, the rest is joined to what was there."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.body = nn.Sequential(block(inputs, 16), block(16, outputs + 4))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        made = scale * self.body(x)
        added = x[:, : self.outputs] + made[:, : self.outputs]
        return torch.cat((added, x[:, self.outputs :], made[:, self.outputs :]), 1)


class Attention(nn.Module):
    """A transformer's block of pointwise convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.mlp = nn.Sequential(nn.Conv2d(channels, 16, 1), nn.GELU(), nn.Conv2d(16, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).flatten(2).chunk(3, 1)
        weights = (query.transpose(1, 2) @ key).softmax(-1)
        x = x + (value @ weights.transpose(1, 2)).view_as(x)
        return x + self.mlp(x)


UNITS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "a body that returns a pair": (lambda: Net(OfPair(8, 8), OfPair(8, 16, 2), channels=16), {"residual": 2}),
    "an active shortcut": (lambda: Net(ActiveShortcut(8, 8), ActiveShortcut(8, 16, 2), channels=16), {"residual": 2}),
    "Inception modules": (lambda: Net(inception(8), inception(32), channels=32), {"inception": 2}),
    "Inception modules behind a reduction of their class": (
        lambda: Net(Concurrent(block(8, 8, 3, 2), nn.MaxPool2d(3, 2, 1)), inception(16), channels=32),
        {"concat_residual": 1, "inception": 1},
    ),
    "two-way dense layers": (lambda: Net(TwoWay(8), TwoWay(24), channels=40), {"dense": 4}),
    "a sum of three, one in the other": (lambda: Net(Poly(8), Poly(8), channels=8), {"residual": 2}),
    "a sum of three branches": (lambda: Net(Fork(8), channels=8), {"residual": 2}),
    "a reversible block": (lambda: Net(Reversible(8), channels=8), {"residual": 2}),
    "dense layers of a choice": (lambda: Net(Choice(8), channels=24), {"dense": 4}),
    "a dual path": (lambda: Net(Dual(8, 8), Dual(12, 8), channels=16), {"residual": 2}),
}


def with_halves(model: nn.Module) -> nn.Module:
    """All gates at one half, whatever the input."""
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            module.gate_scale = 0.5 * module.gate_scale
    return model


class Scaled(nn.Module):
    """The same network, written so that each branch is scaled by a number: what the SEs have to come to."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.stem(x)
        for one in self.net.blocks:
            x = one(x) if isinstance(one, Concurrent) and not is_inception(one) else one(x, 0.5)
        return self.net.fc(x.mean((2, 3)))


def is_inception(one: nn.Module) -> bool:
    return len(list(one.children())) > 2


@pytest.mark.parametrize("name", UNITS)
def test_units_are_those_counted_by_hand(name):
    make, kinds = UNITS[name]
    plan = plan_se(make(), example_input=SIZE)
    found = {kind: sum(site.kind == kind for site in plan.sites) for kind in {site.kind for site in plan.sites}}
    assert found == kinds
    assert all(join.fate != "none" or join.reason for join in plan.census.joins)
    assert not plan.warnings


@pytest.mark.parametrize("name", [name for name in UNITS if "reduction" not in name])
def test_halved_gates_halve_the_branches_and_nothing_else(name):
    torch.manual_seed(0)
    base = randomise(UNITS[name][0]()).eval()
    wanted = Scaled(base)(X)
    operated = with_halves(add_se(base, inplace=False, example_input=SIZE)).eval()
    torch.testing.assert_close(operated(X), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(operated(X), base(X))


@pytest.mark.parametrize("name", UNITS)
def test_such_networks_keep_all_promises(name):
    torch.manual_seed(0)
    model = add_se(randomise(UNITS[name][0]()), example_input=SIZE)
    verify(model, example_input=SIZE, thorough=False)
    assert recipe_of(model)["operations"]


# --------------------------------------------------------------------------------------------------- what is no unit


def reasons(model: nn.Module) -> set[str]:
    return {skip.reason for skip in plan_se(model, example_input=SIZE).skipped}


def test_a_ghost_convolution_is_no_dense_layer():
    plan = plan_se(Net(ActiveShortcut(8, 8), Ghost(8, 16), channels=16), example_input=SIZE)
    assert [site.unit for site in plan.sites] == ["blocks.0"]
    assert any("GhostNet" in skip.reason for skip in plan.skipped)


def test_the_layers_behind_an_attention_are_no_unit():
    plan = plan_se(Net(ActiveShortcut(8, 8), Attention(8), channels=8), example_input=SIZE)
    assert [site.unit for site in plan.sites] == ["blocks.0"]
    assert any("attention" in skip.reason for skip in plan.skipped)


class Fused(nn.Module):
    """Two transformed maps of two sources, added: nobody knows a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = block(8, 8), block(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


def test_a_network_of_additions_that_are_not_understood_is_no_plain_one():
    plan = plan_se(Net(Fused(), Fused(), channels=8), example_input=SIZE)
    assert not plan.sites
    assert str(plan.census) == "2 additions: 2 no unit's"
    assert "a sum of two transformed maps is a fusion, not a residual" in {skip.reason for skip in plan.skipped}


def test_a_block_with_a_join_that_is_not_understood_is_never_straight():
    class Either(nn.Module):
        def __init__(self, fuses: bool) -> None:
            super().__init__()
            self.one, self.two, self.fuses = block(8, 8), block(8, 8), fuses

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x) if self.fuses else x + self.two(self.one(x))

    plan = plan_se(Net(Either(False), Either(True), channels=8), example_input=SIZE)
    assert [(site.unit, site.kind) for site in plan.sites] == [("blocks.0", "residual")]


# ------------------------------------------------------------------------------------------------- heads and decoders


class Head(nn.Module):
    """Separable convolutions in front of the outputs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.deep = block(channels, channels, groups=channels)
        self.point = block(channels, channels, 1)
        self.out = nn.Conv2d(channels, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.point(self.deep(x)))


class Detector(nn.Module):
    """A backbone of whatever name, and a head."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Sequential(block(3, 8, 3, 2), ActiveShortcut(8, 8)))
        self.head = nn.Sequential(ActiveShortcut(8, 8), Head(8)) if name in ("backbone", "encoder") else Head(8)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.head(getattr(self, self.name)(x))


class Decoder(nn.Module):
    """A U-Net of residual blocks, with no name that says what is what."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = ActiveShortcut(3, 8), ActiveShortcut(8, 16, 2), ActiveShortcut(24, 8)
        self.up = nn.Upsample(scale_factor=2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.out(self.c(torch.cat((a, self.up(self.b(a))), 1)))


@pytest.mark.parametrize(
    ("make", "inside", "more"),
    [
        (lambda: Detector("backbone"), ["backbone.1"], ["head.0", "head.1"]),
        (lambda: Detector("encoder"), ["encoder.1"], ["head.0", "head.1"]),
        (lambda: Detector("body"), ["body.1"], []),
        (Decoder, ["a", "b"], ["c"]),
    ],
    ids=["backbone", "encoder", "no name", "u-net"],
)
def test_heads_and_decoders_are_left_out_until_asked_for(make, inside, more):
    plan = plan_se(make(), example_input=SIZE)
    assert [site.unit for site in plan.sites] == inside
    left = [skip.unit for skip in plan.skipped if "neck, head or decoder" in skip.reason]
    assert left == more
    assert [site.unit for site in plan_se(make(), heads=True, example_input=SIZE).sites] == inside + more


def test_a_recipe_knows_that_heads_were_asked_for():
    model = add_se(Decoder(), heads=True, example_input=SIZE)
    assert recipe_of(model)["operations"][0]["options"]["heads"] is True
    assert "heads" not in recipe_of(add_se(Decoder(), example_input=SIZE))["operations"][0]["options"]


# ------------------------------------------------------------------------------------------- shared, and what drops out


class Registered(nn.Module):
    """A block under two paths that runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ActiveShortcut(3, 8)
        self.again = nn.ModuleList([self.first])
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.again[0](x).mean((2, 3)))


def test_a_block_under_two_paths_that_runs_once_is_operated_on():
    torch.manual_seed(0)
    base = randomise(Registered()).eval()
    before = base(X)
    model = add_se(base, example_input=SIZE)
    assert torch.equal(model(X), before)
    assert sum(isinstance(module, SqueezeExcite) for module in model.modules()) == 1


class Untold(nn.Module):
    """A block that decides by values, whose branch is a layer of its own, or one of torch's."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.body = ActiveBody(8) if own else block(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        made = self.body(x)
        return x + made if x.sum() > -1e9 else x


class ActiveBody(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_the_branch_of_a_block_that_cannot_be_traced_may_be_operated_on():
    torch.manual_seed(0)
    base = randomise(Net(Untold(True), channels=8)).eval()
    before = base(X)
    plan = plan_se(base, example_input=SIZE)
    assert [(site.unit, site.kind) for site in plan.sites] == [("blocks.0.body", "branch")]
    assert torch.equal(add_se(base, example_input=SIZE)(X), before)


def test_units_that_drop_out_are_a_warning():
    blocks = [Untold(False), Untold(False), ActiveShortcut(8, 8)]
    plan = plan_se(Net(*blocks, channels=8), example_input=SIZE)
    assert [site.unit for site in plan.sites] == ["blocks.2"]
    assert len(plan.warnings) == 1 and plan.warnings[0].startswith("2 of 3 units drop out, in 'blocks.0', 'blocks.1'")
    assert "Warning: 2 of 3" in str(plan)
    with pytest.warns(SurgeryWarning, match="2 of 3 units drop out"):
        add_se(Net(*blocks, channels=8), example_input=SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_se(Net(ActiveShortcut(8, 8), channels=8), example_input=SIZE)


class Scores(nn.Module):
    """A convolutional classifier without a Linear: its scores are (B, 10), or (B, 10, 1, 1)."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        widths = (3, 8, 16, 16)
        layers = [
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in itertools.pairwise(widths)
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Conv2d(16, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.body(x))
        return scores.flatten(1) if self.flat else scores


@pytest.mark.parametrize("flat", [True, False])
def test_class_scores_get_no_se(flat):
    plan = plan_se(Scores(flat), example_input=(3, 64, 64))
    assert [site.path for site in plan.sites] == ["body.0.2.se", "body.1.2.se", "body.2.2.se"]


def test_what_is_skipped_comes_in_the_same_order_every_time():
    model = timm.create_model("res2net50_14w_8s").to("meta")
    first, second = (plan_se(copy.deepcopy(model)).skipped for _ in range(2))
    assert first == second


class PositionedAttention(nn.Module):
    """An attention over positions, with a depthwise convolution of its values added, and a pointwise layer behind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Sequential(nn.Conv2d(width, 3 * width, 1), nn.BatchNorm2d(3 * width))
        self.pe = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.BatchNorm2d(width))
        self.proj = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.flatten(2) for part in self.qkv(x).chunk(3, 1))
        attention = (q.transpose(1, 2) @ k).softmax(-1)
        y = (v @ attention.transpose(1, 2)).view(x.shape)
        return self.proj(y + self.pe(v.reshape(x.shape)))


class Attending(nn.Module):
    """A residual block, then an attention with its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8, stride=2)
        self.body = nn.Sequential(block(8, 8), block(8, 8, act=False))
        self.attention = PositionedAttention(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.body(x))
        x = x + self.attention(x)
        return self.head(x.mean((2, 3)))


def test_a_convolution_that_an_attention_is_summed_with_is_no_half_of_a_separable_one():
    assert [site.unit for site in plan_se(Attending(), example_input=SIZE).sites] == [""]


class Lateral(nn.Module):
    """Plain convolutions, then a pointwise one and an upsampling: a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 8, stride=2), block(8, 16, stride=2), block(16, 16, stride=2))
        self.lateral = block(16, 8, 1)
        self.up = nn.Upsample(scale_factor=2)
        self.out = block(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.lateral(self.body(x))))


@pytest.mark.parametrize(("heads", "count"), [(False, 3), (True, 5)])
def test_a_lateral_convolution_is_the_first_of_the_decoder(heads, count):
    assert len(plan_se(Lateral(), heads=heads, example_input=SIZE).sites) == count


class TwoWays(nn.Module):
    """An ELAN block, and the same written with a split, as deployed networks have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.cv1, self.cv2, self.cv3 = block(width, width), block(half, half), block(half, half)
        self.cv4 = block(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(layer(y[-1]) for layer in (self.cv2, self.cv3))
        return self.cv4(torch.cat(y, 1))

    def forward_split(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split(self.cv1[0].out_channels // 2, 1))
        y.extend(layer(y[-1]) for layer in (self.cv2, self.cv3))
        return self.cv4(torch.cat(y, 1))


def test_a_block_with_a_second_way_has_its_se_on_both():
    base = randomise(Net(TwoWays(8), channels=8)).eval()
    model = add_se(copy.deepcopy(base), example_input=SIZE)
    (path,) = [path for path, module in model.named_modules() if isinstance(module, SqueezeExcite)]
    x = torch.rand(2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    for way in ("forward", "forward_split"):
        model.get_submodule(path).gate_scale = 2.0
        assert torch.equal(getattr(model.blocks[0], way)(x), getattr(base.blocks[0], way)(x))
        model.get_submodule(path).gate_scale = 1.0  # a gate at one half
        assert torch.equal(getattr(model.blocks[0], way)(x), getattr(base.blocks[0], way)(x) * 0.5)


class Branch(nn.Module):
    """Two convolutions, and a join that each subclass writes in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(8, 8), block(8, 8, act=False))
        self.gain = nn.Parameter(torch.full((1,), 0.5))


# By what they are called: how a block joins x with y, which its branch made of x.
SUMS: dict[str, Callable[[Branch, Tensor, Tensor], Tensor]] = {
    "alpha": lambda block, x, y: torch.add(x, y, alpha=0.5),
    "in place": lambda block, x, y: y.add_(x),
    "gain": lambda block, x, y: x + block.gain * y,
    "python's sum": lambda block, x, y: sum([x, y]),  # type: ignore[arg-type,return-value]
    "sum of the other order": lambda block, x, y: sum([y, x]),  # type: ignore[arg-type,return-value]
    "by name": lambda block, x, y: torch.add(input=x, other=y),
    "mean": lambda block, x, y: (x + y) / 2,
}
ODD_JOINS: dict[str, Callable[[Branch, Tensor, Tensor], Tensor]] = {
    "difference": lambda block, x, y: x - y,
    "interpolation": lambda block, x, y: torch.lerp(x, y, 0.5),
    "product added": lambda block, x, y: torch.addcmul(x, block.gain, y),
    "stack": lambda block, x, y: torch.stack([x, y]).sum(0),
    "maximum": lambda block, x, y: torch.maximum(x, y),
    "product": lambda block, x, y: x * y,
    "negated": lambda block, x, y: -(-x - y),
}


def joining(join: Callable[[Branch, Tensor, Tensor], Tensor]) -> Net:
    """A network of two such blocks."""
    forward = lambda self, x: F.relu(join(self, x, self.body(x)))  # noqa: E731
    cls = type("Joining", (Branch,), {"forward": forward})
    return randomise(Net(cls(), cls(), channels=8)).eval()


@pytest.mark.parametrize("name", SUMS)
def test_every_way_to_write_a_sum(name):
    """With its gate at one half the branch is halved, as its last normalisation's output is by hand."""
    base = joining(SUMS[name])
    model = add_se(copy.deepcopy(base), example_input=SIZE)
    assert [site.unit for site in plan_se(base, example_input=SIZE).sites] == ["blocks.0", "blocks.1"]
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            module.gate_scale = 1.0
    for held in base.blocks:
        held.body.register_forward_hook(lambda module, args, output: output * 0.5)
    assert torch.equal(model(X), base(X))


@pytest.mark.parametrize("name", ODD_JOINS)
def test_a_join_that_is_not_understood_makes_no_plain_network(name):
    model = joining(ODD_JOINS[name])
    with pytest.raises(PlacementError, match=r"blocks\.0: it joins a map.*Write the join as an addition"):
        add_se(model, example_input=SIZE)
