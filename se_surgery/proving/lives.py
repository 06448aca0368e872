"""Lives: what is done to a model besides running it, and what has to be left of its SEs afterwards.

In: a `Pair`. Out: an `Outcome`, of training, copying, pickling or re-parameterising.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import SurgeryError
from ..structure.find import hidden_width
from ..surgery.graft import copied
from .compare import (
    CLOSE,
    CLOSE_GRADIENT,
    Outcome,
    backward,
    blocked,
    counted,
    deviation,
    gradient_deviation,
    gradients_of,
    learning,
    miscalled,
    no_way,
    outputs_of,
    same_tensors,
)
from .gated import Go, Judge, calls_due, gated, often
from .pair import Pair, twin


def _trained(model: nn.Module, pair: Pair, go: Go | None = None, training: bool = True) -> nn.Module:
    """A twin after one backward pass."""
    model = learning(twin(model).train(training))
    backward(outputs_of(model, pair.inputs, go, gradients=True))
    return model


def reached(pair: Pair) -> Outcome:
    """Every parameter of every SE has a gradient; in evaluation for a base that cannot train on these inputs."""
    for training in (True, False):
        try:
            return _learns(_trained(pair.operated, pair, training=training), pair, training)
        except Exception as error:
            failure = error
        try:
            _trained(pair.base, pair, training=training)
        except Exception as error:
            failure = error
        else:
            return blocked(failure)
    return no_way(failure)


def _learns(model: nn.Module, pair: Pair, training: bool) -> Outcome:
    gradients = gradients_of(model, pair.sites)
    missed = [name for name, gradient in gradients.items() if gradient is None]
    if missed:
        return Outcome(False, f"nothing reaches {missed[0]}")
    # A hidden layer of one unit may be closed for all images: then nothing flows, by chance.
    open_sites = [site for site in pair.sites if hidden_width(model.get_submodule(site)) != 1]
    dead = next((site for site in open_sites if not _flows(model, site)), None)
    if dead is not None and not training:
        return Outcome(None, f"all that reaches {dead} in evaluation is zero; the base does not train on this input")
    if dead is not None and _is_dead_in_base(pair, dead):
        return Outcome(None, f"all that reaches {dead} is zero, as all that reaches its block in the base is")
    if dead is not None:
        return Outcome(False, f"all that reaches {dead} is zero")
    mode = "training" if training else "evaluation, as the base does not train on this input,"
    return Outcome(True, f"the backward pass in {mode} reaches all {len(gradients)} SE parameters")


def _is_dead_in_base(pair: Pair, site: str) -> bool:
    """Whether no gradient reaches an SE's block in the base, or the next module around it that has parameters."""
    base, host = _trained(pair.base, pair), site.rpartition(".")[0]
    while host and next(base.get_submodule(host).parameters(), None) is None:
        host = host.rpartition(".")[0]
    return not _flows(base, host)


def _flows(model: nn.Module, path: str) -> bool:
    """Whether some gradient of a module's parameters is not zero."""
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients_of(model, [path]).values())


def _checkpointing(model: nn.Module, *inputs: Any) -> Any:
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model(*inputs)


def checkpointed(pair: Pair) -> Outcome:
    """With blocks that are run again in the backward pass outputs are the base's, and gradients those without it."""
    try:
        _trained(pair.base, pair, _checkpointing)
    except Exception as error:
        return no_way(error)
    outcome = gated(_checkpointing, training=True, gradients=True)(pair)
    if not outcome.passed:
        return outcome
    try:
        off = _changed_by_checkpointing(pair.operated, pair, pair.sites)
    except Exception as error:
        return blocked(error)
    if off > CLOSE_GRADIENT:
        own = _changed_by_checkpointing(pair.base, pair, ("",))
        if own > CLOSE_GRADIENT:
            return Outcome(None, f"the base's own gradients change with it (by {own:.1e} of their range)")
        return Outcome(False, f"the SEs' gradients change with it (by {off:.1e} of their range)")
    return Outcome(True, f"{outcome.detail} in the forward; gradients stay (off by {off:.1e} of their range)")


def _changed_by_checkpointing(model: nn.Module, pair: Pair, paths: tuple[str, ...]) -> float:
    """How far gradients of the modules at some paths are from those without checkpointing."""
    found = gradients_of(_trained(model, pair, _checkpointing), paths)
    return gradient_deviation(found, gradients_of(_trained(model, pair), paths))


