"""How long surgery takes, as ratios within one run: of construction, and of one depth of ResNet to another.

    python benchmarks/surgery_time.py
    python benchmarks/surgery_time.py --repeats 21 --threads 1

Everything is run once to warm up, then `--repeats` times in turn (so that a slow moment of the machine meets all
alike), and medians are compared. Surgery is `add_se` on a model built beforehand, construction of the SEs included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch

from se_surgery import add_se

DEPTHS = (18, 34, 50, 101, 152)
UNITS = {18: 8, 34: 16, 50: 16, 101: 33, 152: 50}


def seconds(action: Callable[[], Any]) -> float:
    """Time of one call, without the garbage collector.

    With one thread it is the processor's time for this process, which other processes do not add to.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    gc.collect()
    gc.disable()
    try:
        start = clock()
        action()
        return clock() - start
    finally:
        gc.enable()


def one_round() -> dict[str, float]:
    """Construction of resnet50, and surgery on every depth."""
    times = {"construction": seconds(lambda: timm.create_model("resnet50"))}
    for depth in DEPTHS:
        model = timm.create_model(f"resnet{depth}")
        times[f"{depth}"] = seconds(lambda model=model: add_se(model))
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="rounds to take medians over (default: 7)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: at least 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    one_round()
    rounds = [one_round() for _ in range(arguments.repeats)]
    median = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
    spread = {name: max(times[name] for times in rounds) / min(times[name] for times in rounds) for name in median}

    print(f"medians of {arguments.repeats} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}")
    built, built_spread = median["construction"], spread["construction"]
    print(f"\ncreate_model('resnet50')   {1e3 * built:7.1f} ms  (slowest/fastest {built_spread:.2f})")
    print("\nadd_se        ms   SEs   ms/SE   of resnet50's   slowest/fastest")
    for depth in DEPTHS:
        took = median[f"{depth}"]
        print(
            f"resnet{depth:<4}{1e3 * took:8.1f}{UNITS[depth]:6}{1e3 * took / UNITS[depth]:8.2f}"
            f"{took / median['50']:16.2f}{spread[f'{depth}']:18.2f}"
        )
    ratio = statistics.median(times["50"] / times["construction"] for times in rounds)
    print(f"\nadd_se(resnet50) / create_model('resnet50')   {ratio:.2f}   (aim: at most 0.3)")
    print(f"add_se(resnet152) / add_se(resnet50)          {median['152'] / median['50']:.2f}   (aim: at most 3.5)")


if __name__ == "__main__":
    main()
