"""Parameters of other classes than torch's own: quantised, sharded. What works with them works, all else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import toys
from patients import assert_differs, assert_same, images, randomise, run
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from se_surgery import (
    PatientError,
    SqueezeExcite,
    add_se,
    count_costs,
    excitations,
    find_se,
    plan_se,
    prune_se,
    push_to_hub,
    save_pretrained,
    strip_se,
    tradeoff,
    verify,
)

SIZE = (3, 32, 32)


class Packed(Tensor):
    """As torchao's: a wrapper of other tensors that knows what a linear layer needs, and nothing else."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        made: Packed = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return "Packed"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return func(
                *tree_map(lambda leaf: leaf.inner if isinstance(leaf, Packed) else leaf, args), **(kwargs or {})
            )
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].inner, **(kwargs or {})))
        raise NotImplementedError(f"Packed dispatch: unimplemented {func}")


class Sharded(Tensor):
    """As DTensor: knows every operation, and is nothing that one can compute with beside plain tensors."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Sharded:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise RuntimeError("got mixed torch.Tensor and Sharded")


class Bytes(nn.Parameter):
    """As bitsandbytes': a parameter of bytes, of a class of its own."""

    def __new__(cls, inner: Tensor) -> Bytes:
        return torch.Tensor._make_subclass(cls, inner.detach().to(torch.int8), False)


class Stubborn(Tensor):
    """Refuses what is asked of it by a function, and not by an operation."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("abs", "empty_like", "conv2d", "_conv_forward"):
            raise NotImplementedError("Stubborn knows nothing of it")
        return super().__torch_function__(func, types, args, kwargs)


class Benign(Tensor):
    """Another name for a plain tensor."""


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Packed": lambda t: nn.Parameter(Packed(t), requires_grad=False),
    "Sharded": lambda t: nn.Parameter(Sharded(t), requires_grad=False),
    "Bytes": Bytes,
    "Stubborn": lambda t: nn.Parameter(t.as_subclass(Stubborn), requires_grad=False),
}


def model_of(operated: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(toys.Trunk(toys.Basic(8, 8), toys.Basic(8, 16, 2), outputs=16)).eval()
    if operated:
        add_se(model, example_input=SIZE)
        for module in model.modules():
            if isinstance(module, SqueezeExcite):
                nn.init.normal_(module.fc2.weight)
    return model


def encoded(path: str, kind: str, operated: bool = True) -> nn.Module:
    """A network one of whose weights is of another class."""
    model = model_of(operated)
    holder = model.get_submodule(path)
    holder._parameters["weight"] = KINDS[kind](holder.weight.detach())  # type: ignore[assignment]
    return model


def loader() -> list[Any]:
    return [(images(SIZE, 4), torch.tensor([0, 1, 2, 3]))]


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "plan_se": lambda model: plan_se(model, example_input=SIZE),
    "add_se": lambda model: add_se(model, existing="stack", example_input=SIZE),
    "strip_se": lambda model: strip_se(model, example_input=SIZE),
    "find_se": lambda model: find_se(model, SIZE),
    "count_costs": lambda model: count_costs(model, SIZE),
    "verify": lambda model: verify(model, example_input=SIZE, thorough=False),
    "excitations": lambda model: excitations(model, loader(), example_input=SIZE),
    "fold": lambda model: strip_se(model, fold="mean", loader=loader(), example_input=SIZE),
    "tradeoff": lambda model: tradeoff(model, loader(), example_input=SIZE),
    "prune_se": lambda model: prune_se(model, 0.5, example_input=SIZE),
}
BLOCK = "blocks.0.conv1.weight"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_a_network_with_encoded_convolutions_is_refused(call, kind):
    with pytest.raises(
        PatientError, match=rf"'{BLOCK}' of this Trunk is of the class test_encoded.{kind}, .* plain model"
    ):
        CALLS[call](encoded("blocks.0.conv1", kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["head", "blocks.1.se.fc1", "blocks.0.bn1", "stem.0"])
def test_nor_is_any_other_verified_or_saved(path, kind, tmp_path):
    model, match = encoded(path, kind), f"'{path}.weight' of this Trunk is of the class"
    with pytest.raises(PatientError, match=match):
        verify(model, example_input=SIZE, thorough=False)
    with pytest.raises(PatientError, match=f"{match}.*cannot be saved"):
        save_pretrained(model, tmp_path / "x", base=model_of(False))
    with pytest.raises(PatientError, match=f"{match}.*cannot be saved"):
        push_to_hub(model, "user/model", base=model_of(False), license="mit")
    assert not list(tmp_path.iterdir())


def test_an_encoded_classifier_is_let_be():
    """Nobody operates on it, and all else of the model is what it was."""
    x = images(SIZE)
    plain, bare = model_of(), model_of(False)
    assert_same(run(encoded("head", "Packed"), x), run(plain, x))
    grown = add_se(encoded("head", "Packed", operated=False), example_input=SIZE)
    assert len(find_se(grown, SIZE)) == 2
    assert_same(run(grown, x), run(bare, x))
    assert_same(run(strip_se(encoded("head", "Packed"), example_input=SIZE), x), run(bare, x))
    assert_differs(run(plain, x), run(bare, x))
    found = excitations(encoded("head", "Packed"), loader(), example_input=SIZE)
    expected = excitations(plain, loader(), example_input=SIZE)
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(found.sites, expected.sites, strict=True))


def test_an_encoded_classifier_counts_as_what_it_stands_for():
    costs, expected = count_costs(encoded("head", "Packed"), SIZE), count_costs(model_of(), SIZE)
    assert costs == expected and costs.base["head"].parameters == 16 * 10 + 10


def test_a_tensor_of_another_name_is_a_plain_one():
    model = model_of(False)
    conv = model.get_submodule("blocks.0.conv1")
    conv._parameters["weight"] = nn.Parameter(conv.weight.detach().as_subclass(Benign))
    assert_same(run(add_se(model, example_input=SIZE), images(SIZE)), run(model_of(False), images(SIZE)))