def pickled(model: nn.Module) -> nn.Module:
    """Through pickle and back. Tensors are handed over as they are: what surgery adds is classes and attributes."""
    tensors: list[Tensor] = []
    stream = BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not isinstance(obj, Tensor):
                return None
            tensors.append(obj)
            return len(tensors) - 1

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: int) -> Tensor:
            return tensors[pid]

    Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(model)
    stream.seek(0)
    return Unpickler(stream).load()  # type: ignore[no-any-return]


def again(remake: Callable[[nn.Module], nn.Module]) -> Judge:
    """The judge of what makes a model anew from itself: classes, keys, outputs and calls of SEs are the same."""

    def judge(pair: Pair) -> Outcome:
        try:
            _, due = _of_base(remake(twin(pair.base).eval()), pair)
        except Exception as error:
            return no_way(error)
        first = twin(pair.operated).eval()
        expected = outputs_of(first, pair.inputs)
        try:
            second = remake(twin(pair.operated).eval())
            ran = counted(second)
            outputs = outputs_of(second, pair.inputs)
        except Exception as error:
            return _parametrized(first, pair.sites) or blocked(error)
        lost = lost_class(first, second, pair.sites)
        if lost is not None:
            return Outcome(False, f"{lost or 'the model'} comes out with another class")
        if list(first.state_dict()) != list(second.state_dict()):
            return Outcome(False, "the state-dict keys come out different")
        if not same_tensors(outputs, expected):
            return Outcome(
                False, f"the outputs come out different, by {deviation(outputs, expected):.1e} of their range"
            )
        right = Outcome(True, f"the same classes, keys and outputs; {often(due)}")
        return miscalled(ran, due) or right

    return judge


def _of_base(base: nn.Module, pair: Pair) -> tuple[list[Tensor], dict[str, int]]:
    """What the base puts out, and how often each SE has to run by what it called."""
    ran = counted(base)
    return outputs_of(base, pair.inputs), calls_due(pair.sites, ran)


def _parametrized(model: nn.Module, sites: Iterable[str]) -> Outcome | None:
    """The outcome where SEs are parametrised, and torch refuses them whatever they are a part of."""
    for site in sites:
        if any(is_parametrized(module) for module in model.get_submodule(site).modules()):
            return Outcome(None, f"not tried: {site} is parametrised, which the base is not")
    return None


def lost_class(first: nn.Module, second: nn.Module, sites: Iterable[str]) -> str | None:
    """The first SE, or block with one, that is of another class in a copy, or not there at all."""
    old, new = dict(first.named_modules()), dict(second.named_modules())
    hosts = [site.rpartition(".")[0] for site in sites]
    return next((path for path in (*hosts, *sites) if type(new.get(path)) is not type(old[path])), None)


def folded(pair: Pair) -> Outcome:
    """Timm's re-parameterisation of an operated model leaves the outputs as they are, or is refused in words."""
    try:
        base = reparameterize_model(copied(pair.base).eval(), inplace=True)
        if _structure(base) == _structure(pair.base):
            return Outcome(None, "the base has no such way: reparameterize_model changes nothing in it")
        expected, due = _of_base(twin(pair.base).eval(), pair)
        own = deviation(outputs_of(base, pair.inputs), expected)
        del base
    except Exception as error:
        return no_way(error)
    try:
        model = reparameterize_model(copied(pair.operated).eval(), inplace=True)
        ran = counted(model)
        outputs = outputs_of(model, pair.inputs)
    except SurgeryError as error:
        return Outcome(None, f"refused: {error}")
    except Exception as error:
        return blocked(error)
    if own > 10 * CLOSE:
        return Outcome(None, f"the base's own outputs change with it (by {own:.1e} of their range)")
    off = deviation(outputs, outputs_of(twin(pair.operated).eval(), pair.inputs))
    if off > max(CLOSE, 3 * own):
        return Outcome(False, f"the outputs change by {off:.1e} of their range (the base's by {own:.1e})")
    right = Outcome(True, f"the outputs stay (off by {off:.1e} of their range); {often(due)}")
    return miscalled(ran, due) or right


def _structure(model: nn.Module) -> list[Any]:
    modules = [(path, type(module)) for path, module in model.named_modules()]
    return [*modules, *((name, parameter.shape) for name, parameter in model.named_parameters())]
