"""SIGTERM (a preempted machine) and Ctrl-C: a run stops between steps, after saving its state."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minigpt4_jax.parallel.multihost import any_process, is_multiprocess

TERMINATED = 143  # exit code after SIGTERM: 128 + 15, as a shell reports it
INTERRUPTED = 130  # after Ctrl-C


class Stopped(SystemExit):
    """The run was stopped by a signal and has saved its state. The exit code tells the signal."""


class StopSignal:
    """True once the process has received SIGTERM or SIGINT.

    While deferred is false (during startup, when everything worth keeping is on disk), a signal ends
    the run at once. Afterwards the run checks this object between steps. Further signals change
    nothing, except that a second Ctrl-C interrupts immediately.
    """

    deferred = False

    def __init__(self) -> None:
        self._number: int | None = None  # of the first signal

    def __bool__(self) -> bool:
        return self._number is not None

    @property
    def name(self) -> str:
        """SIGTERM or SIGINT."""
        if self._number is None:
            return "a signal to another process"
        return signal.Signals(self._number).name

    def exception(self) -> Stopped:
        """What to raise once everything is saved."""
        return Stopped(INTERRUPTED if self._number == signal.SIGINT else TERMINATED)

    def handle(self, number: int, frame: Any) -> None:
        """The signal handler."""
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step
        is_first = not self
        self._number = self._number or number
        if is_first and not self.deferred:
            print(f"stopped by {self.name} before the first step: nothing is lost", flush=True)
            raise self.exception()


@contextmanager
def handle_signals() -> Iterator[StopSignal]:
    """A StopSignal that receives SIGTERM and SIGINT within the body; outside the main thread it
    never does."""
    stop_signal = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop_signal
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, stop_signal.handle) for number in numbers}
    try:
        yield stop_signal
    finally:
        for number, handler in previous.items():
            # None: not set from Python, such as JAX's own, which is not needed here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopAgreement:
    """Whether the run is to stop, as all of its processes know.

    A signal to one of several processes reaches the others with the results of a step (`note`) or by
    `check`. Only an agreed stop may be acted on, so that all processes do it at the same step.
    """

    def __init__(self, stop_signal: StopSignal):
        self.signal = stop_signal
        self.agreed = False  # always False with one process, which acts on the signal itself

    def check(self) -> bool:
        """Whether to stop. Collective with several processes."""
        if not is_multiprocess():
            return bool(self.signal)
        self.agreed = self.agreed or any_process(self.signal)
        return self.agreed

    def note(self, signalled_processes: int) -> None:
        """Take over how many processes had a signal when a step was dispatched."""
        self.agreed |= is_multiprocess() and signalled_processes > 0
