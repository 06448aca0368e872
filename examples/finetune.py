"""Put SEs into a network and train: first the SEs alone, then all. On your images, or on scikit-learn's digits.

    python examples/finetune.py resnet20_cifar --size 8 --se-epochs 1 --epochs 2 --out digits

    accelerate launch examples/finetune.py resnet50 --pretrained --data folder/with/train/and/validation \
        --se-epochs 2 --epochs 10 --lr 1e-4 --se-lr 1e-3 --amp bf16 --ema 0.9998 --out se_resnet50
    torchrun --nproc-per-node 4 examples/finetune.py ... --fsdp
    python examples/finetune.py ... --resume

On one CPU or GPU, several, or several machines; `--out` has to be a folder that all of them see. After each epoch the
state goes into one safetensors file, so that a run that was killed goes on with `--resume` and ends as it would have.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs, distribute_bn, random_seed
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from tuning import checkpoints, curves
from tuning.data import data_sets, loaders

import se_surgery

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
COLUMNS = ("phase", "epoch", "train_loss", "loss", "top1", "lr", "images_per_second")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="resnet20_cifar", help="a timm model (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="drop_path_rate=0.1 ...")
    parser.add_argument("--placement", default="standard", help="of the SEs; none for a run without (%(default)s)")
    parser.add_argument("--reduction", type=int, default=16, help="reduction ratio r (default: %(default)s)")
    parser.add_argument("--init", default="identity", help="identity or paper (default: %(default)s)")
    parser.add_argument("--data", help="a folder with train and validation; by default scikit-learn's digits")
    parser.add_argument("--dataset", default="", help="a data set of timm's: hfds/user/name, torch/cifar10, ...")
    parser.add_argument("--splits", nargs=2, default=("train", "validation"), help="names of the parts")
    parser.add_argument("--num-classes", type=int, help="where the data set does not say it")
    parser.add_argument("--size", type=int, help="side of the images (default: the model's)")
    parser.add_argument("--no-aug", action="store_true", help="no random crops and flips; digits never have them")
    parser.add_argument("--auto-augment", help="timm's, rand-m9-mstd0.5 for instance")
    parser.add_argument("--mixup", type=float, default=0.0, help="timm's, its alpha (default: %(default)s)")
    parser.add_argument("--smoothing", type=float, default=0.0, help="of labels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a process and step (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images (default: %(default)s)")
    parser.add_argument("--se-epochs", type=int, default=1, help="epochs for SEs and head alone (%(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs for all after them (default: %(default)s)")
    parser.add_argument("--se-lr", type=float, default=3e-3, help="learning rate of the SEs (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the base (default: %(default)s)")
    parser.add_argument("--freeze-head", action="store_true", help="the SEs alone means without the classifier")
    parser.add_argument("--opt", default="adamw", help="timm's name of an optimizer (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="(default: %(default)s)")
    parser.add_argument("--layer-decay", type=float, help="factor on the rate from layer to layer of the base")
    parser.add_argument("--sched", default="cosine", help="timm's name of a schedule, for each phase (%(default)s)")
    parser.add_argument("--warmup", type=int, default=0, help="epochs of it, in each phase (default: %(default)s)")
    parser.add_argument("--clip", type=float, help="largest norm of the gradients")
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), help="default: what accelerate launch was told")
    parser.add_argument("--ema", type=float, help="decay of the average of weights; the average is what is saved")
    parser.add_argument("--fsdp", action="store_true", help="scatter parameters and optimizer over the processes")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("finetuned"), help="folder (default: %(default)s)")
    parser.add_argument("--license", help="for the model card")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    args = parser.parse_args()
    if min(args.se_epochs, args.epochs) < 0 or not args.se_epochs + args.epochs:
        parser.error("--se-epochs and --epochs are numbers of epochs, of which one at least is above 0.")
    if args.data and not args.dataset and not Path(args.data).is_dir():
        parser.error(f"--data {args.data} is no folder.")
    if args.fsdp and (args.ema or args.amp == "fp16"):
        parser.error("--fsdp takes neither --ema nor --amp fp16: averages and scaled losses take whole gradients.")
    if args.placement == "none" and args.se_epochs:
        parser.error("--placement none puts no SEs in that could be trained alone: --se-epochs 0")
    return args


def build(args: argparse.Namespace, classes: int, channels: int) -> nn.Module:
    """The network with its SEs: the same in all processes, and whenever it is built."""
    random_seed(args.seed)
    model = timm.create_model(
        args.model, pretrained=args.pretrained, num_classes=classes, in_chans=channels, **args.model_kwargs
    )
    if args.placement != "none":
        se_surgery.add_se(model, args.placement, args.reduction, init=args.init)
    return model


def sharded(model: nn.Module, precision: str) -> nn.Module:
    """A model with each block that has an SE, and the rest, scattered over the processes by FSDP2."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if precision == "bf16" else MixedPrecisionPolicy()
    for host in dict.fromkeys(site.path.rpartition(".")[0] for site in se_surgery.find_se(model)):
        fully_shard(model.get_submodule(host), mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


class Run:
    """One phase: what is trained in it, and where it stands."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, phase: str, rows: list[dict[str, Any]]):
        self.args, self.accelerator, self.phase, self.rows = args, accelerator, phase, rows
        self.epochs = args.se_epochs if phase == "SEs" else args.epochs
        self.file = args.out / "checkpoint.safetensors"
        parts, classes, channels = data_sets(args)
        self.bare = build(args, classes, channels)
        self.train, self.evaluation = accelerator.prepare(*loaders(args, parts, self.bare, channels))
        self.mixup = Mixup(args.mixup, label_smoothing=args.smoothing, num_classes=classes) if args.mixup else None
        self.criterion = SoftTargetCrossEntropy() if args.mixup else LabelSmoothingCrossEntropy(args.smoothing)
        stored, state = checkpoints.load(self.file) if self.file.exists() else ({}, {"phase": None, "epoch": 0})
        if stored:
            self.bare.load_state_dict(stored["model"])
        self.bare.to(accelerator.device)
        self.ema = ModelEmaV3(self.bare, decay=args.ema, device=accelerator.device) if args.ema else None
        if self.ema and stored:
            self.ema.module.load_state_dict(stored["ema"])
        self.prepare()
        self.start = state["epoch"] if state["phase"] == phase else 0
        if self.start:
            found = checkpoints.optimizer_from_plain(stored["optimizer"], state["optimizer"])
            set_optimizer_state_dict(self.model, self.optimizer.optimizer, found, options=WHOLE)

    def prepare(self) -> None:
        """What learns is settled first, then the model is wrapped, then the optimizer is made."""
        args = self.args
        if self.phase == "SEs":
            se_surgery.freeze_base(self.bare, head=not args.freeze_head)
        self.model = sharded(self.bare, self.accelerator.mixed_precision) if args.fsdp else self.bare
        alone = self.phase == "SEs" or args.placement == "none"
        rates = {"lr": args.se_lr if self.phase == "SEs" else args.lr, "se_lr": None if alone else args.se_lr}
        groups = se_surgery.param_groups(
            self.model, **rates, weight_decay=args.weight_decay, layer_decay=args.layer_decay
        )
        optimizer = create_optimizer_v2(groups, args.opt)
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            args.sched,
            num_epochs=self.epochs,
            warmup_epochs=args.warmup,
            step_on_epochs=False,
            updates_per_epoch=len(self.train),
        )
        if not args.fsdp:
            self.model = self.accelerator.prepare(self.model)
        self.optimizer = self.accelerator.prepare(optimizer)

    def train_epoch(self, epoch: int, shown: Progress) -> tuple[float, float]:
        """One epoch; returns the mean loss and images a second, of all processes together."""
        args, accelerator, steps = self.args, self.accelerator, len(self.train)
        # All that is random in an epoch comes from here, so that it is the same after a restart.
        random_seed(args.seed + 1000 * (self.phase == "all") + epoch, accelerator.process_index)
        self.train.set_epoch(epoch)
        self.model.train()
        task = shown.add_task(f"{self.phase} {epoch + 1}/{self.epochs}", total=steps, loss="", rate="")
        begun, total = time.time(), torch.zeros((), device=accelerator.device)
        for step, (images, labels) in enumerate(self.train, 1):
            images, targets = self.mixup(images, labels) if self.mixup else (images, labels)
            loss = self.criterion(self.model(images), targets)
            accelerator.backward(loss)
            if args.clip:
                accelerator.clip_grad_norm_(self.model.parameters(), args.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step_update(epoch * steps + step)
            if self.ema:
                self.ema.update(self.bare)
            total += loss.detach()
            rate = step * args.batch_size * accelerator.num_processes / (time.time() - begun)
            shown.advance(task)
            if step % 10 == 0 or step == steps:  # to read the loss is to wait for the GPU
                shown.update(task, loss=f"{float(total) / step:.4f}", rate=f"{rate:,.0f} images/s")
        for model in (self.model, self.ema) if accelerator.num_processes > 1 else ():
            if model is not None:
                distribute_bn(model, accelerator.num_processes, reduce=True)  # of each process's own images so far
        return float(accelerator.reduce(total / steps, "mean")), rate

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy, of the averaged weights where there are some."""
        model = self.ema.module if self.ema else self.model
        model.eval()
        losses, hits = [], []
        for images, labels in self.evaluation:
            output = model(images).float()
            loss = nn.functional.cross_entropy(output, labels, reduction="none")
            loss, hit = self.accelerator.gather_for_metrics((loss, output.argmax(1) == labels))
            losses.append(loss)
            hits.append(hit)
        return float(torch.cat(losses).mean()), float(torch.cat(hits).float().mean())

    def go(self, shown: Progress) -> None:
        for epoch in range(self.start, self.epochs):
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            train_loss, speed = self.train_epoch(epoch, shown)
            if not math.isfinite(train_loss):
                sys.exit(f"The loss is {train_loss}. The last checkpoint is that of the epoch before; lower the rates.")
            values = (self.phase, epoch + 1, train_loss, *self.evaluate(), rate, speed)
            self.rows.append(dict(zip(COLUMNS, values, strict=True)))
            self.checkpoint(epoch + 1)

    def checkpoint(self, epoch: int) -> None:
        weights = get_model_state_dict(self.model, options=WHOLE)
        found = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)
        if self.accelerator.is_main_process:
            tensors, plain = checkpoints.optimizer_to_plain(found)
            parts = {"model": weights, "optimizer": tensors, "ema": self.ema.module.state_dict() if self.ema else {}}
            flat = {f"{part}.{key}": tensor for part, held in parts.items() for key, tensor in held.items()}
            state = {"phase": self.phase, "epoch": epoch, "optimizer": plain, "rows": self.rows}
            checkpoints.save(self.file, flat, state | {"options": told(self.args)})
            curves.write(self.args.out / "epochs.csv", self.rows, COLUMNS)
            shown = " ".join(f"{key} {value:.4g}" if key != "phase" else value for key, value in self.rows[-1].items())
            print(shown, flush=True)
        self.accelerator.wait_for_everyone()


