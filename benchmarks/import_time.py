"""Import time: what `import se_surgery` adds to `import timm`, as a ratio in one run.

    python -m benchmarks.import_time            ten pairs of processes, one after the other

Each pair is a process that imports timm and one that imports timm and this library, in turns. The median of the pairs'
ratios is printed with its range, and so is that of pairs which import the same twice, which is how far noise goes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from rich.progress import track

BASE = "import timm"
# A process measures itself: what starting Python takes is in neither.
SCRIPT = "import time; start = time.{clock}(); {imports}; print(time.{clock}() - start)"


def seconds(imports: str, clock: str) -> float:
    """Seconds that some imports take in a process of their own."""
    script = SCRIPT.format(imports=imports, clock=clock)
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of processes (default: %(default)s)")
    parser.add_argument(
        "--clock", choices=("process_time", "perf_counter"), default="process_time", help="CPU time, or by the wall"
    )
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {"timm and se_surgery": [], "timm again": []}
    for _ in track(range(args.pairs), "importing"):
        base = seconds(BASE, args.clock)
        ratios["timm and se_surgery"].append(seconds(f"{BASE}; import se_surgery", args.clock) / base)
        ratios["timm again"].append(seconds(BASE, args.clock) / base)
    for what, found in ratios.items():
        print(f"{what}: {statistics.median(found):.3f} of timm alone ({min(found):.3f} to {max(found):.3f})")


if __name__ == "__main__":
    main()
