"""Compile what a server needs before it is ready, or read it from the cache on disk."""

import asyncio
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from minigpt4_jax.inference.batch_shapes import BatchShapes
from minigpt4_jax.inference.compile_ahead import ProgramCompiler
from minigpt4_jax.inference.decode_state import DecodeState
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.inference.text_generator import TextGenerator
from minigpt4_jax.serving.jobs import DeviceCall
from minigpt4_jax.serving.scheduler import Scheduler, SchedulerConfig
from minigpt4_jax.utils.rounding import powers_of_two

SECONDS = 3600.0  # for one program


def start_compiling(scheduler: Scheduler) -> ProgramCompiler:
    """Begin to compile every program, several at a time. The model's weights need not be read yet."""
    compiler = ProgramCompiler(scheduler.model)
    compiler.start(partial(_plan, scheduler.shapes, scheduler.config))
    return compiler


async def warm_up(scheduler: Scheduler, compiler: ProgramCompiler | None = None) -> str:
    """Compile every program, then run each once, between the requests that come already. Returns what was
    done. compiler: of `start_compiling`, if that has begun."""
    begin, count = time.monotonic(), 0
    with compiler or start_compiling(scheduler) as compiler:
        compiled = await asyncio.to_thread(compiler.wait)
    for program in _programs(scheduler.model, scheduler.shapes, scheduler.config):
        call = DeviceCall(partial(_run, program), client="warm-up", timeout=SECONDS)
        scheduler.submit(call)
        await call.result()
        count += 1
    seconds = time.monotonic() - begin
    scheduler.metrics.ready_seconds.set(seconds)
    return f"{count} sets of programs in {seconds:.1f} s ({compiled})"


def _plan(shapes: BatchShapes, config: SchedulerConfig, planned: TextGenerator) -> None:
    """planned: of a `ProgramCompiler`."""
    for program in _programs(planned, shapes, config):
        program()


def _run(program: Callable[[], object], _: list[np.ndarray]) -> None:
    program()


def _programs(
    model: TextGenerator, shapes: BatchShapes, config: SchedulerConfig
) -> Iterator[Callable[[], object]]:
    """Functions that run the programs of one set of array sizes each."""
    warmer = _Warmer(model, shapes, config.cache_tokens)
    for images in powers_of_two(config.encode_images):  # as images are padded
        yield partial(warmer.encode, images)
    for size in shapes.prompts:
        yield partial(warmer.prefill, size)
    for length in shapes.cache_lengths:
        yield partial(warmer.resume, length)
    for rows in shapes.rows:
        for length in shapes.cache_lengths_of(rows):
            if rows * length <= config.cache_tokens:
                yield partial(warmer.decode, rows, length)


class _Warmer:
    """Runs the engine's programs on a made-up prompt."""

    def __init__(self, model: TextGenerator, shapes: BatchShapes, limit: int):
        """limit: rows times cache slots."""
        self._model, self._shapes, self._limit = model, shapes, limit
        self._engine = model.engine

    def encode(self, images: int) -> None:
        size = self._model.config.vision.image_size
        self._model.encode_pixels([np.zeros((size, size, 3), np.uint8)] * images)

    def prefill(self, size: int) -> DecodeState:
        request = Request(tokens=[0] * size, max_new_tokens=1)
        sizes, stages = self._shapes.with_cache(size), self._shapes.stages[-1]
        state = self._engine.prefill([request], sizes, stages, size)
        self._engine.snapshot(state)
        return state

    def resume(self, length: int) -> None:
        for size in self._shapes.pieces:
            if size <= length:
                cache = self.prefill(self._shapes.prompts[0]).cache
                start = min(1, length - size)
                request = Request(tokens=[0] * (start + size), max_new_tokens=1)
                sizes, stages = self._shapes.with_cache(length), self._shapes.stages[-1]
                self._engine.resume(cache, start, request, sizes, stages, size)

    def decode(self, rows: int, length: int) -> None:
        new = self.prefill(self._shapes.prompts[0])
        sizes = self._shapes.with_cache(length, rows)
        state = self._engine.resize(new, [0, *[None] * (rows - 1)], sizes)
        for stages in self._shapes.stages:
            state = self._engine.decode(state, stages, 1)
            self._engine.snapshot(state)
        for size in self._shapes.prompts:
            if size <= length:
                state = self._engine.insert(state, self.prefill(size), 0)
        state = self._engine.finish_rows(state, np.zeros(rows, bool))
        for tokens in self._shapes.cache_lengths_of(rows):
            if tokens <= length:
                stored = self._shapes.with_cache(tokens).cache_length
                self._engine.take_cache_row(state.cache, 0, stored)
        self._resize(state, rows, length)

    def _resize(self, state: DecodeState, rows: int, length: int) -> None:
        """To fewer rows, to more, or to a longer cache. (Two steps at a time are rare.)"""
        shapes = self._shapes
        for fewer in [n for n in shapes.rows if n < rows][-1:]:
            self._engine.resize(state, range(fewer), shapes.with_cache(length, fewer))
        for more in [n for n in shapes.rows if n > rows][:1]:
            # Where the lengths of more rows are finer, a shorter one may be enough.
            for enough in [n for n in shapes.cache_lengths_of(more) if length // 2 < n <= length]:
                self._more_rows(state, more, enough)
        for longer in [n for n in shapes.cache_lengths_of(rows) if n > length][:1]:
            if rows * longer <= self._limit:
                self._engine.resize(state, range(rows), shapes.with_cache(longer, rows))

    def _more_rows(self, state: DecodeState, rows: int, length: int) -> None:
        if rows * length <= self._limit:
            slots = [*range(state.ids.shape[0])]
            slots += [None] * (rows - len(slots))
            self._engine.resize(state, slots, self._shapes.with_cache(length, rows))
