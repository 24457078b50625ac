"""Search for the largest batch that fits a slice: double while it fits, or halve until it does."""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection

from minigpt4_jax.aot.job import Job
from minigpt4_jax.aot.report import Report, Target

# Bytes left for machine code if none was generated: it takes 0.04 to 0.11 GB.
MACHINE_CODE_BYTES = 0.15e9

Attempt = tuple[Report, Target]


def find_max_batch(job: Job, program: str, log: Callable[[str], object]) -> Attempt:
    """The largest batch that fits; if none fits, the smallest that was tried. Batches are a power of
    two times one row per chip. log: called with a line per attempt."""

    def attempt(rows: int) -> Attempt:
        result = _compile_in_subprocess(job.with_rows(program, rows), program)
        log(format_attempt(result))
        return result

    rows, min_rows = job.initial_rows(program), job.min_rows(program)
    best = attempt(rows)
    if _fits(best):
        while _fits(larger := attempt(rows := 2 * rows)):
            best = larger
        return best
    while rows % 2 == 0 and rows // 2 >= min_rows:
        best = attempt(rows := rows // 2)
        if _fits(best):
            break
    return best


def _fits(attempt: Attempt) -> bool:
    report, target = attempt
    has_machine_code = report.memory is not None and report.memory.program > 0
    reserve = 0 if has_machine_code else MACHINE_CODE_BYTES
    return report.fits(target.chip) and report.peak + reserve <= target.chip.usable_hbm


def format_attempt(attempt: Attempt) -> str:
    """One line: the program, its memory, and whether it fits."""
    report, target = attempt
    verdict = "fits" if _fits(attempt) else "does not fit"
    if report.fits(target.chip) and not _fits(attempt):
        verdict = f"leaves no room for machine code ({MACHINE_CODE_BYTES / 1e9:g} GB)"
    return (
        f"{report.program}: {report.description}, mesh {target.mesh}: {report.peak / 1e9:.2f} of "
        f"{target.chip.usable_hbm / 1e9:.2f} GB, {verdict}"
    )


def _compile_in_subprocess(job: Job, program: str) -> Attempt:
    """Compile in a process that is killed once the report is there: otherwise the compiler would go on
    generating machine code and slow down the next attempt."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp_dir:
        child = spawn.Process(target=_child, args=(job.without_devices(), program, sender, tmp_dir))
        child.start()
        sender.close()
        try:
            result: Attempt | Exception = receiver.recv()
        except EOFError:
            child.join()
            raise RuntimeError(
                f"the compiler process ended with exit code {child.exitcode}"
            ) from None
        finally:
            child.kill()
            child.join()
    if isinstance(result, Exception):
        raise result
    return result


def _child(job: Job, program: str, sender: Connection, tmp_dir: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    tempfile.tempdir = tmp_dir  # the parent deletes it after killing this process
    try:
        sender.send((job.compile(program), job.target(program)))
    except Exception as e:
        sender.send(e)
    os._exit(0)
