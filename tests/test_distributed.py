"""Training infrastructure takes operated models as it takes others: DDP, FSDP2, accelerate, SyncBN, mean weights.

distributed_worker.py is what processes run: two with torch alone, one and two with accelerate, each set started once
for all tests. What they return is compared here with what one process makes of the whole batches.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import safetensors.torch
import torch
from distributed_worker import CONVERSIONS, REFUSED, SHARDED, STEPS, VERBS, batches, open_gates, operated, ses
from filelock import FileLock
from patients import assert_differs, assert_same, build, calls, copied, differences, digest, images, run, snapshot
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from se_surgery import PatientError, add_se, find_se, recipe_of, strip_se

WORKER = Path(worker.__file__)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

# What is started: the job, how many processes run it, and what stands between `python` and the script.
LAUNCHES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "torch": ("torch", 2, ()),
    "accelerate, 1 process": ("accelerate", 1, ()),
    "accelerate, 2 processes": ("accelerate", 2, TORCHRUN),
}

# accelerate in two processes does what it does in one, and what DDP does.
_ACCELERATE = [
    (("accelerate, 1 process", "accelerate"), ()),
    (("accelerate, 2 processes", "accelerate"), pytest.mark.sweep),
]

Results = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Results:
    """What each process of a launch returned for a part: started when first asked for, once for all pytest workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    @functools.cache
    def of(launch: str, part: str) -> list[dict[str, Any]]:
        folder = root / launch.replace(" ", "-")
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                start(launch, folder)
        written = [folder / f"{rank}.pt" for rank in range(LAUNCHES[launch][1])]
        if not all(file.exists() for file in written):
            pytest.fail("\n".join(log.read_text()[-4000:] for log in sorted(folder.glob("*.log"))), pytrace=False)
        return [torch.load(file, weights_only=True)[part] for file in written]

    return of


def start(launch: str, folder: Path) -> None:
    """Run a launch to its end; when one process fails, or time is up, the others are ended, too."""
    job, processes, launcher = LAUNCHES[launch]
    path = os.pathsep.join([str(WORKER.parent.parent), os.environ.get("PYTHONPATH", "")])
    common = {
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "error::UserWarning",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ranks = [{"RANK": str(rank), "WORLD_SIZE": str(processes)} for rank in range(processes)]
    running = []
    for number, own in enumerate(ranks if job == "torch" else [{}]):
        with (folder / f"{number}.log").open("w") as log:
            command = [sys.executable, *launcher, str(WORKER), job, str(folder)]
            environment = {**os.environ, **common, **own}
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + worker.WAITS + 20
    try:
        while None in (codes := [process.poll() for process in running]) and not any(codes):
            time.sleep(0.1)
            if time.monotonic() > deadline:
                break
    finally:
        for process in running:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process if it is not at its end; torchrun ends its own when it is asked, not when it is killed."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ----------------------------------------------------------------------------------------- the gates over all the data


@pytest.mark.parametrize(
    ("launch", "part", "how"),
    [
        ("torch", "gates", "statistics"),
        ("torch", "gates", "by one alone"),
        *(pytest.param(*launch, "statistics", marks=marks) for launch, marks in _ACCELERATE),
    ],
)
def test_statistics_of_the_gates_are_those_of_one_process(results, launch, part, how):
    """What samplers and accelerate repeat, so that all parts are equally long, counts once."""
    model = operated()
    if part == "accelerate":
        model.load_state_dict(results(launch, part)[0]["loaded"])
    expected = worker.statistics(model, [worker.labelled()[:]])
    assert max(t.max() for name, t in expected.items() if name.endswith("variance")) > 1e-6
    for result in results(launch, part):
        assert_close(result[how], expected, relative_to_one=True)


def test_a_process_that_fails_takes_the_others_along(results):
    own, other = "Batch 1 holds values that are not finite", "Process 1 failed (DataError: Batch 1 holds values"
    first, second = (result["spoilt"] for result in results("torch", "gates"))
    assert other in first and own in second and "Process" not in second
    assert all("gave no images" in result["nothing"] for result in results("torch", "gates"))


# ------------------------------------------------------------------------------------- training, however it is spread


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One process that trains on the whole batches."""
    model = operated()
    losses = worker.train(model, batches())
    return {"losses": losses, "gradients": worker.gradients(model), "values": worker.values(model)}


def assert_close(
    first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-10, relative_to_one: bool = False
) -> None:
    """Equal names, and values that differ by rounding in double precision: relative to the largest of each tensor."""
    assert list(first) == list(second)
    for name, tensor in second.items():
        error = (first[name] - tensor).abs().max().item()
        size = 1.0 if relative_to_one else tensor.abs().max().item()
        assert error <= tolerance * size, f"{name} differs by {error:g}"


DDP = [("torch", "ddp"), ("torch", "ddp checkpointing")]
FSDP = [("torch", f"fsdp {units}") for units in SHARDED]
ACCELERATE = [pytest.param(*launch, marks=marks) for launch, marks in _ACCELERATE]


@pytest.mark.parametrize(("launch", "part"), DDP + FSDP + ACCELERATE)
def test_training_is_that_of_one_process_with_the_whole_batches(results, alone, launch, part):
    """Gradients and weights after some steps, of the SEs and of the base, within 1e-10 in double precision."""
    start = worker.values(operated())
    for rank, result in enumerate(results(launch, part)):
        if part.startswith("fsdp") and rank > 0:
            assert result["values"] == {}, "the whole state dict is gathered on the first process"
        else:
            assert_close(result["values"], alone["values"])
            assert all(not torch.equal(result["values"][key], start[key]) for key in start)
        if "gradients" in result:
            assert_close(result["gradients"], alone["gradients"])
            assert all(gradient.any() for gradient in result["gradients"].values())


@pytest.mark.parametrize(("launch", "part"), DDP + ACCELERATE[1:])
def test_processes_stay_equal_bit_for_bit(results, launch, part):
    """Each begins with gates of its own; those of the first are everyone's from then on."""
    first, second = (result["values"] for result in results(launch, part))
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)
    if part != "accelerate":
        losses = [result["losses"] for result in results(launch, part)]
        assert losses[0] != losses[1], "each process has images of its own"


