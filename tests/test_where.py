"""verify says where SEs sit: right in every placement, and each wrong place is seen, by values alone.

The wrong networks are written by hand: their forwards call the SE in the wrong place, and the record says otherwise.
"""

from __future__ import annotations

import pytest
import torch
from patients import build, images, randomise, run
from torch import Tensor, nn

from se_surgery import PlacementError, SESpec, SqueezeExcite, VerifyError, add_se, verify
from se_surgery.proving import where
from se_surgery.proving.flow import Flow
from se_surgery.proving.promises import trials
from se_surgery.records import IMPLANTS, Edge, Implant

SIZE = (3, 32, 32)
PLACEMENTS = ("standard", "pre", "post", "identity", "inner", "inception")


def judged(model: nn.Module, size=SIZE):
    """What comes of the check of places."""
    (trial,) = [trial for trial in trials(model, size, thorough=False) if trial.name == "where"]
    return trial.run()


# -------------------------------------------------------------------------------------------------------- right places

# How many SEs each placement has, from the networks' architectures.
COUNTS = {
    "resnet18": {"standard": 8, "pre": 8, "post": 8, "identity": 8, "inner": 8},
    "densenet121": {"standard": 58, "pre": 58},
    "repvgg_a0": {"standard": 22},
    "vgg11_bn": {"standard": 8},
    "convnext_atto": {"standard": 12, "post": 12, "identity": 12, "inner": 12},
    "torchvision/googlenet": {"standard": 9, "inception": 9},
    "torchvision/shufflenet_v2_x0_5": {"standard": 16, "pre": 16, "post": 16, "identity": 16},
    "torchvision/mobilenet_v3_small": {"standard": 11, "pre": 11, "post": 11, "inner": 11},
    "res2net50_26w_4s": {"standard": 16, "inner": 16},
}


QUICK = [("resnet18", placement) for placement in COUNTS["resnet18"]] + [
    ("repvgg_a0", "standard"),
    ("vgg11_bn", "standard"),
    ("convnext_atto", "inner"),
    ("torchvision/googlenet", "inception"),
    ("torchvision/shufflenet_v2_x0_5", "standard"),
    ("torchvision/mobilenet_v3_small", "pre"),
]
OTHERS = [(name, p) for name, counts in COUNTS.items() for p in counts if (name, p) not in QUICK]


def is_where_it_says(name: str, placement: str) -> bool:
    size = (3, 64, 64) if name in ("torchvision/googlenet", "repvgg_a0") else SIZE
    kwargs = {"aux_logits": False, "init_weights": False} if "googlenet" in name else {}
    model = add_se(build(name, **kwargs), placement, existing="stack", example_input=size)
    count = COUNTS[name][placement]
    check = judged(model, size)
    return (check.passed, check.detail) == (True, f"{count} of {count} SEs where {placement} says")


@pytest.mark.parametrize(("name", "placement"), QUICK)
def test_a_placement_is_where_it_says(name, placement):
    assert is_where_it_says(name, placement)


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "placement"), OTHERS)
def test_every_placement_of_a_family_is_where_it_says(name, placement):
    assert is_where_it_says(name, placement)


# -------------------------------------------------------------------------------------------------------- wrong places


