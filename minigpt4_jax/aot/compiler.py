"""Compile a lowered program and read XLA's dump: optimized HLO and buffer assignment.

Both files are written within seconds. Generating machine code takes the TPU compiler minutes (2 to 7
for a training step on one core) and adds only the size of the code itself. So the files are read as
soon as XLA has dumped them (`xla_dump_to`), and machine code is skipped unless requested.
"""

import os
import re
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

_HLO_FILE = "*after_optimizations.txt"
_BUFFER_FILE = "*after_optimizations-buffer-assignment.txt"
_unfinished_dumps: list[Path] = []  # dump directories of compilations that still run


class OutOfMemory(NamedTuple):
    """The compiler rejected a program because it exceeds the HBM of a chip; bytes."""

    needed: float
    available: float


@dataclass(frozen=True)
class Memory:
    """HBM of one chip, bytes."""

    arguments: int
    results: int  # outputs that do not alias arguments
    temporaries: int
    program: int  # machine code; 0 if none was generated

    @property
    def peak(self) -> int:
        return self.arguments + self.results + self.temporaries + self.program


class CompiledProgram(NamedTuple):
    """A compiled program."""

    hlo_text: str  # optimized HLO
    memory: Memory
    seconds: float = 0.0  # that XLA took, until the HLO and the memory were known


def compile_lowered(lowered: Any, *, machine_code: bool = True) -> CompiledProgram | OutOfMemory:
    """Compile the result of `jax.jit(...).lower(...)`. machine_code: wait for the machine code too.

    Without it, the compiler keeps running in a background thread when this returns, and libtpu's
    threads cannot be stopped: end the process with `exit_without_waiting`.
    """
    dump_dir = Path(tempfile.mkdtemp())
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(lowered.compile(compiler_options={"xla_dump_to": str(dump_dir)}))
        except Exception as e:  # the runtime raises its own types
            outcome.append(e)

    thread = threading.Thread(target=run, daemon=True)
    start = time.perf_counter()
    thread.start()
    try:
        while thread.is_alive() and (machine_code or not _dump_is_complete(dump_dir)):
            thread.join(0.2)
        seconds = time.perf_counter() - start
        result = _read_result(dump_dir, outcome)
        return result if isinstance(result, OutOfMemory) else result._replace(seconds=seconds)
    finally:
        if thread.is_alive():  # the compiler would recreate the directory
            _unfinished_dumps.append(dump_dir)
        else:
            shutil.rmtree(dump_dir, ignore_errors=True)


def _read_result(dump_dir: Path, outcome: list[Any]) -> CompiledProgram | OutOfMemory:
    if outcome and isinstance(outcome[0], Exception):
        if (out_of_memory := parse_out_of_memory(str(outcome[0]))) is None:
            raise outcome[0]
        return out_of_memory
    files = _dump_files(dump_dir)
    if not files:  # the executable came from JAX's compilation cache
        return _from_executable(outcome[0])
    code_size = outcome[0].memory_analysis().generated_code_size_in_bytes if outcome else 0
    hlo_text, buffers = (file.read_text() for file in files)
    return CompiledProgram(hlo_text, parse_buffer_assignment(buffers, code_size))


def exit_without_waiting(code: int) -> NoReturn:
    """End the process without waiting for machine code that still compiles in the background."""
    sys.stdout.flush()
    sys.stderr.flush()
    for dump_dir in _unfinished_dumps:
        shutil.rmtree(dump_dir, ignore_errors=True)
    os._exit(code)


def _dump_files(dump_dir: Path) -> list[Path]:
    """The HLO and buffer assignment files; empty until both exist."""
    files = [f for pattern in (_HLO_FILE, _BUFFER_FILE) for f in dump_dir.glob(pattern)]
    return files if len(files) == 2 else []


def _dump_is_complete(dump_dir: Path) -> bool:
    """Whether both files exist and no longer grow."""
    sizes = [f.stat().st_size for f in _dump_files(dump_dir)]
    if not sizes or 0 in sizes:
        return False
    time.sleep(0.3)
    return sizes == [f.stat().st_size for f in _dump_files(dump_dir)]


def _from_executable(compiled: Any) -> CompiledProgram:
    m = compiled.memory_analysis()
    memory = Memory(
        arguments=m.argument_size_in_bytes,
        results=m.output_size_in_bytes - m.alias_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        program=m.generated_code_size_in_bytes,
    )
    return CompiledProgram(compiled.as_text(), memory)


def parse_buffer_assignment(text: str, code_size: int = 0) -> Memory:
    """Sizes in HBM from XLA's buffer assignment, with lines such as
    "allocation 360: size 1157612032, preallocated-temp:". Allocations in other memories have a color.

    (`memory_analysis()` of an executable counts the gaps between temporaries twice.)
    """
    arguments = results = temporaries = 0
    for size, kind in re.findall(r"^allocation \d+: size (\d+), (.*):$", text, re.MULTILINE):
        if "color" in kind or "thread-local" in kind:
            continue
        if "parameter" in kind:
            arguments += int(size)
        elif "maybe-live-out" in kind:
            results += int(size)
        else:
            temporaries += int(size)
    return Memory(arguments, results, temporaries, code_size)


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """Parse a compiler error: "... Used 20.10G of 15.75G hbm. Exceeded hbm capacity by ..." or
    "the total memory required for HLO temporaries (17.15G) exceeds available HBM (15.75G)".
    None if it is another error."""
    match = re.search(
        r"Used ([\d.]+)([KMGTP]?)B? of ([\d.]+)([KMGTP]?)B? hbm|"
        r"memory required .*\(([\d.]+)([KMGTP]?)\) exceeds available HBM \(([\d.]+)([KMGTP]?)\)",
        message,
    )
    if not match:
        return None
    needed, needed_unit, available, available_unit = (
        match.groups()[:4] if match[1] else match.groups()[4:]
    )
    return OutOfMemory(
        float(needed) * _UNITS[needed_unit], float(available) * _UNITS[available_unit]
    )
