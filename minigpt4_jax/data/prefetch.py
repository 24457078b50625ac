"""Reading a Grain dataset whose worker processes may die or hang: one batch after the other."""

import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import grain

from minigpt4_jax.errors import UserError

_RESTARTS = 2  # of the workers for one batch
_LOOK = 1.0  # seconds between looks at the workers
_LAST_WORDS = 10.0  # seconds a dead worker's batch, or its exception, may take to arrive

_log = logging.getLogger(__name__)


class Reader:
    """Gives batch after batch of `start(step)`, a dataset that begins at batch `step`.

    A worker process that dies (killed for memory, say) or hangs is replaced, with the others, at
    the batch that is due; a warning says so. UserError when the same batch fails again and again,
    and when threads hang, which cannot be replaced. workers: how many processes `start` uses, 0 for
    none. timeout: seconds without a batch until the readers count as hung; 0 waits for ever.
    """

    def __init__(self, start: Callable[[int], grain.IterDataset], *, workers: int, timeout: float):
        self._start, self._workers, self._timeout = start, workers, timeout
        self._pull: _Pull | None = None

    def ready(self, step: int, seconds: float) -> bool:
        """Whether `read(step)` need not wait, because the batch is there or is known to fail;
        looks for so long."""
        if self._pull is None:
            self._pull = _Pull(self._start(step), self._timeout)
        return self._pull.wait(seconds)

    def read(self, step: int) -> Any:
        """Batch number `step`, the one behind the last that was read. StopIteration at the end."""
        for failures in range(_RESTARTS + 1):
            try:
                while not self.ready(step, _LOOK):
                    pass
                assert self._pull is not None
                return self._pull.take()
            except _ReadersFailed as e:
                self.close()
                self._give_up_or_warn(step, str(e), failures)
            except BaseException:
                self.close()
                raise
        raise AssertionError("unreachable: the last failure is an error")

    def close(self) -> None:
        """End threads and worker processes; reading again starts them anew, at any step."""
        pull, self._pull = self._pull, None
        if pull is not None:
            pull.close()

    def _give_up_or_warn(self, step: int, what: str, failures: int) -> None:
        if not self._workers:
            raise UserError(
                f"data: {what} at batch {step}: look at the disk or network that holds the images, "
                "or set data.timeout higher"
            )
        if failures == _RESTARTS:
            raise UserError(
                f"data: {what} at batch {step}, {_RESTARTS + 1} times: if memory ran out, lower "
                "data.workers; if the images' disk or network is slow, set data.timeout higher"
            )
        _log.warning(
            "data: %s: the workers are started again at batch %d; no example is lost or repeated",
            what, step,
        )  # fmt: skip


class _ReadersFailed(Exception):
    """What happened to the workers or threads."""


class _Pull:
    """One iterator, read by a thread so that waiting for it can end."""

    def __init__(self, dataset: grain.IterDataset, timeout: float):
        self._timeout = timeout
        self._others = set(multiprocessing.active_children())
        self._children: set[Any] = set()
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._got: tuple[Any, BaseException | None] | None = None
        self._since: float | None = None  # when a batch was asked for that has not come
        self._thread = threading.Thread(
            target=_serve, args=(dataset, self._asked, self._given), daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether `take` has something to give or to raise."""
        if self._got is not None:
            return True
        if self._since is None:
            self._since = time.monotonic()
            self._asked.put(True)
        try:
            self._got = self._given.get(timeout=seconds)
            self._since = None
        except queue.Empty:
            pass
        self._watch()
        return self._got is not None or bool(self._failed())

    def take(self) -> Any:
        """The batch that came, or its exception; _ReadersFailed when they died or hang."""
        if self._got is None:
            raise _ReadersFailed(self._failed())
        (batch, error), self._got = self._got, None
        if error is None:
            return batch
        if isinstance(error, RuntimeError) and "Worker process was terminated" in str(error):
            raise _ReadersFailed(f"a worker process {self._death() or 'died'}") from error
        raise error

    def _failed(self) -> str:
        """Why nothing will come any more; empty while something may."""
        waited = 0.0 if self._since is None else time.monotonic() - self._since
        if waited > _LAST_WORDS and self._death():
            return f"a worker process {self._death()}"
        return f"no batch came for {self._timeout:g} s" if 0 < self._timeout < waited else ""

    def _death(self) -> str:
        """How a worker ended that should not have; empty while all are well."""
        codes = sorted(p.exitcode for p in self._children if p.exitcode)
        if not codes:
            return ""
        if codes[0] >= 0:
            return f"ended with exit code {codes[0]}"
        name = signal.Signals(-codes[0]).name
        why = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"was killed ({name}{why})"

    def _watch(self) -> None:
        """Note which processes Grain started for this iterator."""
        for process in set(multiprocessing.active_children()) - self._others:
            if process.name.startswith("grain"):
                self._children.add(process)

    def close(self) -> None:
        self._watch()
        if (
            self._since is not None or self._death()
        ):  # a thread that waits for them hears of their end
            for process in self._children:
                process.kill()
        self._asked.put(False)
        self._thread.join(timeout=30 if self._children else _LOOK)


def _serve(dataset: grain.IterDataset, asked: queue.SimpleQueue, given: queue.SimpleQueue) -> None:
    iterator = None
    while asked.get():
        try:
            if iterator is None:
                iterator = iter(dataset)
            given.put((next(iterator), None))
        except BaseException as e:
            given.put((None, e))
    if iterator is not None:
        iterator.close()


def init_worker(index: int, count: int) -> None:
    """Runs first in each worker process: Ctrl-C is for its parent to hear, and it ends when that
    is gone (Grain's workers live on when it was killed)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
