"""Continuous batching: slots of a running batch that take the next request as soon as one finishes.

The next chunk of decoding steps is dispatched before the host looks at the last one, so that the
device never waits for the host.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from minigpt4_jax.inference.decode_state import DecodeState, Snapshot, read_snapshot, truncate
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.requests import Completion, Progress, Request, bucket_sizes
from minigpt4_jax.inference.sampling import required_stages

if TYPE_CHECKING:
    from minigpt4_jax.inference.engine import Engine


class RunningBatch:
    """The requests of one call of `Engine.run`, which explains the arguments."""

    def __init__(
        self,
        engine: "Engine",
        requests: Iterable[Request],
        sized_for: Sequence[Request],
        batch_size: int,
        prefix_cache: PrefixCache | None,
    ):
        self._engine, self._sized_for, self._batch_size = engine, sized_for, batch_size
        self._prefix_cache = prefix_cache
        self._waiting = enumerate(requests)
        self._next: tuple[int, Request] | None = None
        self._running: dict[int, Request] = {}
        self._slots: list[int | None] = []  # index of the request in each slot

    def run(self, chunk: int, *, always_in_chunks: bool, progress: bool) -> Iterator[Progress]:
        """Yield finished requests; with `progress` also unfinished ones after every chunk."""
        self._running = dict(islice(self._waiting, self._batch_size))
        if not self._running:
            return
        self._slots = list(self._running)
        self._sizes = bucket_sizes(self._sized_for)
        self._stages = required_stages(
            [request.sampling for request in self._sized_for], self._engine.vocab
        )
        state = self._prefill()
        self._next = next(self._waiting, None)  # fetched early: only then chunks are needed
        snapshots: deque[tuple[list[int | None], Snapshot]] = deque()
        try:
            while self._running:
                if always_in_chunks or self._next:
                    state = self._engine.decode(state, self._stages, chunk)
                else:
                    state = self._engine.decode(state, self._stages)
                snapshots.append((list(self._slots), self._engine.snapshot(state)))
                if len(snapshots) < 2:  # the device always has a chunk to work on
                    continue
                stopped = np.zeros(state.done.shape[0], bool)
                yield from self._read(*snapshots.popleft(), stopped, progress)
                if stopped.any():
                    state = self._engine.finish_rows(state, stopped)
                state = self._refill(state)
        finally:
            if self._prefix_cache is not None:
                self._engine.store_prefix(self._prefix_cache, self._sized_for[0], state)

    def _prefill(self) -> DecodeState:
        requests = list(self._running.values())
        if self._prefix_cache is None:
            return self._engine.prefill(requests, self._sizes, self._stages)
        (request,) = requests
        return self._engine.resume(self._prefix_cache, request, self._sizes, self._stages)

    def _read(
        self,
        owners: list[int | None],
        snapshot: Snapshot,
        stopped: np.ndarray,
        progress: bool,
    ) -> Iterator[Progress]:
        """Yield what a snapshot says; free the slots of finished requests.

        stopped [B] is set for rows that a `stop_check` ends while the device still decodes them.
        """
        for slot, index, completion, done in read_snapshot(owners, snapshot):
            if self._slots[slot] != index:
                continue  # finished before this chunk began
            request = self._running[index]
            stop_length = _stop_length(request, completion)
            if stop_length is not None:
                completion = truncate(completion, stop_length)
                stopped[slot] = not done
                done = True
            if done:
                self._slots[slot] = None
                del self._running[index]
            if done or progress:
                yield Progress(index, request, completion, done)

    def _refill(self, state: DecodeState) -> DecodeState:
        """Put waiting requests into free slots."""
        for slot, index in enumerate(self._slots):
            if index is None and self._next is not None:
                self._slots[slot], request = self._next
                self._running[self._next[0]] = request
                new = self._engine.prefill([request], self._sizes, self._stages)
                state = self._engine.insert(state, new, slot)
                self._next = next(self._waiting, None)
        return state


def _stop_length(request: Request, completion: Completion) -> int | None:
    """How many tokens a request's `stop_check` keeps; None to continue."""
    return request.stop_check(completion.ids) if request.stop_check else None
