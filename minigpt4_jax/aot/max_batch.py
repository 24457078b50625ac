"""The most rows that a slice holds: doubled as long as a program fits, or halved until it does."""

import dataclasses
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection

from minigpt4_jax.aot.job import Job
from minigpt4_jax.aot.report import Figures, Slice

CODE = 0.15e9  # bytes left for machine code where none is made: it takes 0.04 to 0.11 GB

Tried = tuple[Figures, Slice]


def fullest(job: Job, program: str, tell: Callable[[str], None]) -> Tried:
    """What fits with the most rows, or, if nothing does, what was tried with the fewest. Counts of rows
    are one for every chip, times a power of two. tell: called with a line on every one that
    is tried.
    """

    def attempt(rows: int) -> Tried:
        found = _apart(job.with_rows(program, rows), program)
        tell(line(found))
        return found

    rows, least = job.first_rows(program), job.least_rows(program)
    best = attempt(rows)
    if _fits(best):
        while _fits(more := attempt(rows := 2 * rows)):
            best = more
        return best
    while rows % 2 == 0 and rows // 2 >= least:
        best = attempt(rows := rows // 2)
        if _fits(best):
            break
    return best


def _fits(found: Tried) -> bool:
    figures, where = found
    made = figures.memory is not None and figures.memory.program > 0
    return figures.fits(where.chip) and figures.peak + (0 if made else CODE) <= where.chip.usable


def line(found: Tried) -> str:
    """The line on a program that was compiled to see whether it fits."""
    f, where = found
    peak = f.peak + (f.lacks.needed if f.lacks else 0)
    verdict = "fits" if _fits(found) else "does not fit"
    if f.fits(where.chip) and not _fits(found):
        verdict = f"leaves no room for machine code ({CODE / 1e9:g} GB)"
    return (
        f"{f.program}: {f.what}, mesh {where.mesh}: {peak / 1e9:.2f} of {where.chip.usable / 1e9:.2f} GB, "
        f"{verdict}"
    )


def _apart(job: Job, program: str) -> Tried:
    """The figures, from a process that ends with them: the compiler there works on at machine code that
    nobody wants, and would slow down the next attempt."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        args = (dataclasses.replace(job), program, theirs, folder)
        child = spawn.Process(target=_compile, args=args)
        child.start()
        theirs.close()
        try:
            found = ours.recv()
        except EOFError:
            child.join()
            raise RuntimeError(f"the compiler's process ended with code {child.exitcode}") from None
        finally:
            child.kill()
            child.join()
    if isinstance(found, Exception):
        raise found
    return found


def _compile(job: Job, program: str, to: Connection, folder: str) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the process before this one says what is to be said
    tempfile.tempdir = (
        folder  # this process is killed, and what it wrote there goes with the folder
    )
    try:
        to.send((job.figures(program), job.place(program)))
    except Exception as e:
        to.send(e)
    os._exit(0)
