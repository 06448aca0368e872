"""Pairs: an operated model and its base with the same values in both, so that what one does the other has to do.

In: a model and what looking at it told. Out: a `Pair`, whose two models are never run themselves: whatever is tried
runs on a `twin`, which reads the same values and has gradients, buffers and attributes of its own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import PatientError
from ..planning.exam import Exam
from ..reading.draws import Undrawn
from ..se.excite import SqueezeExcite
from ..structure.find import SESite
from ..surgery.journal import guarded
from ..surgery.strip import remove
from .compare import SEED, outputs_of

# What a layer puts out is taken to be this part of its usual size at least.
_LEAST = 0.5


@dataclass(frozen=True)
class Pair:
    """An operated model and its base.

    Attributes:
        operated: The model with its SEs; a copy of the user's.
        base: The model without this library's SEs. Its parameters are the operated model's own. Where SEs replaced
            native ones, those are not put back.
        sites: Paths of the SEs, in order of execution.
        inputs: Arguments for both.
    """

    operated: nn.Module
    base: nn.Module
    sites: tuple[str, ...]
    inputs: tuple[Any, ...]


def paired(operated: nn.Module, exam: Exam, sites: Sequence[SESite]) -> Pair:
    """An operated model, which is the pair's from now on, with its base; both have the model's values."""
    base = twin(operated)
    guarded(remove, base, Exam(base, exam.seen.args), sites, restore=False)
    return Pair(operated, base, tuple(site.path for site in sites), noise(exam.seen.args))


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters' values and nothing else: a large model is not doubled for every run.

    Raises:
        PatientError: The model cannot be copied.
    """
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    try:
        return copy.deepcopy(model, shared)
    except (RuntimeError, TypeError) as error:
        raise PatientError(f"{type(model).__name__} cannot be copied ({error}), which verifying it takes.") from error


