"""Compare: run a model, see what came out and how often each module ran, and how far two results are apart.

In: modules and arguments. Out: tensors, counts and numbers, and the `Outcome`s that are the same for every promise;
what else the numbers mean is decided by those who ask for them.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

SEED = 0
# How far apart two results may be that differ in the order of their arithmetic only, in units of the values' range.
CLOSE, CLOSE_GRADIENT = 1e-3, 1e-2


class Outcome(NamedTuple):
    """Whether a promise holds (None: nothing was promised, or nothing is shown), and what was seen."""

    passed: bool | None
    detail: str


def no_way(error: Exception) -> Outcome:
    """The outcome where the base itself cannot do something, by any error: which it is, is up to the model's code."""
    return Outcome(None, f"the base has no such way: {reason(error)}")


def blocked(error: Exception) -> Outcome:
    """The outcome where only the operated model cannot do something, by any error: a broken promise, which is shown."""
    return Outcome(False, f"the base can, the operated model cannot: {reason(error)}")


def reason(error: Exception) -> str:
    """An error in one line, without what colours it on a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def outputs_of(
    model: Callable[..., Any],
    inputs: tuple[Any, ...],
    go: Callable[..., Any] | None = None,
    gradients: bool = False,
) -> list[Tensor]:
    """The tensors that come out of a model under one seed.

    Args:
        model: The model, in the mode to run it in; or any function of the inputs.
        inputs: The arguments, which stay as they are.
        go: Another way into the model than calling it: a function of the model and the inputs.
        gradients: Whether the outputs can be differentiated.
    """
    torch.manual_seed(SEED)
    given = pytree.tree_map_only(Tensor, torch.clone, inputs)
    with torch.set_grad_enabled(gradients):
        return tensors_in(model(*given) if go is None else go(model, *given))


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors in what a model returned, whatever holds them."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_in(dict(leaf))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def backward(outputs: Sequence[Tensor]) -> None:
    """Differentiate a fixed random combination of the outputs: a plain sum is the same for all that is normalised."""
    generator = torch.Generator().manual_seed(SEED)
    losses = [
        (leaf * torch.randn(leaf.shape, generator=generator, device="cpu").to(leaf)).mean()
        for leaf in outputs
        if leaf.requires_grad and leaf.numel()
    ]
    if not losses:
        raise RuntimeError("no output can be differentiated")
    torch.stack([loss.float() for loss in losses]).sum().backward()


def learning(model: nn.Module) -> nn.Module:
    """The model with gradients for all its parameters, those that its user has frozen too."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return model


def counted(model: nn.Module) -> Counter[str]:
    """Counts, from now on, how often each module of a model runs."""
    ran: Counter[str] = Counter()
    for path, module in model.named_modules():
        module.register_forward_hook(functools.partial(_count, ran, path))
    return ran


def _count(ran: Counter[str], path: str, module: nn.Module, args: Any, output: Any) -> None:
    ran[path] += 1


def miscalled(ran: Mapping[str, int], due: Mapping[str, int]) -> Outcome | None:
    """The outcome where a module did not run as often as it should have."""
    for path, expected in due.items():
        if ran[path] != expected:
            return Outcome(False, f"{path} ran {_times(ran[path])} instead of {_times(expected)}")
    return None


def _times(number: int) -> str:
    return {0: "never", 1: "once"}.get(number, f"{number} times")


def force_gates(model: nn.Module, sites: Iterable[str]) -> nn.Module:
    """The model with its SEs returning what they are given, as with all gates at one."""
    for path in sites:
        model.get_submodule(path).register_forward_hook(_pass_through)
    return model


def _pass_through(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return args[0]


def same_tensors(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two models' outputs are equal bit for bit; what is not a number has to be in the same places."""
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(first, second, strict=True)
    )


def is_telling(outputs: Sequence[Tensor]) -> bool:
    """Whether equal outputs show anything: there are numbers among them, and not all are the same one."""
    return any(leaf.isfinite().any() and bool((leaf != leaf.flatten()[0]).any()) for leaf in outputs if leaf.numel())


def deviation(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest difference between two lists of tensors, each in units of the range of the second's values."""
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return float("inf")
    return max((_deviation(a.detach(), b.detach()) for a, b in zip(first, second, strict=True)), default=0.0)


def _deviation(a: Tensor, b: Tensor) -> float:
    if same_tensors([a], [b]):
        return 0.0
    a, b = a.double(), b.double()
    extent = (b.max() - b.min()).item() or b.abs().max().item()
    off = (a - b).abs().max().item() / extent if extent else float("inf")
    return off if off == off else float("inf")


def gradient_deviation(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    """The largest difference between two sets of gradients by name, each in units of the range of the second's."""
    return max((_between(found[name], gradient) for name, gradient in expected.items()), default=0.0)


def _between(found: Tensor | None, expected: Tensor | None) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    return deviation([found], [expected])


def gradients_of(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor | None]:
    """The gradient of every parameter of the modules at some paths, by name."""
    return {
        f"{path}.{name}": parameter.grad
        for path in paths
        for name, parameter in model.get_submodule(path).named_parameters()
    }
