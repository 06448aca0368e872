"""SEs that are written out in a block's own forward are found by what they compute, and never passed over."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
import toys
from patients import assert_differs, assert_same, differences, images, randomise, run, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from se_surgery import (
    Excitations,
    NothingToDoError,
    PatientError,
    SurgeryError,
    add_se,
    apply_recipe,
    count_costs,
    excitations,
    find_se,
    plan_se,
    prune_se,
    recipe_of,
    strip_se,
    tradeoff,
)
from se_surgery.measuring.cost import multiply_adds

C, HIDDEN, SIDE = 8, 2, 16
SIZE = (3, SIDE, SIDE)


class Block(nn.Module):
    """A residual block; each subclass writes an SE of two convolutions, `reduce` and `expand`, into its branch."""

    LAYERS: ClassVar[tuple[str, ...]] = ("reduce", "expand")
    PATH: ClassVar[str] = "reduce"
    PARAMS: ClassVar[int] = 2 * C * HIDDEN + HIDDEN + C
    WIDTH: ClassVar[int | None] = HIDDEN

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = toys.conv(C, C), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = toys.conv(C, C, 1), nn.BatchNorm2d(C)
        self.build()

    def build(self) -> None:
        self.reduce, self.expand = nn.Conv2d(C, HIDDEN, 1), nn.Conv2d(HIDDEN, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(self.gated(y)))

    def gated(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class Linear(Block):
    def build(self) -> None:
        self.reduce, self.expand = nn.Linear(C, HIDDEN), nn.Linear(HIDDEN, C)

    def gate(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.expand(F.relu(self.reduce(z))))


class GateFirst(Block):
    def gated(self, y: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(y, 1)
        return torch.sigmoid(self.expand(torch.relu(self.reduce(s)))) * y


class Viewed(Linear):
    def gated(self, y: Tensor) -> Tensor:
        b, c, _, _ = y.size()
        return y * self.gate(y.mean((2, 3))).view(b, c, 1, 1)


class Expanded(Linear):
    def gated(self, y: Tensor) -> Tensor:
        return y.mul(self.gate(y.mean(3).mean(2)).unsqueeze(-1).unsqueeze(-1).expand_as(y))


class InPlace(Linear):
    def gated(self, y: Tensor) -> Tensor:
        return y.mul_(self.gate(F.avg_pool2d(y, y.shape[2:]).flatten(1))[:, :, None, None])


class Augmented(Linear):
    def gated(self, y: Tensor) -> Tensor:
        y *= self.gate(y.flatten(2).mean(2)).reshape(y.shape[0], C, 1, 1)
        return y


class Clamped(Block):
    def hard(self, z: Tensor) -> Tensor:
        return (z + 3).clamp(0, 6) / 6

    def gated(self, y: Tensor) -> Tensor:
        return torch.mul(y, self.hard(self.expand(F.silu(self.reduce(y.mean((2, 3), keepdim=True))))))


class Closure(Block):
    def gated(self, y: Tensor) -> Tensor:
        def gate() -> Tensor:
            z = y.sum((2, 3), keepdim=True) / (y.shape[2] * y.shape[3])
            return F.hardsigmoid(self.expand(z_act(self.reduce(z))))

        def z_act(z: Tensor) -> Tensor:
            return z * torch.sigmoid(z)

        return gate() * y


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), -1).mean(-1)


class PoolChild(Linear):
    def build(self) -> None:
        super().build()
        self.pool, self.act, self.sigmoid = Pool(), nn.ReLU6(), nn.Sigmoid()

    def gated(self, y: Tensor) -> Tensor:
        s = self.sigmoid(self.expand(self.act(self.reduce(self.pool(y)))))
        return y * s[..., None, None]


class GateChild(Block):
    LAYERS, PATH = ("se.1", "se.3"), "se"

    def build(self) -> None:
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, HIDDEN, 1), nn.ReLU(), nn.Conv2d(HIDDEN, C, 1), nn.Sigmoid()
        )

    def gated(self, y: Tensor) -> Tensor:
        return self.se(y) * y


class PoolAndLayers(Block):
    """The write-ups' three children, in the block itself."""

    LAYERS, PATH, PARAMS = ("fc.0", "fc.2"), "fc", 2 * C * HIDDEN

    def build(self) -> None:
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(C, HIDDEN, bias=False), nn.ReLU(inplace=True), nn.Linear(HIDDEN, C, bias=False), nn.Sigmoid()
        )

    def gated(self, y: Tensor) -> Tensor:
        b, c, _, _ = y.size()
        return y * self.fc(self.avg_pool(y).view(b, c)).view(b, c, 1, 1).expand_as(y)


