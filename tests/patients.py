"""The models that tests operate on, and what tests do to any model: randomise, run, count calls, compare."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import timm
import torch
import torchvision
import toys
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

HALF, GRAY = ":half", ":gray"
# What tests expect are the networks of timm 1.0.31, and the ways into a graph of torch 2.5. What is older, down to what
# pyproject.toml admits, lacks a few.
OLD_TIMM = Version(timm.__version__) < Version("1.0.31")
OLD_TORCH = Version(torch.__version__) < Version("2.5")


def build(name: str, **kwargs: Any) -> nn.Module:
    """A model with random weights, its branches made to matter, in evaluation mode.

    `resnet50` is timm's, `torchvision/resnet50` torchvision's, `toy/Digits` a class in toys.py; `:half` and `:gray`
    behind a name make it float16, or give it one input channel.
    """
    bare = name.removesuffix(HALF).removesuffix(GRAY)
    if name.endswith(GRAY):
        kwargs["in_chans"] = 1
    torch.manual_seed(len(name))
    library, _, short = bare.rpartition("/")
    if library == "toy":
        model = getattr(toys, short)(**kwargs)
    elif library == "torchvision":
        model = torchvision.models.get_model(short, weights=None, **kwargs)
    else:
        model = timm.create_model(bare, **kwargs)
    randomise(model, seed=1)
    return (model.half() if name.endswith(HALF) else model).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw anew what a fresh model leaves at zero or one, so that no residual branch is multiplied by zero.

    These are the running statistics and affine parameters of all normalisations, and gains that start (nearly) at
    zero: ConvNeXt's gamma of 1e-6, NFNet's skipinit_gain. A fresh timm ResNet has a zero weight in each block's last
    normalisation: any SE before the addition would pass any test of outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.normal_(0.0, 0.1, generator=generator)
            if name == "running_var":
                buffer.uniform_(0.8, 1.2, generator=generator)
        is_norm = "norm" in type(module).__name__.lower()
        is_layer = isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear))
        for name, parameter in module.named_parameters(recurse=False):
            is_gain = not is_layer and parameter.numel() > 0 and parameter.abs().max() < 1e-3
            if is_norm and name == "bias":
                parameter.normal_(0.0, 0.1, generator=generator)
            elif (is_norm and name == "weight") or is_gain or "gain" in name:
                parameter.uniform_(0.3, 0.9, generator=generator)
    return model


def images(size: tuple[int, ...] = (3, 64, 64), batch: int = 2, like: nn.Module | None = None) -> Tensor:
    """A batch of noise; with `like` in that model's dtype and number of channels."""
    x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(7))
    return x.to(next(like.parameters()).dtype) if like is not None else x


def tensors(output: Any) -> list[Tensor]:
    """All tensors in a model's output."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@torch.no_grad()
def run(model: nn.Module, x: Any, training: bool = False, seed: int = 3) -> list[Tensor]:
    """The tensors a model returns, in one mode under one seed; its modules' flags are put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    torch.manual_seed(seed)
    try:
        args = x if isinstance(x, tuple) else (x,)
        return tensors(model(*(a.clone() if isinstance(a, Tensor) else a for a in args)))
    finally:
        for module, flag in flags:
            module.training = flag


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    """Bit-equal, and finite, and not one constant: a comparison of nothing but NaN or zero shows nothing."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all(), "the output is not finite, so that comparing it shows nothing"
        assert a.unique().numel() > 1, "the output is one constant, so that comparing it shows nothing"
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b), f"outputs differ by up to {(a.float() - b.float()).abs().max():g}"


def assert_differs(first: list[Tensor], second: list[Tensor]) -> None:
    """Not equal: what makes the comparisons above mean something."""
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True)), "outputs are equal"


@contextlib.contextmanager
def calls(model: nn.Module, paths: Iterable[str], begun: bool = False) -> Iterator[Counter[str]]:
    """Counts the calls of the modules at `paths` by forward hooks, with `begun` also those that are broken off."""
    counts: Counter[str] = Counter(dict.fromkeys(paths, 0))
    register = nn.Module.register_forward_pre_hook if begun else nn.Module.register_forward_hook
    handles = [register(model.get_submodule(path), lambda *_, path=path: counts.update([path])) for path in counts]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def pass_through(model: nn.Module, is_passed: Callable[[nn.Module], bool]) -> int:
    """Make some modules return what they are given, by forward hooks, and say how many: an SE with its gate at one."""
    passed = [module for module in model.modules() if is_passed(module)]
    for module in passed:
        module.register_forward_hook(lambda module, args, output: args[0])
    return len(passed)


def is_native_se(module: nn.Module) -> bool:
    """Whether a module is an SE of timm or torchvision, by its class and not by what find_se says."""
    names = ("SEModule", "SqueezeExcite", "EffectiveSEModule", "SqueezeExcitation")
    return type(module).__name__ in names and type(module).__module__.split(".")[0] in ("timm", "torchvision")


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's values, bit for bit."""
    if is_lazy(tensor) or tensor.is_meta:
        return "lazy" if is_lazy(tensor) else f"meta {tuple(tensor.shape)}"
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha1(flat.numpy().tobytes()).hexdigest()


def snapshot(model: Any, random: bool = False) -> dict[str, Any]:
    """Everything that makes a model what it is: classes, attributes, flags, hooks, values, gradients, its text.

    Two snapshots are equal when nothing changed; with `random`, when no random numbers were drawn either.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            grad = (id(value.grad), digest(value.grad)) if value.is_leaf and value.grad is not None else None
            return (type(value), value.dtype, value.device, value.requires_grad, id(value), digest(value), grad)
        return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else id(value)

    state: dict[str, Any] = {"text": repr(model)}
    if random:
        state["random"] = torch.get_rng_state().tolist()
    for path, module in model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ():
        state[path] = (type(module), id(module))
        for name, value in module.__dict__.items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            state[f"{path}:{name}"] = [(key, plain(item)) for key, item in items]
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs between two snapshots."""
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]


def copied(model: nn.Module) -> nn.Module:
    """A deep copy."""
    return copy.deepcopy(model)
