"""Folding: an SE whose gate is a constant goes, and the model does what it did, exactly, with the base's own keys.

`python -m pytest -m sweep tests/test_fold.py` tries every family of timm and torchvision with every placement.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import toys
from patients import assert_differs, build, differences, images, randomise, run, snapshot
from timm.layers import BlurPool2d, DropPath, LayerNorm2d, LayerScale2d, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import folding as benchmark
from benchmarks.coverage import zoo
from benchmarks.coverage.rows import read
from se_surgery import (
    FoldError,
    NothingToDoError,
    OptionError,
    SurgeryError,
    add_se,
    apply_recipe,
    excitations,
    find_se,
    recipe_of,
    strip_se,
)
from se_surgery.folding.absorb import ANY, NOT_NEGATIVE, POSITIVE, NoFold
from se_surgery.folding.fold import factors_of, folding
from se_surgery.planning.exam import Exam
from se_surgery.surgery import strip

NARROW = {"channels": (8, 16, 32, 64), "num_classes": 10}
SMALLER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("resnet18", "seresnet18", "resnetv2_18"), NARROW),
    "torchvision/mobilenet_v2": {"inverted_residual_setting": [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 1, 2]]},
}


@torch.no_grad()
def hold_gates(model: nn.Module, size: Any = None, low: float = -1.0, high: float = 1.0) -> nn.Module:
    """Make the gates of all SEs constants, another one for each channel where their last layer has a bias."""
    generator = torch.Generator().manual_seed(11)
    for site in find_se(model, size):
        se = model.get_submodule(site.path)
        last = [m for m in se.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))][-1]
        last.weight.zero_()
        if last.bias is not None:
            last.bias.uniform_(low, high, generator=generator)
        if getattr(se, "mix", None) is not None:
            se.mix.fill_(0.6)
    return model


def foldable(model: nn.Module, size: Any, origin: str | None) -> tuple[list[str], list[str]]:
    """Paths of the SEs that can be folded, all at once, and of those that cannot."""
    exam = Exam(model, size)
    sites = [site for site in exam.existing if origin in (None, site.origin)]
    can, cannot = [], []
    for site in sites:
        try:
            folding(exam, site, [other.path for other in sites])
            can.append(site.path)
        except NoFold:
            cannot.append(site.path)
    return can, cannot


def assert_near(outputs: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Within a tolerance, relative to the largest value of each tensor."""
    assert len(outputs) == len(expected)
    for one, other in zip(outputs, expected, strict=True):
        assert other.isfinite().all() and other.unique().numel() > 1, "one constant, or not finite: shows nothing"
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def assert_folded(model: nn.Module, x: Tensor, paths: list[str], base: nn.Module | None, size: Any) -> None:
    """Fold in double and in single precision: the outputs stay, and what is left is the base, where there is one."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        patient = copy.deepcopy(model).to(dtype)
        expected = run(patient, x.to(dtype))
        assert strip_se(patient, where=paths, fold="mean", loader=[x], example_input=size) is patient
        assert_near(run(patient, x.to(dtype)), expected, tolerance)
    assert not {site.path for site in find_se(patient, size)} & set(paths)
    if base is not None:
        assert repr(patient) == repr(base)
        assert shapes(patient) == shapes(base)
    # Without the fold, their effect goes with the SEs: what was compared above has gates to tell of.
    stripped = strip_se(copy.deepcopy(model), where=paths, example_input=size)
    assert_differs(run(stripped, x), expected)


def shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(key, tuple(tensor.shape)) for key, tensor in model.state_dict().items()]


# --------------------------------------------------------------------------------------- families, placements, by hand


# Model, placement of our SEs (None: its own are folded), and how many of how many can be folded.
FOLDS = {
    ("resnet18", "standard"): (8, 8),  # the last normalisation of the branch takes it
    ("resnet18", "pre"): (8, 8),  # the branch's first convolution
    ("resnet18", "inner"): (8, 8),
    ("resnet18", "identity"): (4, 8),  # where the shortcut has a convolution of its own
    ("resnet18", "post"): (4, 8),  # there both operands of the sum take it
    ("seresnet18", None): (8, 8),
    ("resnetv2_18", "pre"): (8, 8),  # running statistics, and a convolution where the shortcut forks behind the norm
    ("densenet", "standard"): (4, 4),
    ("densenet", "pre"): (4, 4),  # running statistics
    ("mobilenetv3_small_050", None): (9, 9),  # hard swish in front: the convolution behind takes it
    ("torchvision/mobilenet_v2", "inner"): (4, 4),  # ReLU6 in front, and an SE that hangs on it
    ("torchvision/squeezenet1_1", "inception"): (8, 8),  # each convolution takes its part of the concatenation
    ("test_convnext", "standard"): (9, 9),  # past layer scale
    ("toy/PlainSequential", "standard"): (3, 3),
    ("toy/RootAdds", "standard"): (1, 1),
    ("toy/NHWC", "standard"): (2, 2),
    ("toy/Volumes", "standard"): (1, 1),
    ("toy/FunctionalDropPath", "standard"): (2, 2),
    ("toy/OddlyCalled", "standard"): (3, 3),
    ("toy/OwnSlot", "inner"): (2, 2),
}


def patient(name: str) -> nn.Module:
    if name == "densenet":
        torch.manual_seed(2)
        return randomise(timm.models.DenseNet(growth_rate=8, block_config=(2, 2), num_classes=10)).eval()
    return build(name, **SMALLER.get(name, {}))


def size_of(name: str) -> tuple[int, ...]:
    return getattr(toys, name.removeprefix("toy/")).SIZE if name.startswith("toy/") else (3, 64, 64)


def held(name: str, placement: str | None) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """A model with SEs of constant gates, and its base."""
    base, size = patient(name), size_of(name)
    model = copy.deepcopy(base)
    if placement is not None:
        existing = "stack" if find_se(base, size) else "error"
        add_se(model, placement, r=8, bias=True, init="paper", existing=existing, example_input=size)
    else:
        strip_se(base, example_input=size)
    return hold_gates(model, size), base, size


@pytest.mark.parametrize(("name", "placement"), FOLDS, ids=lambda value: str(value).rpartition("/")[2])
def test_a_constant_gate_costs_nothing_to_remove(name: str, placement: str | None) -> None:
    model, base, size = held(name, placement)
    origin = None if placement is None else "se_surgery"
    can, cannot = foldable(model, size, origin)
    assert (len(can), len(can) + len(cannot)) == FOLDS[name, placement]
    if cannot:
        before = snapshot(model)
        with pytest.raises(
            FoldError, match=rf"{len(cannot)} of \d+ SEs cannot be folded \({cannot[0]}: in front of it"
        ):
            strip_se(model, origin=origin, fold="mean", loader=[images(size)], example_input=size)
        assert differences(before, snapshot(model)) == []
    if can:
        assert_folded(model, images(size), can, None if cannot else base, size)


# Where nothing can take a standard SE: a nonlinear activation or another SE right in front of the addition, or a value
# that is used twice.
NONE_STANDARD = {"cs3darknet_focus_s", "cspnext_tiny", "ghostnet_050", "hgnetv2_b0", "legacy_seresnet18"}
NONE_STANDARD |= {"nasnetalarge", "pnasnet5large"}


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(zoo.listed("family")))
def test_every_family_and_placement(name: str) -> None:
    """Whatever can be folded is folded exactly, at once, and a standard SE can be in nearly every family."""
    for placement, body in zip(benchmark.PARTS, benchmark.fold_bodies(name, benchmark.PARTS), strict=True):
        assert body["status"] in (benchmark.PASS, benchmark.NONE), placement
        if placement == "standard" and body["status"] == benchmark.PASS:
            assert body["folded"] or name in NONE_STANDARD


def rows_of(name: str, *placements: str) -> list[dict[str, Any]]:
    bodies = benchmark.fold_bodies(name, placements)
    about = {"kind": "fold", "name": name, "family": "resnet_cifar"}
    return [{**about, "placement": part, **body} for part, body in zip(placements, bodies, strict=True)]


def test_the_benchmark_finds_what_test_folds_by_hand_and_what_goes_wrong(monkeypatch) -> None:
    own, standard, identity = rows_of("resnet20_cifar", "own", "standard", "identity")
    assert own["status"] == benchmark.NONE and own["why"] == "It has no SE of its own."
    assert (standard["ses"], standard["folded"], standard["base"], standard["status"]) == (9, 9, True, "pass")
    assert 0 < standard["float64"] < 1e-12 < 1e-9 < standard["float32"] < 1e-5 < 0.01 < standard["stripped"]
    assert (identity["ses"], identity["folded"]) == (9, 2) and "base" not in identity
    reason = (
        "in front of it the input of a module goes elsewhere, too, and behind it iadd in a module joins it with others"
    )
    assert identity["refused"] == {reason: 7}
    text = benchmark.document_text([own, standard, identity])
    assert "| resnet20_cifar | · | 9 of 9 | · | · | 2 of 9 | · | · |" in text
    assert (
        "11 of 18 SEs of constant gates were folded, in 2 of 2 cases; 0 failed." in text and f"| {reason} | 7 |" in text
    )

    monkeypatch.setattr(strip, "factors_of", lambda *given: [(one, gate * 1.001) for one, gate in factors_of(*given)])
    (off,) = rows_of("resnet20_cifar", "pre")
    assert off["status"].startswith("fail: float64 is ") and "| failed |" in benchmark.document_text([off])


def test_the_document_is_that_of_the_rows() -> None:
    rows = read(benchmark.ROWS).values()
    assert {row["name"] for row in rows} == zoo.listed("family")
    assert benchmark.DOCUMENT.read_text(encoding="utf-8") == benchmark.document_text(rows)
    assert {row["status"] for row in rows} == {benchmark.PASS, benchmark.NONE}


# ---------------------------------------------------------------------------------------- what may stand in between


class Between(nn.Module):
    """A convolution, something, an SE, and a SiLU, past which nothing can be folded."""

    def __init__(self, first: nn.Module, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.first = toys.conv(3, 8), first
        self.between, self.se, self.last = between, toys.ExpandSE(8), toys.conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.se(self.between(self.first(self.stem(x)))))).mean((2, 3))


class Behind(Between):
    """A SiLU, an SE, something, and a layer that may take the gate."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.between(self.se(F.silu(self.stem(x)))))).mean((2, 3))


