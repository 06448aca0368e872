"""Deploying after surgery: what Ultralytics' `fuse()` leaves of the SEs in networks that were operated on before it.

    python -m benchmarks.deploy_forms                 eight networks of Ultralytics, from its yaml files
    python -m benchmarks.deploy_forms yolov8n yolo11n

Ultralytics is no dependency of this package, and under another licence: `pip install ultralytics` puts it beside this
one. For each network it prints how many SEs there are, how many ran before and after, how many went with a branch that
`fuse()` itself takes out, and by how much the predictions differ; next to it the same of the network without SEs, which
is the rounding of fusing. A network in which an SE that is there does not run exactly once, or whose predictions differ
by more than rounding, is marked, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from se_surgery import SqueezeExcite, SurgeryError, add_se
from se_surgery.errors import RewriteError

NAMES = ("yolov3-tiny", "yolov5nu", "yolov6n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n")
# Of yolov5nu the file is yolov5n.yaml: since Ultralytics 8.3 that is the network without anchors.
FILES = {"yolov5nu": "yolov5n.yaml"}
SIZE = (3, 64, 64)
# Fusing a normalisation into a convolution rounds; predictions are in pixels, up to some hundred.
ROUNDING = 1e-5


def built(name: str) -> nn.Module:
    """A network with random weights, its normalisations drawn, too."""
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel(FILES.get(name, f"{name}.yaml"), verbose=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def drawn(model: nn.Module) -> nn.Module:
    """The model with SEs far from the identity."""
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def predicted(model: nn.Module, x: Tensor) -> tuple[Tensor, Counter[int]]:
    """The predictions, and how often each SE ran."""
    counts: Counter[int] = Counter()
    modules = [module for module in model.modules() if isinstance(module, SqueezeExcite)]
    handles = [module.register_forward_hook(lambda module, *_: counts.update([id(module)])) for module in modules]
    output: Any = model(x)
    for handle in handles:
        handle.remove()
    while not isinstance(output, Tensor):
        output = output[0]
    return output, counts


def changed(model: nn.Module, x: Tensor) -> tuple[nn.Module, float, Counter[int], Counter[int]]:
    """The model fused, by how much of the largest prediction that changed one, and the calls before and after."""
    before, counts = predicted(model, x)
    fused: Any = model.fuse(verbose=False)  # type: ignore[operator]
    after, counts_after = predicted(fused, x)
    change = (after - before).abs().max().item() / before.abs().max().item() if after.shape == before.shape else 1.0
    return fused, change, counts, counts_after


def row(name: str) -> tuple[list[str], bool]:
    """One network's line, and whether all is well."""
    base, x = built(name), torch.randn(2, *SIZE)
    try:
        model = drawn(add_se(copy.deepcopy(base), example_input=SIZE))
    except SurgeryError as error:
        # What asks to be reported is a fault of this package's, and no refusal.
        return [name, "", "", "", "", "", "", f"refused: {error}"], not isinstance(error, RewriteError)
    total = sum(isinstance(module, SqueezeExcite) for module in model.modules())
    _, rounding, _, _ = changed(base, x)
    try:
        fused, change, before, after = changed(model, x)
    except SurgeryError as error:
        return [name, str(total), "", "", "", "", f"{rounding:.1e}", f"lost: refused only by fuse(): {error}"], False
    left = {id(module) for module in fused.modules() if isinstance(module, SqueezeExcite)}
    runs_once = set(before.values()) == {1} and len(before) == total and after == Counter(left)
    is_well = runs_once and change < max(ROUNDING, 2 * rounding)
    numbers = [total, len(before), len(after), total - len(left)]
    return [name, *map(str, numbers), f"{change:.1e}", f"{rounding:.1e}", "kept" if is_well else "lost"], is_well


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, help="networks (default: all eight)")
    names = parser.parse_args().names
    try:
        import ultralytics
    except ImportError:
        sys.exit("Ultralytics is not here. Install it to run this: pip install ultralytics")
    logging.disable(logging.WARNING)
    table = Table(title=f"Ultralytics {ultralytics.__version__}, fuse() after add_se")
    for column in ("network", "SEs", "ran before", "ran after", "taken out by fuse()", "change", "without SEs", ""):
        table.add_column(column, justify="left" if column in ("network", "") else "right")
    wells = []
    for name in names:
        cells, is_well = row(name)
        table.add_row(*cells)
        wells.append(is_well)
    Console().print(table)
    sys.exit(not all(wells))


if __name__ == "__main__":
    main()
