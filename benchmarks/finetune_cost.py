"""What training the SEs alone costs against training all: memory and time of a step, as ratios within one run.

    python benchmarks/finetune_cost.py
    python benchmarks/finetune_cost.py resnet50 --size 224 --batch 32 --threads 1 --repeats 9

The same network is trained in turn: the base without SEs, all of the network with SEs, and its SEs alone on a frozen
base, once with SEs in all stages and once in the last alone. Each step is AdamW's on random images. Memory is counted
and exact: bytes of the tensors that autograd keeps for the backward pass (without parameters, each storage once), and
bytes of the gradients and of the optimizer's state. Times are medians; a slow moment of the machine meets all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from se_surgery import add_se, freeze_base, param_groups


@dataclass
class Patient:
    """A network in training."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, name: str, model: nn.Module) -> Patient:
        return cls(name, model.train(), torch.optim.AdamW(param_groups(model, lr=1e-4), weight_decay=0.05))

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()

    def saved(self, images: Tensor) -> int:
        """Bytes kept for the backward pass."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, tuple[int, Tensor]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                # The tensor is held, so that its storage's place is not given to another one meanwhile.
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.model(images)
        return sum(size for size, _ in kept.values())

    def held(self) -> int:
        """Bytes of gradients and of the optimizer's state, after a step."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in [*gradients, *states] if isinstance(tensor, Tensor))


def patients(name: str, size: tuple[int, ...]) -> list[Patient]:
    """In the order of the table; the second is what ratios are to."""

    def operated(stages: int | None = None) -> nn.Module:
        return add_se(timm.create_model(name), stages=stages, example_input=size)

    made: dict[str, Callable[[], nn.Module]] = {
        "base, all": lambda: timm.create_model(name),
        "with SEs, all": operated,
        "with SEs, SEs alone": lambda: freeze_base(operated()),
        "SEs in the last stage, alone": lambda: freeze_base(operated(-1)),
    }
    return [Patient.of(title, make()) for title, make in made.items()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="resnet50", help="a timm model (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of the images (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images in a step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="steps to take medians over (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    everyone = patients(args.model, (3, args.size, args.size))
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    labels = torch.arange(args.batch, device=args.device)
    for patient in everyone:
        patient.model.to(args.device)
        patient.step(images, labels)
    times: dict[str, list[float]] = {patient.name: [] for patient in everyone}
    for _ in range(args.repeats):
        for patient in everyone:
            begun = time.perf_counter()
            patient.step(images, labels)
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            times[patient.name].append(time.perf_counter() - begun)

    print(
        f"{args.model}, {args.batch} images of {args.size}, AdamW, {args.device}, {args.threads} threads, torch",
        end=" ",
    )
    print(f"{torch.__version__}\n\n| what is trained | parameters | kept for backward | grads and state | step |")
    print("|---|--:|--:|--:|--:|")
    whole = everyone[1]
    saved, held, step = whole.saved(images), whole.held(), times[whole.name]
    for patient in everyone:
        trained = sum(p.numel() for p in patient.model.parameters() if p.requires_grad)
        own = patient.saved(images), patient.held(), times[patient.name]
        ratio = statistics.median(mine / theirs for mine, theirs in zip(own[2], step, strict=True))
        print(
            f"| {patient.name} | {trained:,} | {own[0] / 1e6:.1f} MB, {own[0] / saved:.3f} "
            f"| {own[1] / 1e6:.1f} MB, {own[1] / held:.3f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
