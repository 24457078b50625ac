"""Host arrays that threads read ahead of the copies to devices, with bounded memory.

Reading a file, checking, converting and quantizing values, and copying to a device then overlap. All of
this is file reads and NumPy on large arrays, which release Python's interpreter lock.
"""

import contextvars
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

READ_AHEAD_BYTES = 512 << 20  # of arrays that are being read, or wait to be copied to a device
# A thread that waits for a disk or a bucket needs no processor.
THREADS = min(16, max(4, os.cpu_count() or 1))


class HostArray(NamedTuple):
    """An array to be read.

    nbytes: its size. begin: called once, when its turn comes, gives the functions that read its parts, in any
    order and at the same time. Each returns the array, or fills its part of it and returns all of it.
    """

    nbytes: int
    begin: Callable[[], Sequence[Callable[[], np.ndarray]]]


def read_ahead(arrays: Iterable[HostArray], limit: int = READ_AHEAD_BYTES) -> Generator[np.ndarray]:
    """The arrays, in order.

    Besides the one that was yielded last, arrays of `limit` bytes together, or one larger array, are held
    in memory. An error in reading a part is raised in its array's place.
    """
    pending: deque[tuple[int, list[Future[np.ndarray]]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")
    try:
        for array in arrays:
            while pending and held + array.nbytes > limit:
                nbytes, parts = pending.popleft()
                yield _wait(parts)
                held -= nbytes
            # each part in the caller's context, which says what platform the model is for
            pending.append((
                array.nbytes,
                [pool.submit(contextvars.copy_context().run, part) for part in array.begin()],
            ))  # fmt: skip
            held += array.nbytes
        while pending:
            yield _wait(pending.popleft()[1])
    finally:
        pool.shutdown(cancel_futures=True)


def _wait(parts: Sequence[Future[np.ndarray]]) -> np.ndarray:
    """The array of these parts."""
    return [part.result() for part in parts][-1]
