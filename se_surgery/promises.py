"""Promises: run an operated model and see that everything that was promised of it holds.

In: a model. Out: a `Report`, or a `VerifyError` for the first promise that is broken. The model itself is left alone:
all runs are on copies, with the values it has and with BatchNorm statistics, affine parameters and zero-initialised
gains drawn anew, because a branch that is multiplied by zero hides anything.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import NothingToDoError, PatientError, ProbeError, VerifyError
from .exam import Exam, refuse_unfit
from .find import SESite
from .graft import copied
from .records import implants
from .strip import remove

_SEED = 0


@dataclass(frozen=True)
class Check:
    """One promise that was tried.

    Attributes:
        name: The promise.
        passed: Whether it holds; None for what is only reported.
        detail: What was seen.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Report:
    """The promises that were tried on one model, in order."""

    checks: tuple[Check, ...]

    def __str__(self) -> str:
        signs = {True: "ok", False: "BROKEN", None: "-"}
        return "\n".join(f"{signs[check.passed]:>6}  {check.name}: {check.detail}" for check in self.checks)


def verify(model: nn.Module, example_input: Any = None) -> Report:
    """Run an operated model and check every promise: wiring, calls, keys, gradients.

    With all gates forced to one the outputs are bit-equal to those of the base, in evaluation and (under one seed) in
    training; every SE runs exactly once in every way into the model; every key of the base is there; every parameter of
    every SE is reached by the backward pass.

    Args:
        model: A model that `add_se` operated on; it is left as found.
        example_input: (C, H, W), a tensor, or a tuple of arguments. By default what fits the model.

    Returns:
        The report, all of whose checks passed.

    Raises:
        VerifyError: A promise is broken; the message names it and the report follows it.
        NothingToDoError: The model holds no SE of this library.
        PatientError: The model has no values to run with (meta device).

    Example:
        >>> print(verify(add_se(timm.create_model("resnet18"))))
    """
    refuse_unfit(model)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise PatientError("The model is on the meta device and cannot be run. Load its weights, then verify.")
    exam = Exam(model, example_input)
    sites = [site for site in exam.existing if site.origin == "se_surgery"]
    if not sites and not _implanted(model):
        raise NothingToDoError("The model holds no SE of this library. Operate first, then verify.")
    report = Report(tuple(_checks(model, exam, sites)))
    broken = [check for check in report.checks if check.passed is False]
    if broken:
        raise VerifyError(
            f"{broken[0].name}: {broken[0].detail}. Please report this as a bug, with the model's name.\n{report}"
        )
    return report


def _implanted(model: nn.Module) -> set[str]:
    """The paths of all SEs that this library's records say are in the model."""
    return {f"{path}.{i.name}".strip(".") for path, module in model.named_modules() for i in implants(module)}


def _checks(model: nn.Module, exam: Exam, sites: list[SESite]) -> Iterator[Check]:
    lost = sorted(_implanted(model) - {site.path for site in sites})
    if lost:
        yield Check("calls", False, f"{lost[0]} is never called; its block has lost the forward that surgery gave it")
        return
    base = _base(model, exam, sites)
    yield _keys(model, base, exam, sites)
    inputs = _inputs(exam)
    with _reproducible():
        yield _identity(model, base, inputs)
        patient = copied(model)
        randomise(patient, skip=[site.path for site in sites])
        base.load_state_dict({key: patient.state_dict()[key] for key in base.state_dict()})
        for mode in ("evaluation", "training"):
            yield _wiring(patient, base, sites, inputs, training=mode == "training")
        for way, call in _ways_in(patient, inputs).items():
            yield _calls(patient, sites, way, call)
        yield _gradients(patient, sites, inputs)


def _base(model: nn.Module, exam: Exam, sites: list[SESite]) -> nn.Module:
    """The model without this library's SEs; where they replaced native ones, those are not put back."""
    copy = copied(model)
    return remove(copy, Exam(copy, exam.seen.args), sites, restore=False)


