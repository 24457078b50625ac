"""Continuous batching for a server: one thread that owns the device and all running answers.

Each step of the thread processes some prompt tokens of new requests, dispatches a few decoding steps for
all running answers, and then reads the tokens of the step before, while the device works. So answers
go on while long prompts are processed, and requests join and leave at any step.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jax.sharding import Mesh

from minigpt4_jax.config import IMAGE
from minigpt4_jax.inference.decode_state import Snapshot, read_snapshot, truncate
from minigpt4_jax.inference.model import Model
from minigpt4_jax.serving.errors import (
    RequestError,
    device_failure,
    invalid,
    queue_full,
    shutting_down,
    timed_out,
)
from minigpt4_jax.serving.image_store import ImageStore
from minigpt4_jax.serving.jobs import DeviceCall, Generation, WaitingQueue, Work
from minigpt4_jax.serving.prefill import Prefill
from minigpt4_jax.serving.prefix_store import PrefixStore, prompt_key
from minigpt4_jax.serving.shapes import Shapes
from minigpt4_jax.serving.slots import Slots, copy_cache, total_length

log = logging.getLogger(__name__)
MAX_FAILURES = 3  # of the device in a row, after which all running requests are ended


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of the scheduler.

    Attributes:
        max_rows: answers that are decoded together.
        max_queue: requests that wait for their turn; more are refused.
        context: tokens of a prompt and its answer together.
        max_new_tokens: tokens of an answer.
        cache_tokens: positions of the key-value cache of all running answers together.
        prefix_tokens: positions of the caches of earlier prompts, which are kept beside that.
        prefill_tokens: prompt tokens processed between two decoding steps, and at a time: less makes
            the gaps between the tokens of running answers shorter, more starts new ones sooner.
        decode_steps: decoding steps between two looks at new requests.
        encode_images: images encoded between two decoding steps.
        image_bytes: visual tokens kept in the host's memory.
    """

    max_rows: int = 32
    max_queue: int = 128
    context: int = 2048
    max_new_tokens: int = 1024
    cache_tokens: int = 1 << 16
    prefix_tokens: int = 1 << 14
    prefill_tokens: int = 256
    decode_steps: int = 4
    encode_images: int = 2
    image_bytes: int = 1 << 28


