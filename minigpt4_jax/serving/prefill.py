"""The prompt of one request, processed in chunks, so that running answers go on in between."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np

from minigpt4_jax.config import IMAGE
from minigpt4_jax.inference.decode_state import BatchInputs, DecodeState
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.models.kv_cache import KVCache
from minigpt4_jax.serving.jobs import Generation
from minigpt4_jax.serving.shapes import Shapes, fit, shorten_stop_sequences, stage_sets


class Prefill:
    """A prompt on its way into the cache.

    Attributes:
        job: whose prompt it is, its request with visual tokens.
        row: the state after the last chunk, with the first token; None before. It is computed
            asynchronously, so an error of the device shows when it is read.
    """

    def __init__(
        self,
        engine: Engine,
        shapes: Shapes,
        copy_cache: Callable[[KVCache, int], KVCache],
        job: Generation,
        find_cached: Callable[[], tuple[int, KVCache | None]],
    ):
        """find_cached: how many leading tokens are in another prompt's cache, which is left as it is;
        called before the first chunk."""
        self._engine, self._shapes, self._copy_cache, self.job = engine, shapes, copy_cache, job
        self._stages = stage_sets(engine.vocab)[-1]  # one program for all requests
        request = job.request
        self._request = replace(request, stop_sequences=shorten_stop_sequences(request))
        self._position = 0
        self._cache: KVCache | None = None
        self._cache_is_shared = False
        self._find_cached: Callable[[], tuple[int, KVCache | None]] | None = find_cached
        self.row: DecodeState | None = None

    def next_chunk(self) -> int:
        """Tokens of the next chunk, with padding; 0 if there is none."""
        if self._find_cached is not None:
            (length, cache), self._find_cached = self._find_cached(), None
            if cache is not None and self._cost(length) < self._cost(0):
                self._position, self._cache, self._cache_is_shared = length, cache, True
                self.job.cached_tokens = length
        return 0 if self.row is not None else self._chunk(self._position)

    def _chunk(self, position: int) -> int:
        rest = len(self._request.tokens) - position
        sizes = self._shapes.suffix_chunks if position else self._shapes.prompt_chunks
        return fit(sizes, min(rest, self._shapes.prefill_chunk))

    def _cost(self, position: int) -> int:
        """Tokens to process from a position on, with padding."""
        cost = 0
        while position < len(self._request.tokens):
            chunk = self._chunk(position)
            position, cost = position + chunk, cost + chunk
        return cost

    def advance(self) -> None:
        """Dispatch the next chunk."""
        total, chunk = len(self._request.tokens), self.next_chunk()
        end = min(self._position + chunk, total)
        if self._cache is None:
            state = self._engine.prefill_inputs(
                self._inputs(0, end, chunk), self._shapes.bucket_sizes(chunk), self._stages
            )
        else:
            cache_length = fit(self._shapes.cache_lengths, total)
            # The padded chunk must lie within the cache: it may repeat some tokens.
            start = min(self._position, cache_length - chunk)
            cache = self._cache
            if self._cache_is_shared or cache.length != cache_length:
                cache = self._copy_cache(cache, cache_length)
            state = self._engine.extend(
                cache, self._inputs(start, end, chunk), start,
                self._shapes.max_new_tokens, self._stages,
            )  # fmt: skip
        self._position, self._cache, self._cache_is_shared = end, state.cache, False
        if end == total:
            self.row = state

    def _inputs(self, start: int, end: int, chunk: int) -> BatchInputs:
        """The tokens from start to end as arrays [1, chunk], with as many visual tokens, so that the
        number of images changes no shape."""
        tokens = self._request.tokens
        before, count = (_num_visual(part) for part in (tokens[:start], tokens[start:end]))
        width = self._engine.config.llm.width
        visual = np.zeros((chunk, width), np.float32)
        if self._request.visual is not None:
            visual[:count] = self._request.visual[before : before + count]
        request = replace(self._request, tokens=tokens[start:end], visual=visual)
        inputs = self._engine.batch_inputs([request], self._shapes.bucket_sizes(chunk))
        padded = np.zeros((1, chunk), np.int32)
        padded[:, : end - start] = inputs.tokens[:, : end - start]
        return inputs._replace(tokens=padded)

    def wait(self) -> DecodeState:
        """The row once the device has computed it. Raises the device's error."""
        assert self.row is not None
        row: DecodeState = jax.block_until_ready(self.row)
        return row


def _num_visual(tokens: Sequence[int]) -> int:
    return sum(token == IMAGE for token in tokens)
