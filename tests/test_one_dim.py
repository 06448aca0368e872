"""Networks of signals: maps are (B, C, L), and all that holds of images holds of them.

The numbers of sites are counted by hand. Where each SE sits is told by values: with one gate at one half, the network
does what it does when the module that the table names returns, or is given, one half.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import signals
import timm
import torch
import toys
from patients import assert_differs, assert_same, calls, copied, images, pass_through, randomise, run
from torch import Tensor, nn
from torch.nn import functional as F

from se_surgery import (
    PatientError,
    PlacementError,
    ProbeError,
    SESpec,
    SqueezeExcite,
    add_se,
    apply_recipe,
    count_costs,
    excitations,
    find_se,
    from_pretrained,
    load_se,
    plan_se,
    prune_se,
    recipe_of,
    save_pretrained,
    strip_se,
    verify,
)
from se_surgery.reading.look import look
from se_surgery.reading.maps import IMAGES, SIGNALS

# The size of one signal, and by placement the number of sites.
FIVE = ("standard", "pre", "post", "identity", "inner")
NETS: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "ResNet1d": ((12, 300), dict.fromkeys(FIVE, 2 + 1 + 1 + 1)),
    "TCN": ((3, 70), dict.fromkeys(FIVE, 3)),
    # Two times three modules; the two shortcuts go around three of them each.
    "InceptionTime": ((2, 90), {"standard": 2 * 3, "inception": 2 * 3}),
    "ConcatTime": ((2, 90), {"standard": 2 * 3, "inception": 2 * 3}),
    "Inception1d": ((2, 50), {"standard": 2, "inception": 2}),
    "DenseNet1d": ((1, 128), dict.fromkeys(("standard", "pre", "inner"), 3 + 2)),
    # The encoder's three pairs of convolutions; the decoder is left out.
    "UNet1d": ((1, 64), {"standard": 3 * 2}),
    "ConvNeXt1d": ((4, 77), dict.fromkeys(FIVE, 3)),
    # Of four blocks the last one's residual goes nowhere.
    "WaveNet": ((1, 64), dict.fromkeys(FIVE, 4 - 1)),
    "ValidWaveNet": ((1, 64), dict.fromkeys(("standard", "post", "identity", "inner"), 3 - 1)),
    "MobileNet1d": ((6, 100), dict.fromkeys(("standard", "pre", "post", "inner"), 3)),
    "Plain1d": ((9, 128), {"standard": 2}),
    "Cropped": ((2, 50), dict.fromkeys(FIVE, 3)),
    "Speaker": ((20, 50), dict.fromkeys(FIVE, 3)),
    "Conformer": ((20, 50), dict.fromkeys(FIVE, 2)),
    "RepVGG1d": ((3, 64), {"standard": 4}),
    "Codec": ((1, 64), dict.fromkeys(FIVE, 3)),
    "Turned": ((4, 64), dict.fromkeys(FIVE, 2)),
    "Functional1d": ((8, 32), dict.fromkeys(FIVE, 2)),
    # As they come: (B, L), and (B, L, C).
    "Raw": ((500,), dict.fromkeys(FIVE, 4)),
    "Last": ((200, 7), dict.fromkeys(FIVE, 4)),
    "PointNet": ((3, 40), {"standard": 2 + 2}),
}
CASES = [(name, placement) for name, (_, sites) in NETS.items() for placement in sites]
# Nothing that is a convolution's module says what these take.
UNTOLD = ("Functional1d",)
# The modules whose value the SEs gate: (names, side).
HALVED: dict[tuple[str, str], tuple[str, str]] = {
    ("ResNet1d", "standard"): (r"layer\d\.\d\.bn2", "out"),
    ("ResNet1d", "inner"): (r"layer\d\.\d\.bn2", "out"),
    ("ResNet1d", "pre"): (r"layer\d\.\d\.conv1", "in"),
    ("ResNet1d", "post"): (r"layer\d\.\d\.act2", "out"),
    ("TCN", "standard"): (r"blocks\.\d\.net", "out"),
    ("TCN", "pre"): (r"blocks\.\d\.net", "in"),
    ("TCN", "post"): (r"blocks\.\d\.relu", "out"),
    ("TCN", "inner"): (r"blocks\.\d\.net\.6", "out"),
    ("InceptionTime", "inception"): (r"modules\d\.\d\.act", "out"),
    ("ConcatTime", "inception"): (r"modules\d\.\d\.concat", "out"),
    ("Inception1d", "inception"): (r"first|second", "out"),
    ("DenseNet1d", "standard"): (r"block\d\.layers\.\d", "out"),
    ("DenseNet1d", "pre"): (r"block\d\.layers\.\d", "in"),
    ("DenseNet1d", "inner"): (r"block\d\.layers\.\d\.conv2", "out"),
    ("UNet1d", "standard"): (r"(down1|down2|middle)\.[25]", "out"),
    ("ConvNeXt1d", "standard"): (r"blocks\.\d\.pwconv2", "out"),
    ("ConvNeXt1d", "pre"): (r"blocks\.\d\.dwconv", "in"),
    ("ConvNeXt1d", "post"): (r"blocks\.\d", "out"),
    ("ConvNeXt1d", "inner"): (r"blocks\.\d\.norm", "out"),
    ("WaveNet", "standard"): (r"blocks\.[012]\.residual", "out"),
    ("MobileNet1d", "standard"): (r"units\.\d\.act2", "out"),
    ("MobileNet1d", "inner"): (r"units\.\d\.act1", "out"),
    ("Plain1d", "standard"): (r"features\.[26]", "out"),
    ("Speaker", "standard"): (r"blocks\.\d\.bn2", "out"),
    ("Speaker", "inner"): (r"blocks\.\d\.inner", "out"),
    ("RepVGG1d", "standard"): (r"blocks\.\d\.act", "out"),
    ("Codec", "standard"): (r"units\.[014]\.block", "out"),
    ("Codec", "inner"): (r"units\.[014]\.block\.2", "out"),
    ("Codec", "pre"): (r"units\.[014]\.block", "in"),
    ("Conformer", "standard"): (r"blocks\.\d\.out", "out"),
    ("PointNet", "standard"): (r"act1|act2", "out"),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(len(name))
    return randomise(getattr(signals, name)().eval())


def of(name: str) -> Tensor:
    return images(NETS[name][0])


def operated(name: str, placement: str = "standard", **options: Any) -> nn.Module:
    if name in UNTOLD:
        options["example_input"] = NETS[name][0]
    return add_se(made(name), placement, **options)


def ses(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, SqueezeExcite)]


@pytest.mark.parametrize(("name", "placement"), CASES)
def test_sites_and_what_they_leave_as_it_was(name, placement):
    base, x = made(name), of(name)
    model = operated(name, placement)
    paths = ses(model)
    assert len(paths) == NETS[name][1][placement]
    own = [key for key in model.state_dict() if not key.startswith(tuple(f"{path}." for path in paths))]
    assert own == list(base.state_dict())
    assert isinstance(model, type(base))
    for training in (False, True):
        assert_same(run(copied(model), x, training), run(copied(base), x, training))


@pytest.mark.parametrize(("name", "placement"), CASES)
def test_each_runs_once_and_matters_and_goes_again(name, placement):
    base, x = made(name), of(name)
    model = operated(name, placement, init="paper")
    with calls(model, ses(model)) as counts:
        assert_differs(run(model, x), run(base, x))
    assert set(counts.values()) == {1}
    assert_same(run(pickle.loads(pickle.dumps(model)), x), run(model, x))
    assert_same(run(copy.deepcopy(model), x), run(model, x))
    passed = copied(model)
    assert pass_through(passed, lambda module: isinstance(module, SqueezeExcite)) == len(counts)
    assert_same(run(passed, x), run(base, x))
    options = {"example_input": NETS[name][0]} if name in UNTOLD else {}
    assert [site.path for site in find_se(model, **options)] == list(counts)
    strip_se(model, origin="se_surgery", **options)
    assert list(model.state_dict()) == list(base.state_dict()) and type(model) is type(base)
    assert_same(run(model, x), run(base, x))


@pytest.mark.parametrize("name", NETS)
def test_placements_that_a_network_has_none_of_are_refused_by_name(name):
    for placement in {*FIVE, "inception"} - NETS[name][1].keys():
        with pytest.raises(PlacementError, match="It has places for"):
            operated(name, placement)


def halve(module: nn.Module, side: str) -> None:
    if side == "in":
        module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
    else:
        module.register_forward_hook(lambda module, args, out: out * 0.5)


@pytest.mark.parametrize(("name", "placement"), HALVED)
def test_where_each_sits(name, placement):
    pattern, side = HALVED[name, placement]
    x, paths = of(name), ses(operated(name, placement))
    for number, path in enumerate(paths):
        model, base = operated(name, placement), made(name)
        model.get_submodule(path).gate_scale = 1.0
        matched = [module for at, module in base.named_modules() if re.fullmatch(pattern, at)]
        if name == "PointNet":
            matched = [None, None, *matched]  # those of the T-net call functions
        if matched[number] is None:
            continue
        assert len(matched) == len(paths)
        halve(matched[number], side)
        assert_same(run(model, x), run(base, x))


class HalfShortcut(signals.Basic):
    """ResNet's block with one half of its shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + 0.5 * shortcut)