@pytest.mark.parametrize(("launch", "part"), DDP + FSDP + ACCELERATE)
def test_each_se_runs_once_in_each_forward(results, launch, part):
    again = part == "ddp checkpointing"  # each forward is computed again in the backward pass
    expected = 1 if part.startswith("fsdp") else 2 * STEPS if again else STEPS
    for result in results(launch, part):
        assert len(result["calls"]) == 10
        assert set(result["calls"].values()) == {expected}


# --------------------------------------------------------------------------------------------------------------- DDP


def test_ddp_keys_are_the_models_behind_module(results):
    keys = list(operated().state_dict())
    for result in results("torch", "ddp"):
        assert result["keys"] == keys
        assert result["wrapped keys"] == [f"module.{key}" for key in keys]


def test_ddp_weights_load_into_an_operated_model(results):
    """As they are, or saved with the wrapper's prefix."""
    (result, _), models = results("torch", "ddp"), (operated(1), operated(2))
    models[0].load_state_dict(result["values"], strict=True)
    prefixed = {f"module.{key}": tensor for key, tensor in result["values"].items()}
    nn.modules.utils.consume_prefix_in_state_dict_if_present(prefixed, "module.")
    models[1].load_state_dict(prefixed, strict=True)
    assert_same(run(models[0], images().double()), run(models[1], images().double()))


def test_ddp_keeps_a_network_with_batchnorm_equal(results):
    first, second = (result["parameters"] for result in results("torch", "ddp batchnorm"))
    assert first == second
    begun = open_gates(add_se(worker.batchnorm()), 0).double().named_parameters()
    assert all(first[name] != digest(parameter) for name, parameter in begun)


def test_ddp_says_when_an_se_is_not_used(results):
    """That no such error came with find_unused_parameters=False is what shows that all SEs are."""
    for result in results("torch", "ddp unused"):
        assert "Expected to have finished reduction in the prior iteration" in result["error"]