def told(args: argparse.Namespace) -> dict[str, Any]:
    """What a run was told of what it computes, to compare it with what it is told when it goes on."""
    free = ("resume", "out", "workers", "license")
    return {key: value for key, value in json.loads(json.dumps(vars(args), default=str)).items() if key not in free}


def spread(args: argparse.Namespace) -> Accelerator:
    """accelerate's engine over all processes that were started."""
    config = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    # Under torchrun accelerate joins processes without a GPU only when it is told that they have none.
    cpu = started > 1 and not getattr(torch, "accelerator", torch.cuda).is_available()
    accelerator = Accelerator(mixed_precision=args.amp, dataloader_config=config, cpu=cpu)
    if accelerator.num_processes != started:
        sys.exit(
            f"{started} processes were started, and accelerate takes this for one of {accelerator.num_processes}. "
            f"Start them with accelerate launch, or set ACCELERATE_USE_CPU=true."
        )
    return accelerator


def finish(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Save the model as timm and se-surgery load it, with its card; all processes look at its gates together."""
    parts, classes, channels = data_sets(args)
    model = build(args, classes, channels)
    stored, state = checkpoints.load(args.out / "checkpoint.safetensors")
    model.load_state_dict(stored["ema"] or stored["model"])
    gates = None
    if args.placement != "none":
        loader = accelerator.prepare(loaders(args, parts, model, channels)[1])
        gates = se_surgery.excitations(model.to(accelerator.device), loader)
    if accelerator.is_main_process:
        curves.draw(args.out / "curves.png", state["rows"])
        tags = [args.dataset or (Path(args.data).name if args.data else "digits")]
        lineage = {} if args.pretrained else {"base_model": ""}
        folder = se_surgery.save_pretrained(
            model, args.out / "model", overwrite=True, license=args.license, tags=tags, plot=gates, **lineage
        )
        print(f"Accuracy {state['rows'][-1]['top1']:.1%}. Saved as timm's local-dir:{folder}")


def main() -> None:
    args = options()
    file = args.out / "checkpoint.safetensors"
    if file.exists() and not args.resume:
        sys.exit(f"{args.out} holds a run. Go on with it by --resume, or give another folder.")
    rows: list[dict[str, Any]] = []
    phases = [name for name, epochs in (("SEs", args.se_epochs), ("all", args.epochs)) if epochs]
    if file.exists():
        try:
            state = checkpoints.load(file)[1]
        except SafetensorError as error:
            sys.exit(f"{file} cannot be read ({error}). Take it away to begin anew, or give another folder.")
        other = sorted(key for key, value in told(args).items() if state["options"].get(key) != value)
        if other:
            sys.exit(f"The run in {args.out} had another --{other[0]}: {state['options'].get(other[0])}.")
        rows, phases = state["rows"], phases[phases.index(state["phase"]) :]
    accelerator = spread(args)
    if args.fsdp and accelerator.num_processes == 1:
        sys.exit("--fsdp scatters over several processes: start them by torchrun or accelerate launch.")
    args.out.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]} {task.fields[rate]}"),
    )
    for phase in phases:
        run = Run(args, accelerator, phase, rows)
        with Progress(*columns, TimeRemainingColumn(), disable=not accelerator.is_main_process) as shown:
            run.go(shown)
        accelerator.free_memory()
    finish(args, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except se_surgery.SurgeryError as error:  # a placement that the network lacks, say: what is wrong, and what to do
        sys.exit(str(error))