class ByParameter(nn.Module):
    """Layer scale, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None] / 0.9


class DropsPath(nn.Module):
    """A drop path written out, always on: each image's map is scaled."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_ones(x.shape[0], 1, 1, 1).mul_(0.5) / 0.5


class ToLast(nn.Module):
    """Channels to the end, a layer over them, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Normalised(nn.Module):
    """Divided by its own size: what it is given may be scaled as one likes."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean((1, 2, 3), keepdim=True).sqrt()


class Adds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def affine(norm: nn.Module) -> nn.Module:
    """A norm whose weight and bias, and statistics, are not those it starts with."""
    return randomise(norm)


# What stands between the layer and the SE, and which gates can go past it; None for none at all.
IN_FRONT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], int | None]] = {
    "nothing": (lambda: toys.conv(8, 8), nn.Identity, ANY),
    "a convolution with a bias": (lambda: nn.Conv2d(8, 8, 3), nn.Identity, ANY),
    "a grouped convolution": (lambda: nn.Conv2d(8, 8, 3, groups=4), nn.Identity, ANY),
    "a depthwise convolution": (lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Identity, ANY),
    "batch norm": (lambda: affine(nn.BatchNorm2d(8)), nn.Identity, ANY),
    "group norm": (lambda: affine(nn.GroupNorm(2, 8)), nn.Identity, ANY),
    "layer norm": (lambda: affine(LayerNorm2d(8)), nn.Identity, ANY),
    "layer norm, channels last": (ToLast, nn.Identity, ANY),
    "a scaled standardised convolution": (lambda: ScaledStdConv2d(8, 8, 3), nn.Identity, ANY),
    "a standardised convolution": (lambda: StdConv2d(8, 8, 3), nn.Identity, None),
    "a norm without parameters": (lambda: nn.BatchNorm2d(8, affine=False), nn.Identity, None),
    "ReLU": (lambda: toys.conv(8, 8), nn.ReLU, NOT_NEGATIVE),
    "leaky ReLU": (lambda: toys.conv(8, 8), lambda: nn.LeakyReLU(0.2, inplace=True), NOT_NEGATIVE),
    "PReLU": (lambda: toys.conv(8, 8), lambda: nn.PReLU(8), NOT_NEGATIVE),
    "a function": (lambda: toys.conv(8, 8), lambda: F.relu, NOT_NEGATIVE),
    "several": (lambda: toys.conv(8, 8), lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), NOT_NEGATIVE),
    "pooling": (lambda: toys.conv(8, 8), lambda: nn.AvgPool2d(2), ANY),
    "blurring": (lambda: toys.conv(8, 8), lambda: BlurPool2d(8), ANY),
    "dropout": (lambda: toys.conv(8, 8), lambda: nn.Dropout(0.5), ANY),
    "drop path": (lambda: toys.conv(8, 8), lambda: DropPath(0.5), ANY),
    "drop path written out": (lambda: toys.conv(8, 8), DropsPath, ANY),
    "layer scale": (lambda: toys.conv(8, 8), lambda: LayerScale2d(8, 0.7), ANY),
    "layer scale by a function": (lambda: toys.conv(8, 8), ByParameter, ANY),
    "SiLU": (lambda: toys.conv(8, 8), nn.SiLU, None),
    "GELU": (lambda: toys.conv(8, 8), nn.GELU, None),
    "ReLU6": (lambda: toys.conv(8, 8), nn.ReLU6, None),
    "hard swish": (lambda: toys.conv(8, 8), nn.Hardswish, None),
    "a wide clip": (lambda: toys.conv(8, 8), lambda: nn.Hardtanh(-100, 100), None),
    "a sigmoid, a function": (lambda: toys.conv(8, 8), lambda: torch.sigmoid, None),
    "its own size": (lambda: toys.conv(8, 8), Normalised, None),
    "a constant added": (lambda: toys.conv(8, 8), Adds, None),
    "an SE that stays": (lambda: toys.conv(8, 8), lambda: toys.SequenceSE(8), None),
}
BEHIND: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], int | None]] = {
    "nothing": (lambda: nn.Conv2d(8, 8, 3), nn.Identity, ANY),
    "a grouped convolution": (lambda: nn.Conv2d(8, 12, 3, groups=4), nn.Identity, ANY),
    "a depthwise convolution": (lambda: nn.Conv2d(8, 16, 3, groups=8), nn.Identity, ANY),
    "ReLU and pooling": (
        lambda: nn.Conv2d(8, 8, 3),
        lambda: nn.Sequential(nn.MaxPool2d(2), nn.ReLU(inplace=True)),
        NOT_NEGATIVE,
    ),
    "batch norm": (lambda: affine(nn.BatchNorm2d(8)), nn.Identity, POSITIVE),
    "group norm": (lambda: affine(nn.GroupNorm(2, 8)), nn.Identity, None),
    "layer norm": (lambda: affine(LayerNorm2d(8)), nn.Identity, None),
    "a standardised convolution": (lambda: StdConv2d(8, 8, 3), nn.Identity, None),
    "SiLU": (lambda: nn.Conv2d(8, 8, 3), nn.SiLU, None),
    "a constant added": (lambda: nn.Conv2d(8, 8, 3), Adds, None),
}
SITUATIONS = {
    **{f"in front: {name}": (Between, *row) for name, row in IN_FRONT.items()},
    **{f"behind: {name}": (Behind, *row) for name, row in BEHIND.items()},
}
SIZE = (3, 32, 32)


