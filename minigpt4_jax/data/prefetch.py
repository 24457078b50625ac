"""Read a Grain dataset batch by batch, although its worker processes may die or hang."""

import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import grain

from minigpt4_jax.errors import UserError

_RESTARTS = 2  # of the workers, for one batch
_POLL_SECONDS = 1.0
_DRAIN_SECONDS = 10.0  # a dead worker's last batch, or its exception, may still arrive

_log = logging.getLogger(__name__)


class Prefetcher:
    """Reads the batches of `open_at(step)`, a dataset that starts with batch `step`.

    If a worker process dies (killed when memory runs out, for example) or hangs, all workers are
    restarted at the current batch, with a warning. UserError: the same batch fails repeatedly, or
    threads hang, which cannot be restarted.
    workers: the number of processes that `open_at` uses, 0 for none. timeout: seconds without a batch
    after which they count as hung; 0 waits forever.
    """

    def __init__(
        self, open_at: Callable[[int], grain.IterDataset], *, workers: int, timeout: float
    ):
        self._open_at, self._workers, self._timeout = open_at, workers, timeout
        self._thread: _PrefetchThread | None = None

    def ready(self, step: int, seconds: float) -> bool:
        """Whether `read(step)` returns or raises without waiting; waits up to `seconds` for that."""
        if self._thread is None:
            self._thread = _PrefetchThread(self._open_at(step), self._timeout)
        return self._thread.wait(seconds)

    def read(self, step: int) -> Any:
        """Batch number `step`, which must follow the last one. StopIteration at the end."""
        for failures in range(_RESTARTS + 1):
            try:
                while not self.ready(step, _POLL_SECONDS):
                    pass
                assert self._thread is not None
                return self._thread.take()
            except _WorkersFailed as e:
                self.close()
                self._raise_or_warn(step, str(e), failures)
            except BaseException:
                self.close()
                raise
        raise AssertionError("unreachable: the last failure raises")

    def close(self) -> None:
        """Stop threads and worker processes; reading again, at any step, starts new ones."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()

    def _raise_or_warn(self, step: int, failure: str, failures: int) -> None:
        if not self._workers:
            raise UserError(
                f"data: {failure} at batch {step}: check the disk or network that holds the images, "
                "or increase data.timeout"
            )
        if failures == _RESTARTS:
            raise UserError(
                f"data: {failure} at batch {step}, {_RESTARTS + 1} times: if memory ran out, lower "
                "data.workers; if the images' disk or network is slow, increase data.timeout"
            )
        _log.warning(
            "data: %s: restarting the workers at batch %d; no example is lost or repeated",
            failure, step,
        )  # fmt: skip


class _WorkersFailed(Exception):
    """What happened to the workers or threads."""


class _Result(NamedTuple):
    batch: Any
    error: BaseException | None


class _PrefetchThread:
    """Iterates over a dataset in a thread, so that waiting for a batch can end."""

    def __init__(self, dataset: grain.IterDataset, timeout: float):
        self._timeout = timeout
        self._earlier_processes = set(multiprocessing.active_children())
        self._workers: set[BaseProcess] = set()
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: stop
        self._results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
        self._result: _Result | None = None
        self._requested_at: float | None = None  # time of a request without a result
        self._thread = threading.Thread(
            target=_serve, args=(dataset, self._requests, self._results), daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether `take` has something to return or raise; waits up to `seconds` for that."""
        if self._result is not None:
            return True
        if self._requested_at is None:
            self._requested_at = time.monotonic()
            self._requests.put(True)
        try:
            self._result = self._results.get(timeout=seconds)
            self._requested_at = None
        except queue.Empty:
            pass
        self._find_workers()
        return self._result is not None or bool(self._failure())

    def take(self) -> Any:
        """The batch, or its exception; _WorkersFailed if the workers died or hang."""
        if self._result is None:
            raise _WorkersFailed(self._failure())
        (batch, error), self._result = self._result, None
        if error is None:
            return batch
        if isinstance(error, RuntimeError) and "Worker process was terminated" in str(error):
            raise _WorkersFailed(f"a worker process {self._death() or 'died'}") from error
        raise error

    def _failure(self) -> str:
        """Why no batch will come; "" if one still may."""
        waited = 0.0 if self._requested_at is None else time.monotonic() - self._requested_at
        if waited > _DRAIN_SECONDS and self._death():
            return f"a worker process {self._death()}"
        return f"no batch came for {self._timeout:g} s" if 0 < self._timeout < waited else ""

    def _death(self) -> str:
        """How a worker died; "" if none did."""
        codes = sorted(p.exitcode for p in self._workers if p.exitcode)
        if not codes:
            return ""
        if codes[0] >= 0:
            return f"ended with exit code {codes[0]}"
        name = signal.Signals(-codes[0]).name
        reason = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"was killed ({name}{reason})"

    def _find_workers(self) -> None:
        """Record the processes that Grain started for this iterator."""
        for process in set(multiprocessing.active_children()) - self._earlier_processes:
            if process.name.startswith("grain"):
                self._workers.add(process)

    def close(self) -> None:
        self._find_workers()
        if self._requested_at is not None or self._death():
            for process in self._workers:  # a thread that waits for them then returns
                process.kill()
        self._requests.put(False)
        self._thread.join(timeout=30 if self._workers else _POLL_SECONDS)


def _serve(
    dataset: grain.IterDataset,
    requests: "queue.SimpleQueue[bool]",
    results: "queue.SimpleQueue[_Result]",
) -> None:
    iterator = None
    while requests.get():
        try:
            if iterator is None:
                iterator = iter(dataset)
            results.put(_Result(next(iterator), None))
        except BaseException as e:
            results.put(_Result(None, e))
    if iterator is not None:
        iterator.close()


def init_worker(index: int, count: int) -> None:
    """Runs first in each worker process: ignore Ctrl-C, which the parent handles, and exit when the
    parent is gone (Grain's workers survive a parent that is killed)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