class ExpandingGate(nn.Module):
    """A child that gives its gate the map's size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"down": nn.Linear(C, HIDDEN), "up": nn.Linear(HIDDEN, C)})

    def forward(self, x: Tensor) -> Tensor:
        z = F.gelu(self.layers["down"](x.mean((2, 3))))
        return torch.sigmoid(self.layers["up"](z))[:, :, None, None].expand_as(x)


class ExpandedInChild(Block):
    LAYERS, PATH = ("att.layers.down", "att.layers.up"), "att"

    def build(self) -> None:
        self.att = ExpandingGate()

    def gated(self, y: Tensor) -> Tensor:
        return y * self.att(y)


class NormalisedGate(GateChild):
    """FishNet's: the gate is a branch that normalises first, and is added too."""

    LAYERS = ("se.3", "se.5")

    def build(self) -> None:
        super().build()
        self.se = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), *self.se)

    def gated(self, y: Tensor) -> Tensor:
        s = self.se(y)
        return self.conv2(y) * s + s


class OwnWeights(Block):
    LAYERS, PATH, PARAMS = ("down", "up"), "down", 2 * C * HIDDEN + C

    def build(self) -> None:
        self.down, self.up = nn.Parameter(torch.randn(HIDDEN, C)), nn.Parameter(torch.randn(C, HIDDEN))
        self.shift = nn.Parameter(torch.zeros(C))

    def gated(self, y: Tensor) -> Tensor:
        s = F.linear(F.relu(F.linear(y.mean((2, 3)), self.down)), self.up, self.shift)
        return y * s.sigmoid()[:, :, None, None]


class MatrixProducts(OwnWeights):
    PARAMS = 2 * C * HIDDEN

    def gated(self, y: Tensor) -> Tensor:
        s = torch.matmul(F.relu(y.mean((2, 3)) @ self.down.t()), self.up.t())
        return y * s.sigmoid()[:, :, None, None]


class WeightsOfChildren(Linear):
    def gated(self, y: Tensor) -> Tensor:
        z = F.relu(F.linear(y.mean((2, 3)), self.reduce.weight, self.reduce.bias))
        return y * F.linear(z, self.expand.weight, self.expand.bias).sigmoid()[:, :, None, None]


class OverChannels(Block):
    """ECA, written out."""

    LAYERS, PATH, PARAMS, WIDTH = ("mix",), "mix", 3, None

    def build(self) -> None:
        self.mix = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def gated(self, y: Tensor) -> Tensor:
        return y * self.mix(y.mean((2, 3))[:, None]).sigmoid().transpose(1, 2).unsqueeze(-1)


class OneLayer(Block):
    """eSE, written out."""

    LAYERS, PATH, PARAMS, WIDTH = ("fc",), "fc", C * C + C, None

    def build(self) -> None:
        self.fc = nn.Conv2d(C, C, 1)

    def gated(self, y: Tensor) -> Tensor:
        return y * F.hardsigmoid(self.fc(y.mean((2, 3), keepdim=True)))


class TwoPools(Block):
    """CBAM's half: one pair of layers for the mean and the maximum."""

    def gated(self, y: Tensor) -> Tensor:
        pools = (F.adaptive_avg_pool2d(y, 1), F.adaptive_max_pool2d(y, 1))
        average, maximum = (self.expand(F.relu(self.reduce(z))) for z in pools)
        return y * torch.sigmoid(average + maximum)


class Maximum(Linear):
    def gated(self, y: Tensor) -> Tensor:
        z = torch.max(y.flatten(2), 2)[0]
        return y * self.gate(z).view(-1, C, 1, 1)


class Normalised(Linear):
    PARAMS = Linear.PARAMS + 2 * HIDDEN

    def build(self) -> None:
        super().build()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def gated(self, y: Tensor) -> Tensor:
        s = self.expand(F.relu(self.norm(self.reduce(y.mean((2, 3))))))
        return y * (1 + torch.tanh(s))[:, :, None, None]


