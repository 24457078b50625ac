"""Continuous batching for a server: one thread that owns the device and all running answers.

Each step of the thread processes some prompt tokens of new requests, dispatches a few decoding steps for
all running answers, and reads the tokens of the step before (inference/running_batch.py). Images are
dispatched before these decoding steps and used after them, so that the device never waits for the host.
Functions of others are called between two steps.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from minigpt4_jax.config import IMAGE
from minigpt4_jax.inference.batch_shapes import BatchShapes
from minigpt4_jax.inference.model import Model
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.requests import Progress
from minigpt4_jax.inference.running_batch import RunningBatch
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
from minigpt4_jax.serving.metrics import ServerMetrics
from minigpt4_jax.utils.text import one_line

log = logging.getLogger(__name__)
MAX_STARTING = 4  # requests in the batch whose prompts are still to be processed
MAX_RESTARTS = 3  # of an answer, beside which the device failed
MAX_FAILURES = 8  # of the device without a token in between, after which the server is not healthy


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of the scheduler.

    Attributes:
        max_rows: answers that are decoded together.
        max_queue: requests that wait for their turn; more are refused.
        context: tokens of a prompt and its answer together.
        max_new_tokens: tokens of an answer.
        cache_tokens: slots of the key-value cache of all running answers together.
        prefix_tokens: cache slots of finished requests, which are kept beside that.
        prefill_tokens: prompt tokens processed in a step: fewer make the gaps between the tokens of
            running answers shorter, more start new ones sooner.
        decode_steps: tokens of every answer in a step; one while more answers are about to begin.
        encode_images: images encoded together, once in a step.
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

    `submit` and `stop` are called from outside; a thread does the rest.

    Attributes:
        shapes: the sizes of the programs that run.
        accepting: whether requests are taken; False once the server stops.
    """

    def __init__(self, model: Model, config: SchedulerConfig):
        self.model, self.config, self.metrics = model, config, ServerMetrics()
        self.shapes = BatchShapes(
            model.engine.vocab, max_rows=config.max_rows, context=config.context,
            max_new_tokens=config.max_new_tokens, prefill_tokens=config.prefill_tokens,
            reads_in_pieces=model.config.reads_in_pieces,
        )  # fmt: skip
        self.prefixes = PrefixCache(max_entries=1024, max_tokens=config.prefix_tokens)
        self.batch = RunningBatch(
            model.engine, config.max_rows, max_cache_tokens=config.cache_tokens,
            prefill_tokens=self.shapes.prompts[-1], prefix_cache=self.prefixes, shapes=self.shapes,
        )  # fmt: skip
        self.queue = WaitingQueue(config.max_queue)
        self.images = ImageStore(model, config.image_bytes)
        self._next: Work | None = None  # taken from the queue; its images are being encoded
        self._encodes_alone = False  # only images of _next are being encoded, or are to be
        self._running: list[Generation] = []  # in the batch, in the order of admission
        self._suspects: list[Generation] = []  # one of them made the device fail
        self._on_trial: Generation | None = None  # the suspect that was admitted last
        self._failures = 0
        self.accepting, self._stopping = True, False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._add_gauges()

    def _add_gauges(self) -> None:
        add = self.metrics.add_gauge
        add("waiting_requests", "requests in the queue", lambda: len(self.queue))
        add("running_requests", "answers being generated", lambda: self.num_running)
        add("cache_tokens", "allocated cache of running answers", lambda: self.batch.cache_tokens)
        add("cache_tokens_limit", "most of it", lambda: self.config.cache_tokens)
        add("prefix_cache_tokens", "cache of earlier answers", lambda: self.prefixes.num_tokens)
        add("image_cache_bytes", "encoded images", lambda: self.images.size)

    # --- called from outside ------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, *work: Work) -> None:
        """Queue work, all of it or none. RequestError: too long, the queue is full, the server stops."""
        if not self.accepting:
            raise shutting_down()
        for job in work:
            if isinstance(job, Generation):
                self.check_length(len(job.request.tokens), job.request.max_new_tokens)
        if not self.queue.add_all(work):
            raise queue_full(len(self.queue), 1 + len(self.queue) // self.config.max_rows)

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

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and the device computes."""
        return self._thread.is_alive() and self._failures < MAX_FAILURES

    @property
    def num_running(self) -> int:
        """Answers that are being generated."""
        return len(self._running)

    def stop(self, seconds: float) -> bool:
        """Accept nothing more, answer what waits and runs for at most some seconds, end the thread.

        Returns whether everything was answered.
        """
        self.accepting = False
        end = time.monotonic() + seconds
        while self._thread.is_alive() and self._busy() and time.monotonic() < end:
            time.sleep(0.02)
        answered = not self._busy()
        self._stopping = True
        self.queue.wake()
        if self._thread.is_alive():
            self._thread.join(timeout=60)
        return answered

    def _busy(self) -> bool:
        return bool(len(self.queue) or self._next or self._suspects or self._running)

    # --- the thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._step()
                except Exception as error:
                    self._recover(error)
                if not self._busy():
                    self.queue.wait(1.0)
        finally:
            self.accepting = False
            self._fail_all(shutting_down())

    def _step(self) -> None:
        self._drop_ended()
        if self._suspects or self._on_trial:
            self._admit_suspect()
        else:
            self._admit()
        if not self.batch.is_idle:
            # A free row is decoded as well as a full one, to no use: short steps while rows are filled.
            steps = 1 if self._is_filling else self.config.decode_steps
            for progress in self.batch.stream_step(steps, until_row_ends=True):
                self._publish(progress)

    @property
    def _is_filling(self) -> bool:
        """Whether the next step can begin more answers."""
        waits = self._next is not None or len(self.queue) > 0
        return waits and self._room > 0

    @property
    def _room(self) -> int:
        """How many more requests the batch takes now."""
        waiting = self.batch.num_waiting
        return min(self.batch.num_free, MAX_STARTING) - waiting

    def _drop_ended(self) -> None:
        """Drop work that nobody waits for any more, or whose time is over."""
        self.queue.drop_ended()
        if self._next is not None and self._has_ended(self._next):
            self._next = None
        self._suspects = [job for job in self._suspects if not self._has_ended(job)]
        for job in [job for job in self._running if self._has_ended(job)]:
            self.batch.cancel(job)
            self._running.remove(job)

    def _has_ended(self, work: Work) -> bool:
        if not (work.cancelled or work.ended) and work.expired:
            work.fail(timed_out(work.timeout))
        return work.cancelled or work.ended

    # --- admission ----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Move requests whose turn it is to the batch, if their images are encoded."""
        self._try_encoding(self.images.finish)
        while work := self._next or self._take():
            self._next = work
            visual = self.images.get(work.images)
            if visual is None:
                self._try_encoding(self._start_encoding, work)
                return  # the running answers go on meanwhile
            self._next, self._encodes_alone = None, False
            try:
                if isinstance(work, DeviceCall):
                    work.run(visual)
                    return
                if isinstance(work, Generation):
                    self._begin(work, visual)
            except Exception as error:
                self._fail(work, error)

    def _take(self) -> Work | None:
        """The work whose turn it is, out of the queue, if the batch has room for it."""
        work = next(iter(self.queue.in_order(self._running)), None)
        if isinstance(work, Generation) and self._room <= 0:
            return None
        if work is not None:
            self.queue.remove(work)
        return work

    def _start_encoding(self, work: Work) -> None:
        """Images of this work, and with them those of the requests that begin next."""
        later = self.queue.in_order(self._running)[: max(self._room - 1, 0)]
        ahead = [] if self._encodes_alone else [image for job in later for image in job.images]
        self._encodes_alone = not ahead
        images = [*work.images, *ahead]
        self.metrics.images.inc(self.images.start(images, self.config.encode_images))

    def _try_encoding(self, function: Callable[..., None], *args: Work) -> None:
        """If the device fails with images of several requests, those of the next one are encoded alone; if
        it fails with these, the request ends."""
        try:
            function(*args)
        except Exception as error:
            if self._encodes_alone and self._next is not None:
                self._fail(self._next, error)
                self._next = None
            else:
                log.warning(
                    "encoding several images failed, so each request's alone: %s", one_line(error)
                )
            self._encodes_alone = not self._encodes_alone

    def _begin(self, job: Generation, visual: list[np.ndarray]) -> None:
        if visual:
            slots = sum(token == IMAGE for token in job.request.tokens)
            joined = np.concatenate(visual)
            job.request = replace(job.request, visual=joined[len(joined) - slots :])
        self.metrics.started(job, time.monotonic() - job.submitted)
        self._add(job)

    def _add(self, job: Generation) -> None:
        self.batch.add(job, job.request)
        self._running.append(job)

    # --- answers ------------------------------------------------------------------------------------

    def _publish(self, progress: Progress) -> None:
        job: Generation = progress.key
        if progress.error is not None:
            self._running.remove(job)
            self._fail(job, progress.error)
            return
        job.cached_tokens = progress.num_cached
        self.metrics.generated(job, *job.publish(progress.completion, finished=progress.finished))
        if progress.finished:
            self._running.remove(job)
        self._failures = 0

    # --- failures -----------------------------------------------------------------------------------

    def _fail(self, work: Work, error: Exception) -> None:
        """End one request with the error that it caused."""
        if not isinstance(error, RequestError):
            log.error("a request failed: %s", one_line(error), exc_info=error)
            self.metrics.failures.inc()
            error = device_failure(f"{type(error).__name__}: {one_line(error)}")
        if not work.ended:
            work.fail(error)

    def _recover(self, error: Exception) -> None:
        """The device failed in a step of all running answers. Begin them again, one after another: the
        one with which it fails again is to blame, and ends.

        An answer depends on its prompt and seed alone, so the others go on where they were.
        """
        self._failures += 1
        log.error("the device failed: %s", one_line(error), exc_info=error)
        running, self._running = [job for job in self._running if not self._has_ended(job)], []
        self.batch.abort()
        self.prefixes.clear()
        if not running:
            self._fail_all(device_failure(f"{type(error).__name__}: {one_line(error)}"))
        for job in running:
            job.restarts += 1
            if job is self._on_trial or job.restarts > MAX_RESTARTS:
                self._fail(job, error)
        self._on_trial = None
        self._suspects = [*(job for job in running if not job.ended), *self._suspects]

    def _admit_suspect(self) -> None:
        """Begin the next suspect, once the one before has got further than the first tokens."""
        trial = self._on_trial
        if trial is not None and (
            trial.ended or trial.cancelled or trial.num_tokens > 1 + self.config.decode_steps
        ):
            self._on_trial = None
        if self._on_trial is None and self._suspects:
            self._on_trial = self._suspects.pop(0)
            self._on_trial.num_tokens = 0
            self._add(self._on_trial)

    def _fail_all(self, error: RequestError) -> None:
        """End everything that has not been answered."""
        self.queue.fail_all(error)
        for work in [*self._running, *self._suspects, *([self._next] if self._next else [])]:
            if not work.ended:
                work.fail(error)
        self._running, self._suspects, self._next = [], [], None