def _inputs(exam: Exam) -> tuple[Any, ...]:
    """What the model was looked at with, its empty images filled with noise."""
    generator = torch.Generator().manual_seed(_SEED)

    def filled(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.any():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    return pytree.tree_map_only(Tensor, filled, exam.seen.args)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Leave the random number generators as found."""
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        yield


@torch.no_grad()
def randomise(model: nn.Module, skip: list[str] | tuple[str, ...] = ()) -> None:
    """Draw normalisations' statistics and affine parameters, and gains that are (nearly) zero, anew, in place.

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
            if is_norm and name == "bias":
                parameter.normal_(0.0, 0.1)
            elif parameter.dim() <= 1 and (is_norm or parameter.abs().max() < 1e-3) and name != "bias":
                parameter.uniform_(0.5, 1.5)


def _outputs(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> list[Tensor]:
    model.train(training)
    torch.manual_seed(_SEED)
    with torch.no_grad():
        given = pytree.tree_map_only(Tensor, torch.clone, inputs)
        return [leaf for leaf in pytree.tree_leaves(model(*given)) if isinstance(leaf, Tensor)]


def same_tensors(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two models' outputs are equal bit for bit; what is not a number has to be in the same places."""
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(first, second, strict=True)
    )


def _keys(model: nn.Module, base: nn.Module, exam: Exam, sites: list[SESite]) -> Check:
    mine = tuple(site.path + "." for site in sites)
    others = [key for key in model.state_dict() if not key.startswith(mine)]
    kept = others == list(base.state_dict())
    return Check("keys", kept, f"{len(others)} of the base and {len(model.state_dict()) - len(others)} of the SEs")


def _identity(model: nn.Module, base: nn.Module, inputs: tuple[Any, ...]) -> Check:
    """Never broken: trained SEs are meant to change the outputs."""
    same = same_tensors(_outputs(copied(model), inputs, False), _outputs(copied(base), inputs, False))
    return Check(
        "identity",
        None,
        f"with its gates as they are the model's outputs {'equal' if same else 'differ from'} the base's",
    )


def _wiring(patient: nn.Module, base: nn.Module, sites: list[SESite], inputs: tuple[Any, ...], training: bool) -> Check:
    forced, plain = copied(patient), copied(base)
    for site in sites:
        forced.get_submodule(site.path).register_forward_hook(lambda module, args, output: args[0])
    mode = "training" if training else "evaluation"
    try:
        expected = _outputs(plain, inputs, training)
    except (RuntimeError, ValueError) as error:
        raise ProbeError(
            f"The base itself does not run in {mode} mode on this input ({error}). Give an example_input that it takes."
        ) from error
    same = same_tensors(_outputs(forced, inputs, training), expected)
    detail = f"outputs are {'bit-equal to' if same else 'not'} the base's"
    return Check(f"gates at one, {mode}", same, detail)


def _ways_in(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Callable[[nn.Module], Any]]:
    """The ways into a model that timm's conventions give it."""
    ways: dict[str, Callable[[nn.Module], Any]] = {"forward": functools.partial(_call_method, "__call__", inputs)}
    for method in ("forward_features", "forward_intermediates"):
        if callable(getattr(model, method, None)):
            ways[method] = functools.partial(_call_method, method, inputs)
    return ways


def _count(counts: Counter[str], path: str, module: nn.Module, args: Any, output: Any) -> None:
    counts[path] += 1


def _call_method(method: str, inputs: tuple[Any, ...], model: nn.Module) -> Any:
    return getattr(model, method)(*inputs)


def _calls(patient: nn.Module, sites: list[SESite], way: str, call: Callable[[nn.Module], Any]) -> Check:
    counted, counts = copied(patient), Counter[str]()
    for site in sites:
        counted.get_submodule(site.path).register_forward_hook(functools.partial(_count, counts, site.path))
    counted.eval()
    with torch.no_grad():
        call(counted)
    wrong = [f"{site.path} {counts[site.path]} times" for site in sites if counts[site.path] != 1]
    detail = f"{len(sites)} SEs, each once" if not wrong else f"{wrong[0]} instead of once"
    return Check(f"calls in {way}", not wrong, detail)


def _gradients(patient: nn.Module, sites: list[SESite], inputs: tuple[Any, ...]) -> Check:
    trained = copied(patient).train()
    for site in sites:
        trained.get_submodule(site.path).requires_grad_(True)
    with torch.enable_grad():
        outputs = [leaf for leaf in pytree.tree_leaves(trained(*inputs)) if isinstance(leaf, Tensor)]
        sum((leaf.float().square().mean() for leaf in outputs if leaf.requires_grad), torch.zeros(())).backward()
    missed = [
        f"{site.path}.{name}"
        for site in sites
        for name, parameter in trained.get_submodule(site.path).named_parameters()
        if parameter.grad is None
    ]
    detail = "the backward pass reaches every SE parameter" if not missed else f"nothing reaches {missed[0]}"
    return Check("gradients", not missed, detail)
