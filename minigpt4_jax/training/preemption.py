"""SIGTERM (a machine that is taken away) and Ctrl-C: a run ends where its state is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 143  # exit code after SIGTERM: 128 + 15, as a shell reports it
INTERRUPTED = 130  # after Ctrl-C


class Stopped(SystemExit):
    """The run was told to stop and has saved its state; the exit code says by what."""


class Stop:
    """Whether the run was told to stop; true once it was.

    While it only starts, everything it did is on disk: it is ended at once. From `running` on it
    looks here between steps; more signals change nothing, except a second Ctrl-C.
    """

    running = False

    def __init__(self) -> None:
        self._first: int | None = None

    def __bool__(self) -> bool:
        return self._first is not None

    @property
    def name(self) -> str:
        """SIGTERM or SIGINT."""
        if self._first is None:
            return "a signal to another process"
        return signal.Signals(self._first).name

    def end(self) -> Stopped:
        """What to raise when everything is saved."""
        return Stopped(INTERRUPTED if self._first == signal.SIGINT else TERMINATED)

    def _note(self, number: int, frame: Any) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step
        again, self._first = bool(self), self._first or number
        if not self.running and not again:
            print(f"stopped by {self.name} before the first step: nothing is lost", flush=True)
            raise self.end()


@contextmanager
def listen() -> Iterator[Stop]:
    """A Stop that hears SIGTERM and SIGINT while the body runs, in the main thread."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {s: signal.signal(s, stop._note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            # None: of no Python code, such as JAX's own, which asks for nothing that is done here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
