"""Shards: several processes look at one part of the data each, and what they saw is put together.

In: this process's part of a job, or of a sum. Out: the whole, the same on every process. Without torch.distributed the
part is the whole. How the data is dealt out is the loader's doing (a `DistributedSampler`, accelerate); what such
loaders give twice to make the parts equally long is left out here, so that the sums are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import Tensor
from torch.utils.data import DistributedSampler

from ..errors import SurgeryError

_T = TypeVar("_T")


def processes() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def attempt(work: Callable[[], _T]) -> _T:
    """Do this process's part; what fails on one fails on all, so that none waits forever for another.

    Raises:
        Exception: What the part itself raised, or a `SurgeryError` that says what it was on another process.
    """
    if processes() == 1:
        return work()
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others have to know
        failure = error
    told = gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for number, text in enumerate(told):
        if text is not None:
            raise SurgeryError(f"Process {number} failed ({text}), and what it saw is missing. See to its part first.")
    return result


def gathered(value: Any) -> list[Any]:
    """What every process gives, by rank: a small thing that pickle takes."""
    if processes() == 1:
        return [value]
    values: list[Any] = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if processes() == 1:
        return tensor
    on_cpu = "gloo" in dist.get_backend() or "mpi" in dist.get_backend()
    whole = tensor.clone().to("cpu" if on_cpu else torch.device("cuda", torch.cuda.current_device()))
    dist.all_reduce(whole)
    return whole.to(tensor.device)


def first_times(loader: Any, seen: int, size: int) -> int:
    """How many images at the front of a batch are this process's own, and not repeated from another part.

    Args:
        loader: The loader that gave the batch last.
        seen: Number of images that it gave before.
        size: Number of images in the batch.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, (DistributedSampler, OrderedDistributedSampler)):
        # The image at place i of this part has the place rank + i * processes in the whole.
        left = len(sampler.dataset) - sampler.rank - seen * sampler.num_replicas  # type: ignore[arg-type]
        return min(size, max(0, -(-left // sampler.num_replicas)))
    # accelerate's loaders know which batch is the last, and how many images of it, over all processes, are new.
    remainder = getattr(loader, "remainder", -1)
    if processes() > 1 and getattr(loader, "end_of_dataloader", False) and remainder > 0:
        return min(size, max(0, remainder - rank() * size))
    return size
