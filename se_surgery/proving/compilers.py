"""Compilers: what makes a graph of a model (tracers, exporters, compilers), and whether the graph computes the same.

In: a way to lower a model, and a `Pair`. Out: an `Outcome`. A graph may drop a call that does nothing, so here the
gates are away from one: the graph has to come out where the operated model does, and the base far from there.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import FeatureGraphNet
from torch import Tensor, nn

from .compare import (
    CLOSE,
    CLOSE_GRADIENT,
    Outcome,
    backward,
    blocked,
    deviation,
    force_gates,
    gradient_deviation,
    gradients_of,
    learning,
    no_way,
    outputs_of,
    tensors_in,
)
from .gated import Go
from .pair import Pair, twin

# Makes a function of the inputs out of a twin and the inputs.
Lower = Callable[..., Callable[..., Any]]
# So far off the base has to be, and so many times as far as the graph, for an SE that is left out to be seen.
_APART, _TIMES_APART = 1e-3, 100


class _Run(NamedTuple):
    """What one model, or its graph, computed, and the gradients of its SEs' parameters."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]


class _Gap(NamedTuple):
    """How far a graph is from the model it was made of."""

    expected: list[Tensor]
    outputs: float
    gradients: float

    @property
    def is_wide(self) -> bool:
        return self.outputs > CLOSE or self.gradients > CLOSE_GRADIENT

    def __str__(self) -> str:
        parts = [f"outputs by {self.outputs:.1e} of their range"]
        parts += [f"gradients by {self.gradients:.1e}"] if self.gradients else []
        return " and ".join(parts)


@dataclass(frozen=True)
class Lowered:
    """The judge of a graph: it computes what the operated model does, and the base computes something else.

    Attributes:
        lower: Makes the graph.
        eager: Goes the way in the model itself that the graph stands for; by default the forward.
        training: The mode.
        gradients: Whether the graph can be differentiated, so that the SEs' gradients are compared, too.
        around: What the graph is made and run in.
    """

    lower: Lower
    eager: Go | None = None
    training: bool = False
    gradients: bool = True
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def __call__(self, pair: Pair) -> Outcome:
        """Make a graph of the operated model; where that fails, or comes out elsewhere, one of the base, too."""
        with self.around():
            try:
                gap = self._gap(pair.operated, pair.inputs, pair.sites)
            except Exception as error:
                return self._excused(pair) or blocked(error)
            if gap.is_wide:
                return self._excused(pair) or Outcome(False, f"what comes out differs from the eager model's: {gap}")
        forced = force_gates(twin(pair.operated).train(self.training), pair.sites)
        apart = deviation(outputs_of(forced, pair.inputs, self.eager), gap.expected)
        if apart < max(_APART, _TIMES_APART * gap.outputs):
            return Outcome(None, f"the base's outputs differ by {apart:.1e} only, so that a lost SE would not be seen")
        return Outcome(True, f"as the eager model (off: {gap}), and the base is {apart:.2g} away")

    def _excused(self, pair: Pair) -> Outcome | None:
        """The outcome where the base cannot be lowered either, or comes out elsewhere itself."""
        try:
            gap = self._gap(pair.base, pair.inputs, ())
        except Exception as error:
            return no_way(error)
        return Outcome(None, f"the base itself comes out different: {gap}") if gap.is_wide else None

    def _gap(self, model: nn.Module, inputs: tuple[Any, ...], sites: tuple[str, ...]) -> _Gap:
        expected, found = self._run(model, inputs, sites), self._run(model, inputs, sites, graph=True)
        off = gradient_deviation(found.gradients, expected.gradients)
        return _Gap(expected.outputs, deviation(found.outputs, expected.outputs), off)

    def _run(self, model: nn.Module, inputs: tuple[Any, ...], sites: tuple[str, ...], graph: bool = False) -> _Run:
        model = learning(twin(model).train(self.training))
        if graph:
            with _quiet():
                outputs = outputs_of(self.lower(model, *inputs), inputs, gradients=self.gradients)
        else:
            outputs = outputs_of(model, inputs, self.eager, self.gradients)
        if any(leaf.requires_grad for leaf in outputs):
            backward(outputs)
        return _Run([leaf.detach() for leaf in outputs], gradients_of(model, sites))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what exporters warn of, log and print: it is about their own workings, and whole graphs are among it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def fresh_caches() -> Iterator[None]:
    """Empty torch.compile's caches before, so that nothing compiled earlier is used, and after, to free them."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def compiled(model: nn.Module, *inputs: Any) -> Callable[..., Any]:
    """One graph of the whole model by torch.compile; its backend runs the graph's operations as they are."""
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def exported(model: nn.Module, *inputs: Any) -> Callable[..., Any]:
    """The program of torch.export."""
    return torch.export.export(model, inputs).module()


def extracted(model: nn.Module, *inputs: Any) -> Callable[..., Any]:
    """Torchvision's feature extractor for the last value that the forward computes."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    name = get_graph_node_names(model)[1][-1]
    return create_feature_extractor(model, [name]).eval()  # type: ignore[no-any-return]


def last_output(model: nn.Module, *inputs: Any) -> Tensor:
    """What `extracted` takes out of the model."""
    return tensors_in(model(*inputs))[-1]


def feature_graph(model: nn.Module, *inputs: Any) -> Callable[..., Any]:
    """Timm's feature extractor made of a graph, for all the features the model has."""
    graph = FeatureGraphNet(model, tuple(range(len(_feature_modules(model)))), return_dict=True).eval()
    return lambda *args: [value for _, value in sorted(graph(*args).items(), key=lambda item: int(item[0]))]


def features(model: nn.Module, *inputs: Any) -> list[Any]:
    """What `feature_graph` takes out of the model: what the modules of its features return."""
    taken: dict[str, Any] = {}
    for path in _feature_modules(model):
        model.get_submodule(path).register_forward_hook(functools.partial(_take, taken, path))
    model(*inputs)
    return [taken[path] for path in _feature_modules(model)]


def _take(taken: dict[str, Any], path: str, module: nn.Module, args: Any, output: Any) -> None:
    taken[path] = output


def _feature_modules(model: nn.Module) -> list[str]:
    infos: Any = model.feature_info
    return [infos[i]["module"] for i in range(len(infos))]


def onnx_session(model: nn.Module, *inputs: Any) -> Callable[..., Any]:
    """The ONNX file of torch.onnx, run by onnxruntime."""
    import onnxruntime

    if torch.__version__ < "2.5":  # compared as versions: it is no plain string
        raise RuntimeError("torch 2.4's exporter is another one, which leaves a report in the working directory")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    program: Any = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.onnx"
        program.save(file)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*args: Any) -> list[Tensor]:
        arrays = [leaf.cpu().numpy() for leaf in tensors_in(args)]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run
