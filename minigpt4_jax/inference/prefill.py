"""Prefill of a running batch: one prompt at a time, whole or in pieces, possibly after a cached prefix."""

from collections.abc import Hashable
from dataclasses import dataclass

from minigpt4_jax.inference.batch_shapes import BatchShapes
from minigpt4_jax.inference.batch_sizing import BatchSizing
from minigpt4_jax.inference.decode_state import DecodeState
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.requests import (
    BucketSizes,
    Completion,
    Request,
    bucket,
    bucket_sizes,
    section,
)
from minigpt4_jax.inference.runner import ModelRunner
from minigpt4_jax.models.kv_cache import KVCache
from minigpt4_jax.utils.rounding import next_power_of_two

SHARED_PROMPTS = 2  # prompts whose caches are kept for those that follow
SMALLEST_SHARED = 64  # tokens
NOTHING = Completion([], [], False, 0.0)


@dataclass(eq=False)
class PrefillRow:
    """A request on its way through a running batch.

    Attributes:
        key: what its progress is reported as.
        slot: its place in the arrays on the device, while it is decoded.
        completion: the answer so far, as the host knows it.
        num_cached: tokens of the prompt in `cache`, while it is processed in pieces.
        num_reused: tokens of the prompt that were in the prefix cache.
    """

    key: Hashable
    request: Request
    slot: int | None = None
    completion: Completion = NOTHING
    finished: bool = False
    num_cached: int = 0
    cache: KVCache | None = None
    num_reused: int = 0


class Prefill:
    """Processes the prompts of rows by the programs of a runner."""

    def __init__(
        self,
        runner: ModelRunner,
        sizing: BatchSizing,
        piece_tokens: int | None,
        prefix_cache: PrefixCache | None,
        *,
        share_prompts: bool = False,
    ):
        """
        Args:
            piece_tokens: of a prompt, processed at a time; None: the whole prompt.
            prefix_cache: of finished requests, which prompts continue from.
            share_prompts: prompts continue from those processed before them. Without the other two.
        """
        self._runner, self._sizing = runner, sizing
        self._piece_tokens, self._finished = piece_tokens, prefix_cache
        self._shared = PrefixCache(SHARED_PROMPTS, compare_visual=False) if share_prompts else None

    def reuse_prefix(self, row: PrefillRow) -> None:
        """Let a row continue from a cached prompt that begins alike, if there is one."""
        caches = self._finished or self._shared
        if caches is not None:
            cached = caches.take(row.request, self._runner.leaves, self._padded)
            row.num_cached, row.cache = cached or (0, None)
            row.num_reused = row.num_cached

    def next_piece(self, row: PrefillRow) -> tuple[int, int]:
        """The end of a row's next piece, and how many tokens it takes with its padding."""
        total = len(row.request.tokens)
        limit = self._piece_tokens
        stop = total if limit is None else min(total, row.num_cached + limit)
        return stop, self._padded(stop - row.num_cached, row.cache is not None)

    def _padded(self, tokens: int, resumed: bool) -> int:
        """How many tokens of a prompt are processed for these, with their padding. resumed: after others."""
        before_last = 0  # tokens of whole pieces
        if self._piece_tokens is not None:
            before_last = (tokens - 1) // self._piece_tokens * self._piece_tokens
        last, shapes = tokens - before_last, self._sizing.shapes
        if shapes is None:
            return before_last + bucket(last)
        return before_last + shapes.prompt(last, resumed=resumed or before_last > 0)

    def process_part(self, row: PrefillRow, stop: int) -> None:
        """Process a row's prompt up to a token that is not its last."""
        request, piece = row.request, stop - row.num_cached
        length = bucket(-(-len(request.tokens) // piece) * piece)
        sizes = bucket_sizes([request])._replace(cache_length=length, max_new_tokens=1)
        row.cache = self._run(row, section(request, 0, stop), sizes).cache
        row.num_cached = stop

    def finish(self, row: PrefillRow, *, starts_batch: bool) -> DecodeState:
        """Process the rest of a row's prompt.

        starts_batch: the state becomes the batch's, in the batch's sizes. Otherwise its row is inserted
        into a state that exists, which also fills the rest of the arrays.
        """
        request, shapes = row.request, self._sizing.shapes
        grows = starts_batch and (shapes is not None or self._shared is not None)
        if starts_batch:
            sizes = self._sizing.sizes([request])
        else:
            length = bucket(len(request.tokens))
            sizes = bucket_sizes([request])._replace(cache_length=length, max_new_tokens=1)
        state = self._run(row, request, sizes)
        row.cache = None
        if grows:
            rows = self._sizing.num_rows(1)
            slots = [0, *[None] * (rows - 1)]
            state = self._runner.resize(state, slots, self._sizing.sizes([request], rows))
        return state

    def _run(self, row: PrefillRow, request: Request, sizes: BucketSizes) -> DecodeState:
        """request: the row's, up to the last token of this piece."""
        if self._sizing.shapes is not None:
            return self._run_in_shapes(self._sizing.shapes, row, request)
        if self._shared is not None:
            return self._run_shared(self._shared, row)
        stages = self._sizing.stages([request])
        if row.cache is None:
            return self._runner.prefill([request], sizes, stages)
        cache, row.cache = row.cache, None
        return self._runner.resume(cache, row.num_cached, request, sizes, stages)

    def _run_shared(self, shared: PrefixCache, row: PrefillRow) -> DecodeState:
        """Process the rest of a row's prompt, and keep its cache for those that follow."""
        request, runner = row.request, self._runner
        # Powers of two: the caches of most prompts have the same shape, as have the programs.
        length = next_power_of_two(max(SMALLEST_SHARED, len(request.tokens)))
        sizes = bucket_sizes([request])._replace(cache_length=length, max_new_tokens=1)
        stages = self._sizing.stages([request])
        if row.cache is None:
            state = runner.prefill([request], sizes, stages)
        else:
            cache, row.cache = row.cache, None
            if cache.length > length:
                cache = runner.take_cache_row(cache, 0, length)
            # The padded rest must lie within the cache: it may repeat some tokens.
            start = min(row.num_cached, length - bucket(len(request.tokens) - row.num_cached))
            state = runner.resume(cache, start, request, sizes, stages)
        shared.store(request, [], state.cache, runner.leaves, state.nonfinite)
        return state

    def _run_in_shapes(self, shapes: BatchShapes, row: PrefillRow, request: Request) -> DecodeState:
        size = shapes.prompt(len(request.tokens) - row.num_cached, resumed=row.cache is not None)
        stages = shapes.stages[-1]  # one program for all requests
        if row.cache is None:
            return self._runner.prefill([request], shapes.with_cache(size), stages, size)
        cache, row.cache = row.cache, None
        sizes = shapes.with_cache(max(len(row.request.tokens), cache.length))
        # The padded piece must lie within the cache: it may repeat some tokens.
        start = min(row.num_cached, sizes.cache_length - size)
        return self._runner.resume(cache, start, request, sizes, stages, size)