def test_ddp_does_not_know_ses_that_come_later(results):
    """Operating on `parallel.module` cannot be seen from there: nobody averages the gradients of those SEs."""
    first, second = (result["gradients"] for result in results("torch", "ddp operated inside"))
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    assert differing == {name for name in first if ".se" in name}


# ------------------------------------------------------------------------------------------------------------- FSDP2


@pytest.mark.parametrize("units", SHARDED)
def test_fsdp_forward_is_the_unsharded_one(results, units):
    model = operated()
    for x, result in zip(batches()[0][0].chunk(2), results("torch", f"fsdp {units}"), strict=True):
        assert result["scattered"]
        assert_same([result["output"]], run(model, x, training=True))


@pytest.mark.parametrize("units", SHARDED)
def test_fsdp_keeps_generated_forwards_and_the_record(results, units):
    """FSDP2 gives each of its units a class of its own, below which there is the block's generated one."""
    model = operated()
    expected = [path for path, module in model.named_modules() if module in [model, *SHARDED[units](model)]]
    for result in results("torch", f"fsdp {units}"):
        assert result["units"] == expected
        assert len(result["kept forwards"]) == 5 and all(result["kept forwards"])
        assert result["operations"] == recipe_of(model)["operations"]


@pytest.mark.parametrize("units", SHARDED)
def test_fsdp_gathers_a_state_dict_that_an_operated_model_loads(results, alone, units):
    gathered = results("torch", f"fsdp {units}")[0]["values"]
    model, other = operated(1), operated(2)
    assert list(gathered) == list(model.state_dict())
    model.load_state_dict(gathered, strict=True)
    other.load_state_dict(alone["values"])
    x = images().double()
    assert torch.allclose(run(model, x)[0], run(other, x)[0], rtol=1e-9, atol=0)


def test_fsdp_of_a_model_operated_on_without_memory(results):
    """On the meta device, sharded, then given weights that only the first process had."""
    model = operated(gates=1)
    for x, result in zip(batches()[0][0].chunk(2), results("torch", "fsdp from meta"), strict=True):
        assert_same([result["output"]], run(model, x, training=True))


def test_fsdp_in_mixed_precision(results):
    model = operated().bfloat16()
    for x, result in zip(batches()[0][0].chunk(2), results("torch", "fsdp bfloat16"), strict=True):
        assert_same([result["output"]], run(model, x.bfloat16(), training=True))


# ------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def tuned_alone() -> dict[str, Any]:
    """One process on whole batches: the SEs by themselves, then all."""
    return worker.tuned(worker.tunable(), lambda model: model, batches())


@pytest.mark.parametrize("part", ["ddp tuned", "fsdp tuned"])
def test_frozen_and_given_back_training_is_that_of_one_process(results, tuned_alone, part):
    """On a network with BatchNorm: frozen, it does not depend on how batches are spread."""
    model = worker.tunable()
    start, parameters = worker.values(model), dict(model.named_parameters())
    for rank, result in enumerate(results("torch", part)):
        assert result["groups"] == tuned_alone["groups"]
        for phase in ("SEs", "all"):
            if part == "fsdp tuned" and rank > 0:
                assert result[phase] == {}, "the whole state dict is gathered on the first process"
                continue
            assert_close(result[phase], tuned_alone[phase])
            moved = {key for key, tensor in result[phase].items() if not torch.equal(tensor, start[key])}
            assert moved == {key for key in start if ".se." in key or (phase == "all" and key in parameters)}


def test_it_is_too_late_to_freeze_what_is_in_ddp(results):
    for result in results("torch", "ddp tuned"):
        for text in result["refused"]:
            assert "PatientError: The model is in DistributedDataParallel, which has fixed what is trained." in text


# ------------------------------------------------------------------------------------------- what cannot work says so


@pytest.mark.parametrize("name", REFUSED)
def test_wrapped_models_are_refused_and_left_as_they_are(results, name):
    part = "'layer2'" if name.startswith("a part") else "The model"
    for result in results("torch", "refused"):
        for verb in VERBS:
            text, unchanged = result[name, verb]
            assert f"{part} is wrapped or compiled by {name.split()[-1]}" in text
            assert text.endswith("Operate on the bare model first, then wrap it.")
            assert unchanged, f"{verb} changed it"