def noise(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the model was looked at with, its empty images filled with noise."""
    generator = torch.Generator().manual_seed(SEED)

    def filled(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.any():
            return tensor
        return torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor)

    return pytree.tree_map_only(Tensor, filled, args)  # type: ignore[no-any-return]


# The seed and the choice of algorithms are the process's: what needs them runs one at a time.
_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """One seed, one choice of algorithms and no autocast for whatever runs, and everything as found when it has.

    Seed and algorithms are those of the whole process meanwhile: another thread that draws numbers gets others.
    """
    cudnn = torch.backends.cudnn
    with _ONE_AT_A_TIME, contextlib.ExitStack() as around:
        choices = cudnn.benchmark, cudnn.deterministic
        around.enter_context(torch.random.fork_rng())
        around.enter_context(plain())
        torch.manual_seed(SEED)
        cudnn.benchmark, cudnn.deterministic = False, True
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = choices


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """The same numbers for whatever draws from torch, and no autocast, in this thread alone."""
    with plain(), Undrawn().on():
        yield


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Neither inference mode nor autocast, in this thread."""
    with contextlib.ExitStack() as around:
        around.enter_context(torch.inference_mode(False))
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            around.enter_context(torch.autocast(device, enabled=False))
        yield


def draw_anew(pair: Pair) -> None:
    """Draw anew, in both models, what would hide a mistake: branches times zero, and gates that are one.

    Normalisations and small gains are what `randomise` makes of them. Then both they and the SEs are fitted to what
    they are given, so that features keep their size, in evaluation as in training, and gates spread over their range.
    """
    randomise(pair.operated, skip=pair.sites)
    for path in pair.sites:
        _draw_se(pair.operated.get_submodule(path))
    _fit(pair)
    drawn = dict(pair.operated.named_buffers())
    with torch.no_grad():
        for name, buffer in pair.base.named_buffers():
            buffer.copy_(drawn[name])


@torch.no_grad()
def randomise(model: nn.Module, skip: Sequence[str] = ()) -> None:
    """Draw normalisations' statistics and affine parameters, and gains and weights that are (nearly) zero, anew.

    Args:
        model: The model.
        skip: Paths of modules to leave alone.
    """
    for path, module in model.named_modules():
        if any(path == root or path.startswith(root + ".") for root in skip):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.normal_(0.0, 0.1)
            elif name == "running_var":
                buffer.uniform_(0.5, 1.5)
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            # NFNet's gains are (C, 1, 1, 1).
            is_gain = is_norm or parameter.numel() == max(parameter.shape, default=1)
            if name == "bias":
                if is_norm:
                    parameter.normal_(0.0, 0.1)
            elif is_gain and (is_norm or _vanishes(parameter)):
                parameter.uniform_(0.5, 1.5)
            elif _vanishes(parameter):
                _draw_weight(parameter)


def _vanishes(parameter: Tensor) -> bool:
    return parameter.numel() > 0 and bool(parameter.abs().max() < 1e-3)


def _draw_weight(weight: Tensor) -> None:
    """Draw a layer's weight anew, of a size that keeps that of what it acts on."""
    weight.normal_(0.0, weight[0].numel() ** -0.5)


@torch.no_grad()
def _draw_se(se: nn.Module) -> None:
    randomise(se)
    for name, parameter in se.named_parameters():
        if name == "mix":
            parameter.fill_(1.0)
        elif parameter.dim() > 1:
            _draw_weight(parameter)
    if isinstance(se, SqueezeExcite):
        # One of each pair of rows (w, -w) passes a ReLU, whatever comes.
        half = se.fc1.weight.shape[0] // 2
        se.fc1.weight[half : 2 * half] = -se.fc1.weight[:half]
        if se.fc1.bias is not None:
            se.fc1.bias.zero_()


def _fit(pair: Pair) -> None:
    model = twin(pair.operated).eval()
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.register_forward_pre_hook(_to_statistics)
    for path in pair.sites:
        se = model.get_submodule(path)
        if isinstance(se, SqueezeExcite):
            se.fc1.register_forward_hook(functools.partial(_to_size, 1.0, 0.0))
            # Larger ones would amplify the rounding of what they are computed from, from SE to SE.
            se.fc2.register_forward_hook(functools.partial(_to_size, 0.5, 0.5))
    # A model that does not run on these inputs is reported by the first check that runs it.
    with contextlib.suppress(Exception):
        outputs_of(model, pair.inputs)
    fitted = dict(model.named_buffers())
    for name, buffer in pair.operated.named_buffers():
        if name.endswith(("running_mean", "running_var")) and fitted[name].isfinite().all():
            buffer.copy_(fitted[name])


def _to_statistics(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Bring drawn statistics to the place and size of a normalisation's input.

    The size is one for all channels: that of a channel is a guess from few values, and would blow up rounding.
    """
    mean, var, values = norm.running_mean, norm.running_var, args[0].float()
    center = values.mean([axis for axis in range(values.dim()) if axis != 1], keepdim=True)
    size = (values - center).square().mean().clamp_min(1e-6)
    mean.mul_(size.sqrt()).add_(center.flatten())  # type: ignore[operator, union-attr]
    var.mul_(size)  # type: ignore[operator]


def _to_size(size: float, least: float, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """Scale a layer's weights so that what it puts out has this size, for inputs of at least the size `least`.

    A few units may put out next to nothing because weights and inputs cancel out by chance, and need not in training:
    weights that make up for that would shut all gates there, or open them so far that nothing learns.
    """
    if layer.bias is not None:
        output = output - layer.bias[:, None, None]  # type: ignore[index]
    weight: Tensor = layer.weight  # type: ignore[assignment]
    usual = _size(weight) * _size(args[0]).clamp_min(least) * weight[0].numel() ** 0.5
    weight.mul_(size / torch.maximum(_size(output), _LEAST * usual).clamp_min(1e-6))
    return layer.forward(args[0])  # type: ignore[no-any-return]


def _size(values: Tensor) -> Tensor:
    return values.float().square().mean().sqrt()
