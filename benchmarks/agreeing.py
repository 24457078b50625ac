"""What it costs several processes to agree at every step whether one of them is told to stop.

    python benchmarks/agreeing.py --processes=1,2,4 --steps=400

Trains a tiny model in so many processes on this machine. Stretches of steps with the agreement (a sum
over all devices, read with the step's loss) and without it take turns in one run; reported are medians
of the time from step to step. A real step takes longer and the agreement does not.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
STRETCH = 25  # steps
LEFT_OUT = 3  # steps of a stretch, in which the one before may still be felt


def train(folder: Path, steps: int) -> dict[bool, list[float]]:
    """-> whether they agreed -> seconds of each step."""
    from minigpt4_jax.parallel import multihost
    from minigpt4_jax.training.trainer import train

    agree, calls = multihost.AllReduceSum.__call__, [0]

    def sometimes(self: Any, *numbers: int) -> Any:
        import numpy as np

        calls[0] += 1
        if (calls[0] - 1) // STRETCH % 2:
            return np.array(numbers, np.int32)
        return agree(self, *numbers)

    multihost.AllReduceSum.__call__ = sometimes  # type: ignore[method-assign]
    ends: list[float] = []
    values = {
        "model": str(folder / "model"), "steps": steps, "batch_size": 8, "dtype": "float32",
        "data": {"path": (str(folder / "data" / "rows.jsonl"),)}, "save_every": 10 * steps,
        "log_every": steps,
    }  # fmt: skip
    train(values, folder / f"run{steps}", on_metrics=lambda r: ends.append(time.perf_counter()))
    found: dict[bool, list[float]] = {True: [], False: []}
    for i in range(STRETCH, len(ends)):  # the first stretch compiles
        if i % STRETCH >= LEFT_OUT:
            found[i // STRETCH % 2 == 0].append(ends[i] - ends[i - 1])
    return found


def one_of(count: int, index: int, address: str, folder: Path, steps: int) -> None:
    from minigpt4_jax.parallel import distributed

    if count > 1:
        distributed.initialize(distributed.ProcessOptions(address, count, index, 60), 60)
    times = train(folder, steps)
    if index == 0:
        ms = {
            agreed: [1e3 * q for q in statistics.quantiles(t, n=4)] for agreed, t in times.items()
        }
        print(
            f"RESULT {count} processes: with {ms[True][1]:.2f} ms a step (quartiles {ms[True][0]:.2f} to "
            f"{ms[True][2]:.2f}), without {ms[False][1]:.2f} ({ms[False][0]:.2f} to {ms[False][2]:.2f})",
            flush=True,
        )


def run(count: int, steps: int) -> str:
    sys.path.insert(0, str(TESTS))
    from helpers import tiny

    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_random_model(Path(folder) / "model")
        tiny.write_data(Path(folder) / "data", rows=61)
        started = [
            subprocess.Popen(
                [sys.executable, __file__, f"--steps={steps}", "--as", str(count), str(n), address, folder],
                env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True,
            )
            for n in range(count)
        ]  # fmt: skip
        said = [process.communicate()[0] for process in started]
    return next(line.removeprefix("RESULT ") for line in said[0].splitlines() if "RESULT" in line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--as", nargs=4, dest="one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        count, index, address, folder = args.one
        one_of(int(count), int(index), address, Path(folder), args.steps)
        return
    for count in args.processes.split(","):
        print(run(int(count), args.steps), flush=True)


if __name__ == "__main__":
    main()