@pytest.mark.parametrize("name", CONVERSIONS)
def test_sync_batchnorm_in_a_process_group(results, name):
    """What torch refuses without an accelerator, training and DDP, it refuses for the base in the same words."""
    model = open_gates(add_se(CONVERSIONS[name][1]()), 0)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for result in (result[name] for result in results("torch", "sync batchnorm")):
        assert result["synchronised"] == norms
        assert len(result["calls"]) == {"timm": 17, "torch": 5}[name] and set(result["calls"].values()) == {1}
        assert_same([result["output"]], run(model, images()))
        for errors, words in ((result["in training"], "on GPU"), (result["in DDP"], "GPU modules")):
            assert errors[0] == errors[1] and "SyncBatchNorm" in errors[0] and words in errors[0]


@pytest.mark.parametrize("name", CONVERSIONS)
def test_sync_batchnorm_trains_as_batchnorm_in_one_process(name):
    convert, network = CONVERSIONS[name]
    model = open_gates(add_se(network()), 0)
    converted = convert(copied(model))
    assert_same(run(converted, images(), training=True), run(model, images(), training=True))
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in converted.state_dict().items())


def test_torchs_converter_changes_networks_with_batchnormact_before_any_surgery():
    """Why MobileNet is converted by timm's in these tests."""
    base = worker.batchnorm()
    assert_differs(run(nn.SyncBatchNorm.convert_sync_batchnorm(copied(base)), images()), run(base, images()))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_ses_for_a_converted_model(name):
    convert, network = CONVERSIONS[name]
    base = convert(network())
    model = add_se(copied(base))
    with calls(model, ses(model)) as counts:
        assert_same(run(model, images()), run(base, images()))
    assert set(counts.values()) == {1}
    assert list(model.state_dict()) == list(convert(add_se(network())).state_dict())
    assert [type(module) for module in strip_se(model).modules()] == [type(module) for module in base.modules()]


# ------------------------------------------------------------------------------------------------------- accelerate


@pytest.mark.parametrize(("launch", "part"), ACCELERATE)
def test_accelerate_saves_and_loads_the_operated_model(results, launch, part):
    processes = results(launch, part)
    keys = list(operated().state_dict())
    for result in processes:
        assert result["processes"] == len(processes)
        assert result["class"] == ("ResNet" if len(processes) == 1 else "DistributedDataParallel")
        assert result["unwrapped is the model"]
        assert result["keys"] == keys
        assert all(torch.equal(result["loaded"][key], result["values"][key]) for key in keys)
        saved = safetensors.torch.load(result["file"])
        assert set(saved) == set(keys) and all(torch.equal(saved[key], result["values"][key]) for key in keys)


@pytest.mark.sweep
def test_accelerate_wraps_in_ddp_where_there_are_processes(results):
    """One process gets the model itself back, which can be operated on; of two, each gets it in DDP."""
    (one,) = results("accelerate, 1 process", "accelerate")
    assert one["plan_se"] == "no error"
    for result in results("accelerate, 2 processes", "accelerate"):
        assert "PatientError: The model is wrapped or compiled by DistributedDataParallel" in result["plan_se"]


# ------------------------------------------------------------------------------------------------ averages of weights


