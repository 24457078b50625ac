"""Work for the scheduler's thread, handed over by an event loop that waits for its outcome."""

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minigpt4_jax.inference.requests import Completion, Request
from minigpt4_jax.serving.errors import RequestError, timed_out


class ImageInput(NamedTuple):
    """An image of a request, read and resized."""

    digest: bytes  # of the file's content: equal images are encoded once
    pixels: np.ndarray  # [S, S, 3] uint8


class Work:
    """What the queue holds: a Generation or a DeviceCall. Made in the event loop that waits for it.

    The scheduler's thread calls `publish` and `fail`; everything else belongs to the event loop,
    except for `cancelled`, which both may read.
    """

    def __init__(self, images: Sequence[ImageInput], client: str, timeout: float):
        """client: whose request it is, for the fair order. timeout: in seconds."""
        self.images, self.client, self.timeout = images, client, timeout
        self.submitted = time.monotonic()
        self.cancelled = False
        self.ended = False  # the scheduler is done with it
        self._error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    @property
    def expired(self) -> bool:
        """Whether its time limit has passed."""
        return time.monotonic() > self.submitted + self.timeout

    def cancel(self) -> None:
        """Nobody waits for the outcome any more: the scheduler drops the work."""
        self.cancelled = True

    def fail(self, error: Exception) -> None:
        """End with an error, which the waiting side gets."""
        self._error = error
        self._end()

    def _end(self) -> None:
        self.ended = True
        self._notify()

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._changed.set)

    async def _wait_for_change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class Generation(Work):
    """A request for one answer.

    Attributes:
        request: what to generate; its visual tokens are added by the scheduler, for the last of its
            image slots if the prompt was cut on the left.
        streamed: whether every few tokens are published, or only the finished answer.
        first_token, finished: when, as time.monotonic(); None until then.
        cached_tokens: how many tokens of the prompt were in the prefix cache.
        num_tokens: of the answer so far; fewer than before after a restart.
        restarts: how often it was begun again because the device failed.
    """

    def __init__(
        self,
        request: Request,
        images: Sequence[ImageInput] = (),
        *,
        client: str = "",
        timeout: float = 300.0,
        streamed: bool = False,
    ):
        super().__init__(images, client, timeout)
        self.request, self.streamed = request, streamed
        self.first_token: float | None = None
        self.finished: float | None = None
        self.cached_tokens = self.num_tokens = self.restarts = 0
        self._last_published: float | None = None
        self._latest: Completion | None = None

    def publish(self, completion: Completion, *, finished: bool) -> tuple[int, float | None]:
        """Called by the scheduler with the answer so far.

        Returns how many tokens are new, and seconds since the last of them; None for the first.
        """
        now = time.monotonic()
        new = max(0, len(completion.ids) - self.num_tokens)
        gap = None if self._last_published is None else now - self._last_published
        if completion.ids and self.first_token is None:
            self.first_token = now
        if new:
            self.num_tokens, self._last_published = len(completion.ids), now
        self._latest = completion
        if finished:
            self.finished = now
            self._end()
        elif self.streamed:
            self._notify()
        return new, gap

    async def updates(self) -> AsyncIterator[tuple[Completion, bool]]:
        """(the answer so far, whether it is finished), whenever it has grown.

        A slow reader gets the newest state, so nothing piles up. RequestError: it failed. Closing the
        iterator early cancels the request.
        """
        seen = 0
        try:
            while True:
                await self._wait_for_change()
                ended, latest = self.ended, self._latest  # in this order
                self._raise_error()
                if latest is not None and (ended or len(latest.ids) > seen):
                    seen = len(latest.ids)
                    yield latest, ended
                if ended:
                    return
        finally:
            if not self.ended:
                self.cancel()

    async def result(self) -> Completion:
        """The finished answer. RequestError: it failed."""
        async for completion, finished in self.updates():
            if finished:
                return completion
        raise AssertionError("updates end with the finished answer or an error")


class DeviceCall(Work):
    """A function that the scheduler's thread calls between two steps of the running answers."""

    def __init__(
        self,
        function: Callable[[list[np.ndarray]], Any],
        images: Sequence[ImageInput] = (),
        *,
        client: str = "",
        timeout: float = 300.0,
    ):
        """function: gets the visual tokens [P, D] of each image."""
        super().__init__(images, client, timeout)
        self._function = function
        self._result: Any = None

    def run(self, visual: list[np.ndarray]) -> None:
        """Call the function and publish its result."""
        self._result = self._function(visual)
        self._end()

    async def result(self) -> Any:
        """What the function returned. RequestError: it failed."""
        try:
            await self._wait_for_change()
        finally:
            if not self.ended:
                self.cancel()
        self._raise_error()
        return self._result


class WaitingQueue:
    """The work that waits for the scheduler's thread, at most `limit` of it.

    Next are those of the clients with the fewest running answers, and of these the oldest.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._waiting: list[Work] = []
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def add_all(self, work: Sequence[Work]) -> bool:
        """Append all of these, or none (False) if they are too many."""
        with self._changed:
            if len(self._waiting) + len(work) > self.limit:
                return False
            self._waiting += work
            self._changed.notify()
        return True

    def wake(self) -> None:
        """End a `wait`."""
        with self._changed:
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """Return when there is work, at a `wake`, or after some time."""
        with self._changed:
            if not self._waiting:
                self._changed.wait(seconds)

    def put_back(self, work: Sequence[Work]) -> None:
        """Work that was taken and is to be done again, before all others."""
        with self._changed:
            self._waiting[:0] = work

    def drop_ended(self) -> list[Work]:
        """Remove cancelled and expired work, fail the expired, and return all of it."""
        with self._changed:
            dropped = [work for work in self._waiting if work.cancelled or work.expired]
            self._waiting = [work for work in self._waiting if work not in dropped]
        for work in dropped:
            if not work.cancelled:
                work.fail(timed_out(work.timeout))
        return dropped

    def in_order(self, running: Sequence[Work]) -> list[Work]:
        """What waits, beginning with the work whose turn it is. running: to be fair to other clients."""
        clients = Counter(work.client for work in running)
        with self._changed:
            return sorted(self._waiting, key=lambda work: clients[work.client])

    def remove(self, work: Work) -> None:
        """Take this one out of the queue."""
        with self._changed:
            self._waiting.remove(work)

    def fail_all(self, error: RequestError) -> None:
        """Empty the queue."""
        with self._changed:
            dropped, self._waiting = self._waiting, []
        for work in dropped:
            work.fail(error)
