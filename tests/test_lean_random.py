"""The lean form against the plain one in configurations drawn at random: outputs, gradients, statistics, exceptions.

A configuration is one option of each axis of `AXES`, drawn by a dtype and a number. A failure prints it with the line
that runs it again. The long run:

    python -m pytest -m sweep tests/test_lean_random.py -s
"""

from __future__ import annotations

import random
import warnings
from typing import Any, NamedTuple

import lean_options as options
import pytest
import torch
from patients import randomise
from torch import Tensor, nn

from se_surgery import SqueezeExcite
from se_surgery.se.excite import SESpec
from se_surgery.se.tail import tail

Config = dict[str, str]

# How numbers are held: the dtype of the parameters, that of the maps, and that of autocast.
FORMS: dict[str, dict[str, tuple[torch.dtype, torch.dtype, torch.dtype | None]]] = {
    "float64": {"whole": (torch.float64, torch.float64, None)},
    "float32": {"whole": (torch.float32, torch.float32, None)},
    **{
        str(half).removeprefix("torch."): {
            "autocast": (torch.float32, half, half),
            "autocast of wide maps": (torch.float32, torch.float32, half),
            "half maps": (torch.float32, half, None),
            "half parameters": (half, half, None),
        }
        for half in (torch.bfloat16, torch.float16)
    },
}
BACKWARDS = (
    "once",
    "twice",
    "of the SE alone",
    "of the norm's bias alone",
    "of the input alone",
    "under autocast",
    "to be differentiated",
    "of many",
)
# By axis, its options; the first is the usual one.
AXES: dict[str, Any] = {
    "norm": options.NORMS,
    "acts": options.ACTS,
    "spec": options.SPECS,
    "layout": options.LAYOUTS,
    "values": options.VALUES,
    "size": options.SIZES,
    "frozen": options.FROZEN,
    "drawn": options.DRAWN,
    "event": options.EVENTS,
    "use": options.USES,
    "way": options.WAYS,
    "backward": BACKWARDS,
    "mode": ("training", "evaluation"),
    "before": ("nothing", "a convolution"),
    "input": ("learns", "is constant"),
}
# What is drawn evenly; of the others, the usual one as often as all the rest, so that most configurations run.
EVEN = ("norm", "mode", "layout")


def configuration(dtype: str, number: int) -> Config:
    """The configuration of a number: one option of each axis."""
    draw = random.Random(f"{dtype} {number}")
    axes = {"form": FORMS[dtype], **AXES}
    config = {}
    for axis, among in axes.items():
        names = list(among)
        usual = axis not in EVEN and draw.random() < 0.6
        config[axis] = names[0] if usual else draw.choice(names)
    return config


# ------------------------------------------------------------------------------------------------------------ one of it


class Case(NamedTuple):
    """What a configuration comes down to: modules, a map, and how numbers are held."""

    parts: nn.ModuleList
    x: Tensor
    autocast: torch.dtype | None


def case_of(dtype: str, config: Config) -> Case:
    """Modules with random parameters, and a map."""
    parameters, maps, autocast = FORMS[dtype][config["form"]]
    torch.manual_seed(5)
    batch, width, *sides = options.SIZES[config["size"]]
    x = torch.randn(batch, width, *sides, dtype=torch.float64)
    norm = nn.Sequential(options.NORMS[config["norm"]](width), *options.ACTS[config["acts"]]())
    se = SqueezeExcite(SESpec(width, 3, **{"gate_scale": 2.0, **options.SPECS[config["spec"]]}), init="paper")
    conv = nn.Conv2d(width, width, 1) if config["before"] == "a convolution" else nn.Identity()
    parts = randomise(nn.ModuleList([conv, norm, se])).train(config["mode"] == "training")
    with torch.no_grad():
        if isinstance(getattr(norm[0], "weight", None), nn.Parameter):
            options.DRAWN[config["drawn"]](norm[0])
    for name, parameter in parts.named_parameters():
        parameter.requires_grad_(not name.startswith(options.FROZEN[config["frozen"]] or "-"))
    return Case(parts.to(parameters), options.VALUES[config["values"]](x).to(maps), autocast)


class Seen(NamedTuple):
    """What a form did: its output, that one's strides, gradients and buffers by name; or an exception's type alone."""

    out: Tensor | None
    strides: tuple[int, ...]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    error: str = ""


def seen(dtype: str, config: Config, lean: bool, exactly: bool = False) -> Seen:
    """What one form does in a configuration; exactly, in float64."""
    # Built anew, and not copied: a copy lies otherwise in memory.
    parts, x, autocast = case_of(dtype, config)
    if exactly:
        parts, x, autocast = parts.double(), x.double(), None
    parts[2].lean = lean
    x = options.LAYOUTS[config["layout"]](x).requires_grad_(config["input"] == "learns")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _seen(parts, x, autocast, config)
        except Exception as error:  # whatever it is, the other form is to raise the same
            return Seen(None, (), {}, {}, type(error).__name__)


def _seen(parts: nn.ModuleList, x: Tensor, autocast: torch.dtype | None, config: Config) -> Seen:
    makers = [part for part in parts[:2] if not isinstance(part, nn.Identity)]

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return tail(parts[2], makers, x)

    out = options.WAYS[config["way"]](forward, x)
    strides, kept = out.stride(), out.detach().clone()
    if torch.is_grad_enabled() and out.requires_grad:
        used = options.USES[config["use"]](out)
        options.EVENTS[config["event"]](parts, x)
        gradients = differentiated(used, parts, x, config["backward"], autocast)
    else:
        gradients = {}
    return Seen(kept, strides, gradients, dict(parts.named_buffers()))