class FromInput(Linear):
    """The gate is computed from the block's input, the map of which the branch comes."""

    def forward(self, x: Tensor) -> Tensor:
        s = self.gate(x.mean((2, 3)))[:, :, None, None]
        return x + s * self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Beside(Linear):
    """The map and the gated map, added."""

    def gated(self, y: Tensor) -> Tensor:
        return y + y * self.gate(y.mean((2, 3)))[:, :, None, None]


class LastAxis(Linear):
    def gated(self, y: Tensor) -> Tensor:
        y = y.permute(0, 2, 3, 1)
        return (y * self.gate(y.mean((1, 2)))[:, None, None]).permute(0, 3, 1, 2)


class Multiplies(nn.Module):
    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return x * s


class ProductInChild(Block):
    def build(self) -> None:
        super().build()
        self.product = Multiplies()

    def gated(self, y: Tensor) -> Tensor:
        return self.product(y, torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True))))))


class Quantisable(Block):
    def build(self) -> None:
        super().build()
        self.product = nn.quantized.FloatFunctional()

    def gated(self, y: Tensor) -> Tensor:
        s = torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return self.product.mul(s, y)


class Scse(nn.Module):
    """smp's: a gate for each channel and one for each position, of the same map."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = GateChild().se
        self.positions = nn.Sequential(nn.Conv2d(C, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.channels(x) + x * self.positions(x)


class HoldsScse(Block):
    LAYERS, PATH = ("scse.channels.1", "scse.channels.3"), "scse.channels"

    def build(self) -> None:
        self.scse = Scse()

    def gated(self, y: Tensor) -> Tensor:
        return self.scse(y)


class Gated(nn.Module):
    """A wrapper that gates what its children make."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.reduce, self.expand = nn.Conv2d(C, HIDDEN, 1), nn.Conv2d(HIDDEN, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y * torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))


class Wrapped(Block):
    LAYERS, PATH = ("wrapper.reduce", "wrapper.expand"), "wrapper.reduce"

    def build(self) -> None:
        self.wrapper = Gated(nn.Sequential(toys.conv(C, C), nn.BatchNorm2d(C)))

    def gated(self, y: Tensor) -> Tensor:
        return self.wrapper(y)


class Untraceable(Gated):
    """What torch.fx cannot write as a graph: it asks for values."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        s = torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        for _ in range(len(list(y.shape)) // 4):
            y = y * s
        return y


class HoldsUntraceable(Wrapped):
    def build(self) -> None:
        self.wrapper = Untraceable(nn.Sequential(toys.conv(C, C), nn.BatchNorm2d(C)))


FORMS = (
    *(GateFirst, Viewed, Expanded, InPlace, Augmented, Clamped, Closure, PoolChild, GateChild, NormalisedGate),
    *(PoolAndLayers, ExpandedInChild),
    *(OwnWeights, MatrixProducts, WeightsOfChildren, OverChannels, OneLayer, TwoPools, Maximum, Normalised, FromInput),
    *(Beside, LastAxis, ProductInChild, Quantisable, HoldsScse, Wrapped, HoldsUntraceable),
)


def net(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomise(toys.Trunk(*blocks), seed=1).eval()


def holding(form: type[Block]) -> nn.Module:
    """A net of a block with that SE in it, and one with none."""
    torch.manual_seed(0)
    return net(form(), toys.Basic(C, C))


def under(path: str) -> str:
    return f"blocks.0.{path}"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_it_is_found_with_all_that_it_is(form):
    (site,) = find_se(holding(form), SIZE)
    assert (site.path, site.unit, site.stage) == (under(form.PATH), "blocks.0", 1)
    assert site.layers == tuple(map(under, form.LAYERS))
    assert (site.channels, site.rd_channels, site.params) == (C, form.WIDTH, form.PARAMS)
    assert (site.origin, site.is_module) == ("other", False)


# Multiply-adds and activations of one position: those of its layers, and one for each element of the scaled map.
COSTS = {
    **dict.fromkeys((GateFirst, Viewed, GateChild, OwnWeights, WeightsOfChildren, HoldsScse), (2 * C * HIDDEN, 10)),
    MatrixProducts: (2 * C * HIDDEN, 0),
    OverChannels: (3 * C, C),
    TwoPools: (4 * C * HIDDEN, 20),
}


@pytest.mark.parametrize("form", COSTS, ids=lambda form: form.__name__)
def test_what_it_costs(form):
    model, (macs, activations) = holding(form), COSTS[form]
    (site,) = find_se(model, SIZE)
    scaled = C * SIDE * SIDE
    assert (site.macs, site.activations) == (macs + scaled, activations + scaled)
    costs = count_costs(model, SIZE)
    ses = costs.ses["stage 1"]
    assert (ses.parameters, ses.multiply_adds, ses.activations) == (form.PARAMS, site.macs, site.activations)
    assert costs.whole.parameters == sum(p.numel() for p in model.parameters())
    assert costs.whole.multiply_adds == multiply_adds(model, SIZE)


# --------------------------------------------------------------------------------------------------- what is no such SE


class LayerScale(Block):
    def build(self) -> None:
        self.gamma = nn.Parameter(torch.rand(1, C, 1, 1))

    def gated(self, y: Tensor) -> Tensor:
        return y * self.gamma.expand(y.size(0), -1, -1, -1)


class LearnedCode(Block):
    """Layers, and what they work on is the same for any image."""

    def build(self) -> None:
        self.code, self.fc = nn.Parameter(torch.rand(4)), nn.Linear(4, C)

    def gated(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.fc(self.code.expand(y.size(0), 4)))[:, :, None, None]


class NoLayer(Block):
    def build(self) -> None:
        self.slope = nn.Parameter(torch.rand(C))

    def gated(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.slope[:, None, None] * y.mean((2, 3), keepdim=True))


class ResponseNorm(Block):
    """ConvNeXt V2's global response normalisation."""

    def build(self) -> None:
        self.gamma = nn.Parameter(torch.rand(1, C, 1, 1))

    def gated(self, y: Tensor) -> Tensor:
        size = y.norm(p=2, dim=(2, 3), keepdim=True)
        return y + self.gamma * (y * (size / (size.mean(1, keepdim=True) + 1e-6)))