# How it is made, how it takes the model's weights, and what weights have at its making, first and second update.
AVERAGES: dict[str, tuple[Callable[[nn.Module], nn.Module], str, tuple[float, float, float]]] = {
    "ModelEmaV2": (functools.partial(ModelEmaV2, decay=0.75), "update", (0.5625, 0.1875, 0.25)),
    "ModelEmaV3": (functools.partial(ModelEmaV3, decay=0.75), "update", (0.5625, 0.1875, 0.25)),
    "AveragedModel": (functools.partial(AveragedModel, use_buffers=True), "update_parameters", (0.0, 0.5, 0.5)),
    "AveragedModel, moving": (
        functools.partial(AveragedModel, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.75)),
        "update_parameters",
        (0.0, 0.75, 0.25),
    ),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_weights(name):
    """Of the SEs' as of all others; the average runs its own SEs, and its outputs are those of the mean weights."""
    make, update, shares = AVERAGES[name]
    model = open_gates(add_se(worker.batchnorm()), 0).double()
    average = make(model)
    history = [worker.values(model)]
    for seed in (1, 2):
        shake(model, seed)
        getattr(average, update)(model)
        history.append(worker.values(model))
    mean = {
        key: sum(share * state[key] for share, state in zip(shares, history, strict=True))
        for key in history[0]
        if history[0][key].is_floating_point()
    }
    averaged = {key: tensor for key, tensor in average.module.state_dict().items() if tensor.is_floating_point()}
    assert_close(averaged, mean, tolerance=1e-14)

    expected = add_se(worker.batchnorm()).double()
    expected.load_state_dict({**history[-1], **mean})
    x = images().double()
    with calls(average.module, ses(average.module)) as counts:
        assert torch.allclose(run(average.module, x)[0], run(expected, x)[0], rtol=1e-10, atol=0)
    assert len(counts) == 17 and set(counts.values()) == {1}
    assert_differs(run(average.module, x), run(model, x))


@torch.no_grad()
def shake(model: nn.Module, seed: int) -> None:
    """Change all weights and statistics, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.2, generator=generator))


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_made_before_surgery_says_so(name):
    """It was made of a model without SEs, and its weights have no partners."""
    make, update, _ = AVERAGES[name]
    model = worker.batchnorm()
    average = make(model)
    add_se(model)
    with pytest.raises(RuntimeError, match=r"must match|doesn't match"):
        getattr(average, update)(model)


def test_an_optimizer_made_before_surgery_trains_the_base_only():
    model = base = worker.base()
    optimizer = torch.optim.SGD(base.parameters(), lr=0.1)
    open_gates(add_se(model), 0).train()
    before = worker.values(model)
    model(images()).square().mean().backward()
    optimizer.step()
    same = {key for key, tensor in model.state_dict().items() if torch.equal(tensor, before[key])}
    assert same == {key for key in before if ".se." in key}
    optimizer.add_param_group({"params": [p for path in ses(model) for p in model.get_submodule(path).parameters()]})
    optimizer.step()
    assert all(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


# -------------------------------------------------------------------------------------------- in one process


def test_data_parallel_without_accelerators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, twin = operated(), operated()
    parallel = nn.DataParallel(model)
    (x, y), *_ = batches()
    for net in (parallel, twin):
        nn.functional.cross_entropy(net(x), y).backward()
    theirs, ours = worker.gradients(twin), worker.gradients(model)
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list(parallel.state_dict()) == [f"module.{key}" for key in twin.state_dict()]


def test_functional_call_with_other_weights():
    model, other = operated(0), operated(1)
    before = worker.values(model)
    x = images().double()
    with torch.no_grad():
        output = functional_call(model, dict(other.named_parameters()), (x,))
    assert_same([output], run(other, x, training=True))
    assert_differs([output], run(model, x, training=True))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_gradients_for_each_sample():
    """vmap of grad: the mean over the samples is the gradient of the batch."""
    model = operated()
    (x, y), *_ = batches()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, weights, (image[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    nn.functional.cross_entropy(model(x), y).backward()
    assert_close({name: gradient.mean(0) for name, gradient in each.items()}, worker.gradients(model))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035"])
def test_autocast_backward_at_the_identity(name):
    """The base's gradients are bit-equal in bfloat16, too, and those of the SEs begin."""
    base = build(name)
    model = add_se(copied(base))
    for net in (base, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = net.train()(images())
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
    gradients = worker.gradients(model)
    assert all(torch.equal(gradients[key], gradient) for key, gradient in worker.gradients(base).items())
    assert all(model.get_submodule(path).fc2.weight.grad.any() for path in ses(model))


def test_autocast_backward_with_open_gates():
    """The SEs' gradients, all together, point where those of double precision do; a maximum would have ties."""
    exact = open_gates(add_se(worker.base(), r=4), 0).double().train()
    model = copied(exact).float()
    (x, y), *_ = batches()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nn.functional.cross_entropy(model(x.float()), y).backward()
    nn.functional.cross_entropy(exact(x), y).backward()
    low, high = (
        torch.cat([gradient.double().flatten() for name, gradient in worker.gradients(net).items() if ".se" in name])
        for net in (model, exact)
    )
    assert torch.cosine_similarity(low, high, dim=0) > 0.95


def test_channels_last_training():
    """Gradients are those of the contiguous format; parameters and what the SEs return stay in theirs."""
    model, twin = operated(), operated().to(memory_format=torch.channels_last)
    (x, y), *_ = batches()
    nn.functional.cross_entropy(model(x), y).backward()
    kept = []
    for path in ses(twin):
        hook = lambda module, args, out: kept.append(out.is_contiguous(memory_format=torch.channels_last))  # noqa: E731
        twin.get_submodule(path).register_forward_hook(hook)
    nn.functional.cross_entropy(twin(x.to(memory_format=torch.channels_last)), y).backward()
    assert_close(worker.gradients(twin), worker.gradients(model))
    assert len(kept) == 10 and all(kept)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.08), (torch.float32, 1e-5)])
