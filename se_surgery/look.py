"""Look: run a model once without computing anything, and note what happened where.

In: an nn.Module and an example input. Out: a `Look`, the list of module calls (with the shapes that went in and came
out) and of the events between them (convolutions, normalisations, activations, additions, concatenations, gates).

The parameters are replaced by meta tensors for the length of one forward, so that no arithmetic is done, and put back
whatever happens. The users' own hooks do not run. A model that cannot run on the meta device is run for real.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .errors import ProbeError

_log = logging.getLogger("se_surgery")

# Square sizes that are tried, in this order, for a model that does not say what it takes.
PROBE_SIZES = (224, 32, 28, 64, 96, 128, 160, 256, 299, 331, 384, 448, 512)
PROBE_BATCH = 2
_LARGEST = 2**28


@dataclass(frozen=True)
class Event:
    """One operation of interest.

    Attributes:
        clock: Position in the order of execution; calls of modules are on the same clock.
        kind: `conv`, `norm`, `act`, `pool`, `add`, `cat`, `gate`, `linear` or `squeeze` (a reduction).
        path: The module whose own forward ran the operation.
        shape: Shape of the result.
        kernel: Spatial kernel size of a convolution.
        groups: Groups of a convolution.
        channels: Input channels of a convolution.
        macs: Multiply-adds an image of a convolution or linear layer.
        alone: Whether a convolution was given a map of one position.
    """

    clock: int
    kind: str
    path: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    groups: int = 1
    channels: int = 0
    macs: int = 0
    alone: bool = False

    @property
    def spatial(self) -> bool:
        """Whether the result is a feature map of more than one position."""
        return is_map(self.shape)

    @property
    def transforms(self) -> bool:
        """Whether this changes what a map shows: not a gate on it, and not a reduction of it."""
        return self.kind not in ("gate", "squeeze")

    @property
    def wide(self) -> bool:
        """Whether this is a convolution that looks at more than one position (k > 1)."""
        return any(size > 1 for size in self.kernel)

    @property
    def depthwise(self) -> bool:
        """Whether this is a convolution with one filter a channel."""
        return self.groups > 1 and self.groups == self.channels


@dataclass
class Call:
    """One call of a module: `path` ran from `start` to `end` on the events' clock, with meta copies of its tensors."""

    path: str
    start: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    end: int = -1
    output: Any = None
    parent: Call | None = None
    children: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class Look:
    """What one forward did.

    Attributes:
        model: The model that was looked at.
        modules: Its modules by path.
        calls: The calls of every module, by path, in order.
        events: All events in order.
        args: What the model was called with.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    calls: dict[str, list[Call]]
    events: tuple[Event, ...]
    clocks: tuple[int, ...]
    args: tuple[Any, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial size of the images that went into the model, or `()` where it took none."""
        images = [leaf for leaf in pytree.tree_leaves(self.args) if isinstance(leaf, Tensor) and leaf.dim() in (4, 5)]
        return tuple(images[0].shape[-2:]) if images else ()

    def during(self, call: Call) -> tuple[Event, ...]:
        """All events inside one call, those of its children included."""
        return self.events[bisect.bisect(self.clocks, call.start) : bisect.bisect(self.clocks, call.end)]

    def own(self, call: Call) -> list[Event]:
        """The events of the module's own forward."""
        return [event for event in self.during(call) if event.path == call.path]


def is_map(shape: tuple[int, ...] | torch.Size) -> bool:
    """Whether a shape is that of a batch of feature maps with more than one position: (B, C, H, W) or (B, C, T, H, W).

    Example:
        >>> is_map((2, 64, 7, 7)), is_map((2, 64, 1, 1)), is_map((2, 49, 64))
        (True, False, False)
    """
    return len(shape) in (4, 5) and sum(size > 1 for size in shape[1:]) > 1


def _functions(*names: str) -> frozenset[Callable[..., Any]]:
    """The callables of `names` in torch, torch.nn.functional and Tensor, with their in-place and dunder forms."""
    spaces = (torch, F, Tensor, torch.ops.aten)
    forms = [form for name in names for form in (name, name + "_", f"__{name}__", f"__i{name}__", f"__r{name}__")]
    found = [getattr(space, form, None) for space in spaces[:3] for form in forms]
    return frozenset(function for function in found if function is not None)