class Scheduler:
    """Answers requests of many clients with one model.

    `submit` and `stop` are called from an event loop; a thread does the rest.
    """

    def __init__(self, model: Model, config: SchedulerConfig, mesh: Mesh | None = None):
        self.model, self.config = model, config
        self.shapes = Shapes(
            config.context, config.max_rows, config.max_new_tokens, config.prefill_tokens
        )
        self.queue = WaitingQueue(config.max_queue)
        self.slots = Slots(model.engine, mesh, self.shapes, config.cache_tokens)
        self.images = ImageStore(model, config.image_bytes)
        self.prefixes = PrefixStore(config.prefix_tokens)
        self._copy_cache = copy_cache(mesh)
        self._next: Work | None = None  # taken from the queue; its images are being encoded
        self._prefills: list[Prefill] = []
        # Dispatched and not yet read: the owners of the rows, and a copy of the state.
        self._dispatched: deque[tuple[list[Generation | None], Snapshot]] = deque()
        self._failures = 0  # of the device, without a token in between
        self._accepting, self._stopping = True, False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    # --- called by the event loop ---------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, *work: Work) -> None:
        """Queue work, all of it or none. RequestError: too long, the queue is full, the server stops."""
        if not self._accepting:
            raise shutting_down()
        for job in work:
            if isinstance(job, Generation):
                self.check_length(len(job.request.tokens), job.request.max_new_tokens)
        if not self.queue.add_all(work):
            raise queue_full(len(self.queue), self._retry_after())

    def _retry_after(self) -> int:
        """Seconds until some of the waiting requests have been answered, roughly."""
        return 1 + len(self.queue) // max(1, self.config.max_rows)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def check_length(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """RequestError: a prompt and an answer of these lengths exceed a limit."""
        context = min(self.config.context, self.config.cache_tokens)
        if prompt_tokens + max_new_tokens > context:
            raise invalid(
                f"{prompt_tokens} tokens of the prompt and {max_new_tokens} of the answer exceed the "
                f"context of {context} tokens; shorten the prompt or lower max_tokens",
                "messages", "context_length_exceeded",
            )  # fmt: skip
        if max_new_tokens > self.config.max_new_tokens:
            raise invalid(
                f"max_tokens {max_new_tokens}: at most {self.config.max_new_tokens} are generated",
                "max_tokens",
            )

    def stop(self, seconds: float) -> bool:
        """Accept nothing more, answer what waits and runs for at most some seconds, end the thread.

        Returns whether everything was answered.
        """
        self._accepting = False
        end = time.monotonic() + seconds
        while self.alive and self._busy() and time.monotonic() < end:
            time.sleep(0.02)
        finished = not self._busy()
        self._stopping = True
        self.queue.wake()
        if self.alive:
            self._thread.join(timeout=60)
        return finished

    def _busy(self) -> bool:
        return bool(len(self.queue) or self._next or self._prefills or self.slots.running)

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._step()
            except Exception as error:
                self._recover(error)
            if not self._busy():
                self.queue.wait(1.0)
        self._fail_all(shutting_down())

    def _step(self) -> None:
        self._drop_ended()
        self._insert_prefilled()
        self._start_waiting()
        self._advance_prefills()
        running = self.slots.running
        if running:
            snapshot = self.slots.decode(self.config.decode_steps)
            self._dispatched.append((list(self.slots.owners), snapshot))
        while len(self._dispatched) > (1 if running else 0):
            self._read(*self._dispatched.popleft())
        if not (len(self.queue) or self._next or self._prefills):
            self.slots.shrink()

    def _drop_ended(self) -> None:
        """Drop work that nobody waits for any more, or whose time is over."""
        self.queue.drop_ended()
        if self._next is not None and self._has_ended(self._next):
            self._next = None
        self._prefills = [p for p in self._prefills if not self._has_ended(p.job)]
        ended = [job for job in self.slots.running if self._has_ended(job)]
        if ended:
            self.slots.finish(ended)
            for job in ended:
                self.slots.free(job)

    def _has_ended(self, work: Work) -> bool:
        if not work.cancelled and work.expired:
            work.fail(timed_out(work.timeout))
        return work.cancelled or work.ended

    # --- new requests -----------------------------------------------------------------------------

    def _start_waiting(self) -> None:
        """Take requests from the queue whose turn it is and which find a place, and encode images."""
        budget = self.config.encode_images
        while budget > 0:
            work = self._next = self._next or self._take()
            if work is None:
                return
            try:
                visual = self.images.get(work.images)
                if visual is None:
                    self.images.encode(work.images, budget)
                    budget = 0  # continue after the next decoding steps
                    visual = self.images.get(work.images)
                if visual is None:
                    return
                self._next = None
                if isinstance(work, DeviceCall):
                    budget = 0
                self._begin(work, visual)
            except Exception as error:
                self._next = None
                self._fail(work, error)

    def _take(self) -> Work | None:
        """The work whose turn it is, out of the queue, if there is room for it."""
        active = [*self.slots.running, *(p.job for p in self._prefills)]
        work = self.queue.first(active)
        if isinstance(work, Generation) and not self.slots.fits([total_length(work)], active):
            return None
        if work is not None:
            self.queue.remove(work)
        return work

    def _begin(self, work: Work, visual: list[np.ndarray]) -> None:
        if isinstance(work, DeviceCall):
            work.run(visual)
            return
        assert isinstance(work, Generation)
        if visual:
            slots = sum(token == IMAGE for token in work.request.tokens)
            joined = np.concatenate(visual)
            work.request = replace(work.request, visual=joined[len(joined) - slots :])
        find = partial(self.prefixes.find, self._prompt_key(work))
        prefill = Prefill(self.model.engine, self.shapes, self._copy_cache, work, find)
        self._prefills.append(prefill)

    def _prompt_key(self, job: Generation) -> np.ndarray:
        digests = [image.digest for image in job.images]
        return prompt_key(job.request.tokens, digests, self.model.config.visual_tokens)

    def _advance_prefills(self) -> None:
        """Dispatch chunks of the oldest prompts, up to `prefill_tokens` in all."""
        budget = self.config.prefill_tokens
        for prefill in self._prefills:
            while 0 < prefill.next_chunk() <= budget:
                budget -= prefill.next_chunk()
                try:
                    prefill.advance()
                except Exception as error:
                    self._prefills.remove(prefill)
                    self._fail(prefill.job, error)
                    return
            if prefill.next_chunk():
                return

    def _insert_prefilled(self) -> None:
        """Move rows whose prompts were processed in the last step to the running answers."""
        for prefill in [p for p in self._prefills if p.row is not None]:
            job = prefill.job
            try:
                row = prefill.wait()
                owners: list[Generation | None] = [job]
                self._publish(owners, self.model.engine.snapshot(row))
            except Exception as error:
                self._prefills.remove(prefill)
                self._fail(job, error)
                continue
            if not bool(np.asarray(row.nonfinite)[0]):
                self.prefixes.put(self._prompt_key(job), row.cache)
            self._prefills.remove(prefill)
            if job.ended:
                continue
            try:
                self.slots.add(row, job)
            except Exception as error:
                self._recover(error, job)
                return

    # --- answers ----------------------------------------------------------------------------------

    def _read(self, owners: list[Generation | None], snapshot: Snapshot) -> None:
        """Publish what a snapshot says, and free the slots of finished answers."""
        stopped = self._publish(owners, snapshot)
        if stopped and self.slots.state is not None:
            self.slots.finish(stopped)
        for job in owners:
            if job is not None and job.ended and job in self.slots.owners:
                self.slots.free(job)
        self._failures = 0

    def _publish(self, owners: list[Generation | None], snapshot: Snapshot) -> list[Generation]:
        """Hand the tokens over. Returns the answers that a stop text ended, not the device."""
        indices = [None if job is None else slot for slot, job in enumerate(owners)]
        stopped = []
        for slot, _, completion, done in read_snapshot(indices, snapshot):
            job = owners[slot]
            if job is None or job.ended or job.cancelled:
                continue
            check = job.request.stop_check
            stop_length = check(completion.ids) if check else None
            if stop_length is not None:
                completion = truncate(completion, stop_length)
                if not done:
                    stopped.append(job)
            job.publish(completion, finished=done or stop_length is not None)
        return stopped

    # --- failures ---------------------------------------------------------------------------------

    def _fail(self, work: Work, error: Exception) -> None:
        """End one request with the error that it caused."""
        log.error("a request failed: %s", error, exc_info=error)
        if not work.ended:
            work.fail(device_failure(_reason(error)))

    def _recover(self, error: Exception, blamed: Generation | None = None) -> None:
        """The device failed in a step of all running answers: end one of them, by default the newest,
        and begin the others again. An answer depends on its prompt and seed alone, so these go on
        where they were. After several failures in a row, end all."""
        self._failures += 1
        running = [job for job in self.slots.running if not (job.ended or job.cancelled)]
        others = [prefill.job for prefill in self._prefills]
        if blamed is None and running:
            blamed = max(running, key=lambda job: job.first_token or 0)
            running.remove(blamed)
        failed = [blamed] if blamed is not None else others
        if self._failures > MAX_FAILURES:
            failed = [*failed, *running, *others]
        for job in failed:
            self._fail(job, error)
        if not failed:
            log.error("the scheduler failed: %s", error, exc_info=error)
            self._fail_all(device_failure(_reason(error)))
        self._prefills = []
        self._dispatched.clear()
        self.slots.clear()
        self.prefixes.clear()
        self.queue.put_back([job for job in [*running, *others] if not job.ended])

    def _fail_all(self, error: RequestError) -> None:
        """End everything that has not been answered."""
        self.queue.fail_all(error)
        active: list[Work] = [*self.slots.running, *(p.job for p in self._prefills)]
        for work in [*active, *([self._next] if self._next else [])]:
            if not work.ended:
                work.fail(error)


def _reason(error: Exception) -> str:
    """The first line of an error, which may be pages long."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