class MapGate(Block):
    def gated(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.expand(F.relu(self.reduce(y))))


class PositionGate(Block):
    def build(self) -> None:
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def gated(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.conv(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)))


class ImageGate(Block):
    """One number an image: whether to take the branch at all."""

    def build(self) -> None:
        self.fc = nn.Linear(C, 1)

    def gated(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.fc(y.mean((2, 3))))[:, :, None, None]


class Selective(Block):
    """SKNet: which of two branches each channel is taken from."""

    def build(self) -> None:
        self.reduce, self.expand = nn.Conv2d(C, HIDDEN, 1), nn.Conv2d(HIDDEN, 2 * C, 1)

    def gated(self, y: Tensor) -> Tensor:
        both = torch.stack([y, self.conv2(y)], 1)
        s = self.expand(F.relu(self.reduce(both.sum(1).mean((2, 3), keepdim=True))))
        return (both * s.view(-1, 2, C, 1, 1).softmax(1)).sum(1)


class SplitNothing(Block):
    """ResNeSt's split attention in two groups, of one split."""

    def build(self) -> None:
        self.reduce, self.expand = nn.Conv2d(C, HIDDEN, 1, groups=2), nn.Conv2d(HIDDEN, C, 1, groups=2)

    def gated(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))


class Context(Block):
    """A global context: every position has its weight in what is pooled."""

    def build(self) -> None:
        super().build()
        self.weigh = nn.Conv2d(C, 1, 1)

    def gated(self, y: Tensor) -> Tensor:
        weights = self.weigh(y).flatten(2).softmax(-1)
        z = (y.flatten(2) @ weights.transpose(1, 2)).unsqueeze(-1)
        return y * torch.sigmoid(self.expand(F.relu(self.reduce(z))))


class WholeMap(Block):
    """A layer that sees every position by itself."""

    def build(self) -> None:
        self.fc = nn.Linear(C * SIDE * SIDE, C)

    def gated(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.fc(y.flatten(1)))[:, :, None, None]


class RowGate(Block):
    """A number for each row of the map."""

    def build(self) -> None:
        self.fc = nn.Linear(SIDE, SIDE)

    def gated(self, y: Tensor) -> Tensor:
        y = F.interpolate(y, (SIDE, 2 * SIDE))
        y = y * torch.sigmoid(self.fc(y.mean((1, 3))))[:, None, :, None]
        return F.interpolate(y, (SIDE, SIDE))