_ACTIVATIONS = _functions(
    *"celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6".split(),
    *"rrelu selu sigmoid silu softplus softshrink softsign tanh threshold".split(),
)
# Thresholded linear units are the maximum of the map and a parameter.
_MAXIMA = _functions("maximum", "max")
_REDUCTIONS = _functions(
    *"mean sum amax logsumexp adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split(),
    *"adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split(),
)
_KINDS: dict[Callable[..., Any], str] = {
    **dict.fromkeys(_functions("conv1d", "conv2d", "conv3d"), "conv"),
    **dict.fromkeys(_functions("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "conv"),
    **dict.fromkeys(_functions("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"), "norm"),
    **dict.fromkeys(_ACTIVATIONS | _MAXIMA, "act"),
    **dict.fromkeys(_functions("max_pool2d", "max_pool3d", "avg_pool2d", "avg_pool3d"), "pool"),
    **dict.fromkeys(_functions("add"), "add"),
    **dict.fromkeys(_functions("cat", "concat", "concatenate"), "cat"),
    **dict.fromkeys(_functions("mul", "multiply"), "gate"),
    **dict.fromkeys(_functions("linear"), "linear"),
    **dict.fromkeys(_REDUCTIONS, "squeeze"),
}
# These return a tensor of their first argument's shape, strides and dtype: on the meta device that argument will do.
_SHAPELESS = _ACTIVATIONS - _functions("glu") | _functions("batch_norm")


def kind_of(function: Any) -> str | None:
    """The kind of event a torch function makes, or None."""
    return _KINDS.get(function) if callable(function) else None


class _Recorder(TorchFunctionMode):
    """Notes events and calls while a model runs."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.real = real
        self.clock = 0
        self.stack: list[Call] = []
        self.events: list[Event] = []
        self.calls: dict[str, list[Call]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _KINDS.get(function)
        kwargs = kwargs or {}
        if kind is None:
            return function(*args, **kwargs)
        first = args[0] if args else None
        if not self.real and function in _SHAPELESS and isinstance(first, Tensor):
            result = first
        else:
            result = function(*args, **kwargs)
        value = result[0] if isinstance(result, tuple) and result else result
        if isinstance(value, Tensor) and self.stack:
            if function in _MAXIMA and not (len(args) > 1 and isinstance(args[1], Tensor)):
                kind = "squeeze"
            self._note(kind, args, kwargs, value)
        return result

    def _note(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        extra: dict[str, Any] = {}
        if kind == "conv":
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            given = args[0] if args else kwargs["input"]
            channels = given.shape[1 - len(weight.shape)] if given.dim() < weight.dim() else given.shape[1]
            groups = channels // weight.shape[1]
            extra = {"kernel": tuple(weight.shape[2:]), "groups": groups, "channels": channels}
            extra["alone"] = given.dim() in (4, 5) and not is_map(given.shape)
        if kind in ("conv", "linear"):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            extra["macs"] = result[0].numel() * weight[0].numel()
        if kind == "gate" and not _is_gate(args, result):
            return
        if kind == "add" and (len(args) < 2 or not isinstance(args[1], Tensor)):
            return
        self.clock += 1
        self.events.append(Event(self.clock, kind, self.stack[-1].path, tuple(result.shape), **extra))

    def enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.clock += 1
            parent = self.stack[-1] if self.stack else None
            call = Call(path, self.clock, _to_meta(args), _to_meta(kwargs), parent=parent)
            self.calls.setdefault(path, []).append(call)
            if parent is not None:
                parent.children.append(call)
            self.stack.append(call)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.clock += 1
        call = self.stack.pop()
        call.end = self.clock
        call.output = _to_meta(output)


def _is_gate(args: tuple[Any, ...], result: Tensor) -> bool:
    """Whether a product scales the channels of a map by one number each, broadcast or expanded."""
    if len(args) < 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor) or not is_map(result.shape):
        return False
    pair = [args[0], args[1]]
    return sum(_is_per_channel(operand) for operand in pair) == 1 and all(
        operand.dim() == result.dim() and operand.shape[0] == result.shape[0] for operand in pair
    )


def _is_per_channel(tensor: Tensor) -> bool:
    held = [size for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True) if size > 1 and stride]
    return len(held) <= 1


def _to_meta(value: Any) -> Any:
    """`value` with its tensors on the meta device, so that a record holds no memory."""
    if isinstance(value, Tensor):
        return value if value.is_meta else torch.empty_like(value, device="meta")
    if value is None or isinstance(value, (int, float, str)):
        return value
    if type(value) in (tuple, list):
        return type(value)(_to_meta(item) for item in value)
    return pytree.tree_map_only(Tensor, _to_meta, value)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")

# Those that register_module_forward_hook and its like keep for all modules of the process.
_GLOBAL_HOOKS = (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks)


@contextlib.contextmanager
def _on_the_table(modules: dict[str, nn.Module], recorder: _Recorder) -> Iterator[None]:
    """Hold the modules in evaluation mode, on the meta device and under the recorder's hooks only; then undo it all."""
    saved = [(module, dict(module.__dict__)) for module in modules.values()]
    for_all = [(hooks, dict(hooks)) for hooks in _GLOBAL_HOOKS]
    # Parameters shared between modules stay shared.
    seen: dict[int, Tensor] = {}

    def meta(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        if id(tensor) not in seen:
            seen[id(tensor)] = torch.empty_like(tensor, device="meta", requires_grad=False)
        return seen[id(tensor)]

    try:
        for hooks, _ in for_all:
            hooks.clear()
        for path, module in modules.items():
            state = module.__dict__
            state["training"] = False
            state.update({name: OrderedDict() for name in (*_HOOKS, *_HOOK_FLAGS) if name in state})
            state["_forward_pre_hooks"] = OrderedDict({0: recorder.enter(path)})
            state["_forward_pre_hooks_with_kwargs"] = OrderedDict({0: True})
            state["_forward_hooks"] = OrderedDict({0: recorder.leave})
            if recorder.real:
                continue
            for group in ("_parameters", "_buffers"):
                if state[group]:
                    state[group] = {name: None if t is None else meta(t) for name, t in state[group].items()}
            state.update({name: meta(value) for name, value in state.items() if isinstance(value, Tensor)})
        yield
    finally:
        for module, state in saved:
            module.__dict__.clear()
            module.__dict__.update(state)
        for hooks, registered in for_all:
            hooks.update(registered)


def look(model: nn.Module, example_input: Any = None) -> Look:
    """Run `model` once and note its calls and events.

    Args:
        model: The model; it is left as found.
        example_input: (C, H, W), a tensor, or a tuple of arguments; without it, see `probes`.

    Raises:
        ProbeError: The model fails on every input that was tried.
    """
    modules = dict(model.named_modules())
    failures: list[tuple[str, Exception]] = []
    for args in probes(model, example_input):
        for real in (False, True):
            if real and any(p.is_meta for p in model.parameters()):
                continue
            try:
                return _enlarged(_record(model, modules, args, real))
            except Exception as error:  # whatever the model's own code raises: the input does not fit it
                failures.append((_describe(args), error))
                if _is_shape_mismatch(error):
                    break
                _log.debug("probing with %s failed: %r", _describe(args), error)
    raise ProbeError(_probe_message(model, failures, example_input)) from failures[0][1]


def _enlarged(seen: Look) -> Look:
    """The look, or one at a larger image where on this one maps shrink to a single position before the network ends."""
    enlarged = seen
    while any(event.alone and event.wide for event in enlarged.events) and max(enlarged.size) < PROBE_SIZES[-1]:
        height, width = enlarged.size
        args = pytree.tree_map_only(Tensor, functools.partial(_resized, (2 * height, 2 * width)), enlarged.args)
        try:
            enlarged = _record(seen.model, seen.modules, args, real=False)
        except Exception as error:  # whatever the model's own code raises: it takes this size alone
            _log.debug("looking at a larger image failed: %r", error)
            return seen
    return enlarged


def look_again(seen: Look) -> Look | None:
    """The same look at images of another size, or None where the model takes no other."""
    height, width = seen.size or (0, 0)
    for size in ((2 * height, 2 * width), (height + 32, width + 32), (2 * height, width)):
        args = pytree.tree_map_only(Tensor, functools.partial(_resized, size), seen.args)
        try:
            return _record(seen.model, seen.modules, args, real=False)
        except Exception as error:  # whatever the model's own code raises: it does not take this size
            _log.debug("looking again at %s failed: %r", size, error)
    return None


def _resized(size: tuple[int, int], tensor: Tensor) -> Tensor:
    if tensor.dim() not in (4, 5):
        return tensor
    return torch.zeros((*tensor.shape[:-2], *size), dtype=tensor.dtype, device=tensor.device)


def _record(model: nn.Module, modules: dict[str, nn.Module], args: tuple[Any, ...], real: bool) -> Look:
    recorder = _Recorder(real)
    given = args if real else _to_meta(args)
    rng = torch.random.get_rng_state()
    try:
        with torch.no_grad(), _on_the_table(modules, recorder), recorder:
            output = model(*given)
    finally:
        torch.random.set_rng_state(rng)
    shapes = tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor))
    _check_batch(shapes, output)
    clocks = tuple(event.clock for event in recorder.events)
    return Look(model, modules, recorder.calls, tuple(recorder.events), clocks, args)


def _check_batch(shapes: tuple[tuple[int, ...], ...], output: Any) -> None:
    """A `view(-1, n)` on a map of the wrong size mixes images: the batch that comes out is not the one that went in."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim()]
    if len(leaves) == 1 and shapes and leaves[0].shape[0] != shapes[0][0]:
        raise _BatchMixedError(f"a batch of {shapes[0][0]} came out as a batch of {leaves[0].shape[0]}")


class _BatchMixedError(RuntimeError):
    pass


def _is_shape_mismatch(error: Exception) -> bool:
    """Whether the error would come again on real tensors: it is about sizes, not about the meta device."""
    text = str(error).lower()
    return isinstance(error, _BatchMixedError) or any(
        word in text for word in ("mat1 and mat2", "expected input", "size mismatch", "kernel size can't", "channels")
    )


def probes(model: nn.Module, example_input: Any = None) -> Iterator[tuple[Any, ...]]:
    """The argument tuples to try on `model`, most likely first.

    The size is that of `pretrained_cfg` (timm convention) and otherwise each of `PROBE_SIZES`; channels, dtype and
    device are those of the first convolution, so that `in_chans=1` and half models work.
    """
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    weight = first.weight if first is not None else next(model.parameters(), torch.empty(0))

    def images(*shape: int) -> tuple[Tensor]:
        return (torch.zeros(PROBE_BATCH, *shape, device=weight.device, dtype=weight.dtype),)

    if isinstance(example_input, Tensor):
        yield (example_input,)
    elif isinstance(example_input, (tuple, list)) and example_input and all(type(n) is int for n in example_input):
        if min(example_input) < 0 or math.prod(example_input) > _LARGEST:
            raise ProbeError(
                f"example_input is {example_input!r}, which no image is. "
                f"Give the size (C, H, W) of one that fits into memory."
            )
        yield images(*example_input)
    elif isinstance(example_input, tuple) and example_input:
        yield example_input
    elif example_input is not None:
        raise ProbeError(
            f"example_input is {example_input!r}, which is not an input. "
            "Give the size (C, H, W), a tensor with its batch axis, or a tuple of the forward's arguments."
        )
    else:
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        size = tuple(config.get("input_size") or ()) if isinstance(config, dict) else ()
        # A stem may rearrange positions into channels in front of its first convolution.
        counts = dict.fromkeys([first.in_channels if first is not None else 3, *size[:1], 3, 1])
        if isinstance(first, nn.Conv3d):
            yield from (images(channels, 16, 112, 112) for channels in counts)
            return
        sizes = [*([size[1:]] if len(size) == 3 else []), *((side, side) for side in PROBE_SIZES)]
        for height, width in sizes:
            yield from (images(channels, height, width) for channels in counts)


def _describe(args: tuple[Any, ...]) -> str:
    parts = [f"{tuple(a.shape)} {a.dtype}" if isinstance(a, Tensor) else repr(a)[:60] for a in args]
    return ", ".join(parts)


def _probe_message(model: nn.Module, failures: list[tuple[str, Exception]], example_input: Any) -> str:
    tried = list(OrderedDict.fromkeys(description for description, _ in failures))
    error = failures[0][1]
    text = (str(error).splitlines() or ["no message"])[0][:300]
    remedy = (
        "Give the size (C, H, W), a tensor or a tuple of arguments as example_input."
        if example_input is None
        else "Give an example_input that the model's forward takes."
    )
    return f"{type(model).__name__} does not run on {'; '.join(tried)} ({type(error).__name__}: {text}). {remedy}"