class HalfTemporal(signals.Temporal):
    """A temporal block with one half of its shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.net(x) + 0.5 * (x if self.downsample is None else self.downsample(x)))


class HalfConvNeXt(signals.ConvNeXtBlock1d):
    """A ConvNeXt block with one half of its shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x).transpose(1, 2)))))
        return 0.5 * x + y.transpose(1, 2)


class HalfCropped(signals.CroppedBlock):
    """A causal block with one half of what is cropped."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x)[:, :, : -self.pad])
        return x + 0.5 * self.conv2(y)[:, :, : -self.pad]


HALF_BLOCKS = {
    "ResNet1d": ("identity", HalfShortcut),
    "TCN": ("identity", HalfTemporal),
    "ConvNeXt1d": ("identity", HalfConvNeXt),
    "Cropped": ("standard", HalfCropped),
}


@pytest.mark.parametrize("name", HALF_BLOCKS)
def test_where_each_sits_beside_a_forward_by_hand(name):
    placement, half = HALF_BLOCKS[name]
    x, paths = of(name), ses(operated(name, placement))
    for path in paths:
        model, base = operated(name, placement), made(name)
        model.get_submodule(path).gate_scale = 1.0
        base.get_submodule(path.rpartition(".")[0]).__class__ = half
        assert_same(run(model, x), run(base, x))


def test_what_is_cropped_is_squeezed_as_it_is_joined():
    plan = plan_se(made("Cropped"))
    length = plan.sites[0].size
    assert [site.size for site in plan.sites] == [length] * 3
    # Behind the convolutions it would be longer by what they are padded with.
    assert [site.size for site in plan_se(made("Cropped"), "inner").sites] == [
        (length[0] + 2 * 2**i,) for i in range(3)
    ]


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("squeeze", ["avg", "max"])
def test_the_module_by_hand(squeeze, last):
    torch.manual_seed(0)
    se = SqueezeExcite(SESpec(8, 4, squeeze=squeeze, dims=1, channels_last=last), "paper")
    x = torch.randn(3, 8, 5)
    z = x.mean(2) if squeeze == "avg" else x.amax(2)
    gate = torch.sigmoid(torch.relu(z @ se.fc1.weight.flatten(1).T) @ se.fc2.weight.flatten(1).T)
    expected = x * gate[:, :, None]
    got = se(x.transpose(1, 2)).transpose(1, 2) if last else se(x)
    torch.testing.assert_close(got, expected)
    assert "dims=1" in repr(se)


@pytest.mark.parametrize("name", ["ResNet1d", "ConvNeXt1d", "InceptionTime", "DenseNet1d"])
def test_the_lean_form_is_the_plain_one(name):
    x = of(name)
    for placement in NETS[name][1]:
        # In the start that is the identity no hidden channel is dead.
        lean, plain = operated(name, placement), operated(name, placement, lean=False)
        for path in ses(lean):
            nn.init.normal_(lean.get_submodule(path).fc2.weight, std=0.1)
        plain.load_state_dict(lean.state_dict())
        outputs = [model.train()(x) for model in (lean, plain)]
        assert torch.equal(*outputs)
        for output in outputs:
            output.square().mean().backward()
        for one, other in zip(lean.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        assert all(lean.get_submodule(path).fc2.weight.grad.abs().sum() > 0 for path in ses(lean))


def kept(model: nn.Module, x: Tensor) -> int:
    """Number of values that a forward keeps for its backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes.setdefault(tensor.data_ptr(), tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(x)
    assert output.requires_grad
    return sum(sizes.values())


def test_the_lean_form_keeps_no_map_of_its_own():
    """BatchNorm keeps its input; the plain form keeps what it made of it, too: one map for each SE."""
    x = images((12, 256))
    maps = 2 * sum(site.channels * site.size[0] for site in plan_se(made("ResNet1d"), example_input=(12, 256)).sites)
    more = kept(operated("ResNet1d", lean=False), x) - kept(operated("ResNet1d"), x)
    # Of every channel it keeps two numbers of the statistics.
    assert more == maps - 2 * sum(site.channels for site in plan_se(made("ResNet1d")).sites)


@pytest.mark.parametrize("name", [name for name in NETS if name not in ("WaveNet", "ValidWaveNet")])
def test_verify(name):
    report = verify(operated(name), example_input=NETS[name][0], thorough=False)
    where = next(check for check in report.checks if check.name == "where")
    count = NETS[name][1]["standard"]
    assert where.passed and where.detail.startswith(f"{count} of {count} SEs")


@pytest.mark.parametrize(("name", "placement"), [(n, p) for n in ("ResNet1d", "TCN", "WaveNet") for p in FIVE])
def test_verify_all_placements(name, placement):
    assert not verify(operated(name, placement, init="paper"), example_input=NETS[name][0], thorough=False).broken


FOLDED = [("ResNet1d", "standard"), ("ResNet1d", "pre"), ("ResNet1d", "inner"), ("TCN", "standard"), ("TCN", "inner")]
FOLDED += [("InceptionTime", "inception"), ("DenseNet1d", "standard"), ("ConvNeXt1d", "inner"), ("Plain1d", "standard")]


@pytest.mark.parametrize(("name", "placement"), FOLDED)
def test_folded(name, placement):
    """A gate that is the same for all signals goes into a layer exactly; mean gates are folded as they are."""
    base, x = made(name), of(name)
    model = operated(name, placement, init="paper")
    for path in ses(model):
        # Without its first layer the gate is its bias alone.
        se = model.get_submodule(path)
        se.fc2 = nn.Conv2d(se.fc2.in_channels, se.fc2.out_channels, 1)
        nn.init.zeros_(se.fc2.weight)
        nn.init.normal_(se.fc2.bias)
    expected = run(model, x)
    assert_differs(expected, run(base, x))
    strip_se(model, origin="se_surgery", fold="mean", loader=[x])
    assert list(model.state_dict()) == list(base.state_dict())
    for got, wanted in zip(run(model, x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_gates_are_measured():
    model, x = operated("ResNet1d", init="paper"), of("ResNet1d")
    se = model.get_submodule("layer2.0.se")
    seen: list[Tensor] = []
    se.gate.register_forward_hook(lambda module, args, out: seen.append(out.flatten(1)))
    measured = excitations(model, [(x, torch.tensor([0, 1]))])
    mean = next(gates.mean for gates in measured.sites if gates.site.path == "layer2.0.se")
    torch.testing.assert_close(mean.float(), seen[0].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Raw", "Last"])
def test_gates_are_measured_on_signals_as_they_come(name):
    model = operated(name, init="paper")
    measured = excitations(model, [(of(name), torch.tensor([0, 1]))])
    assert [gates.count for gates in measured.sites] == [2] * 4


@pytest.mark.parametrize("name", ["ResNet1d", "TCN", "ConvNeXt1d", "InceptionTime", "Plain1d", "Raw"])
def test_saved_and_loaded(name, tmp_path):
    placement = list(NETS[name][1])[-1]
    model, x = operated(name, placement, init="paper"), of(name)
    save_pretrained(model, tmp_path / "saved", base=getattr(signals, name)())
    loaded = from_pretrained(tmp_path / "saved", base=getattr(signals, name)()).eval()
    assert ses(loaded) == ses(model)
    assert_same(run(loaded, x), run(model, x))


@pytest.mark.parametrize("name", ["ResNet1d", "ConvNeXt1d", "WaveNet", "Last"])
def test_a_recipe_is_applied_again(name):
    for placement in NETS[name][1]:
        model, x = operated(name, placement, init="paper", r=4), of(name)
        other = apply_recipe(made(name), recipe_of(model))
        other.load_state_dict(model.state_dict())
        assert_same(run(other, x), run(model, x))


@pytest.mark.parametrize("name", [name for name in NETS if name not in ("Plain1d", "PointNet")])
def test_other_lengths(name):
    """What was looked at at one length runs at any other."""
    base, model = made(name), operated(name)
    size = NETS[name][0]
    axis = 1 if name == "Last" else len(size)
    for length in (size[axis - 1] + 32, 2 * size[axis - 1]):
        shape = [2, *size]
        shape[axis] = length
        x = torch.randn(shape)
        assert_same(run(model, x), run(base, x))


def test_costs_by_hand():
    model = made("ResNet1d")
    plan = plan_se(model, example_input=(12, 256))
    first = plan.sites[0]
    # 256 positions, halved by the stem and by the pooling; 16 channels, 2 hidden ones.
    assert (first.size, first.channels, first.rd_channels) == ((64,), 16, 2)
    assert first.params == 2 * 16 * 2 and first.macs == 2 * 16 * 2 + 16 * 64
    before = count_costs(model, example_input=(12, 256))
    after = count_costs(add_se(model, example_input=(12, 256)), example_input=(12, 256))
    channels = [(16, 64), (16, 64), (24, 32), (32, 16), (40, 8)]
    macs = sum(2 * c * 2 + c * length for c, length in channels)
    assert plan.params_added == sum(2 * c * 2 for c, _ in channels)
    assert plan.macs_added == macs == after.whole.multiply_adds - before.whole.multiply_adds


@pytest.mark.parametrize("name", ["ResNet1d", "ConvNeXt1d", "DenseNet1d"])
def test_pruned(name):
    model = operated(name, init="paper", r=2)
    widths = [site.rd_channels for site in find_se(model)]
    prune_se(model, ratio=0.5)
    assert sum(site.rd_channels for site in find_se(model)) == sum(widths) // 2
    assert_differs(run(model, of(name)), run(made(name), of(name)))


def test_drawn_and_printed(tmp_path):
    plan = plan_se(made("ResNet1d"))
    assert plan.draw(tmp_path / "plan.svg").stat().st_size > 1000
    assert "12 x 1024" in str(count_costs(made("ResNet1d"))) and "5 additions: 5 of units" in str(plan)


# ---------------------------------------------------------------------------------------------------- other attentions

NATIVE: dict[str, tuple[type[nn.Module], list[str]]] = {
    "linear": (signals.LinearSE, ["att", "att"]),
    "pointwise": (signals.PointwiseSE, ["att", "att"]),
    "turned": (signals.TurnedECA, ["att", "att"]),
    "viewed": (signals.ViewedECA, ["att", "att"]),
    # Of CBAM the part that gates channels.
    "both": (signals.Both, ["att.channels", "att.channels"]),
    "positions": (signals.OverPositions, []),
}


def attended(attention: type[nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    return randomise(signals.Attended(attention).eval())


@pytest.mark.parametrize("case", NATIVE)
def test_ses_of_others_are_found_and_replaced(case):
    attention, names = NATIVE[case]
    expected = [f"blocks.{i}.{name}" for i, name in zip((0, 2), names, strict=False)]
    assert [site.path for site in find_se(attended(attention))] == expected
    x = images((3, 64))
    if expected:
        replaced = add_se(attended(attention), existing="replace")
        assert [site.origin for site in find_se(replaced)] == ["se_surgery"] * 2
        passed = copied(replaced)
        pass_through(passed, lambda module: isinstance(module, SqueezeExcite))
        without = attended(attention)
        for path in expected:
            without.get_submodule(path).register_forward_hook(lambda module, args, out: args[0])
        assert_same(run(passed, x), run(without, x))
        strip_se(replaced, origin="se_surgery")
        assert_same(run(replaced, x), run(attended(attention), x))
    stacked = add_se(attended(attention), "inner", existing="stack")
    assert len(ses(stacked)) == 2
    assert_same(run(stacked, x), run(attended(attention), x))
    assert not verify(stacked, example_input=(3, 64), thorough=False).broken


def test_weights_of_an_se_of_another_move_over():
    source, x = attended(signals.PointwiseSE), images((3, 64))
    model = add_se(attended(signals.PointwiseSE), existing="replace", bias=True, r=4, gate_scale=1.0, init="paper")
    load_se(model, source.state_dict())
    torch.testing.assert_close(run(model, x)[0], run(source, x)[0])


@pytest.mark.parametrize("attn", ["ese", "eca", "ecam", "ceca", "gc", "gca"])
@pytest.mark.parametrize("name", ["ResNet1d", "ConvNeXt1d"])
def test_light_attention(name, attn):
    base, x = made(name), of(name)
    for placement in ("standard", "inner"):
        model = operated(name, placement, attn=attn)
        assert_same(run(model, x), run(base, x))
        assert len(find_se(model)) == NETS[name][1][placement]
        mixes = [parameter for key, parameter in model.named_parameters() if key.endswith(".mix")]
        assert len(mixes) == NETS[name][1][placement]
        for mix in mixes:
            nn.init.constant_(mix, 0.5)
        assert_differs(run(model, x), run(base, x))
        plan = plan_se(made(name), placement, attn=attn, example_input=NETS[name][0])
        before, after = (count_costs(one, example_input=NETS[name][0]) for one in (base, model))
        assert after.whole.multiply_adds - before.whole.multiply_adds == plan.macs_added > 0


@pytest.mark.parametrize("attn", ["cbam", "lcbam"])
def test_attention_with_kernels_of_two_dimensions_is_refused(attn):
    with pytest.raises(PatientError, match=f"{attn} takes maps of two dimensions"):
        operated("ResNet1d", attn=attn)


OPTIONS: dict[str, dict[str, Any]] = {
    "max": {"squeeze": "max"},
    "hard": {"gate": "hard_sigmoid"},
    "bias": {"bias": True},
    "silu": {"act": "silu"},
    "divisor": {"rd_divisor": 8},
    "mix": {"gate": "tanh"},
    "stages": {"stages": [1, -1]},
    "width": {"rd_channels": lambda site: site.in_channels // 4},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    base, x = made("ResNet1d"), of("ResNet1d")
    model = operated("ResNet1d", **options)
    assert_same(run(model, x), run(base, x))
    assert len(ses(model)) == (3 if "stages" in options else 5)


# ------------------------------------------------------------------------------------------------------- what is a map


def test_a_map_with_as_many_channels_as_positions():
    """(2, 16, 16) with its channels in front, and with them last: another length tells which."""
    model = signals.ConvNeXt1d(16)
    plan = plan_se(model, "inner", example_input=(4, 16))
    assert [(site.spec.channels_last, site.edge.producer) for site in plan.sites] == [(True, "norm")] * 3
    assert not any(site.spec.channels_last for site in plan_se(model, example_input=(4, 16)).sites)


def test_mirrored_maps_are_told_apart_by_what_made_them():
    """64 channels on 16 positions beside 16 on 64: no shape is a map's and a turned one's."""
    assert look(made("ResNet1d"), (12, 256)).maps.axis((2, 16, 64)) == 1


def test_where_nothing_tells_the_channels_there_is_no_place():
    model = signals.Square()
    assert [site.path for site in plan_se(model, example_input=(4, 16)).sites] == []
    skipped = plan_se(model, example_input=(4, 16)).skipped
    assert any("cannot be told from its positions" in skip.reason for skip in skipped)


RANKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "signals": (signals.ResNet1d, (12, 256), SIGNALS),
    "functions": (signals.Functional1d, (8, 32), SIGNALS),
    "filters": (signals.Spectral, (1, 4000), IMAGES),
    "transformer": (lambda: timm.create_model("test_vit"), (3, 160, 160), IMAGES),
    # ECA's convolution has one dimension.
    "eca": (lambda: timm.create_model("ecaresnet26t"), (3, 64, 64), IMAGES),
    "no convolution": (toys.NoConvolution, (3, 32, 32), IMAGES),
}


@pytest.mark.parametrize("case", RANKS)
def test_the_rank_of_maps_is_a_networks(case):
    make, size, ranks = RANKS[case]
    with torch.device("meta"):
        model = make()
    seen = look(model, size)
    assert seen.maps.ranks == ranks
    assert all(len(value.shape) in ranks for value in seen.values if value.is_map)
    assert all(len(event.shape) in ranks for event in seen.events if event.spatial)


class Positions(signals.ResNet1d):
    """Adds the sine of whole numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.sin(torch.arange(x.shape[-1], device=x.device)))


def test_the_sine_of_whole_numbers_is_none():
    base, x = randomise(Positions().eval()), of("ResNet1d")
    assert_same(run(add_se(copied(base)), x), run(base, x))


def test_the_rank_stays_what_it_was_with_ses_in_it():
    for attn in ("se", "gc", "eca"):
        assert look(operated("ResNet1d", attn=attn)).maps.ranks == SIGNALS


def test_a_network_of_images_behind_filters_of_signals():
    base, x = randomise(signals.Spectral().eval()), images((1, 4000))
    model = add_se(copied(base), example_input=(1, 4000))
    assert [site.size for site in plan_se(base, example_input=(1, 4000)).sites] == [(16, 501)] * 2
    assert_same(run(model, x), run(base, x))


def test_a_transformer_of_signals_is_refused():
    with pytest.raises(PlacementError, match="nothing to operate on"):
        add_se(signals.Transformer1d())


# ------------------------------------------------------------------------------------------------------- probing inputs


class Told(nn.Module):
    """Takes the number of positions that it says, and no other."""

    def __init__(self, **told: Any) -> None:
        super().__init__()
        vars(self).update(told)
        self.body = nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(8 * 345, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).flatten(1))


@pytest.mark.parametrize(
    "told", [{"seq_len": 345}, {"input_size": (2, 345)}, {"config": {"n_samples": 345}}, {"input_shape": (345, 2)}]
)
def test_a_network_says_its_length(told):
    assert plan_se(Told(**told)).image == (2, 345)


def test_a_length_that_nothing_tells_is_asked_for():
    with pytest.raises(ProbeError, match=re.escape("Give the size (C, L), a tensor")):
        add_se(Told())
    assert len(plan_se(Told(), example_input=(2, 345)).sites) == 2


@pytest.mark.parametrize(("name", "image"), [("Raw", (1024,)), ("Last", (1024, 7)), ("ResNet1d", (12, 1024))])
def test_what_stands_in_for_a_signal(name, image):
    assert plan_se(made(name)).image == image


def test_a_signal_that_comes_down_to_one_position_is_made_longer():
    model = signals.MobileNet1d()
    assert len(plan_se(model, example_input=(6, 2)).sites) == 3
    base, x = randomise(signals.MobileNet1d().eval()), images((6, 2))
    assert_same(run(add_se(copied(base), example_input=(6, 2)), x), run(base, x))


def test_half_precision_and_formats():
    model, x = operated("ResNet1d", init="paper"), of("ResNet1d")
    assert {module.fc1.weight.dtype for module in operated_half().modules() if isinstance(module, SqueezeExcite)} == {
        torch.float16
    }
    wanted = run(model, x)
    for memory_format in (torch.channels_last, torch.channels_last_3d):
        torch.testing.assert_close(run(copied(model).to(memory_format=memory_format), x), wanted)


def operated_half() -> nn.Module:
    return add_se(made("ResNet1d").half())


REASONS = {
    "WaveNet": "nothing that the network puts out is made of it",
    "ValidWaveNet": "a sum that is only added to further ones is a fusion",
    "Speaker": "adds a part of a map to what became of another part of it",
    "InceptionTime": "joins branches that hold whole units",
    "UNet1d": "a skip connection over lower resolutions",
    "Conformer": "no convolution on either side of the addition",
    "RepVGG1d": "a sum that can be re-parameterised",
}


@pytest.mark.parametrize("name", REASONS)
def test_joins_that_are_no_units_are_named(name):
    assert any(REASONS[name] in skip.reason for skip in plan_se(made(name)).skipped)
