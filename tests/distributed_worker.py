"""What one of several training processes does with operated models, for test_distributed.py.

`python distributed_worker.py JOB FOLDER` runs once a process, with RANK and WORLD_SIZE in its environment. A job's
parts run one after the other, and what they return is written to `FOLDER/RANK.pt`. A part that fails ends its process.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from patients import build, calls, digest, images, snapshot
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from se_surgery import (
    PatientError,
    SqueezeExcite,
    add_se,
    excitations,
    find_se,
    freeze_base,
    param_groups,
    plan_se,
    recipe_of,
    records,
    strip_se,
    unfreeze_base,
)

try:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor
except ImportError:  # torch before 2.6
    from torch.distributed._composable.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed._tensor import DTensor

Part = Callable[[int], dict[str, Any]]

BATCH, CLASSES, STEPS = 4, 5, 3
WAITS = 200  # seconds until a process that hangs says where, and ends
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
VERBS = {verb.__name__: verb for verb in (add_se, plan_se, find_se, strip_se)}


def base() -> nn.Module:
    """A network without BatchNorm: what it makes of a batch is what it makes of the parts."""
    return narrow(partial(timm.layers.GroupNorm, num_groups=4))


def narrow(norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A ResNet of five blocks."""
    shape = {"layers": (2, 1, 1, 1), "channels": (16, 32, 64, 128)}
    return build("resnet18", **shape, norm_layer=norm_layer, num_classes=CLASSES)


def operated(gates: int = 0, model: nn.Module | None = None) -> nn.Module:
    """An operated network, two SEs in a block, in double precision; `gates` seeds weights as if they were trained."""
    model = base() if model is None else model
    add_se(model, r=8)
    add_se(model, "pre", existing="stack", squeeze="max", bias=True)
    return open_gates(model, gates).double().train()


def open_gates(model: nn.Module, seed: int) -> nn.Module:
    """Give the SEs' second layers weights: while they are zero, no gradient goes to the first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path in ses(model):
            model.get_submodule(path).fc2.weight.normal_(0.0, 1.0, generator=generator)
    return model


def ses(model: nn.Module) -> list[str]:
    """Paths of the SEs, by their class."""
    return [path for path, module in model.named_modules() if isinstance(module, SqueezeExcite)]


def batches(steps: int = STEPS, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """The batches of all processes together."""
    x = images(batch=steps * size).double()
    y = torch.arange(len(x)) % CLASSES
    return list(zip(x.split(size), y.split(size), strict=True))


def share(tensor: Tensor, rank: int) -> Tensor:
    """One process's part of a batch."""
    return tensor.chunk(dist.get_world_size())[rank]


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Some steps of training; the gradients of the last are left on the parameters. Returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def my_batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    return [(share(x, rank), share(y, rank)) for x, y in batches()]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradients, also those that are scattered over the processes."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def labelled() -> torch.utils.data.TensorDataset:
    """Images that no number of processes and no size of a batch divides, with labels."""
    x = images(batch=13).double()
    return torch.utils.data.TensorDataset(x, torch.arange(len(x)) % CLASSES)


def statistics(model: nn.Module, loader: Any) -> dict[str, Tensor]:
    """What `excitations` says of a loader, as tensors by SE."""
    found = excitations(model, loader)
    names = ("mean", "variance", "saturated", "class_means", "class_counts")
    values = {f"{one.site.path} {name}": getattr(one, name) for one in found for name in names}
    return values | {"count": torch.tensor(found.sites[0].count).double()}


# ------------------------------------------------------------------------------------------------------------- DDP


def gates(rank: int) -> dict[str, Any]:
    """Each process looks at its part of the data; then one of them fails, and none waits for it."""
    model = DistributedDataParallel(operated())
    data = labelled()
    sampler = torch.utils.data.DistributedSampler(data, shuffle=False)
    nothing: list[Tensor] = []
    spoilt = [images().double() * float("nan" if rank else 1)]
    return {
        "statistics": statistics(model, torch.utils.data.DataLoader(data, batch_size=3, sampler=sampler)),
        "by one alone": statistics(model, nothing if rank else torch.utils.data.DataLoader(data, batch_size=3)),
        "spoilt": error_of(lambda: excitations(model, spoilt)),
        "nothing": error_of(lambda: excitations(model, nothing)),
    }


def ddp(rank: int, saving: bool = False) -> dict[str, Any]:
    """Each process starts from gates of its own; what counts are those of the first."""
    model = operated(gates=rank)
    model.set_grad_checkpointing(saving)
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    with calls(model, ses(model)) as counts:
        losses = train(parallel, my_batches(rank))
    return {
        "losses": losses,
        "calls": dict(counts),
        "gradients": gradients(model),
        "values": values(model),
        "wrapped keys": list(parallel.state_dict()),
        "keys": list(model.state_dict()),
    }


def ddp_checkpointing(rank: int) -> dict[str, Any]:
    return ddp(rank, saving=True)


