"""Kill real training processes at random moments, many times, and compare the results of the runs.

    python benchmarks/kills.py --kills=500

A run of 20 steps that saves after each one is killed with SIGKILL and restarted until it ends; then the
next run begins. Prints whether each run ended with the same batches, records and parameters as an
undisturbed one, and what the kills hit. Exit code 1 if one differs. The tests do the same with 8 kills
(tests/training/test_train_kills.py).
"""

import tempfile
import time
from pathlib import Path

from common import add_test_helpers_to_path, argument_parser

add_test_helpers_to_path()

from helpers import kill_driver  # noqa: E402

from minigpt4_jax.errors import run  # noqa: E402


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        driver = kill_driver.Driver(Path(folder), args.seed)
        expected, num_different, n = driver.undisturbed(), 0, 0
        while driver.count.all < args.kills:
            n += 1
            outcome = driver.killed(f"run{n}", args.kills - driver.count.all)
            num_different += outcome != expected
            verdict = "as" if outcome == expected else "NOT as"
            print(f"run {n}: {verdict} undisturbed; {driver.count}", flush=True)
    count, minutes = driver.count, (time.monotonic() - start) / 60
    print(
        f"{count.all} kills in {n} runs, {count.starting} before the first step of a process, "
        f"{count.writing} while a checkpoint was written: {num_different} runs ended differently "
        f"({minutes:.1f} min)"
    )
    return int(num_different > 0)


if __name__ == "__main__":
    run(main)