def situation(name: str) -> tuple[nn.Module, int | None]:
    network, first, between, needs = SITUATIONS[name]
    torch.manual_seed(4)
    model = network(first(), between())
    if isinstance(model, Behind):
        outputs = [m for m in model.first.modules() if isinstance(m, nn.Conv2d)]
        model.last = toys.conv(outputs[-1].out_channels if outputs else 8, 4)
    return model.eval(), needs


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_may_stand_between_an_se_and_the_layer_that_takes_its_gate(name: str) -> None:
    model, needs = situation(name)
    hold_gates(model, SIZE)
    if needs is not None:
        exam = Exam(model, SIZE)
        assert folding(exam, exam.existing[-1], ["se"]).needs == needs
        assert_folded(model, images(SIZE), ["se"], None, SIZE)
        return
    before = snapshot(model)
    with pytest.raises(FoldError, match=r"1 of 1 SEs cannot be folded \(se: in front of it .*, and behind it .*where"):
        strip_se(model, where="se", fold="mean", loader=[images(SIZE)], example_input=SIZE)
    assert differences(before, snapshot(model)) == []


class Signed(nn.Module):
    """An SE whose gates are these numbers, whatever it sees."""

    def __init__(self, gates: list[float]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 2), nn.Linear(2, 8)
        with torch.no_grad():
            self.two.weight.zero_()
            self.two.bias.copy_(torch.tensor(gates))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.two(self.one(x.mean((2, 3))).relu())[:, :, None, None]


