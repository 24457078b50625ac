"""Shared by the benchmarks: arguments, timing in turns, tables, memory, other processes, AOT figures."""

import argparse
import contextlib
import json
import math
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minigpt4_jax.errors import Parser, UserError

Side = TypeVar("Side", bound=Hashable)

ROOT = Path(__file__).resolve().parents[1]
TEST_TOKENIZER = ROOT / "tests" / "fixtures" / "llama_tokenizer"  # small, LLaMA's format


def argument_parser(doc: str | None) -> Parser:
    """A parser whose help is the script's docstring."""
    return Parser(description=doc, formatter_class=argparse.RawTextHelpFormatter)


def add_test_helpers_to_path() -> None:
    """Make `helpers` of the tests importable."""
    sys.path.insert(0, str(ROOT / "tests"))


# --- timing -------------------------------------------------------------------------------------


Clock = Callable[[], float]


def seconds(work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Time of one call, by default wall time."""
    start = clock()
    work()
    return clock() - start


def use_one_core() -> Clock:
    """Keep this process on one core, with one thread for XLA's products. Returns the clock of its CPU time,
    which other work on the machine hardly changes. Call it before JAX computes."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    return time.process_time


def time_in_turns(
    rounds: int,
    sides: Mapping[Side, Callable[[], object]],
    *,
    warm_up: bool = True,
    clock: Clock = time.perf_counter,
) -> dict[Side, list[float]]:
    """Seconds of every side in every round. In a round the sides run one after another, so that other
    work on the machine affects all alike. warm_up: run a round that is not counted first."""
    times: dict[Side, list[float]] = {name: [] for name in sides}
    for number in range(rounds + warm_up):
        for name, work in sides.items():
            elapsed = seconds(work, clock)
            if number >= warm_up:
                times[name].append(elapsed)
    return times


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of times / base."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


# --- tables -------------------------------------------------------------------------------------


class Table:
    """A table printed row by row. columns: title -> (width, format); the first one is left-aligned."""

    def __init__(self, columns: Mapping[str, tuple[int, str]]):
        self._columns = list(columns.values())
        self._print(list(columns))

    def row(self, *values: object) -> None:
        """Print a row. Strings are printed as they are; missing values at the end are empty."""
        cells = [
            value if isinstance(value, str) else format(value, spec)
            for value, (_, spec) in zip(values, self._columns, strict=False)
        ]
        self._print(cells)

    def _print(self, cells: list[str]) -> None:
        widths = [width for width, _ in self._columns]
        line = "".join(
            f"{cell:<{width}}" if n == 0 else f"{cell:>{width}}"
            for n, (cell, width) in enumerate(zip(cells, widths, strict=False))
        )
        print(line.rstrip(), flush=True)


# --- memory -------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Anonymous resident memory of this process: without pages of mapped files (Linux)."""
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("RssAnon:") + 1]) * 1024


def reset_peak_resident() -> None:
    """Restart the measurement of `peak_resident_bytes` (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """Peak resident memory of this process, since `reset_peak_resident` if that works, or of the
    largest child process (RUSAGE_CHILDREN)."""
    if who == resource.RUSAGE_SELF:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(x.split()[1] for x in lines if x.startswith("VmHWM")))
    return 1024 * resource.getrusage(who).ru_maxrss


def memory_bandwidth(size: int = 1 << 30, repeats: int = 5) -> float:
    """Bytes/s that all cores together read from memory, the best of some tries."""
    cores = len(os.sched_getaffinity(0))
    # NumPy vectorizes this reduction best, and runs it without the interpreter's lock.
    parts = np.array_split(np.ones(size, np.int8), cores)
    best = math.inf
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats):
            best = min(best, seconds(lambda: list(pool.map(np.max, parts))))
    return size / best


# --- other processes ----------------------------------------------------------------------------


def local_address() -> str:
    """HOST:PORT where process 0 of a group on this machine can listen."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def start_cpu_processes(commands: Sequence[Sequence[object]], **options: Any) -> list[Any]:
    """Start Python with each of these command lines, on CPU devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen([sys.executable, *map(str, command)], env=environment, **options)
        for command in commands
    ]


# --- figures of `python -m minigpt4_jax.compile` --------------------------------------------------


def compile_figures(arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON record of `python -m minigpt4_jax.compile` for one program. UserError: it failed.

    In a process of its own, as the compiler keeps running after its figures are known."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "minigpt4_jax.compile", *arguments, f"--json={path}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if not path.exists():
            output = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise UserError(f"{' '.join(arguments)}: {output[-1]}")
        (record,) = json.loads(path.read_text())
    return dict(record)


class RecordFile:
    """Records by key, appended to a JSON Lines file as they are computed, and read from it by the next
    run. path: None for memory only."""

    def __init__(self, path: Path | None, key: Callable[[dict[str, Any]], str]):
        self._path, self._key = path, key
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.records: dict[str, dict[str, Any]] = {key(r): r for r in map(json.loads, lines)}

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        self.records[self._key(record)] = record
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record
