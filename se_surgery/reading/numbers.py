"""Numbers: what a forward reads of tensors while it is traced, and which a graph would keep as it is now.

In: the calls of torch's functions on tensors that are values and no nodes of the graph. Out: nodes, where the graph can
ask for it when it runs; reads, where it can be asked whether it is still the same; or a `TraceError`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ..errors import TraceError
from .blame import handed
from .reads import SELF
from .watch import Watch, way
from .wrappers import tensors_of

# What makes a number of a tensor's values.
_NUMBERS = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__float__", "__int__", "__index__"}
)
# What a graph asks for when it runs, and what is the same for good unless somebody exchanges the tensor.
_LATE, _SHAPES = frozenset({"dtype", "device"}), frozenset({"shape", "size", "dim", "ndim", "numel", "__len__"})


class Numbers(TorchFunctionMode):
    """Sees what is read of the tensors of one block that come to its forward as they are, by `parameters()` for one."""

    def __init__(self, tracer: fx.Tracer, watch: Watch) -> None:
        super().__init__()
        self.tracer = tracer
        self.watch = watch
        self.paths: dict[int, str] = {}
        for path, tensor in tensors_of(watch.modules):
            self.paths.setdefault(id(tensor), path)
        self.has_numbers = False
        self.has_own = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if self.watch.is_on and args and isinstance(args[0], Tensor):
            name = getattr(function.__self__, "__name__", "") if name == "__get__" else name
            path = self.paths.get(id(args[0]))
            self.has_numbers |= name in _NUMBERS
            if path is not None:
                self.has_own = True
                if name in _LATE:
                    node = self.tracer.create_proxy("get_attr", path, (), {})
                    return self.tracer.create_proxy("call_function", getattr, (node, name), {})
                if name in _SHAPES:
                    self.watch.reads.take(SELF, (*way(path), (".", "shape")), tuple(args[0].shape))
        return handed(function, *args, **(kwargs or {}))

    def refuse_frozen(self) -> None:
        """To be called when all that was read is known.

        Raises:
            TraceError: A tensor's values were read as numbers.
        """
        if self.has_numbers and (self.has_own or self.watch.reads.has_tensors):
            raise TraceError("its forward reads a tensor's values as numbers, which a graph of it would keep for ever")
