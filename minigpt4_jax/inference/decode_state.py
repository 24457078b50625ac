"""The state of a running batch, and operations on it: append a token to every row, insert a new row,
finish rows, and copy out what the host reads."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.inference.requests import Completion
from minigpt4_jax.inference.sampling import SamplingParams, SamplingStages, sample
from minigpt4_jax.inference.stop_sequences import completing_tokens
from minigpt4_jax.models.kv_cache import cache_axes, grow_cache
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain

Array: TypeAlias = Any  # of JAX inside the programs, of NumPy where they are called
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
    token = sample(logits, s.ids, s.num_generated, stop_tokens, s.keys, s.sampling, stages)
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
    """Put the row of `new`, a batch of one, into a slot of `state`.

    The bucket sizes are the same, but the cache of `new` may be shorter; it is padded.
    """
    axis = 0 if isinstance(state.cache.k, list) else 1  # stacked layers: [L, B, K, S, H]

    def put(old: jax.Array, row: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, row, slot, axis)

    keys = put(jax.random.key_data(state.keys), jax.random.key_data(new.keys))
    new_cache = grow_cache(new.cache, state.cache.length)
    cache = jax.tree.map(partial(put, axis=axis), state.cache, new_cache)
    others = [s._replace(cache=None, keys=None) for s in (state, new)]
    updated: DecodeState = jax.tree.map(put, *others)
    keys = jax.random.wrap_key_data(keys, impl=PRNG)
    return constrain_state(updated._replace(cache=cache, keys=keys))


def finish_rows(state: DecodeState, rows: jax.Array) -> DecodeState:
    """Mark the rows [B] that are True as done."""
    return constrain_state(state._replace(done=state.done | rows))


def take_snapshot(s: DecodeState) -> Snapshot:
    """New arrays, as the state's own are donated to the next chunk before the host reads them."""
    head = (s.num_generated, s.done, s.hit_stop, s.nonfinite)
    numbers = jnp.concatenate([*(a.astype(jnp.int32)[:, None] for a in head), s.ids], axis=1)
    return Snapshot(constrain(numbers), constrain(jnp.copy(s.logprobs)))


def read_snapshot(
    owners: list[int | None], snapshot: Snapshot
) -> Iterator[tuple[int, int, Completion, bool]]:
    """(slot, request, completion so far, done) of the slots in use.

    owners: the request in each slot, None where a slot is free.
    """
    numbers, all_logprobs = (np.asarray(a) for a in snapshot)
    for slot, index in enumerate(owners):
        if index is not None:
            num_generated, done, hit_stop, nonfinite = numbers[slot, :4].tolist()
            logprobs = all_logprobs[slot, :num_generated].tolist()
            ids = numbers[slot, 4 : 4 + num_generated].tolist()
            completion = Completion(ids, logprobs, bool(hit_stop), sum(logprobs), bool(nonfinite))
            yield slot, index, completion, bool(done)


def truncate(completion: Completion, length: int) -> Completion:
    """The first `length` tokens, ended there by a stop rule of the host."""
    logprobs = completion.logprobs[:length]
    return Completion(completion.ids[:length], logprobs, True, sum(logprobs))
