"""The SE module by itself: its arithmetic, its identity start, its size, its first gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from patients import assert_differs, assert_same, build, images, run
from timm.layers import SEModule
from torch import Tensor, nn

from se_surgery import SESpec, SqueezeExcite, add_se, find_se
from se_surgery.se.costs import parameter_count
from se_surgery.se.excite import GATES, LIGHT_ATTENTION, Attention, hidden_channels
from se_surgery.se.excite import build as build_se

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BIASES = ((False, False), (True, False), (False, True), (True, True))
# Each layout: the shape of a batch, the axis of its channels, the axes of its positions.
LAYOUTS = {
    "maps": ((3, 6, 5, 4), 1, (2, 3)),
    "maps-channels-last": ((3, 5, 4, 6), 3, (1, 2)),
    "volumes": ((3, 6, 2, 5, 4), 1, (2, 3, 4)),
    "volumes-channels-last": ((3, 2, 5, 4, 6), 4, (1, 2, 3)),
}
# What the gates are, written down again.
GATE_FORMULAS = {
    "sigmoid": lambda v: 1 / (1 + torch.exp(-v)),
    "hard_sigmoid": lambda v: torch.clamp(v + 3, 0, 6) / 6,
    "tanh": lambda v: (torch.exp(v) - torch.exp(-v)) / (torch.exp(v) + torch.exp(-v)),
    "relu": lambda v: torch.maximum(v, torch.zeros_like(v)),
}
ACT_FORMULAS = {
    "relu": lambda v: torch.maximum(v, torch.zeros_like(v)),
    "silu": lambda v: v / (1 + torch.exp(-v)),
    "gelu": lambda v: v / 2 * (1 + torch.erf(v / 2**0.5)),
    "leaky_relu": lambda v: torch.where(v > 0, v, v / 100),
    "hard_swish": lambda v: v * torch.clamp(v + 3, 0, 6) / 6,
    "prelu": lambda v: torch.where(v > 0, v, v / 4),
}


def trained(spec: SESpec, init: str = "paper") -> SqueezeExcite:
    """An SE in float64 with weights far from any special value: some hidden units closed, some gates saturated."""
    se = SqueezeExcite(spec, init=init).double()
    with torch.no_grad():
        for name, parameter in se.named_parameters():
            if name.startswith("fc") or name == "mix":
                parameter.normal_(0.3, 1.5)
    return se


def directly(se: SqueezeExcite, spec: SESpec, x: Tensor, channel: int, positions: tuple[int, ...]) -> Tensor:
    """The same by the formulas, image by image and without convolutions."""
    w1, w2 = se.fc1.weight[:, :, 0, 0], se.fc2.weight[:, :, 0, 0]
    b1 = se.fc1.bias if spec.bias[0] else torch.zeros(spec.rd_channels, dtype=x.dtype)
    b2 = se.fc2.bias if spec.bias[1] else torch.zeros(spec.channels, dtype=x.dtype)
    result = torch.empty_like(x)
    for i, image in enumerate(x.movedim(channel, 1)):
        flat = image.reshape(spec.channels, -1)
        z = flat.sum(1) / flat.shape[1] if spec.squeeze == "avg" else flat.sort(1).values[:, -1]
        gate = spec.gate_scale * GATE_FORMULAS[spec.gate](w2 @ ACT_FORMULAS[spec.act](w1 @ z + b1) + b2)
        gated = torch.stack([gate[c] * image[c] for c in range(spec.channels)])
        if spec.mix:
            gated = image + se.mix * (gated - image)
        result.movedim(channel, 1)[i] = gated
    return result


def check_against_formulas(layout: str, **options: object) -> None:
    shape, channel, positions = LAYOUTS[layout]
    dims = 3 if layout.startswith("volumes") else 2
    spec = SESpec(channels=6, rd_channels=3, channels_last=layout.endswith("last"), dims=dims, **options)
    se = trained(spec)
    x = torch.randn(shape, dtype=torch.float64)
    expected = directly(se, spec, x, channel, positions)
    assert not torch.allclose(expected, x)
    before = x.clone()
    torch.testing.assert_close(se(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before), "the input was changed in place"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", BIASES, ids=lambda b: f"bias-{b[0]:d}{b[1]:d}")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("squeeze", ["avg", "max"])
def test_output_is_that_of_the_formulas(squeeze, gate, bias, layout):
    check_against_formulas(layout, squeeze=squeeze, gate=gate, bias=bias)


@pytest.mark.parametrize("act", ACT_FORMULAS)
def test_output_with_each_activation_is_that_of_the_formulas(act):
    check_against_formulas("maps", act=act)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("options", [{"gate_scale": 2.0}, {"gate_scale": 0.5}, {"mix": True}], ids=str)
def test_output_with_scale_and_mix_is_that_of_the_formulas(options, gate):
    check_against_formulas("maps", gate=gate, **options)


@pytest.mark.parametrize("squeeze", ["avg", "max"])
def test_gradients_are_those_of_the_formulas(squeeze):
    spec = SESpec(channels=6, rd_channels=3, bias=(True, True), squeeze=squeeze, gate_scale=2.0)
    se = trained(spec)
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = [x, *se.parameters()]
    ours = torch.autograd.grad(se(x).sin().sum(), weights)
    theirs = torch.autograd.grad(directly(se, spec, x, 1, (2, 3)).sin().sum(), weights)
    for first, second in zip(ours, theirs, strict=True):
        assert second.any()
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


def test_channels_last_memory_format_gives_the_same_values():
    se = trained(SESpec(channels=6, rd_channels=3))
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(se(x.contiguous(memory_format=torch.channels_last)), se(x), rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------- like timm's own module


@pytest.mark.parametrize("channels", [64, 24, 200])
def test_paper_start_draws_the_weights_that_timm_draws(channels):
    """One seed, the same numbers in the same order; so the names, shapes and outputs are the same too."""
    torch.manual_seed(5)
    theirs = SEModule(channels, rd_ratio=1 / 16, rd_divisor=8)
    torch.manual_seed(5)
    width = hidden_channels(channels, 16, rd_divisor=8)
    ours = SqueezeExcite(SESpec(channels, width, bias=(True, True)), init="paper")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    x = torch.randn(2, channels, 7, 7)
    assert_same([ours(x)], [theirs(x)])


# (channels, r, divisor) and the hidden width, by hand: max(2, C // r), to the nearest multiple, at least one of them.
WIDTHS = {
    (64, 16, 1): 4,
    (256, 16, 1): 16,
    (2048, 32, 1): 64,
    (24, 16, 1): 2,
    (16, 16, 1): 2,
    (7, 16, 1): 2,
    (100, 3, 1): 33,
    (64, 1, 1): 64,
    (64, 16, 8): 8,
    (96, 16, 8): 8,
    (24, 16, 8): 8,
    (200, 16, 8): 16,
    (176, 16, 8): 8,
    (192, 16, 8): 16,
    (512, 16, 8): 32,
    (320, 16, 16): 16,
    (384, 16, 16): 32,
    (100, 3, 2): 34,
    (72, 4, 4): 20,
}
TIMM_OPTIONS = [options for options in WIDTHS if options[2] > 1]


@pytest.mark.parametrize("options", WIDTHS, ids=str)
def test_hidden_width(options):
    assert hidden_channels(*options) == WIDTHS[options]


@pytest.mark.parametrize("options", TIMM_OPTIONS, ids=str)
def test_hidden_width_is_that_of_timms_module(options):
    channels, r, divisor = options
    assert hidden_channels(*options) == SEModule(channels, rd_ratio=1 / r, rd_divisor=divisor).fc1.out_channels


# ----------------------------------------------------------------------------------------------------------------- size


def test_the_write_ups_block_has_576_parameters():
    """64 channels, r=16, a bias in the second layer only: 64 x 4 + 4 x 64 + 64."""
    spec = SESpec(channels=64, rd_channels=hidden_channels(64, 16), bias=(False, True))
    assert parameter_count(spec) == 576
    assert sum(p.numel() for p in SqueezeExcite(spec).parameters()) == 576
    model = add_se(build("resnet18"), bias=(False, True), r=16)
    assert [site.params for site in find_se(model, (3, 64, 64)) if site.channels == 64] == [576, 576]


SPECS = {
    **{f"bias-{a:d}{b:d}": SESpec(24, 5, bias=(a, b)) for a, b in BIASES},
    "mix": SESpec(24, 5, mix=True),
    "max": SESpec(24, 5, squeeze="max", bias=(True, True)),
    "prelu": SESpec(24, 5, act="prelu"),
    **{f"{attn}{'-mix' * mix}": SESpec(24, 5, attn=attn, mix=mix) for attn in LIGHT_ATTENTION for mix in (False, True)},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_parameters_are_counted_without_building(spec):
    built = sum(p.numel() for p in build_se(spec, "identity", None, None).parameters())
    assert built > 0
    assert parameter_count(spec) == built


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_module_is_built_in_the_dtype_asked_for(spec, dtype):
    se = build_se(spec, "identity", torch.device("cpu"), dtype)
    assert {t.dtype for t in (*se.parameters(), *se.buffers()) if t.is_floating_point()} == {dtype}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_module_is_built_on_the_device_asked_for(spec):
    se = build_se(spec, "identity", torch.device("meta"), None)
    assert all(tensor.is_meta for tensor in (*se.parameters(), *se.buffers()))
    assert se(torch.empty(2, 24, 7, 7, device="meta")).shape == (2, 24, 7, 7)


# ------------------------------------------------------------------------------------------------------- identity start

IDENTITIES = {
    **{gate: {"gate": gate} for gate in GATES},
    "max": {"squeeze": "max"},
    "bias": {"bias": True},
    "silu": {"act": "silu"},
    "hard_swish": {"act": "hard_swish"},
    **{attn: {"attn": attn} for attn in LIGHT_ATTENTION},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", IDENTITIES.values(), ids=IDENTITIES)
def test_identity_start_leaves_a_models_outputs_bit_equal(options, dtype):
    base, x = build("test_resnet").to(dtype), images((3, 64, 64)).to(dtype)
    before = run(base, x), run(base, x, training=True)
    model = add_se(build("test_resnet").to(dtype), **options)
    assert_same(run(model, x), before[0])
    assert_same(run(model, x, training=True), before[1])


@pytest.mark.parametrize("options", IDENTITIES.values(), ids=IDENTITIES)
def test_identity_start_is_in_the_datas_way(options):
    """The same model with other SE weights gives other outputs: the test above does not compare a model with itself."""
    model, x = add_se(build("test_resnet"), **options), images((3, 64, 64))
    before = run(model, x)
    with torch.no_grad():
        for site in find_se(model, (3, 64, 64)) or _attended(model):
            module = model.get_submodule(site if isinstance(site, str) else site.path)
            if getattr(module, "mix", None) is not None:
                module.mix.fill_(0.5)
            else:
                module.fc2.weight.normal_()
    assert_differs(run(model, x), before)


def _attended(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, Attention)]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0], ids=lambda scale: f"features-of-{scale:g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_identity_start_is_exact_for_features_of_any_size(gate, dtype, scale):
    mix = not GATES[gate].at_zero
    spec = SESpec(64, 4, gate=gate, gate_scale=1.0 if mix else 2.0, mix=mix, bias=(True, True))
    se = SqueezeExcite(spec, init="identity", dtype=dtype)
    for x in (torch.randn(2, 64, 7, 7) * scale, torch.rand(2, 64, 7, 7) * scale, -torch.rand(2, 64, 7, 7) * scale):
        assert torch.equal(se(x.to(dtype)), x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("attn", LIGHT_ATTENTION)
def test_identity_start_of_each_light_attention_is_exact(attn, channels_last, dtype):
    attention = Attention(SESpec(24, 6, attn=attn, mix=True, channels_last=channels_last), dtype=dtype)
    x = torch.randn(2, 9, 8, 24) if channels_last else torch.randn(2, 24, 9, 8)
    x = x.to(dtype)
    assert torch.equal(attention(x), x)


@pytest.mark.parametrize("attn", LIGHT_ATTENTION)
def test_light_attention_is_timms_own_mixed_in(attn):
    attention = Attention(SESpec(24, 6, attn=attn, mix=True)).eval()
    x = torch.randn(2, 24, 9, 8)
    y = attention.attn(x)
    assert not torch.equal(y, x)
    for amount in (0.25, 1.0):
        with torch.no_grad():
            attention.mix.fill_(amount)
        torch.testing.assert_close(attention(x), x * (1 - amount) + y * amount)
    plain = Attention(SESpec(24, 6, attn=attn)).eval()
    plain.attn.load_state_dict(attention.attn.state_dict())
    assert torch.equal(plain(x), y)


@pytest.mark.parametrize("attn", LIGHT_ATTENTION)
def test_channels_last_attention_is_that_of_the_moved_axes(attn):
    first = Attention(SESpec(24, 6, attn=attn)).eval()
    last = Attention(SESpec(24, 6, attn=attn, channels_last=True)).eval()
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 24, 9, 8)
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)), first(x).permute(0, 2, 3, 1))


@pytest.mark.parametrize("gate", GATES)
def test_identity_start_gives_the_gate_its_largest_slope(gate):
    """At zero a sigmoid is steepest, a hard sigmoid is not saturated; a zero mix lets its own gradient through."""
    mix = not GATES[gate].at_zero
    se = SqueezeExcite(SESpec(16, 4, gate=gate, gate_scale=1.0 if mix else 2.0, mix=mix), init="identity")
    se(torch.randn(2, 16, 5, 5)).square().sum().backward()
    first = se.mix if mix else se.fc2.weight
    assert first.grad.any()


# ---------------------------------------------------------------------------------------------------- not one born dead


@pytest.mark.parametrize("width", range(1, 10))
def test_first_layers_rows_come_in_pairs(width):
    weight = SqueezeExcite(SESpec(16, width), init="identity").fc1.weight.flatten(1)
    half = width // 2
    assert torch.equal(weight[:half], -weight[half : 2 * half])
    assert weight.any(1).all(), "a row of zeros"
    if width % 2:
        assert not any(torch.equal(weight[-1], -row) for row in weight[:-1]), "the odd row has no partner"


def test_paper_starts_rows_are_independent():
    weight = SqueezeExcite(SESpec(16, 8), init="paper").fc1.weight.flatten(1)
    assert not any(torch.equal(a, -b) for a, b in itertools.combinations(weight, 2))


SIGNS = {
    "positive": torch.rand,
    "negative": lambda *shape: -torch.rand(*shape),
    "mixed": torch.randn,
    "small": lambda *shape: 1e-6 * torch.rand(*shape),
}


@pytest.mark.parametrize("squeeze", ["avg", "max"])
@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("width", [2, 3])
def test_narrow_ses_second_layer_learns_at_once_for_any_input(width, bias, sign, squeeze):
    """One image, twenty seeds: with plain random rows some of these SEs had all hidden units closed."""
    spec = SESpec(16, width, bias=(bias, bias), gate_scale=2.0, squeeze=squeeze)
    for seed in range(20):
        torch.manual_seed(seed)
        se = SqueezeExcite(spec, init="identity")
        se(SIGNS[sign](1, 16, 5, 5)).square().sum().backward()
        assert se.fc2.weight.grad.any(), f"dead with seed {seed}"


@pytest.mark.parametrize("width", [2, 3, 4])
def test_first_layer_learns_after_one_step(width):
    se = SqueezeExcite(SESpec(16, width, gate_scale=2.0, bias=(True, True)), init="identity")
    optimizer = torch.optim.SGD(se.parameters(), lr=1e-3)
    x, target = torch.rand(4, 16, 5, 5), torch.rand(4, 16, 5, 5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (se(x) - target * x).square().sum()
        losses.append(loss.item())
        loss.backward()
        first = se.fc1.weight.grad.clone()
        optimizer.step()
    assert first.any()
    assert losses[0] > losses[1] > losses[2]


def test_parameters_are_drawn_from_the_global_generator():
    spec = SESpec(16, 4)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(SqueezeExcite(spec, init="identity").fc1.weight)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


PRINTED = {
    "plain": (SESpec(64, 4), []),
    "max": (SESpec(64, 4, squeeze="max"), ["squeeze='max'"]),
    "scaled": (SESpec(64, 4, gate_scale=2.0), ["gate_scale=2"]),
    "last": (SESpec(64, 4, channels_last=True), ["channels_last=True"]),
    "volumes": (SESpec(64, 4, dims=3), ["dims=3"]),
}


@pytest.mark.parametrize("case", PRINTED.values(), ids=PRINTED)
def test_print_names_what_differs_from_the_papers_module(case):
    spec, parts = case
    text = repr(SqueezeExcite(spec))
    others = {part for _, other in PRINTED.values() for part in other} - set(parts)
    assert all(part in text for part in parts)
    assert not any(part in text for part in others)


def test_a_model_prints_what_its_ses_are_and_where() -> None:
    model = build("resnet18")
    for placement, options in (("pre", {}), ("identity", {"gate": "tanh", "squeeze": "max", "r": 8})):
        add_se(model, placement, where="layer1.0*", existing="stack", **options)
    lines = [line.strip() for line in repr(model.layer1[0]).splitlines()]
    assert lines[1:3] == ["(se): SqueezeExcite(", "channels=64, rd_channels=4, placement='pre', gate_scale=2"]
    # Where the forward comes to the shortcut: behind the branch, in front of the activation after the addition.
    behind = lines.index("(se_identity): SqueezeExcite(")
    assert lines[behind + 1] == "channels=64, rd_channels=8, placement='identity', squeeze='max'"
    assert lines[behind - 1].startswith("(bn2)") and "(gate): Tanh()" in lines[behind:]
    add_se(model, "post", attn="eca", where="layer1.1*")
    assert "(se): Attention(\n    placement='post'\n" in repr(model.layer1[1])
    # Without a unit around it there is no placement, and a layer that is wrapped may have no widths.
    alone = SqueezeExcite(SESpec(64, 4, gate_scale=2.0))
    assert alone.extra_repr() == "channels=64, rd_channels=4, gate_scale=2"
    alone.fc1 = nn.Sequential(alone.fc1)
    assert alone.extra_repr() == "gate_scale=2"