MIXED = [0.5, 2.0, -1.0, 0.25, 1.0, 3.0, -0.5, 0.75]
WITH_ZERO = [0.5, 2.0, 0.0, 0.25, 1.0, 3.0, 0.5, 0.75]


@pytest.mark.parametrize(
    ("name", "gates", "refused"),
    [
        ("in front: nothing", MIXED, None),
        ("in front: layer norm", MIXED, None),
        ("in front: ReLU", MIXED, "the gate of channel 2 is -1 on average"),
        ("in front: ReLU", WITH_ZERO, None),
        ("in front: batch norm", WITH_ZERO, None),
        ("behind: nothing", MIXED, None),
        ("behind: ReLU and pooling", MIXED, "the gate of channel 2 is -1 on average"),
        ("behind: batch norm", MIXED, "the gate of channel 2 is -1 on average"),
        ("behind: batch norm", WITH_ZERO, "the gate of channel 2 is 0"),
    ],
)
def test_negative_and_zero_gates_go_where_they_can(name: str, gates: list[float], refused: str | None) -> None:
    model, _ = situation(name)
    model.se = Signed(gates)
    if refused is None:
        assert_folded(model, images(SIZE), ["se"], None, SIZE)
        return
    before = snapshot(model)
    with pytest.raises(FoldError, match=refused):
        strip_se(model, fold="mean", loader=[images(SIZE)], example_input=SIZE)
    assert differences(before, snapshot(model)) == []


