"""Export: the weights of an operated model in the names and shapes of other SE networks; the way back of `load_se`.

In: a model with SEs of this library. Out: a state dict; the model is left alone. What a style's modules cannot compute
is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import CheckpointError, OptionError, shorten
from ..planning.options import check_flags
from .foreign import LAYERS, Grafted, grafted, match, tensors_of


class Style(NamedTuple):
    """How SEs are written elsewhere.

    Attributes:
        child: Name of the SE in its block.
        layers: Names of its two layers.
        linear: Whether these are Linear, (out, in), and not convolutions of one position, (out, in, 1, 1).
        biases: The biases that its module can have.
        plain: Whether its module has no other activation than ReLU, and no other gate than the sigmoid.
    """

    child: str
    layers: tuple[str, str]
    linear: bool = False
    biases: tuple[tuple[bool, bool], ...] = ((True, True),)
    plain: bool = False


_ANY = ((False, False), (True, True), (False, True), (True, False))
STYLES = {
    "timm": Style("se", ("fc1", "fc2"), biases=((True, True), (False, False))),
    "legacy": Style("se_module", ("fc1", "fc2"), plain=True),
    "torchvision": Style("se", ("fc1", "fc2")),
    "linear": Style("se", ("fc.0", "fc.2"), linear=True, biases=_ANY),
}


def export_se(model: nn.Module, style: str = "timm", *, base: bool = True) -> dict[str, Tensor]:
    """The weights of an operated model as an SE network made elsewhere wants them; what `load_se` reads back.

    With `style="timm"` and the options that make a timm network (`bias=True, rd_divisor=8, init="paper"`), timm's own
    `seresnet50` loads what comes of `add_se(resnet50)`, strictly. The styles differ in names and shapes:

    - `timm`: `layer1.0.se.fc1.weight` (hidden, C, 1, 1), both biases or none;
    - `legacy`: `layer1.0.se_module.fc1.weight` (hidden, C, 1, 1) of timm's legacy_senet and Cadene's, both biases;
    - `torchvision`: as `timm`, both biases; for a `SqueezeExcitation` called `se` in each block;
    - `linear`: `layer1.0.se.fc.0.weight` and `se.fc.2.weight` (hidden, C) and (C, hidden), as most write-ups have it.

    None of them has a factor on the gate: what was operated on with `init="identity"` has one of 2 and is refused. No
    weights of the SE give twice a sigmoid.

    Args:
        model: A model that `add_se` operated on.
        style: A key of the list above.
        base: Whether to put in the base's tensors, too, under their own names.

    Returns:
        Copies of the tensors by name, in the order of the model's state dict.

    Raises:
        CheckpointError: The style cannot express an SE, or two SEs would have one name.
        OptionError: There is no such style.
        NothingToDoError: The model holds no SE of this library.
        PatientError: The model is wrapped, on the meta device, or holds other kinds of attention.

    Examples:
        >>> model = add_se(timm.create_model("resnet50"), bias=True, rd_divisor=8, init="paper")
        >>> timm.create_model("seresnet50").load_state_dict(export_se(model, "timm"), strict=True)
    """
    if not isinstance(style, str) or style not in STYLES:
        raise OptionError(f"style={shorten(style)} is not known. Take one of {', '.join(STYLES)}.")
    check_flags(base=base)
    ses, to = grafted(model), STYLES[style]
    for se in ses:
        _refuse(se, to, style)
    names = {old: new for se in ses for old, new in _names(se, to).items()}
    out: dict[str, Tensor] = {}
    for key, tensor in tensors_of(model).items():
        if not base and key not in names:
            continue
        new, value = names.get(key, key), tensor.detach().clone()
        if new in out:
            raise CheckpointError(f"In the style {style!r} two tensors would be called {new!r}. {_OWN}")
        out[new] = value.flatten(1) if to.linear and key in names and value.dim() > 1 else value
    unclear = match(ses, {new: out[new] for new in names.values()}).problems
    if unclear:
        raise CheckpointError(f"In the style {style!r} names do not tell whose they are: {unclear[0].text}. {_OWN}")
    return out


_OWN = "Names of other networks have room for one SE in a block: keep the model's own state_dict()."


class _Rule(NamedTuple):
    """What a style's module may lack: whether it does, in which words, and the remedy."""

    breaks: Callable[[Grafted, Style], bool]
    text: Callable[[Grafted], str]
    remedy: str


_RULES = (
    _Rule(
        lambda se, to: se.module.gate_scale != 1.0,
        lambda se: f"multiplies its gate by {se.module.gate_scale:g}, which no weights of a plain SE do",
        'Operate with init="paper" or gate_scale=1.0, or keep the model\'s own state_dict().',
    ),
    _Rule(
        lambda se, to: bool(se.extras),
        lambda se: f"has the parameter {se.extras[0]!r} beyond its two layers",
        'Operate with init="paper" and an activation without parameters, or keep the model\'s own state_dict().',
    ),
    _Rule(
        lambda se, to: se.module.squeeze != "avg",
        lambda se: f"squeezes by {se.module.squeeze!r}, and SEs elsewhere by the average",
        "Keep the model's own state_dict().",
    ),
    _Rule(
        lambda se, to: not to.linear and (se.module.channels_last or len(se.module.axes) != 2),
        lambda se: "does not work on maps (B, C, H, W)",
        'Take style="linear".',
    ),
    _Rule(
        lambda se, to: se.biases not in to.biases,
        lambda se: f"has bias={se.biases}",
        'Take style="linear", or operate with bias=True.',
    ),
    _Rule(
        lambda se, to: to.plain and (type(se.module.act), type(se.module.gate)) != (nn.ReLU, nn.Sigmoid),
        lambda se: f"has {type(se.module.act).__name__} and {type(se.module.gate).__name__}, not ReLU and Sigmoid",
        "Take another style, and build its network with these.",
    ),
)


def _refuse(se: Grafted, to: Style, style: str) -> None:
    for rule in _RULES:
        if rule.breaks(se, to):
            text = f"{se.path} cannot be written in the style {style!r}: it {rule.text(se)}."
            raise CheckpointError(f"{text} {rule.remedy}")


def _names(se: Grafted, to: Style) -> dict[str, str]:
    """The names that the tensors of one SE will have, by those they have."""
    holder, _, own = se.path.rpartition(".")
    # What fills the base's own slot is called there by the name it has.
    path = f"{holder}.{to.child if se.record.edges else own}".strip(".")
    layers = dict(zip(LAYERS, to.layers, strict=True))
    keys = [name for name, _ in se.module.named_parameters()]
    return {f"{se.path}.{k}": f"{path}.{layers[k.partition('.')[0]]}.{k.partition('.')[2]}" for k in keys}
