"""Promises: try everything that was promised of an operated model.

In: a model. Out: a `Report`, or a `VerifyError` for the first promise that is broken. The model itself is left alone:
all runs are on copies, with the values it has and with BatchNorm statistics, affine parameters, zero-initialised gains
and the SEs themselves drawn anew, because a branch that is multiplied by zero, or by one, hides anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import NothingToDoError, PatientError, ProbeError, VerifyError
from ..planning.exam import Exam, refuse_unfit
from ..planning.options import check_flags
from ..reading.encoded import refuse_encoded
from ..records import implanted
from ..surgery.graft import copied
from .compare import Outcome, blocked, outputs_of, reason, same_tensors
from .lives import lost_class
from .pair import Pair, draw_anew, paired, randomise, reproducible, twin
from .ways import WAYS, Way

__all__ = ["Check", "Report", "Trial", "randomise", "same_tensors", "trials", "verify"]

_SIGNS = {True: "ok", False: "BROKEN", None: "-"}


@dataclass(frozen=True)
class Check:
    """One promise that was tried.

    Attributes:
        name: The promise.
        passed: Whether it holds; None for what is only reported, such as a way that the base itself does not have.
        detail: What was seen.
    """

    name: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{_SIGNS[self.passed]:>6}  {self.name}: {self.detail}"


@dataclass(frozen=True)
class Report:
    """The promises that were tried on one model, in order."""

    checks: tuple[Check, ...]

    @property
    def broken(self) -> tuple[Check, ...]:
        """The promises that do not hold."""
        return tuple(check for check in self.checks if check.passed is False)

    def refuse_broken(self) -> None:
        """Raise what `verify` does where a promise is broken.

        Raises:
            VerifyError: The message names the first broken promise, and all that are broken follow.
        """
        if self.broken:
            first, *_ = self.broken
            raise VerifyError(
                f"{first.name}: {first.detail}. Please report this as a bug, with the model's name.\n"
                + "\n".join(map(str, self.broken))
            )

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))

    def _repr_html_(self) -> str:
        from ..showing.notebook import html
        from ..showing.tables import Section

        rows = [(_SIGNS[check.passed], check.name, check.detail) for check in self.checks]
        return html([Section("", ["", "promise", "what was seen"], rows)])


@dataclass(frozen=True)
class Trial:
    """A promise that can be tried.

    Attributes:
        name: The promise.
        attempt: Tries it.
    """

    name: str
    attempt: Callable[[], Outcome]

    def run(self) -> Check:
        """Try it, and leave the random number generators as found."""
        with reproducible():
            return Check(self.name, *self.attempt())


def verify(model: nn.Module, example_input: Any = None, *, thorough: bool = True) -> Report:
    """Run an operated model and check every promise: wiring, calls, keys, gradients, and every way into the model.

    With all gates forced to one the outputs are bit-equal to those of the base, in evaluation and (under one seed) in
    training, and every SE runs as often as its block; so they are by timm's `forward_features`, `forward_head`,
    `forward_intermediates` and its feature extractors. Every key of the base is there; every parameter of every SE is
    reached by the backward pass, with `set_grad_checkpointing` too; deepcopy and pickle keep classes, keys and outputs;
    with one gate at one half, what is halved is what the SE's placement says; `timm.utils.reparameterize_model` keeps
    the outputs or is refused. Graphs by torch.fx, torch.export, torch.compile and ONNX (where onnxruntime is installed)
    compute what the model does, while the base computes something else.

    A way that the base itself does not have is reported, and no promise. torch.compile's caches are emptied
    (`torch.compiler.reset()`) before and after its checks.

    Args:
        model: A model that `add_se` operated on; it is left as found.
        example_input: (C, H, W), a tensor, or a tuple of arguments. By default what fits the model.
        thorough: Whether to try compilers and exporters, too, which takes several times as long.

    Returns:
        The report, none of whose checks failed.

    Raises:
        VerifyError: A promise is broken; the message names it, and all that are broken follow.
        NothingToDoError: The model holds no SE of this library.
        ProbeError: The base does not run on the input.
        PatientError: The model has no values to run with (meta device), or cannot be copied.

    Examples:
        >>> print(verify(add_se(timm.create_model("resnet18"))))
    """
    check_flags(thorough=thorough)
    report = Report(tuple(trial.run() for trial in trials(model, example_input, thorough=thorough)))
    report.refuse_broken()
    return report


def trials(model: nn.Module, example_input: Any = None, *, thorough: bool = True) -> list[Trial]:
    """What `verify` tries, to be run one by one, in order.

    Args:
        model: A model that `add_se` operated on.
        example_input: (C, H, W), a tensor, or a tuple of arguments.
        thorough: Whether to try compilers and exporters, too.

    Raises:
        SurgeryError: As `verify` does, but for `VerifyError`.
    """
    refuse_unfit(model)
    refuse_encoded(model, "verified: its values are drawn anew for that")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise PatientError("The model is on the meta device and cannot be run. Load its weights, then verify.")
    exam = Exam(model, example_input)
    sites = [site for site in exam.existing if site.origin == "se_surgery"]
    ours = implanted(model)
    if not sites and not ours:
        raise NothingToDoError("The model holds no SE of this library. Operate first, then verify.")
    lost = sorted(set(ours) - {site.path for site in sites})
    if lost:
        detail = f"{lost[0]} is never called; its block has lost the forward that surgery gave it"
        return [Trial("calls", lambda: Outcome(False, detail))]
    with reproducible():
        copy = copied(model)
        forgotten = lost_class(model, copy, [site.path for site in sites])
        if forgotten is not None:
            return [Trial("deepcopy", lambda: Outcome(False, f"{forgotten} is not what it was in a copy of the model"))]
        pair = paired(copy, exam, sites)
        as_it_is = _identity(pair)
        draw_anew(pair)
    first = [Trial("keys", lambda: _keys(pair)), Trial("identity", lambda: as_it_is)]
    return [*first, *(_trial(way, pair) for way in WAYS if thorough or not way.thorough)]


def _trial(way: Way, pair: Pair) -> Trial:
    return Trial(way.name, lambda: way.tried(pair))


def _keys(pair: Pair) -> Outcome:
    # A block may be registered under several paths, and so is its SE.
    ses = {pair.operated.get_submodule(site) for site in pair.sites}
    everywhere = pair.operated.named_modules(remove_duplicate=False)
    mine = tuple(path + "." for path, module in everywhere if module in ses)
    keys, base = list(pair.operated.state_dict()), list(pair.base.state_dict())
    others = [key for key in keys if not key.startswith(mine)]
    if others == base:
        return Outcome(True, f"{len(others)} of the base and {len(keys) - len(others)} of the SEs")
    different = sorted(set(base) ^ set(others))
    if not different:
        return Outcome(False, "the base's are in another order")
    return Outcome(False, f"{different[0]} is in only one of the base and the operated model")


def _identity(pair: Pair) -> Outcome:
    """Different outputs break no promise: trained SEs are meant to change them."""
    try:
        expected = outputs_of(twin(pair.base).eval(), pair.inputs)
    except Exception as error:
        raise ProbeError(
            f"The base itself does not run on this input ({reason(error)}). Give an example_input that it takes."
        ) from error
    try:
        outputs = outputs_of(twin(pair.operated).eval(), pair.inputs)
    except Exception as error:
        return blocked(error)
    how = "equal" if same_tensors(outputs, expected) else "differ from"
    return Outcome(None, f"with its gates as they are the model's outputs {how} the base's")
