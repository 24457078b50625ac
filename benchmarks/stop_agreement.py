"""Cost of agreeing at every step whether a process was told to stop (SIGTERM, Ctrl-C).

    python benchmarks/stop_agreement.py --processes=1,2,4 --steps=400

Trains a tiny model in several processes on this machine. In one run, stretches of steps with the
agreement (a sum over all devices, read with the loss of the step) alternate with stretches without it.
Prints, for each number of processes, the median and the quartiles of the time between steps, with and
without it. A real step takes longer; the agreement does not.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    add_test_helpers_to_path,
    argument_parser,
    local_address,
    start_cpu_processes,
)

from minigpt4_jax.errors import run

STRETCH = 25  # steps
SKIPPED = 3  # first steps of a stretch, which the previous stretch may still affect


def train_alternating(folder: Path, steps: int) -> dict[bool, list[float]]:
    """Whether the processes agree -> seconds of each step."""
    from minigpt4_jax.parallel import multihost
    from minigpt4_jax.training.trainer import train

    agree, num_calls = multihost.AllReduceSum.__call__, 0

    def agree_in_even_stretches(self: Any, *numbers: int) -> Any:
        nonlocal num_calls
        num_calls += 1
        if (num_calls - 1) // STRETCH % 2:
            return np.array(numbers, np.int32)
        return agree(self, *numbers)

    multihost.AllReduceSum.__call__ = agree_in_even_stretches  # type: ignore[method-assign]
    ends: list[float] = []
    values = {
        "model": str(folder / "model"), "steps": steps, "batch_size": 8, "dtype": "float32",
        "data": {"path": (str(folder / "data" / "rows.jsonl"),)}, "save_every": 10 * steps,
        "log_every": steps,
    }  # fmt: skip
    train(values, folder / f"run{steps}", on_metrics=lambda _: ends.append(time.perf_counter()))
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(STRETCH, len(ends)):  # the first stretch compiles
        if i % STRETCH >= SKIPPED:
            times[i // STRETCH % 2 == 0].append(ends[i] - ends[i - 1])
    return times


def run_process(count: int, index: int, address: str, folder: Path, steps: int) -> None:
    """One of the processes; the first one prints the result."""
    from minigpt4_jax.parallel import distributed

    if count > 1:
        distributed.initialize(distributed.ProcessOptions(address, count, index, 60), 60)
    times = train_alternating(folder, steps)
    if index == 0:
        quartiles = {
            agreed: [1e3 * q for q in statistics.quantiles(t, n=4)] for agreed, t in times.items()
        }
        with_, without = (
            f"{middle:.2f} ms a step (quartiles {low:.2f} to {high:.2f})"
            for low, middle, high in (quartiles[True], quartiles[False])
        )
        print(f"RESULT {count} processes: with {with_}, without {without}", flush=True)


def measure(count: int, steps: int) -> str:
    add_test_helpers_to_path()
    from helpers import tiny

    address = local_address()
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_random_model(Path(folder) / "model")
        tiny.write_data(Path(folder) / "data", rows=61)
        commands = [
            [__file__, f"--steps={steps}", "--process", count, index, address, folder]
            for index in range(count)
        ]
        processes = start_cpu_processes(commands, stdout=subprocess.PIPE, text=True)
        outputs: list[str] = [process.communicate()[0] for process in processes]
    lines = outputs[0].splitlines()
    return next(line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT"))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--process", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        count, index, address, folder = args.process
        run_process(int(count), int(index), address, Path(folder), args.steps)
        return
    for count in args.processes.split(","):
        print(measure(int(count), args.steps), flush=True)


if __name__ == "__main__":
    run(main)
