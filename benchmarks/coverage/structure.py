"""Structure: whether SEs gate what their placement says, by what a zero gate does to a unit's convolutions.

In: an operated model and its sites. Out: faults in words. The planner and its graphs are not asked: a unit's module is
run alone, with one of its gates at one and at zero, and on two inputs. Of its outputs only the positions count that the
gate has a say in: the units of DPN add to some channels and append others. Where the join is a concatenation itself
(ShuffleNet) all of an output counts, for what is beside the branch is in other channels.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from se_surgery.planning.plan import Site
from se_surgery.structure.unit import WITH_SHORTCUT

Given = tuple[tuple[Any, ...], dict[str, Any]]
_Layers = frozenset[str]
# Whether something is wrong, and what.
_Verdict = tuple[bool, str]


def shortcut_faults(model: nn.Module, sites: Sequence[Site], args: tuple[Any, ...]) -> tuple[list[str], int]:
    """What is wrong with SEs of units that have a shortcut, for the first and the last unit of each kind.

    Returns:
        The faults, and the number of units that were run.
    """
    units: dict[str, list[str]] = {}
    for site in sites:
        if site.kind in WITH_SHORTCUT:
            units.setdefault(site.kind, []).append(site.unit)
    chosen = list(dict.fromkeys(path for paths in units.values() for path in (paths[0], paths[-1])))
    faults = []
    for path, given in _inputs(model, args, chosen).items():
        for site in (site for site in sites if site.unit == path):
            verdicts = _VERDICTS[site.placement](_Flow(_Unit(model, site), given))
            faults += [f"{site.path}: {fault}" for is_wrong, fault in verdicts if is_wrong]
    return faults, len(chosen)


def _inputs(model: nn.Module, args: tuple[Any, ...], paths: Sequence[str]) -> dict[str, Given]:
    """What the modules at `paths` are given in one forward."""
    given: dict[str, Given] = {}

    def noting(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: given.__setitem__(path, copy.deepcopy((args, kwargs)))

    handles = [model.get_submodule(p).register_forward_pre_hook(noting(p), with_kwargs=True) for p in paths]
    try:
        with torch.no_grad():
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return given


@dataclass(frozen=True)
class _Run:
    """One forward of a unit's module: what it and each of its layers returned, and what its SE was given."""

    outputs: list[Tensor]
    layers: dict[str, Tensor]
    squeezed: Tensor