def differentiated(
    out: Tensor, parts: nn.ModuleList, x: Tensor, backward: str, autocast: torch.dtype | None
) -> dict[str, Tensor | None]:
    """The gradients of a fixed combination of an output, of all that learns or of a part."""
    generator = torch.Generator().manual_seed(1)
    # Numbers that all dtypes can hold.
    weights = torch.randn(2, *out.shape, generator=generator).bfloat16().to(out.dtype)
    loss = (out * weights[0]).sum()
    learning = {"input": x, **dict(parts.named_parameters())}
    wanted = {name: tensor for name, tensor in learning.items() if tensor.requires_grad and _is_wanted(name, backward)}
    if backward == "of many":
        found = torch.autograd.grad(out, list(wanted.values()), weights, is_grads_batched=True, allow_unused=True)
        return dict(zip(wanted, found, strict=True))
    if backward.endswith("alone"):
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True) if wanted else ()
        return dict(zip(wanted, found, strict=True))
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=backward == "under autocast"):
        loss.backward(retain_graph=backward == "twice", create_graph=backward == "to be differentiated")
    if backward == "twice":
        loss.backward()
    return {name: None if tensor.grad is None else tensor.grad.detach() for name, tensor in wanted.items()}


def _is_wanted(name: str, backward: str) -> bool:
    prefix = {"of the SE alone": "2.", "of the norm's bias alone": "1.0.bias", "of the input alone": "input"}
    return name.startswith(prefix.get(backward, ""))


# ----------------------------------------------------------------------------------------------------------- comparison


class Result(NamedTuple):
    """How the lean form did.

    Attributes:
        faults: What is wrong.
        raised: The type of the exception that both forms raise.
        gradients: How many gradients were compared.
        equal: How many of them are bit-equal.
        worst: The largest error of the others beside the plain form's.
    """

    faults: list[str]
    raised: str = ""
    gradients: int = 0
    equal: int = 0
    worst: float = 0.0


def compared(dtype: str, config: Config) -> Result:
    """Both forms in a configuration, compared."""
    mine, other = (seen(dtype, config, lean) for lean in (True, False))
    if mine.error != other.error:
        return Result([f"lean: {mine.error or 'computes'}, plain: {other.error or 'computes'}"])
    if mine.error:
        return Result([], mine.error)
    faults = [] if same(mine.out, other.out) else ["outputs differ"]
    faults += [] if mine.strides == other.strides else [f"strides {mine.strides} and {other.strides}"]
    faults += [f"{name} differs" for name in other.buffers if not same(mine.buffers[name], other.buffers[name])]
    names = given(mine.gradients)
    if names != given(other.gradients):
        return Result([*faults, "gradients are given of other tensors"])
    unequal = [name for name in names if not same(mine.gradients[name], other.gradients[name])]
    exact = seen(dtype, config, lean=False, exactly=True).gradients if unequal else {}
    ratios = {name: ratio(mine.gradients[name], other.gradients[name], exact.get(name)) for name in unequal}
    faults += [f"gradient of {name}: {its:.3g} times the error" for name, its in ratios.items() if not its <= 2]
    return Result(faults, "", len(names), len(names) - len(unequal), max(ratios.values(), default=0.0))


def given(gradients: dict[str, Tensor | None]) -> list[str]:
    """What there is a gradient of."""
    return [name for name, gradient in gradients.items() if gradient is not None]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal bit for bit, NaN being NaN."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))


def ratio(mine: Tensor, other: Tensor, exact: Tensor | None) -> float:
    """The error of a gradient beside that of the plain form, of which there is one rounding at the least."""
    finite = other.isfinite()
    if exact is None or not torch.equal(mine.isfinite(), finite) or not exact[finite].isfinite().all():
        return float("inf")
    exact = exact[finite]
    errors = [(gradient[finite].double() - exact).norm() for gradient in (mine, other)]
    return float(errors[0] / max(errors[1], torch.finfo(mine.dtype).eps * exact.norm()))


def faults_in(dtype: str, numbers: range) -> tuple[list[str], list[Result]]:
    """The faults of some configurations, with the lines that run them again, and all results."""
    found, results = [], []
    for number in numbers:
        config = configuration(dtype, number)
        results.append(result := compared(dtype, config))
        again = f"compared({dtype!r}, configuration({dtype!r}, {number}))"
        found += [f"{fault}\n  {again}\n  {config}" for fault in result.faults]
    return found, results


@pytest.mark.parametrize("dtype", FORMS)
def test_some_configurations(dtype):
    found, results = faults_in(dtype, range(1000, 1015))
    assert not found, "\n".join(found)
    assert sum(result.gradients > 0 for result in results) >= 5


# So many that two thousand are left when those are taken away that both forms refuse.
EACH = 750


@pytest.mark.sweep
def test_two_thousand_configurations():
    print("\n| dtype | drawn | both raise | with gradients | gradients | bit-equal | worst beside the plain | faults |")
    print("| --- | --: | --: | --: | --: | --: | --: | --: |")
    everything, computed = [], 0
    for dtype in FORMS:
        found, results = faults_in(dtype, range(EACH))
        raised = sum(bool(result.raised) for result in results)
        differentiated = sum(result.gradients > 0 for result in results)
        gradients, equal = (sum(column) for column in zip(*((r.gradients, r.equal) for r in results), strict=True))
        worst = max(result.worst for result in results)
        cells = (dtype, len(results), raised, differentiated, gradients, equal, f"{worst:.3g}", len(found))
        print("| " + " | ".join(map(str, cells)) + " |")
        everything += found
        computed += len(results) - raised
    assert not everything, "\n".join(everything)
    assert computed >= 2000
