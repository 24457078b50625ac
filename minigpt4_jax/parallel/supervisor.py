"""Ending a run of several processes: a parent process that explains why JAX aborted its child.

JAX aborts a process whose peers are lost, or do not connect in time, with SIGABRT: no Python code runs
then. So the run happens in a child process, and the parent prints the message.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from minigpt4_jax.parallel.distributed import ProcessOptions

EXIT_PEER_LOST = 75  # exit code if another process is lost: EX_TEMPFAIL of sysexits.h
_SHUTDOWN_TIMEOUT = 5.0  # seconds that a failing process gives the others to fail too


def supervise(
    options: ProcessOptions, describe_saved_state: Callable[[], str]
) -> Callable[[], None]:
    """Continue in a child process; the parent waits for it and explains an abort by JAX.

    Returns in the child only, with a function to call once all processes are connected.
    describe_saved_state: what the run has saved, for the message.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _die_with_parent()
        return lambda: _notify(writer)
    os.close(writer)
    signal.signal(signal.SIGINT, lambda *_: _interrupt(child, reader))
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT:
        connected = os.read(reader, 1)
        message = (
            peer_lost_message(
                "another process of this run is lost or cannot be reached", describe_saved_state()
            )
            if connected
            else _not_connected_message(options)
        )
        print(f"error: {message}", file=sys.stderr, flush=True)
        code = EXIT_PEER_LOST
    sys.exit(code if code >= 0 else 128 - code)


def peer_lost_message(cause: str, saved_state: str) -> str:
    return (
        f"{cause}; {saved_state}. See what it printed last, and start the same command again on every "
        "host"
    )


def _not_connected_message(options: ProcessOptions) -> str:
    address = f" to {options.coordinator_address}" if options.coordinator_address else ""
    return (
        f"not all of the processes connected{address} within {options.timeout} s: start each with its "
        "own --process_id, and check that they can reach the port"
    )


def _interrupt(child: int, reader: int) -> None:
    """The terminal sends Ctrl-C to the child too, which handles it, unless it is blocked in JAX
    initialization, where signal handlers cannot run."""
    connected = select.select([reader], [], [], 0)[0]
    if not connected:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise KeyboardInterrupt


def _notify(writer: int) -> None:
    os.write(writer, b".")
    os.close(writer)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def exit_process(code: int) -> NoReturn:
    """End this process. If it fails as one of several, it does not wait long for the others."""
    if code == EXIT_PEER_LOST:
        sys.stderr.flush()
        os._exit(code)
    if code and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        shutdown = threading.Thread(target=sys.modules["jax"].distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(_SHUTDOWN_TIMEOUT)
        os._exit(code)
    sys.exit(code)