class Unused(Linear):
    """The gate is computed and added, and multiplies nothing."""

    def gated(self, y: Tensor) -> Tensor:
        return y + self.gate(y.mean((2, 3)))[:, :, None, None]


NONE = (
    *(LayerScale, LearnedCode, NoLayer, ResponseNorm, MapGate, PositionGate, ImageGate, Selective, Context, WholeMap),
    *(RowGate, Unused, SplitNothing),
)


@pytest.mark.parametrize("form", NONE, ids=lambda form: form.__name__)
def test_what_looks_like_one_and_is_none(form):
    model = holding(form)
    assert find_se(model, SIZE) == []
    assert [site.path for site in plan_se(model, example_input=SIZE).sites] == ["blocks.0.se", "blocks.1.se"]


# --------------------------------------------------------------------------------------------------------- operations


def refusal_of(form: type[Block]) -> list[str]:
    """What an error has to say: the block, and its layers."""
    block = {"HoldsScse": "scse", "Wrapped": "wrapper", "HoldsUntraceable": "wrapper", "ProductInChild": "product"}
    owner = f"blocks.0.{block[form.__name__]}" if form.__name__ in block else "blocks.0"
    return [repr(name) for name in (owner, *map(under, form.LAYERS))]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_its_unit_is_held_by_default(form):
    model, x = holding(form), images(SIZE)
    before = run(model, x)
    plan = plan_se(model, example_input=SIZE)
    assert [site.path for site in plan.sites] == ["blocks.1.se"]
    assert [(skip.unit, skip.kind) for skip in plan.skipped if skip.is_unit] == [("blocks.0", "held")]
    assert [site.path for site in plan.existing] == [under(form.PATH)]
    assert under(form.PATH) in str(plan) and "written out in a forward" in str(plan)
    add_se(model, example_input=SIZE)
    assert_same(run(model, x), before)
    assert [site.path for site in find_se(model, SIZE)] == [under(form.PATH), "blocks.1.se"]


