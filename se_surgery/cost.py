"""Cost: what a model costs to keep and to run, counted as the paper counts (section 4, tables 2, 10 and 13).

In: a model. Out: numbers. The model is not touched: what runs is a copy of it on the meta device, which has shapes and
no values.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from .errors import ProbeError
from .find import sites_in
from .look import Look, look
from .stages import Stages


def parameters(model: nn.Module) -> tuple[int, int]:
    """The number of parameters, and that number with BatchNorm's running statistics counted in.

    Frozen parameters count, shared ones once. What is added for the second number are the elements of all
    floating-point buffers; in nearly every CNN these are the running statistics and nothing else. The paper's table 10
    counts them in.

    Example:
        >>> parameters(timm.create_model("resnet50"))
        (25557032, 25610152)
    """
    learned = sum(parameter.numel() for parameter in model.parameters())
    return learned, learned + sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())


def multiply_adds(model: nn.Module, example_input: Any = None) -> int:
    """Multiply-adds of one forward in evaluation, for one image.

    Convolutions, linear layers and matrix products count, and for every SE the scale, one multiplication an element of
    its map; its pooling is free, as all pooling, normalisation and activation is.

    Args:
        model: The model; it is left as found.
        example_input: (C, H, W), a tensor with its batch axis, or a tuple of arguments. By default what fits the model.

    Raises:
        ProbeError: The model does not run on that input.

    Example:
        >>> multiply_adds(timm.create_model("resnet50"))
        4089184256
    """
    seen = look(model, example_input)
    return _layers(model, seen) + _scales(seen)


def _layers(model: nn.Module, seen: Look) -> int:
    """Multiply-adds of everything that multiplies matrices."""
    images = pytree.tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor[:1], device="meta"), seen.args)
    patient = _on_meta(model).eval()
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            patient(*images)
    except Exception as error:  # whatever the model's own code raises where a tensor has no values
        raise ProbeError(
            f"{type(model).__name__} reads the values of its feature maps ({error}), so its multiply-adds cannot be "
            f"counted without running it. Count them with torch.utils.flop_counter on real images."
        ) from error
    # A multiply-add is two floating-point operations.
    return int(counter.get_total_flops()) // 2


def _scales(seen: Look) -> int:
    """The multiplications with which SEs scale their maps."""
    maps = [call.output.shape for site in sites_in(seen, Stages(seen, [])) for call in seen.calls[site.path]]
    return sum(math.prod(shape[1:]) for shape in maps)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, without its hooks; no weight is copied on the way."""
    tensors = [tensor for module in model.modules() for tensor in _tensors(module)]
    memo: dict[int, Any] = {id(tensor): _empty(tensor) for tensor in tensors}
    patient = copy.deepcopy(model, memo)
    for module in patient.modules():
        # They are the user's: what they note must come from the user's own runs.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return patient


def _tensors(module: nn.Module) -> list[Tensor]:
    held = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
    return [tensor for tensor in held if isinstance(tensor, Tensor)]


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
