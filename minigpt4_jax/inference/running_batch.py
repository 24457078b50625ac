"""Continuous batching: requests join a running batch and leave it, at any time, one step after another.

A step admits waiting requests, dispatches a chunk of decoding steps for all rows, and reads what the
chunk before has generated, so that the device never waits for the host.
"""

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.batch_shapes import BatchShapes
from minigpt4_jax.inference.batch_sizing import SMALLEST_SIZES, BatchSizing, sizes_of
from minigpt4_jax.inference.decode_state import DecodeState, Snapshot, read_snapshot, truncate
from minigpt4_jax.inference.prefill import NOTHING, Prefill, PrefillRow
from minigpt4_jax.inference.prefix_cache import PrefixCache, is_deleted
from minigpt4_jax.inference.requests import BucketSizes, Progress, Request
from minigpt4_jax.inference.runner import UNLIMITED, ModelRunner
from minigpt4_jax.inference.sampling import SamplingStages

CHUNK_STEPS = 16  # decoding steps between two decisions of the host, if it has any to make


class _Unread(NamedTuple):
    """A snapshot that the host has not read yet."""

    snapshot: Snapshot
    rows: list[PrefillRow | None]  # by slot in the snapshot


class RunningBatch:
    """A batch of requests at any point of their answers. One thread uses it.

        batch = RunningBatch(engine)
        batch.add("a", request)  # at any time
        while not batch.is_idle:
            for progress in batch.step():
                ...

    An answer is that of the request alone, whatever runs beside it. The arrays on the device grow and
    shrink with the requests, in powers of two of rows and buckets of cache slots, each of which is
    compiled once; `min_rows` and `min_sizes` keep their number small.
    """

    def __init__(
        self,
        runner: ModelRunner,
        max_rows: int = 32,
        *,
        min_rows: int = 1,
        min_sizes: BucketSizes = SMALLEST_SIZES,
        max_cache_tokens: int | None = None,
        prefill_tokens: int | None = None,
        prefix_cache: PrefixCache | None = None,
        share_prompts: bool = False,
        stages: SamplingStages | None = None,
        shapes: BatchShapes | None = None,
        report_progress: bool = True,
    ):
        """
        Args:
            runner: the engine whose programs run.
            max_rows: requests decoded together.
            min_rows, min_sizes: the batch is not made smaller than this.
            max_cache_tokens: cache slots, one per token, that all rows may take together: rows (a power
                of two) times the bucket of the longest request. A request waits until it fits.
            prefill_tokens: prompt tokens processed in a step. Longer prompts are processed in pieces,
                between which the running answers go on. None: no limit.
            prefix_cache: prompts continue from it where they begin alike, and finished requests are
                stored in it.
            share_prompts: prompts continue from one before them in this batch, if they begin alike.
                Without prefix_cache, prefill_tokens and shapes.
            stages: sampling stages that all requests to come need together. By default those of the
                running requests.
            shapes: the only sizes and stages that are used; min_rows, min_sizes and stages then have no
                effect. Needs prefill_tokens, the longest of its prompts.
            report_progress: also report unfinished requests.
        """
        if not runner.config.reads_in_pieces:
            prefill_tokens, prefix_cache, share_prompts = None, None, False
        self._runner, self._max_rows = runner, max_rows
        self._sizing = BatchSizing(
            runner,
            min_rows=min_rows,
            min_sizes=min_sizes,
            max_cache_tokens=max_cache_tokens,
            stages=stages,
            shapes=shapes,
        )
        self._prefill = Prefill(
            runner, self._sizing, prefill_tokens, prefix_cache, share_prompts=share_prompts
        )
        self._prefill_tokens, self._prefix_cache = prefill_tokens, prefix_cache
        self._starts_together = not (prefill_tokens or prefix_cache or share_prompts or shapes)
        self._report_progress = report_progress
        self._waiting: deque[PrefillRow] = deque()
        self._prefilling: PrefillRow | None = None  # a prompt of which a part is processed
        self._state: DecodeState | None = None
        self._slots: list[PrefillRow | None] = []  # the row in each slot of the state
        self._stopped: set[int] = set()  # free slots that the device still decodes
        self._unread: deque[_Unread] = deque()

    # --- requests ---------------------------------------------------------------------------

    def add(self, key: Hashable, request: Request) -> None:
        """Queue a request, which joins in the order of the queue. key: what its progress is reported as.

        UserError: beam search, or more tokens than max_cache_tokens.
        """
        if request.beam_search.num_beams > 1:
            raise UserError("a running batch has no beam search; use Engine.search")
        tokens = self._sizing.sizes([request]).cache_length
        if self._sizing.max_cache_tokens is not None and tokens > self._sizing.max_cache_tokens:
            raise UserError(
                f"{len(request.tokens)} tokens and max_new_tokens {request.max_new_tokens} exceed the "
                f"cache of {self._sizing.max_cache_tokens} tokens; shorten the prompt or lower max_new_tokens"
            )
        self._waiting.append(PrefillRow(key, request))

    def cancel(self, key: Hashable) -> bool:
        """Drop a request; it is not reported any more. False: there is none with this key."""
        row = next((row for row in self._rows() if row.key == key), None)
        if row is None:
            return False
        if row in self._waiting:
            self._waiting.remove(row)
        if row is self._prefilling:
            self._prefilling = None
        if row.slot is not None:
            self._stopped.add(row.slot)
        self._free(row)
        return True

    def abort(self) -> list[Hashable]:
        """Drop all requests and everything on the device, as after an exception of `step`: their keys."""
        keys = [row.key for row in self._rows()]
        self._waiting.clear()
        self._prefilling = None
        self._reset()
        return keys

    @property
    def num_waiting(self) -> int:
        """Requests that have not been admitted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        return len(self._running()) + (self._prefilling is not None)

    @property
    def num_free(self) -> int:
        """Requests that may be admitted besides the running ones, if there is cache for them."""
        return self._max_rows - self.num_running

    @property
    def is_idle(self) -> bool:
        """Whether every request has been answered."""
        return not self._rows()

    @property
    def cache_tokens(self) -> int:
        """Cache slots, one per token, that are allocated on the device; see max_cache_tokens."""
        return 0 if self._state is None else len(self._slots) * self._state.cache.length

    @property
    def used_cache_tokens(self) -> int:
        """Cache slots that hold tokens of running requests."""
        return sum(len(r.request.tokens) + len(r.completion.ids) for r in self._running())

    # --- a step -----------------------------------------------------------------------------

    def step(self, steps: int = CHUNK_STEPS, *, until_row_ends: bool = False) -> list[Progress]:
        """Admit requests, decode up to `steps` tokens of each, and return the news of the chunk before.

        until_row_ends: fewer tokens if a request finishes, so that another can take its place.
        A request whose prompt fails is reported with an error, and the others go on. After any
        exception the batch is undefined: call `abort`.
        """
        return list(self.stream_step(steps, until_row_ends=until_row_ends))

    def stream_step(self, steps: int, *, until_row_ends: bool = False) -> Iterator[Progress]:
        """As `step`, but yields news as soon as the device has it. Exhaust it: it is the step itself."""
        self._finish_stopped()
        self._shrink()
        yield from self._admit()
        decoding = self._state is not None and bool(self._running())
        if decoding:
            self._decode(steps, 1 if until_row_ends else UNLIMITED)
        while len(self._unread) > decoding:
            yield from self._read(self._unread.popleft())
        if not self._running():
            self._reset()

    def close(self) -> None:
        """Drop all requests; what is cached of the running ones goes to the prefix cache."""
        for row in self._running():
            self._store_prefix(row)
        self.abort()

    def _finish_stopped(self) -> None:
        if self._stopped and self._state is not None:
            rows = np.zeros(len(self._slots), bool)
            rows[list(self._stopped)] = True
            self._state = self._runner.finish_rows(self._state, rows)
        self._stopped.clear()

    def _decode(self, steps: int, max_ended: int) -> None:
        assert self._state is not None
        stages = self._sizing.stages([row.request for row in self._running()])
        self._state = self._runner.decode(self._state, stages, steps, max_ended)
        self._snapshot(self._state, self._slots)

    def _snapshot(self, state: DecodeState, rows: Sequence[PrefillRow | None]) -> None:
        self._unread.append(_Unread(self._runner.snapshot(state), list(rows)))

    def _read(self, unread: _Unread) -> list[Progress]:
        """What a snapshot says; the slots of finished requests become free."""
        rows = [None if row is None or row.finished else row for row in unread.rows]
        news = []
        for _, row, completion, done in read_snapshot(rows, unread.snapshot):
            length = row.request.stopped_after(completion.ids)
            if length is not None:
                completion = truncate(completion, length)
                if not done and row.slot is not None:
                    self._stopped.add(row.slot)
            row.completion = completion
            finished = done or length is not None
            if finished:
                self._store_prefix(row)
                self._free(row)
            if finished or self._report_progress:
                progress = Progress(row.key, row.request, completion, finished)
                news.append(progress._replace(num_cached=row.num_reused))
        return news

    def _free(self, row: PrefillRow) -> None:
        row.finished = True
        if row.slot is not None:
            self._slots[row.slot] = None

    def _reset(self) -> None:
        """Free what is on the device."""
        self._state, self._slots = None, []
        self._stopped.clear()
        self._unread.clear()

    # --- admission --------------------------------------------------------------------------

    def _admit(self) -> list[Progress]:
        """Process prompts and put their rows into slots, as the limits allow: those that failed."""
        if self._state is None and self._starts_together:
            return self._admit_together()
        failed: list[Progress] = []
        limit, num_tokens = self._prefill_tokens, 0
        while row := self._prefilling or self._next_waiting():
            stop, piece = self._prefill.next_piece(row)
            if limit is not None and num_tokens and num_tokens + piece > limit:
                break
            num_tokens += piece
            try:
                self._process(row, stop)
            except Exception as e:
                self._prefilling = None
                failed.append(_failure(row, e))
        return failed

    def _admit_together(self) -> list[Progress]:
        """The first rows of a batch, in one prefill."""
        rows: list[PrefillRow] = []
        while self._waiting and len(rows) < self._max_rows:
            if rows and self._exceeds_cache([*rows, self._waiting[0]]):
                break
            rows.append(self._waiting.popleft())
        if not rows:
            return []
        requests = [row.request for row in rows]
        try:
            sizes, stages = self._sizing.sizes(requests), self._sizing.stages(requests)
            state = self._runner.prefill(requests, sizes, stages)
        except Exception as e:
            return [_failure(row, e) for row in rows]
        self._start(rows, state)
        return []

    def _next_waiting(self) -> PrefillRow | None:
        """The first waiting row, if there is room for it."""
        running = self._running()
        if not self._waiting or len(running) >= self._max_rows:
            return None
        row = self._waiting[0]
        if running and not self._has_room(row) and self._exceeds_cache([*running, row]):
            return None
        self._prefilling = self._waiting.popleft()
        self._prefill.reuse_prefix(row)
        return row

    def _process(self, row: PrefillRow, stop: int) -> None:
        """Process a row's prompt up to a token; at its end the row gets a slot."""
        if stop < len(row.request.tokens):
            self._prefill.process_part(row, stop)
            return
        new = self._prefill.finish(row, starts_batch=self._state is None)
        self._prefilling = None
        if self._state is None:
            self._start([row], new)
            return
        if self._report_progress:
            self._snapshot(new, [row])
        row.slot = self._free_slot(row)
        self._slots[row.slot] = row
        self._state = self._runner.insert(self._state, new, row.slot)
        self._release_visual(row)

    def _start(self, rows: list[PrefillRow], state: DecodeState) -> None:
        """Begin a batch with these rows."""
        self._state = state
        self._slots = [*rows, *[None] * (state.ids.shape[0] - len(rows))]
        for slot, row in enumerate(rows):
            row.slot = slot
            self._release_visual(row)
        if self._report_progress:
            self._snapshot(state, rows)

    def _release_visual(self, row: PrefillRow) -> None:
        if self._prefix_cache is None:  # which compares them
            row.request = replace(row.request, visual=None)

    # --- sizes ------------------------------------------------------------------------------

    def _free_slot(self, row: PrefillRow) -> int:
        """A free slot that the row fits into; the arrays grow if there is none."""
        if not self._has_room(row):
            self._resize(*self._needed_sizes([*self._running(), row]))
        return self._slots.index(None)

    def _has_room(self, row: PrefillRow) -> bool:
        if None not in self._slots or self._state is None:
            return False
        return self._sizing.fits(row.request, self._state)

    def _shrink(self) -> None:
        """Use smaller arrays if a quarter is enough."""
        rows = self._running()
        if self._state is None or self._waiting or not rows:
            return
        num_rows, sizes = self._needed_sizes(rows)
        if 4 * num_rows * sizes.cache_length <= self.cache_tokens:
            self._resize(num_rows, sizes)

    def _resize(self, num_rows: int, sizes: BucketSizes) -> None:
        assert self._state is not None
        current = sizes_of(self._state)
        sizes = BucketSizes(sizes.cache_length, *map(max, sizes[1:], current[1:]))
        rows = self._running()
        empty = [None] * (num_rows - len(rows))
        self._state = self._runner.resize(self._state, [*(r.slot for r in rows), *empty], sizes)
        self._slots = [*rows, *empty]
        for slot, row in enumerate(rows):
            row.slot = slot

    def _needed_sizes(self, rows: Sequence[PrefillRow]) -> tuple[int, BucketSizes]:
        return self._sizing.needed([row.request for row in rows])

    def _exceeds_cache(self, rows: Sequence[PrefillRow]) -> bool:
        return self._sizing.exceeds_cache([row.request for row in rows])

    # --- rows -------------------------------------------------------------------------------

    def _running(self) -> list[PrefillRow]:
        return [row for row in self._slots if row is not None]

    def _rows(self) -> list[PrefillRow]:
        prefilling = [] if self._prefilling is None else [self._prefilling]
        return [*self._running(), *prefilling, *self._waiting]

    def _store_prefix(self, row: PrefillRow) -> None:
        """Keep what is cached of a running row."""
        state, ids = self._state, row.completion.ids
        if self._prefix_cache is None or state is None or row.slot is None:
            return
        if row.completion.nonfinite or is_deleted(state.cache):
            return
        if len(self._slots) == 1 and not self._waiting:  # nothing else needs it
            cache = state.cache
            self._state, self._slots, row.slot = None, [], None
        else:
            length = self._sizing.cache_length(len(row.request.tokens) + len(ids))
            cache = self._runner.take_cache_row(state.cache, row.slot, length)
        self._prefix_cache.store(row.request, ids, cache, self._runner.leaves)


def _failure(row: PrefillRow, error: Exception) -> Progress:
    """The news of a request whose prompt could not be processed."""
    row.finished = True
    return Progress(row.key, row.request, NOTHING, True, error)
