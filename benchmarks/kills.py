"""Kills real training processes at random moments, many times, and compares what the runs end with.

    python benchmarks/kills.py --kills=500

Tests do the same with 50 kills (tests/training/test_train_kills.py). A run of 40 steps that saves
each of them is killed, started again, and so on until it ends; then the next run begins.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers import kill_driver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = kill_driver.Driver(Path(folder), args.seed)
        expected, different, n = runs.undisturbed(), 0, 0
        while runs.count.all < args.kills:
            n += 1
            found = runs.killed(f"run{n}", args.kills - runs.count.all)
            different += found != expected
            print(
                f"run {n}: {'as' if found == expected else 'NOT as'} undisturbed; {runs.count}",
                flush=True,
            )
    count, minutes = runs.count, (time.monotonic() - begun) / 60
    print(
        f"{count.all} kills in {n} runs, {count.starting} before a life's first step, "
        f"{count.writing} while a checkpoint was written: {different} runs ended differently "
        f"({minutes:.1f} min)"
    )
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