class _Unit:
    """The module of one SE's unit. Its layers are whatever has a matrix of weights, and does not belong to the SE."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        self.kind = site.kind
        self.module, self.se = model.get_submodule(site.unit), model.get_submodule(site.path)
        inside = set(self.se.modules())
        self.layers = {
            name: module
            for name, module in self.module.named_modules()
            if isinstance(weight := getattr(module, "weight", None), Tensor)
            and weight.dim() > 1
            and module not in inside
        }

    def run(self, given: Given, gate: float, silent: Iterable[str] = ()) -> _Run:
        """Run it with the gate at one value, and with the outputs of some layers at zero."""
        layers: dict[str, Tensor] = {}
        squeezed: list[Tensor] = []

        def noting(name: str) -> Callable[..., None]:
            return lambda module, args, output: layers.__setitem__(name, output.detach().clone())

        def gated(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            squeezed.append(args[0])
            return output * gate

        hooks = [(self.se, gated), *((self.layers[name], _silenced) for name in silent)]
        hooks += [(layer, noting(name)) for name, layer in self.layers.items()]
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, given)
        with _hooked(hooks):
            returned = pytree.tree_leaves(self.module(*args, **kwargs))
        return _Run([leaf for leaf in returned if isinstance(leaf, Tensor)], layers, squeezed[0])

    def behind(self, values: Sequence[Tensor]) -> _Layers:
        """The layers that values were computed from: those whose weights have a gradient."""
        generator = torch.Generator().manual_seed(2)
        total = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in values)
        if not isinstance(total, Tensor) or not total.requires_grad:
            return frozenset()
        weights = [layer.weight for layer in self.layers.values()]
        grads = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
        return frozenset(name for name, grad in zip(self.layers, grads, strict=True) if grad is not None and grad.any())


def _silenced(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output * 0.0


@contextlib.contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles: list[RemovableHandle] = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Flow:
    """What flows through a unit, by one SE.

    Attributes:
        alive: The layers that the input reaches and the output takes something from.
        left: Those of them for which this still holds with the gate at zero.
        cut: Those for which it does not.
        beside: Those left that neither lead to the SE nor follow it.
        open: Whether with the gate at zero the output still depends on the input.
    """

    def __init__(self, unit: _Unit, given: Given) -> None:
        self.unit, self.given = unit, given
        generator = torch.Generator().manual_seed(1)
        self.other: Given = pytree.tree_map_only(
            Tensor, lambda t: t + torch.randn(t.shape, generator=generator) if t.is_floating_point() else t, given
        )
        one, zero = unit.run(given, 1.0), unit.run(given, 0.0)
        self.felt = [a != b for a, b in zip(one.outputs, zero.outputs, strict=True)]
        if unit.kind == "concat_residual":
            self.felt = [mask.any().expand_as(mask) for mask in self.felt]
        self.alive = self._alive(one, unit.run(self.other, 1.0))
        self.left = self._alive(zero, unit.run(self.other, 0.0))
        self.cut = self.alive - self.left
        self.beside = self.left - unit.behind([one.squeezed]) - _changed(one, zero)
        self.open = self.comes_through(0.0)

    def _alive(self, run: _Run, other: _Run) -> _Layers:
        return _changed(run, other) & self.unit.behind(self._felt(run))

    def _felt(self, run: _Run) -> list[Tensor]:
        return [output[mask] for output, mask in zip(run.outputs, self.felt, strict=True)]

    def comes_through(self, gate: float, silent: Iterable[str] = ()) -> bool:
        """Whether the output depends on the input, with some layers silent."""
        run, other = (self._felt(self.unit.run(given, gate, silent)) for given in (self.given, self.other))
        return any(not torch.equal(a, b) for a, b in zip(run, other, strict=True))


def _changed(run: _Run, other: _Run) -> _Layers:
    return frozenset(name for name, value in run.layers.items() if not torch.equal(value, other.layers[name]))


def _of_branch(flow: _Flow) -> list[_Verdict]:
    """An SE on the branch: a zero gate cuts more layers than there are beside it, and the shortcut is still open."""
    told = f"a zero gate cuts {len(flow.cut)} layers, with {len(flow.beside)} beside them"
    return [(len(flow.cut) <= len(flow.beside), told), (not flow.open, "a zero gate closes the shortcut, too")]


def _of_inner(flow: _Flow) -> list[_Verdict]:
    """An SE behind a convolution of the branch with k > 1."""
    kernels = [getattr(flow.unit.layers[name], "kernel_size", (1,)) for name in flow.cut]
    wide = any(max(kernel) > 1 for kernel in kernels)
    return [
        (not wide, "a zero gate cuts no convolution with k > 1"),
        (not flow.open, "a zero gate closes the shortcut, too"),
    ]


def _of_sum(flow: _Flow) -> list[_Verdict]:
    """An SE after the addition: a zero gate cuts everything."""
    told = f"a zero gate leaves {len(flow.left)} of {len(flow.alive)} layers"
    return [(not flow.alive or bool(flow.left), told), (flow.open, "a zero gate leaves a way from input to output")]


def _of_shortcut(flow: _Flow) -> list[_Verdict]:
    """An SE on the shortcut: a zero gate leaves the branch, and without the branch nothing comes through."""
    told = f"a zero gate cuts {len(flow.cut)} layers, with {len(flow.beside)} beside them"
    return [
        (len(flow.cut) >= len(flow.beside), told),
        (not flow.comes_through(1.0, flow.beside), "without the branch nothing comes through the shortcut"),
        (flow.comes_through(0.0, flow.beside), "something comes through beside the branch and the gate"),
    ]


_VERDICTS: dict[str, Callable[[_Flow], list[_Verdict]]] = {
    "standard": _of_branch,
    "pre": _of_branch,
    "inner": _of_inner,
    "post": _of_sum,
    "identity": _of_shortcut,
}