class Elsewhere(Between):
    """The convolution's output is used a second time."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.stem(x))
        return self.last(F.silu(self.se(self.between(y))) + y).mean((2, 3))


class Twice(Between):
    """One convolution runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.se(self.first(self.first(self.stem(x)))))).mean((2, 3))


class Tied(Between):
    """Two convolutions have one weight."""

    def __init__(self) -> None:
        super().__init__(toys.conv(8, 8), nn.Identity())
        self.other = toys.conv(8, 8)
        self.other.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.se(self.first(self.other(self.stem(x)))))).mean((2, 3))


class Forked(Between):
    """Behind the SE a ReLU in place, and what it takes is used elsewhere, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.stem(x))
        return self.last(self.first(F.relu(self.se(y), inplace=True)) + y).mean((2, 3))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Elsewhere(toys.conv(8, 8), F.relu), "what 'first' makes goes elsewhere, too"),
        (lambda: Twice(toys.conv(8, 8), nn.Identity()), "'first' is used in several places"),
        (Tied, "'first' is used in several places"),
        (lambda: Forked(toys.conv(8, 8), nn.Identity()), "would change in place what goes elsewhere, too"),
    ],
)
def test_a_layer_that_others_depend_on_takes_nothing(make: Callable[[], nn.Module], reason: str) -> None:
    model = hold_gates(make().eval(), SIZE)
    before = snapshot(model)
    with pytest.raises(FoldError, match=reason):
        strip_se(model, fold="mean", loader=[images(SIZE)], example_input=SIZE)
    assert differences(before, snapshot(model)) == []


# -------------------------------------------------------------------------------------------------- the fold, by hand


def test_the_mean_gate_is_a_factor_on_the_last_normalisation() -> None:
    """Gates that vary: what is left is the base with that normalisation scaled by their mean."""
    base = patient("resnet18")
    model = add_se(copy.deepcopy(base), r=4, stages=4, init="paper", bias=True, example_input=(3, 64, 64))
    with torch.no_grad():
        model.layer4[1].se.fc2.weight.normal_()
    data = [images(batch=3), images((3, 96, 96), batch=2)]
    gates = excitations(model, data)["layer4.1.se"]
    assert gates.variance.max() > 1e-6
    strip_se(model, where="layer4.1", fold="mean", loader=data, example_input=(3, 64, 64))
    for name in ("weight", "bias"):
        scaled = (getattr(base.layer4[1].bn2, name).double() * gates.mean).float()
        assert torch.equal(getattr(model.layer4[1].bn2, name), scaled)
    changed = [key for key, value in base.state_dict().items() if not torch.equal(value, model.state_dict()[key])]
    assert changed == ["layer4.1.bn2.weight", "layer4.1.bn2.bias"]
    assert [site.path for site in find_se(model, (3, 64, 64))] == ["layer4.0.se"]


def test_several_ses_around_one_convolution_are_all_in_it() -> None:
    """One gates what it takes, the other what it makes."""
    model = patient("resnet18")
    add_se(model, "pre", r=4, bias=True, init="paper", example_input=(3, 64, 64))
    add_se(model, "inner", r=4, bias=True, init="paper", existing="stack", example_input=(3, 64, 64))
    hold_gates(model)
    paths = [site.path for site in find_se(model) if "layer2.0" in site.path]
    assert len(paths) == 2
    assert_folded(model, images(), paths, None, (3, 64, 64))


# Placements of SEs on one edge, in the order in which they run, and which of them alone can be folded.
STACKED = {
    ("standard", "inner"): 0,  # in front is the normalisation, behind the addition
    ("pre", "pre"): 1,  # in front is the fork, behind the convolution
}


@pytest.mark.parametrize("placements", STACKED)
def test_the_way_does_not_lead_past_an_se_that_stays(placements: tuple[str, ...]) -> None:
    model = patient("resnet18")
    for placement in placements:
        options = {"stages": 4, "r": 4, "bias": True, "init": "paper", "existing": "stack"}
        add_se(model, placement, **options, example_input=(3, 64, 64))
    hold_gates(model)
    with torch.no_grad():
        for path in ("se", f"se_{placements[1]}"):
            # Not a constant: what is folded past it would change its gates.
            model.layer4[1].get_submodule(path).fc2.weight.normal_()
    paths = ["layer4.1.se", f"layer4.1.se_{placements[1]}"]
    free = paths.pop(STACKED[placements])
    with torch.no_grad():
        model.get_submodule(free).fc2.weight.zero_()
    assert_folded(model, images(), [free], None, (3, 64, 64))
    with pytest.raises(FoldError, match=f"'{free}' is in between"):
        strip_se(model, where=paths, fold="mean", loader=[images()], example_input=(3, 64, 64))


def test_excitations_measured_before_do_as_well() -> None:
    model, _, size = held("resnet18", "standard")
    found = excitations(model, [images()])
    first = strip_se(copy.deepcopy(model), fold=found, example_input=size)
    second = strip_se(model, fold="mean", loader=[images()], example_input=size)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize(("name", "placement"), [("resnet18", "standard"), ("toy/FunctionalDropPath", "standard")])
def test_training_goes_on_as_before(name: str, placement: str) -> None:
    """What a constant gate did in training, the folded layer does."""
    model, _, size = held(name, placement)
    model.double()
    expected = run(copy.deepcopy(model), images(size).double(), training=True)
    strip_se(model, fold="mean", loader=[images(size)], example_input=size)
    assert_near(run(model, images(size).double(), training=True), expected, 1e-12)


def test_running_statistics_keep_their_meaning_in_training() -> None:
    """A batch norm that took a gate in its statistics still normalises: in training they play no part."""
    model, _, size = held("densenet", "pre")
    model.double()
    expected = run(copy.deepcopy(model), images(size).double(), training=True)
    strip_se(model, fold="mean", loader=[images(size)], example_input=size)
    assert_near(run(model, images(size).double(), training=True), expected, 1e-3)  # but for epsilon


def test_native_ses_that_ours_replaced_are_gone_for_good_or_refused() -> None:
    model = patient("seresnet18")
    add_se(model, r=4, existing="replace", bias=True, init="paper", example_input=(3, 64, 64))
    hold_gates(model)
    before = snapshot(model)
    with pytest.raises(FoldError, match=r"'layer1.0.se' replaced 'layer1.0.se', which would come back"):
        strip_se(model, origin="se_surgery", fold="mean", loader=[images()], example_input=(3, 64, 64))
    assert differences(before, snapshot(model)) == []
    expected = run(model, images())
    strip_se(model, fold="mean", loader=[images()], example_input=(3, 64, 64))
    assert_near(run(model, images()), expected, 1e-5)
    assert find_se(model, (3, 64, 64)) == []


def test_a_folded_model_is_rebuilt_from_its_recipe() -> None:
    model, base, size = held("resnet18", "standard")
    strip_se(model, stages=[3, 4], fold="mean", loader=[images()], example_input=size)
    again = apply_recipe(copy.deepcopy(base), recipe_of(model), size)
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(run(again, images()), run(model, images()), strict=True))
    strip_se(model, origin="se_surgery", fold="mean", loader=[images()], example_input=size)
    assert recipe_of(model)["operations"] or not find_se(model, size)


def test_a_copy_is_folded_and_the_model_left_alone() -> None:
    model, _, size = held("resnet18", "standard")
    before = snapshot(model)
    folded = strip_se(model, fold="mean", loader=[images()], inplace=False, example_input=size)
    assert differences(before, snapshot(model)) == [] and not find_se(folded, size)


# ----------------------------------------------------------------------------------------------------------- refused


def cbam() -> nn.Module:
    return hold_gates(add_se(patient("resnet18"), attn="cbam", stages=4, example_input=(3, 64, 64)), (3, 64, 64))


def ours() -> nn.Module:
    return held("resnet18", "standard")[0]


def others() -> Any:
    """Of a model whose first stage has no SE."""
    model = add_se(patient("resnet18"), stages=[2, 3, 4], example_input=(3, 64, 64))
    return excitations(model, [images()])


# A model, the options, the error and what it says.
REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], type[Exception], str]] = {
    "no loader": (ours, lambda: {"fold": "mean"}, OptionError, "fold='mean' needs a loader"),
    "no fold": (ours, lambda: {"loader": [images()]}, OptionError, "fold=None has no use for a loader"),
    "unknown": (ours, lambda: {"fold": "median", "loader": [images()]}, OptionError, "fold='median' is not known"),
    "empty loader": (ours, lambda: {"fold": "mean", "loader": []}, SurgeryError, "gave no images"),
    "NaN": (ours, lambda: {"fold": "mean", "loader": [images() * math.nan]}, SurgeryError, "not finite"),
    "no SE there": (
        ours,
        lambda: {"fold": "mean", "loader": [images()], "where": "fc*"},
        NothingToDoError,
        "No SE is left",
    ),
    "a stage that is none": (
        ours,
        lambda: {"fold": "mean", "loader": [images()], "stages": 5},
        SurgeryError,
        "There is no stage 5",
    ),
    "a stage without": (
        lambda: add_se(patient("resnet18"), stages=[1, 2], example_input=(3, 64, 64)),
        lambda: {"fold": "mean", "loader": [images()], "stages": 4},
        NothingToDoError,
        "the model's 4 are in the stages 1, 2 and",
    ),
    "another attention": (
        cbam,
        lambda: {"fold": "mean", "loader": [images()]},
        SurgeryError,
        "does more than multiply each channel",
    ),
    "another model's gates": (
        ours,
        lambda: {"fold": others()},
        FoldError,
        "layer1.0.se: the excitations are not those",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_is_refused_and_the_model_left_alone(name: str) -> None:
    make, options, error, text = REFUSED[name]
    model, given = make(), options()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        strip_se(model, **given, example_input=(3, 64, 64))
    assert differences(before, snapshot(model)) == []


def test_a_layer_that_would_overflow_takes_nothing() -> None:
    model = situation("behind: batch norm")[0].half()
    model.se = Signed([1e-7] * 8).half()
    before = snapshot(model)
    with pytest.raises(FoldError, match=r"first.running_\w+ cannot take the mean gate of 'se'.*torch.float16"):
        strip_se(model, fold="mean", loader=[images(SIZE)], example_input=SIZE)
    assert differences(before, snapshot(model)) == []


def test_an_error_half_way_takes_everything_back(monkeypatch) -> None:
    model = ours()
    before = snapshot(model)
    absorbed, calls = strip.absorbed, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        return absorbed(*args) if len(calls) < 5 else None

    monkeypatch.setattr(strip, "absorbed", failing)
    with pytest.raises(FoldError, match="does not take its factor any more"):
        strip_se(model, fold="mean", loader=[images()], example_input=(3, 64, 64))
    assert len(calls) == 5 and differences(before, snapshot(model)) == []