class Residual(nn.Module):
    """A residual block with an SE at any of its places; `at` says which."""

    def __init__(self, at: str, channels: int = 8) -> None:
        super().__init__()
        self.at = at
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU()
        self.se = SqueezeExcite(SESpec(channels, channels // 2))

    def place(self, name: str, x: Tensor) -> Tensor:
        return self.se(x) if self.at == name else x

    def forward(self, x):
        x = self.place("input", x)
        y = self.act1(self.conv1(self.place("pre", x)))
        y = self.bn2(self.place("between", self.conv2(self.place("inner", y))))
        y = self.place("standard", y)
        x = self.place("identity", x)
        if self.at == "part":
            half = y.shape[1] // 2
            y = torch.cat([self.se(y)[:, :half], y[:, half:]], 1)
        y = self.place("sum", y + x)
        return self.place("post", self.act2(y))


class Parallel(nn.Module):
    """Three branches, concatenated; the SE is behind all, behind one or two of them, or behind what follows."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(9, 3, k, padding=k // 2), nn.ReLU()) for k in (1, 3, 5))
        self.deep = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.se = SqueezeExcite(SESpec({"all": 9, "input": 9, "two": 6}.get(at, 3), 2))

    def forward(self, x):
        if self.at == "input":
            x = self.se(x)
        one, two, three = (branch(x) for branch in self.branches)
        three = self.deep(three)
        if self.at == "one":
            three = self.se(three)
        if self.at == "two":
            y = torch.cat([self.se(torch.cat([one, two], 1)), three], 1)
        else:
            y = torch.cat([one, two, three], 1)
        return self.se(y) if self.at == "all" else y


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2, 1)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def forged(net: nn.Module, placement: str) -> nn.Module:
    """The network with a record of that placement in each block, whatever its forward does."""
    for name, block in net.blocks.named_children():
        edge = Edge(f"blocks.{name}", "forward", "x", ("se",), (2, 8, 16, 16), 1)
        block.__dict__[IMPLANTS] = [Implant("se", f"blocks.{name}", placement, (edge,), host=f"blocks.{name}")]
        block.se.placement = placement
    return randomise(net).eval()


def flow_of(net: nn.Module) -> str | None:
    """What the rule of its placement has against the first SE."""
    sites = [f"blocks.{name}.se" for name, _ in net.blocks.named_children()]
    placement = net.get_submodule(sites[0]).placement
    flow = Flow(net, sites)
    with flow, torch.no_grad():
        net(images(SIZE))
    with torch.no_grad():
        told = [where.RULES[placement](where.Seat(flow, site, flow.seats[site])) for site in sites]
    return next((one for one in told if one is not None), None)


RIGHT = {
    "standard": {"standard"},
    "pre": {"pre"},
    "identity": {"identity"},
    "post": {"post"},
    # A 1 x 1 convolution follows; behind its activation or behind that convolution is another place.
    "inner": {"inner"},
}
PLACES = ("input", "pre", "inner", "between", "standard", "identity", "part", "sum", "post")


@pytest.mark.parametrize("placement", RIGHT)
@pytest.mark.parametrize("at", PLACES)
def test_an_se_by_hand_is_judged_by_where_it_is(at, placement):
    told = flow_of(forged(Net(Residual(at), Residual(at)), placement))
    is_right = at in RIGHT[placement] or (placement, at) in ALSO_RIGHT
    assert (told is None) is is_right, told


# Before the activation behind the addition it halves what leaves that, too.
ALSO_RIGHT = {("post", "sum")}

WORDS = {
    ("standard", "identity"): "it is on an operand of the addition in 'blocks.0' with 0 convolutions; another has 2",
    ("standard", "post"): "it is behind the addition in 'blocks.0', not in front of it",
    ("standard", "inner"): "convolutions follow it before the addition in 'blocks.0'",
    ("standard", "part"): "on an operand of the concatenation in 'blocks.0' with 0 convolutions; another has 0",
    (
        "identity",
        "standard",
    ): "it is on an operand of the addition in 'blocks.0' with 2 convolutions; no other has more",
    ("pre", "input"): "it changes both operands of the addition in 'blocks.0'",
    ("post", "standard"): "it is in front of the addition in 'blocks.0', not behind it",
    ("inner", "standard"): "no convolution with k > 1 is right in front of it",
}


@pytest.mark.parametrize(("placement", "at"), WORDS)
def test_what_is_wrong_is_said(placement, at):
    told = flow_of(forged(Net(Residual(at)), placement))
    assert told is not None and told.endswith(WORDS[placement, at])


@pytest.mark.parametrize("placement", ["standard", "inception"])
@pytest.mark.parametrize("at", ["all", "one", "two", "input"])
def test_an_se_behind_a_part_of_a_concatenation_is_seen(at, placement):
    told = flow_of(forged(Net(Parallel(at), Parallel(at), channels=9), placement))
    assert (told is None) is (at == "all"), told


def test_verify_fails_for_an_se_in_the_wrong_place_and_names_it():
    model = add_se(build("resnet18"), "identity", example_input=SIZE)
    for path, module in model.named_modules():
        if path.startswith("layer3.1") and IMPLANTS in module.__dict__:
            (record,) = module.__dict__[IMPLANTS]
            record.placement = "standard"
    with pytest.raises(VerifyError, match=r"where: layer3\.1\.se is not where standard says: it is on an operand of"):
        verify(model, SIZE, thorough=False)
    assert run(model, images(SIZE))[0].isfinite().all()


def test_foreign_and_native_ses_are_not_judged():
    model = add_se(build("seresnet18"), existing="stack", example_input=SIZE)
    check = judged(model)
    assert (check.passed, check.detail) == (True, "8 of 8 SEs where standard says")


def test_a_placement_that_a_network_lacks_is_refused_before_it_is_judged():
    with pytest.raises(PlacementError):
        add_se(build("vgg11_bn"), "identity", example_input=SIZE)


def test_judging_leaves_the_model_as_found():
    model = add_se(build("resnet18"), example_input=SIZE)
    before = [value.clone() for value in model.state_dict().values()]
    assert judged(model).passed
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())
