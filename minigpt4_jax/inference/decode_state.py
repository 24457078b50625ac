"""The state of a running batch, and operations on it: append a token to every row, insert a new row,
change the sizes, finish rows, and copy out what the host reads."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.inference.requests import BucketSizes, Completion
from minigpt4_jax.inference.sampling import SamplingParams, SamplingStages, sample
from minigpt4_jax.inference.stop_sequences import completing_tokens
from minigpt4_jax.models.kv_cache import KVCache, cache_axes, grow_cache
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain

Array: TypeAlias = Any  # of JAX inside the programs, of NumPy where they are called
Owner = TypeVar("Owner")  # what a slot of a batch is used for
PRNG = "threefry2x32"


class BatchInputs(NamedTuple):
    """What each row of a batch asks for; B is padded with rows that generate nothing."""

    tokens: Array  # [B, T] int32
    lengths: Array  # [B] int32
    visual: Array  # [B, I * P, D] float32
    max_new_tokens: Array  # [B] int32
    stop_sequences: Array  # [B, R, W] int32, right-aligned, -1 before
    keys: Array  # [B] PRNG keys
    sampling: SamplingParams  # arrays [B]


class DecodeState(NamedTuple):
    """A batch between two steps. Any row (slot) can be replaced by a newly prefilled one."""

    cache: Any  # KVCache
    token: Array  # [B] int32: last generated token, not in the cache yet
    position: Array  # [B] int32: its position in the row
    ids: Array  # [B, N] int32: generated so far, then -1
    logprobs: Array  # [B, N] float32 of those ids, by the model itself
    num_generated: Array  # [B] int32
    done: Array  # [B] bool
    hit_stop: Array  # [B] bool: done because of a stop sequence
    nonfinite: Array  # [B] bool: done because the logits of the next token were NaN or infinite
    max_new_tokens: Array  # [B] int32
    stop_sequences: Array  # [B, R, W] int32
    keys: Array  # [B]
    sampling: SamplingParams


class Snapshot(NamedTuple):
    """What the host reads of a state."""

    numbers: Array  # [B, 4 + N] int32: num_generated, done, hit_stop, nonfinite, ids
    logprobs: Array  # [B, N] float32


def constrain_state(s: DecodeState) -> DecodeState:
    """The sharding in which every program returns a state: the cache split by rows and heads, the
    rest replicated."""
    cache = jax.tree.map(lambda a: constrain(a, *cache_axes(s.cache)), s.cache)
    rest: DecodeState = jax.tree.map(constrain, s._replace(cache=None))
    return rest._replace(cache=cache)


def advance(s: DecodeState, logits: jax.Array, stages: SamplingStages) -> DecodeState:
    """Append the next token to every row that is not done, from logits [B, V] float32.

    A row whose logits are NaN or infinite gets no token and is done.
    """
    logits = constrain(logits, BATCH_AXES)
    stop_tokens = completing_tokens(s.ids, s.num_generated, s.stop_sequences)
    token = sample(
        logits, s.ids, s.num_generated, stop_tokens, s.keys, s.sampling, stages, ~s.done
    )  # fmt: skip
    logprob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    normalizer = jax.nn.logsumexp(logits, axis=1)  # not finite if a logit is NaN or +inf
    logprob = logprob - normalizer
    hit_stop = jnp.any(stop_tokens == token[:, None], axis=1)
    nonfinite = s.nonfinite | (~s.done & ~jnp.isfinite(normalizer))
    live = ~s.done & ~nonfinite
    index = jnp.where(live, s.num_generated, s.ids.shape[1])  # out of range for done rows: dropped
    rows = jnp.arange(s.ids.shape[0])
    num_generated = s.num_generated + live
    return s._replace(
        token=jnp.where(live, token, s.token),
        position=s.position + live,
        ids=s.ids.at[rows, index].set(token, mode="drop"),
        logprobs=s.logprobs.at[rows, index].set(logprob, mode="drop"),
        num_generated=num_generated,
        done=s.done | (num_generated >= s.max_new_tokens) | hit_stop | nonfinite,
        hit_stop=s.hit_stop | (live & hit_stop),
        nonfinite=nonfinite,
    )


def insert(state: DecodeState, new: DecodeState, slot: jax.Array) -> DecodeState:
    """Put the row of `new`, a batch of one whose arrays may be smaller, into a slot of `state`.

    Of its cache, as many slots are copied as `state` has; the prompt must fit into them.
    """
    length = state.cache.length
    rows_axis = _rows_axis(state.cache)

    def put(old: jax.Array, row: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, row, slot, axis)

    def cut_cache(row: jax.Array) -> jax.Array:
        return jax.lax.slice_in_dim(
            row, 0, min(length, row.shape[rows_axis + 2]), axis=rows_axis + 2
        )

    # The whole row is overwritten: what an earlier one left may be NaN, which no mask removes.
    cut = jax.tree.map(cut_cache, new.cache)
    cache = jax.tree.map(partial(put, axis=rows_axis), state.cache, grow_cache(cut, length))
    new = _pad_fields(new, *state.ids.shape[1:], *state.stop_sequences.shape[1:])
    keys = put(jax.random.key_data(state.keys), jax.random.key_data(new.keys))
    others = [s._replace(cache=None, keys=None) for s in (state, new)]
    updated: DecodeState = jax.tree.map(put, *others)
    keys = jax.random.wrap_key_data(keys, impl=PRNG)
    return constrain_state(updated._replace(cache=cache, keys=keys))


def resize(state: DecodeState, rows: jax.Array, sizes: BucketSizes) -> DecodeState:
    """The rows [B] of a state, as a batch of other sizes; a row of -1 is empty, which counts as done.

    Rows that are not done must fit; ids and stop sequences never shrink.
    """
    rows_axis = _rows_axis(state.cache)
    source = jnp.maximum(rows, 0)

    def take_cache(a: jax.Array) -> jax.Array:
        length = min(sizes.cache_length, a.shape[rows_axis + 2])
        a = jax.lax.slice_in_dim(a, 0, length, axis=rows_axis + 2)
        return jnp.take(a, source, axis=rows_axis)

    cache = grow_cache(jax.tree.map(take_cache, state.cache), sizes.cache_length)
    taken: DecodeState = jax.tree.map(lambda a: a[source], state._replace(cache=None))
    taken = _pad_fields(taken, sizes.max_new_tokens, sizes.num_stops, sizes.stop_width)
    return constrain_state(taken._replace(cache=cache, done=taken.done | (rows < 0)))


def take_cache_row(cache: KVCache, slot: jax.Array, length: int) -> KVCache:
    """The first `length` slots of one row of a cache, as a cache of one row; zeros where it is shorter."""
    rows_axis, copied = _rows_axis(cache), min(length, cache.length)

    def take(a: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(a, slot, 1, rows_axis)
        return jax.lax.slice_in_dim(row, 0, copied, axis=rows_axis + 2)

    taken = grow_cache(jax.tree.map(take, cache), length)
    constrained: KVCache = jax.tree.map(lambda a: constrain(a, *cache_axes(taken)), taken)
    return constrained


def _rows_axis(cache: KVCache) -> int:
    """The axis of rows in the arrays of a cache; two behind it is that of the slots."""
    return 0 if isinstance(cache.k, list) else 1  # stacked layers: [L, B, K, S, H]


def _pad_fields(s: DecodeState, max_new_tokens: int, num_stops: int, width: int) -> DecodeState:
    """A state, without regard to its cache, padded to at least these sizes; see `BucketSizes`."""
    tokens = (0, 0), (0, max(0, max_new_tokens - s.ids.shape[1]))
    more_stops, more_width = (
        max(0, size - old)
        for size, old in zip((num_stops, width), s.stop_sequences.shape[1:], strict=True)
    )
    stops = (0, 0), (0, more_stops), (more_width, 0)  # sequences are right-aligned
    return s._replace(
        ids=jnp.pad(s.ids, tokens, constant_values=-1),
        logprobs=jnp.pad(s.logprobs, tokens),
        stop_sequences=jnp.pad(s.stop_sequences, stops, constant_values=-1),
    )


def finish_rows(state: DecodeState, rows: jax.Array) -> DecodeState:
    """Mark the rows [B] that are True as done."""
    return constrain_state(state._replace(done=state.done | rows))


def take_snapshot(s: DecodeState) -> Snapshot:
    """New arrays, as the state's own are donated to the next chunk before the host reads them."""
    head = (s.num_generated, s.done, s.hit_stop, s.nonfinite)
    numbers = jnp.concatenate([*(a.astype(jnp.int32)[:, None] for a in head), s.ids], axis=1)
    return Snapshot(constrain(numbers), constrain(jnp.copy(s.logprobs)))


def read_snapshot(
    owners: Sequence[Owner | None], snapshot: Snapshot
) -> Iterator[tuple[int, Owner, Completion, bool]]:
    """(slot, owner, completion so far, done) of the slots in use.

    owners: whose row is in each slot, None where nobody asks for it.
    """
    numbers, all_logprobs = (np.asarray(a) for a in snapshot)
    for slot, owner in enumerate(owners):
        if owner is not None:
            num_generated, done, hit_stop, nonfinite = numbers[slot, :4].tolist()
            logprobs = all_logprobs[slot, :num_generated].tolist()
            ids = numbers[slot, 4 : 4 + num_generated].tolist()
            completion = Completion(ids, logprobs, bool(hit_stop), sum(logprobs), bool(nonfinite))
            yield slot, owner, completion, bool(done)


def truncate(completion: Completion, length: int) -> Completion:
    """The first `length` tokens, ended there by a stop rule of the host."""
    logprobs = completion.logprobs[:length]
    return Completion(completion.ids[:length], logprobs, True, sum(logprobs))