REFUSED = {
    "error": lambda model: add_se(model, existing="error", example_input=SIZE),
    "replace": lambda model: add_se(model, existing="replace", example_input=SIZE),
    "strip": lambda model: strip_se(model, example_input=SIZE),
    "strip where": lambda model: strip_se(model, where="blocks.0*", example_input=SIZE),
    "fold": lambda model: strip_se(model, fold="mean", loader=[images(SIZE)], example_input=SIZE),
    "tradeoff": lambda model: tradeoff(model, [(images(SIZE), torch.zeros(2).long())]),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_what_cannot_be_done_is_refused_with_where_it_is(form, what):
    model = holding(form)
    before = snapshot(model)
    with pytest.raises(SurgeryError) as caught:
        REFUSED[what](model)
    assert [name for name in refusal_of(form) if name not in str(caught.value)] == []
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("placement", ["standard", "inner"])
def test_stack_puts_one_beside_it_and_strip_takes_that_alone(form, placement):
    if form is HoldsUntraceable and placement == "inner":
        placement = "post"  # its last wide convolution is where no graph shows it
    model, x = holding(form), images(SIZE)
    before, outputs, base = snapshot(model), run(model, x), find_se(model, SIZE)
    add_se(model, placement, existing="stack", where="blocks.0*", example_input=SIZE, lean=False)
    assert_same(run(model, x), outputs)
    (ours,) = (site for site in find_se(model, SIZE) if site.is_module)
    assert (ours.unit, ours.origin) == ("blocks.0", "se_surgery")
    assert [site for site in find_se(model, SIZE) if not site.is_module] == base
    with torch.no_grad():
        for parameter in model.get_submodule(ours.path).parameters():
            parameter.add_(0.3)
    assert_differs(run(model, x), outputs)
    with pytest.raises(PatientError, match="no module that could be taken out"):
        strip_se(model, example_input=SIZE)
    strip_se(model, origin="se_surgery", example_input=SIZE)
    assert differences(before, snapshot(model)) == []


def test_those_that_are_modules_are_taken_when_the_others_are_left_out():
    model = net(GateFirst(), toys.HoldsSE(C, toys.SequenceSE(C)))
    bare = net(GateFirst(), toys.HoldsSE(C, nn.Identity()))
    with pytest.raises(PatientError, match=r"'blocks.0.reduce'.*where=lambda site: site.is_module"):
        strip_se(model, example_input=SIZE)
    strip_se(model, where=lambda site: site.is_module, example_input=SIZE)
    bare.load_state_dict(model.state_dict())
    assert_same(run(model, images(SIZE)), run(bare, images(SIZE)))
    assert [site.path for site in find_se(model, SIZE)] == ["blocks.0.reduce"]


def test_a_block_with_a_module_and_a_written_one_is_not_half_replaced():
    class Both(GateFirst):
        def build(self) -> None:
            super().build()
            self.attention = toys.SequenceSE(C)

        def gated(self, y: Tensor) -> Tensor:
            return self.attention(super().gated(y))

    model = net(Both())
    before = snapshot(model)
    assert [site.path for site in find_se(model, SIZE)] == ["blocks.0.reduce", "blocks.0.attention"]
    with pytest.raises(PatientError, match=r"'blocks.0.reduce' is no module that could be replaced"):
        add_se(model, existing="replace", example_input=SIZE)
    assert differences(before, snapshot(model)) == []


# ------------------------------------------------------------------------------------------------- several, and nested


def test_two_in_one_block_are_two_and_the_same_layers_twice_are_one():
    class Two(Block):
        def build(self) -> None:
            super().build()
            self.fc = nn.Conv2d(C, C, 1)

        def gated(self, y: Tensor) -> Tensor:
            y = y * torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
            return y * torch.sigmoid(self.fc(F.adaptive_max_pool2d(y, 1)))

    class Twice(Block):
        def gated(self, y: Tensor) -> Tensor:
            for _ in range(2):
                y = y * torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
            return y

    sites = find_se(net(Two()), SIZE)
    assert [(site.path, site.rd_channels, site.params) for site in sites] == [
        ("blocks.0.reduce", HIDDEN, 42),
        ("blocks.0.fc", None, 72),
    ]
    assert [site.path for site in find_se(net(Twice()), SIZE)] == ["blocks.0.reduce"]


def test_of_two_units_in_one_forward_the_one_that_has_it_is_held():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(toys.conv(3, C), nn.BatchNorm2d(C), nn.ReLU())
            self.a, self.b, self.c, self.d = (toys.conv(C, C) for _ in range(4))
            self.reduce, self.expand, self.head = nn.Linear(C, HIDDEN), nn.Linear(HIDDEN, C), nn.Linear(C, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.b(F.relu(self.a(x)))
            y = F.relu(self.c(x))
            y = y * torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3))))))[:, :, None, None]
            x = x + self.d(y)
            return self.head(x.mean((2, 3)))

    model = randomise(Root())
    plan = plan_se(model, example_input=SIZE)
    assert [site.edge.producer for site in plan.sites] == ["b"]
    assert [(site.path, site.layers) for site in plan.existing] == [("reduce", ("reduce", "expand"))]
    with pytest.raises(PatientError, match="in the forward of the model, with the layers 'reduce' and 'expand'"):
        strip_se(model, example_input=SIZE)


class PlainBlock(Block):
    """No shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(F.relu(self.bn1(self.conv1(x))))

    def gated(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))


class Dense(GateFirst):
    """Its input with what it makes, concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.gated(F.relu(self.bn1(self.conv1(x))))], 1)


