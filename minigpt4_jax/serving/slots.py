"""The answers that are decoded together: a DecodeState whose rows and cache grow and shrink in steps."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from minigpt4_jax.inference.decode_state import PRNG, DecodeState, Snapshot, constrain_state
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.models.kv_cache import KVCache, QuantizedArray, grow_cache
from minigpt4_jax.parallel.sharding import with_mesh
from minigpt4_jax.serving.jobs import Generation
from minigpt4_jax.serving.shapes import Shapes, choose_stages, fit


class Slots:
    """The running answers, one in each slot.

    The cache of all rows together takes at most `cache_tokens` positions, so the longest answer
    decides how many fit beside it.
    """

    def __init__(self, engine: Engine, mesh: Mesh | None, shapes: Shapes, cache_tokens: int):
        self._engine, self._shapes, self._cache_tokens = engine, shapes, cache_tokens
        self._resize = jax.jit(with_mesh(resize, mesh), static_argnums=(2,))
        self.state: DecodeState | None = None
        self.owners: list[Generation | None] = []

    @property
    def running(self) -> list[Generation]:
        """The answers that are being decoded."""
        return [job for job in self.owners if job is not None]

    @property
    def cache_size(self) -> int:
        """Positions of the cache in use, of all rows together."""
        return 0 if self.state is None else len(self.owners) * self.state.cache.length

    def fits(self, requested: Sequence[int], running: Sequence[Generation]) -> bool:
        """Whether rows of these lengths (prompt and answer) find a place beside the running answers."""
        count = len(running) + len(requested)
        if count > self._shapes.max_rows:
            return False
        lengths = [*requested, *(total_length(job) for job in running)]
        rows, length = self._shape(count, max(lengths))
        return rows * length <= self._cache_tokens

    def _shape(self, rows: int, length: int) -> tuple[int, int]:
        return fit(self._shapes.rows, rows), fit(self._shapes.cache_lengths, length)

    def add(self, row: DecodeState, job: Generation) -> None:
        """Put a prefilled row into a free slot. `fits` has said yes to it."""
        running = self.running
        rows, length = self._shape(
            len(running) + 1, max(total_length(other) for other in [*running, job])
        )
        if self.state is None:
            indices = np.full(rows, -1, np.int32)
            self.state = self._resize(row, indices, length)
            self.owners = [None] * rows
        elif rows > len(self.owners) or length > self.state.cache.length:
            self._reshape(rows, length)
        slot = self.owners.index(None)
        self.state = self._engine.insert(self.state, row, slot)
        self.owners[slot] = job

    def shrink(self) -> None:
        """Give up rows and cache that the running answers do not need."""
        running = self.running
        if not running:
            self.clear()
            return
        assert self.state is not None
        rows, length = self._shape(len(running), max(map(total_length, running)))
        if rows < len(self.owners) or length < self.state.cache.length:
            self._reshape(rows, length)

    def _reshape(self, rows: int, length: int) -> None:
        """Move the running answers into a state of this size."""
        kept = [slot for slot, job in enumerate(self.owners) if job is not None]
        indices = np.full(rows, -1, np.int32)
        indices[: len(kept)] = kept
        self.state = self._resize(self.state, indices, length)
        self.owners = [*(self.owners[slot] for slot in kept), *[None] * (rows - len(kept))]

    def decode(self, steps: int) -> Snapshot:
        """Dispatch up to `steps` more tokens for every answer; a copy of the state after them."""
        requests = [job.request for job in self.running]
        assert self.state is not None
        stages = choose_stages(requests, self._engine.vocab)
        self.state = self._engine.decode(self.state, stages, steps)
        return self._engine.snapshot(self.state)

    def finish(self, jobs: Sequence[Generation]) -> None:
        """End answers that the device still decodes; their slots are free already."""
        assert self.state is not None
        rows = np.array([job in jobs for job in self.owners])
        self.state = self._engine.finish_rows(self.state, rows)

    def free(self, job: Generation) -> None:
        """Free the slot of an answer that is done."""
        self.owners[self.owners.index(job)] = None

    def clear(self) -> None:
        """Drop everything."""
        self.state, self.owners = None, []


def total_length(job: Generation) -> int:
    """Tokens of the prompt and of the longest answer."""
    return len(job.request.tokens) + job.request.max_new_tokens


def resize(state: DecodeState, indices: jax.Array, cache_length: int) -> DecodeState:
    """The rows indices [B'] of a state as a new state with S = cache_length; -1 is a free row.

    The kept rows have no more than S positions.
    """
    index = jnp.maximum(indices, 0)
    axis = 0 if isinstance(state.cache.k, list) else 1  # stacked layers: [L, B, K, S, H]

    def take(a: jax.Array, axis: int = 0) -> jax.Array:
        return jnp.take(a, index, axis=axis)

    cache = jax.tree.map(lambda a: take(a, axis), _cut_cache(state.cache, cache_length))
    keys = jax.random.wrap_key_data(take(jax.random.key_data(state.keys)), impl=PRNG)
    rest: DecodeState = jax.tree.map(take, state._replace(cache=None, keys=None))
    resized = rest._replace(
        cache=grow_cache(cache, cache_length), keys=keys, done=rest.done | (indices < 0)
    )
    return constrain_state(resized)


def _cut_cache(cache: KVCache, length: int) -> KVCache:
    """The first `length` positions."""
    if cache.length <= length:
        return cache

    def cut(x: Any) -> Any:
        if isinstance(x, QuantizedArray):
            return QuantizedArray(x.levels[..., :length, :], x.scale[..., :length])
        return x[..., :length, :]

    result: KVCache = jax.tree.map(cut, cache, is_leaf=lambda x: isinstance(x, QuantizedArray))
    return result


def copy_cache(mesh: Mesh | None) -> Callable[[KVCache, int], KVCache]:
    """A compiled function: (cache, S) -> a copy of its first S positions, padded to S."""

    def copy(cache: KVCache, length: int) -> KVCache:
        sized = grow_cache(_cut_cache(cache, length), length)
        copied: KVCache = jax.tree.map(jnp.copy, sized)
        return copied

    return jax.jit(with_mesh(copy, mesh), static_argnums=(1,))