def test_training_in_another_dtype(dtype, tolerance):
    """After surgery with open gates: forward and backward, against double precision."""
    model = operated()
    twin = copied(model).to(dtype)
    x = images().double()
    outputs = []
    for net in (model, twin):
        outputs.append(net(x.to(next(net.parameters()).dtype)))
        outputs[-1].double().square().mean().backward()
    assert outputs[1].dtype == dtype
    assert (outputs[1] - outputs[0]).abs().max() < tolerance * outputs[0].abs().max()
    for name, gradient in worker.gradients(twin).items():
        assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.any(), name


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrised_ses():
    """What computes a weight anew in each forward is asked for it by the SE, as by any convolution."""
    model, expected = operated(), operated()
    for path in ses(model):
        parametrize.register_parametrization(model.get_submodule(path).fc2, "weight", Halved())
        with torch.no_grad():
            expected.get_submodule(path).fc2.weight.div_(2)
    x = images().double()
    assert_differs(run(model, x), run(operated(), x))
    assert_same(run(model, x), run(expected, x))
    for path in ses(model):
        parametrize.remove_parametrizations(model.get_submodule(path).fc2, "weight", leave_parametrized=True)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert_same(run(model, x), run(expected, x))


def test_weight_norm_on_ses():
    """It starts from the same weights, trains them in two parts, is copied with the model and stripped with its SE."""
    model, plain = operated(), operated()
    for path in ses(model):
        parametrizations.weight_norm(model.get_submodule(path).fc1)
    x = images().double()
    with calls(model, ses(model)) as counts:
        assert torch.allclose(run(model, x)[0], run(plain, x)[0], rtol=1e-9, atol=0)
    assert set(counts.values()) == {1}
    assert_same(run(copied(model), x), run(model, x))
    assert [site.path for site in find_se(model)] == [site.path for site in find_se(plain)]
    worker.train(model, batches()[:1])
    parts = {name: p.grad for name, p in model.named_parameters() if "original" in name}
    assert len(parts) == 20 and all(gradient.any() for gradient in parts.values())
    base = worker.base().double()
    assert list(strip_se(model, origin="se_surgery").state_dict()) == list(base.state_dict())


def test_weight_norm_on_an_operated_block():
    """A convolution of the block changes its class below the block, whose own forward goes on."""
    model, plain = operated(), operated()
    parametrizations.weight_norm(model.layer1[0].conv1)
    x = images().double()
    with calls(model, ses(model)) as counts:
        assert torch.allclose(run(model, x)[0], run(plain, x)[0], rtol=1e-9, atol=0)
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("verb", VERBS)
def test_data_parallel_is_refused(verb):
    model = nn.DataParallel(operated())
    before = snapshot(model)
    with pytest.raises(PatientError, match=r"DataParallel.*Operate on the bare model first, then wrap it"):
        VERBS[verb](model)
    assert differences(before, snapshot(model)) == []