class Inception(GateFirst):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        z = F.relu(self.bn2(self.conv2(x)))
        return self.gated(torch.cat([y[:, : C // 2], z[:, : C // 2]], 1))


class PlainRoot(nn.Module):
    """All in the model's own forward, and no shortcut anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = toys.conv(3, C), toys.conv(C, C), nn.Linear(C, 5)
        self.reduce, self.expand = nn.Conv2d(C, HIDDEN, 1), nn.Conv2d(HIDDEN, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.head(F.relu(self.b(x)).mean((2, 3)))


# Blocks of other kinds than a residual one: the unit that holds the SE, and how many units get one.
KINDS = {
    "straight": (lambda: net(PlainBlock(), PlainBlock()), ["blocks.0", "blocks.1"], 1),
    "concatenated": (lambda: net(Dense(), toys.conv(2 * C, C)), ["blocks.0"], 0),
    "inception": (lambda: net(Inception()), ["blocks.0"], 0),
    "root": (lambda: randomise(PlainRoot()), [""], 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_units_of_other_kinds_are_held(kind):
    create, held, sites = KINDS[kind]
    plan = plan_se(create(), example_input=SIZE)
    assert [skip.unit for skip in plan.skipped if skip.kind == "held"] == held
    assert len(plan.existing) == len(held)
    assert len(plan.sites) == sites


def test_a_block_in_two_places_holds_it_in_both():
    shared = GateFirst()
    plan = plan_se(net(shared, toys.Basic(C, C), shared), existing="skip", example_input=SIZE)
    assert [site.path for site in plan.existing] == ["blocks.0.reduce"]
    assert [site.path for site in plan.sites] == ["blocks.1.se"]


def test_paths_move_with_the_model():
    model = nn.Sequential(nn.Identity(), holding(GateChild))
    (site,) = find_se(model, SIZE)
    assert (site.path, site.unit, site.block) == ("1.blocks.0.se", "1.blocks.0", "1.blocks.0")
    assert site.layers == ("1.blocks.0.se.1", "1.blocks.0.se.3")


def test_volumes():
    class Volume(toys.VolumeBlock):
        def __init__(self) -> None:
            super().__init__(8)
            self.reduce, self.expand = nn.Conv3d(8, 2, 1), nn.Conv3d(2, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            y = torch.sigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool3d(y, 1))))) * y
            return F.relu(x + y)

    model = toys.Volumes()
    model.block = Volume()
    (site,) = find_se(model, toys.Volumes.SIZE)
    assert (site.path, site.channels, site.rd_channels, site.params) == ("block.reduce", 8, 2, 42)


# ------------------------------------------------------------------------------------------- what else asks for SEs


def mixed() -> nn.Module:
    """Two blocks with an SE each: one that is written out, and a module."""
    return net(GateFirst(), toys.HoldsSE(C, toys.SequenceSE(C)))


def test_excitations_leave_it_out_with_the_reason(tmp_path):
    model = mixed()
    found = excitations(model, [images(SIZE)])
    assert [gates.site.path for gates in found] == ["blocks.1.attention"]
    ((path, reason),) = found.skipped
    assert path == "blocks.0.reduce" and "'blocks.0.reduce' and 'blocks.0.expand'" in reason
    assert (
        Excitations.load(found.save(tmp_path / "gates.safetensors"))["blocks.1.attention"].site == found.sites[0].site
    )
    with pytest.raises(NothingToDoError, match=r"written out in the forward of 'blocks.0'"):
        excitations(holding(GateFirst), [images(SIZE)])


def test_the_tradeoff_says_what_it_leaves_alone():
    model = mixed()
    found = tradeoff(model, [(images(SIZE), torch.zeros(2).long())], evaluate=lambda patient: 0.5, budget=0)
    assert found.taken == ("blocks.1.attention",)
    assert [path for path, _ in found.left] == ["blocks.0.reduce"]
    assert "blocks.0.reduce" in found.table()
    assert [site.path for site in find_se(model, SIZE)] == ["blocks.0.reduce"]


def test_pruning_leaves_it_alone_or_refuses():
    pytest.importorskip("torch_pruning")
    model = mixed()
    prune_se(model, 0.5, example_input=SIZE)
    assert [(site.path, site.rd_channels) for site in find_se(model, SIZE)] == [
        ("blocks.0.reduce", 2),
        ("blocks.1.attention", 1),
    ]
    with pytest.raises(PatientError, match=r"'blocks.0.reduce' and 'blocks.0.expand'"):
        prune_se(model, 0.5, where="blocks.0*", example_input=SIZE)


def test_recipes_of_models_with_it_are_done_again():
    model = add_se(mixed(), existing="stack", example_input=SIZE)
    strip_se(model, where="blocks.1*", example_input=SIZE)
    again = apply_recipe(mixed(), json.loads(json.dumps(recipe_of(model))), example_input=SIZE)
    assert list(again.state_dict()) == list(model.state_dict())
    assert [site.path for site in find_se(again, SIZE)] == [site.path for site in find_se(model, SIZE)]


def test_plans_draw_and_tell_it(tmp_path):
    plan = plan_se(mixed(), existing="stack", example_input=SIZE)
    assert plan.draw(tmp_path / "plan.svg").stat().st_size > 1000
    data = json.loads(plan.to_json())["plan"]["existing"]
    assert [(site["path"], site["layers"], site["block"]) for site in data] == [
        ("blocks.0.reduce", ["blocks.0.reduce", "blocks.0.expand"], "blocks.0"),
        ("blocks.1.attention", [], None),
    ]