def ddp_batchnorm(rank: int) -> dict[str, Any]:
    """A network with BatchNorm, each process on images of its own."""
    model = open_gates(add_se(batchnorm()), rank).double().train()
    parallel = DistributedDataParallel(model)
    train(parallel, my_batches(rank))
    return {"parameters": {name: digest(p) for name, p in model.named_parameters()}}


def ddp_unused(rank: int) -> dict[str, Any]:
    """What DDP says when an SE is skipped."""
    model = operated()
    model.layer2[0].se.forward = lambda x: x
    parallel = DistributedDataParallel(model)
    return {"error": error_of(lambda: train(parallel, my_batches(rank)))}


def ddp_operated_inside(rank: int) -> dict[str, Any]:
    """SEs that come into a model when DDP has it already are not among the parameters that it knows."""
    model = base().double().train()
    parallel = DistributedDataParallel(model)
    operated(model=parallel.module)
    train(parallel, my_batches(rank)[:1])
    return {"gradients": gradients(model)}


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ------------------------------------------------------------------------------------------------------ fine-tuning


def tunable() -> nn.Module:
    """An operated network with BatchNorm, in double precision."""
    return open_gates(add_se(narrow(), r=4), 0).double().train()


def tuned(
    model: nn.Module, wrap: Callable[[nn.Module], nn.Module], data: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """First the SEs learn by themselves, then all but the BatchNorms' statistics; the weights after each."""
    found: dict[str, Any] = {"groups": []}
    for phase in ("SEs", "all"):
        if phase == "SEs":
            freeze_base(model)
        else:
            # Statistics of parts of a batch are not those of the whole: they stay, and parameters learn.
            unfreeze_base(model).eval()
        parallel = wrap(model)
        groups = param_groups(parallel, lr=0.01, se_lr=0.02, weight_decay=0.01, layer_decay=0.9)
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(parallel(x), y).backward()
            optimizer.step()
        found["groups"] += [(group["name"], group["param_names"]) for group in groups]
        found[phase] = get_model_state_dict(model, options=WHOLE) if is_sharded(model) else values(model)
    return found


def ddp_tuned(rank: int) -> dict[str, Any]:
    """Each phase has a wrapper of its own; inside of one it is too late."""
    wrapped = DistributedDataParallel(tunable())
    refused = [error_of(partial(verb, wrapped)) for verb in (freeze_base, unfreeze_base)]
    return tuned(tunable(), DistributedDataParallel, my_batches(rank)) | {"refused": refused}


def fsdp_tuned(rank: int) -> dict[str, Any]:
    """The same shards in both phases."""
    model = sharded(freeze_base(tunable()), "blocks")
    return tuned(model, lambda model: model, my_batches(rank))


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


# ------------------------------------------------------------------------------------------------------------ FSDP2


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        yield from stage


# Which modules are sharded as units of their own, below the root.
SHARDED: dict[str, Callable[[nn.Module], Iterator[nn.Module]]] = {
    "root": lambda model: iter(()),
    "blocks": blocks,
    "SEs": lambda model: (model.get_submodule(path) for path in ses(model)),
}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(model: nn.Module, units: str, **options: Any) -> nn.Module:
    for module in SHARDED[units](model):
        fully_shard(module, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


def fsdp(units: str) -> Part:
    def part(rank: int) -> dict[str, Any]:
        model = operated()
        generated = {path: records.generated_class(model.get_submodule(path)) for path in block_paths(model)}
        sharded(model, units)
        x = share(batches()[0][0], rank)
        with calls(model, ses(model)) as counts, torch.no_grad():
            output = model(x)
        model.reshard()  # the root stays whole after a forward without a backward, and its parameters are others then
        train(model, my_batches(rank))
        return {
            "output": output,
            "calls": dict(counts),
            "scattered": all(isinstance(p, DTensor) for p in model.parameters()),
            "kept forwards": [
                type(model.get_submodule(path)).forward is cls.forward for path, cls in generated.items()
            ],
            "units": [path for path, module in model.named_modules() if isinstance(module, FSDPModule)],
            "gradients": gradients(model),
            "values": get_model_state_dict(model, options=WHOLE),
            "operations": recipe_of(model)["operations"],
        }

    return part


def block_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if records.generated_class(module) is not None]


def fsdp_from_meta(rank: int) -> dict[str, Any]:
    """Operated on and sharded without memory, then given the weights that only the first process has."""
    with torch.device("meta"):
        model = operated()
    sharded(model, "blocks").to_empty(device="cpu")
    weights = operated(gates=1).state_dict() if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    with torch.no_grad():
        return {"output": model(share(batches()[0][0], rank))}


def fsdp_bfloat16(rank: int) -> dict[str, Any]:
    """Parameters in double precision, computed with in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = sharded(operated(), "root", mp_policy=policy)
    with torch.no_grad():
        return {"output": model(share(batches()[0][0], rank))}


# ------------------------------------------------------------------------------------------- what cannot work says so


def wrapped_part(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = base()
        model.layer2 = wrap(model.layer2)
        return model

    return make


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "DistributedDataParallel": lambda: DistributedDataParallel(base()),
    "a part in DistributedDataParallel": wrapped_part(DistributedDataParallel),
    "FSDP2": lambda: sharded(base(), "blocks"),
    "a part in FSDP2": wrapped_part(lambda module: fully_shard(module, mesh=mesh())),
    "an operated model in FSDP2": lambda: sharded(operated(), "blocks"),
}


def refused(rank: int) -> dict[str, Any]:
    """Each function of the library on each wrapped model: the error, and whether the model is what it was."""
    answers = {}
    for name, make in REFUSED.items():
        model = make()
        for verb, function in VERBS.items():
            before = snapshot_of(model)
            try:
                function(model)
                text = "no error"
            except PatientError as error:
                text = str(error)
            answers[name, verb] = (text, snapshot_of(model) == before)
    return answers


def snapshot_of(model: nn.Module) -> dict[str, Any]:
    """The state of a model; where FSDP2 scattered it, its classes and what this process holds."""
    if not is_sharded(model):
        return snapshot(model)
    state: dict[str, Any] = {path: (type(module), list(module._modules)) for path, module in model.named_modules()}
    return state | {f"{name}:": digest(held(p)) for name, p in model.named_parameters()}


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def batchnorm() -> nn.Module:
    return build("mobilenetv2_035", num_classes=CLASSES)


# torch's converter drops the activation of MobileNet's BatchNormAct2d, whether there are SEs or not.
CONVERSIONS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[], nn.Module]]] = {
    "timm": (timm.layers.convert_sync_batchnorm, batchnorm),
    "torch": (nn.SyncBatchNorm.convert_sync_batchnorm, narrow),
}


def sync_batchnorm(rank: int) -> dict[str, Any]:
    """Converted models in a process group: evaluation, and what torch says of them in training and in DDP.

    torch's SyncBatchNorm trains on accelerators only; the base's errors show that this is not the operation's doing.
    """
    answers: dict[str, Any] = {}
    for name, (convert, network) in CONVERSIONS.items():
        model, plain = convert(open_gates(add_se(network()), 0)), convert(network())
        with calls(model, ses(model)) as counts, torch.no_grad():
            output = model(images())
        answers[name] = {
            "output": output,
            "calls": dict(counts),
            "synchronised": sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()),
            "in training": [error_of(partial(net.train(), images())) for net in (model, plain)],
            "in DDP": [error_of(partial(DistributedDataParallel, net)) for net in (model, plain)],
        }
    return answers


# ------------------------------------------------------------------------------------------------------- accelerate


def accelerated(rank: int) -> dict[str, Any]:
    """accelerate's way: prepare, train, save, load."""
    from accelerate import Accelerator

    folder = Path(sys.argv[2]) / "accelerate"
    accelerator = Accelerator(cpu=True)
    model = operated(gates=rank)
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    size = BATCH // accelerator.num_processes
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with calls(model, ses(model)) as counts:
        for mine, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(prepared(mine), labels))
            optimizer.step()
    trained = values(model)
    accelerator.save_model(prepared, folder / "model")
    accelerator.save_state(folder / "state")
    accelerator.wait_for_everyone()
    with torch.no_grad():
        model.get_submodule(ses(model)[0]).fc2.weight.zero_()
    accelerator.load_state(folder / "state")
    return {
        "statistics": statistics(
            prepared, accelerator.prepare(torch.utils.data.DataLoader(labelled(), batch_size=4, shuffle=True))
        ),
        "processes": accelerator.num_processes,
        "class": type(prepared).__name__,
        "unwrapped is the model": accelerator.unwrap_model(prepared) is model,
        "calls": dict(counts),
        "values": trained,
        "loaded": values(model),
        "keys": list(accelerator.get_state_dict(prepared)),
        "file": (folder / "model" / "model.safetensors").read_bytes(),
        "plan_se": error_of(partial(plan_se, prepared)),
    }


JOBS: dict[str, dict[str, Part]] = {
    "torch": {
        "ddp": ddp,
        "gates": gates,
        "ddp checkpointing": ddp_checkpointing,
        "ddp batchnorm": ddp_batchnorm,
        "ddp unused": ddp_unused,
        "ddp operated inside": ddp_operated_inside,
        "ddp tuned": ddp_tuned,
        "fsdp tuned": fsdp_tuned,
        **{f"fsdp {units}": fsdp(units) for units in SHARDED},
        "fsdp from meta": fsdp_from_meta,
        "fsdp bfloat16": fsdp_bfloat16,
        "refused": refused,
        "sync batchnorm": sync_batchnorm,
    },
    "accelerate": {"accelerate": accelerated},
}


def main(job: str, folder: str) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(WAITS, exit=True)
    rank = int(os.environ.get("RANK", "0"))
    if job == "torch":
        # A file, as a port that is free now may not be free a moment later.
        store = f"file://{folder}/store"
        world = int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results = {}
    for name, part in JOBS[job].items():
        print(name, flush=True)
        results[name] = part(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
