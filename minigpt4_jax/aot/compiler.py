"""The compiler, asked for its plan of a program: every instruction, and what lies where in memory.

The plan is there within seconds. Making machine code of it, which says nothing more but its own size,
takes the compiler for TPUs minutes (2 to 7 for a training step on one core). So the plan is read from the
files that XLA writes on its way (`xla_dump_to`), and the machine code is left out unless it is asked for.
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

_STILL_WRITTEN: list[Path] = []  # folders of programs whose machine code is still being made
PLAN, MEMORY = "*after_optimizations.txt", "*after_optimizations-buffer-assignment.txt"


class TooLarge(NamedTuple):
    """A program that the compiler refused because a chip's memory cannot hold it; bytes."""

    needed: float
    available: float


@dataclass(frozen=True)
class Memory:
    """HBM of one chip, bytes."""

    arguments: int
    results: int  # that are not written over arguments
    temporaries: int
    program: int  # 0 where no machine code was made

    @property
    def peak(self) -> int:
        return self.arguments + self.results + self.temporaries + self.program


class CompiledProgram(NamedTuple):
    """A compiled program."""

    text: str  # its instructions, in XLA's own format
    memory: Memory


def compile_for_chip(lowered: Any, *, code: bool = True) -> CompiledProgram | TooLarge:
    """The plan of a lowered program, or what it lacks. code: make machine code as well.

    Without it the compiler works on in a thread of its own when this returns, so that a process
    should end by `leave`: threads of libtpu are not to be stopped otherwise.
    """
    folder = Path(tempfile.mkdtemp())
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(lowered.compile(compiler_options={"xla_dump_to": str(folder)}))
        except Exception as e:  # the runtime raises its own kinds
            outcome.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive() and (code or not _is_written(folder)):
            thread.join(0.2)
        return _found(folder, outcome)
    finally:
        if thread.is_alive():  # it would make the folder again
            _STILL_WRITTEN.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _found(folder: Path, outcome: list[Any]) -> CompiledProgram | TooLarge:
    """What the compiler has written, or said."""
    if outcome and isinstance(outcome[0], Exception):
        if (lacks := lacks_of(str(outcome[0]))) is None:
            raise outcome[0]
        return lacks
    files = _files(folder)
    if not files:  # the program was in JAX's cache of compiled ones
        return _plan_of(outcome[0])
    size = outcome[0].memory_analysis().generated_code_size_in_bytes if outcome else 0
    return CompiledProgram(files[0].read_text(), memory_of(files[1].read_text(), size))


def leave(code: int) -> NoReturn:
    """Ends the process without waiting for machine code that nobody asked for."""
    sys.stdout.flush()
    sys.stderr.flush()
    for folder in _STILL_WRITTEN:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)


def _files(folder: Path) -> list[Path]:
    """Those of the plan, or none as long as not both are there."""
    files = [f for pattern in (PLAN, MEMORY) for f in folder.glob(pattern)]
    return files if len(files) == 2 else []


def _is_written(folder: Path) -> bool:
    """Whether the plan is there, and whole: its files do not grow any more."""
    before = [f.stat().st_size for f in _files(folder)]
    if not before or 0 in before:
        return False
    time.sleep(0.3)
    return before == [f.stat().st_size for f in _files(folder)]


def _plan_of(compiled: Any) -> CompiledProgram:
    m = compiled.memory_analysis()
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    return CompiledProgram(
        compiled.as_text(),
        Memory(
            m.argument_size_in_bytes, results, m.temp_size_in_bytes, m.generated_code_size_in_bytes
        ),
    )


def memory_of(text: str, program: int = 0) -> Memory:
    """The sizes in HBM of XLA's buffer assignment, whose lines are, for instance,
    "allocation 360: size 1157612032, preallocated-temp:". What lies elsewhere has a color.

    (`memory_analysis` of a compiled program counts the gaps between temporaries twice.)
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
    return Memory(arguments, results, temporaries, program)


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


def lacks_of(message: str) -> TooLarge | None:
    """What the compiler says is missing: "... Used 20.10G of 15.75G hbm. Exceeded hbm capacity by ...",
    or "the total memory required for HLO temporaries (17.15G) exceeds available HBM (15.75G)"."""
    found = re.search(
        r"Used ([\d.]+)([KMGTP]?)B? of ([\d.]+)([KMGTP]?)B? hbm|"
        r"memory required .*\(([\d.]+)([KMGTP]?)\) exceeds available HBM \(([\d.]+)([KMGTP]?)\)",
        message,
    )
    if not found:
        return None
    used, unit, room, other = found.groups()[:4] if found[1] else found.groups()[4:]
    return TooLarge(float(used) * _UNITS[unit], float(room) * _UNITS[other])
