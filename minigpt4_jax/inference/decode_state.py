"""A running batch, and what programs do to it: choose a token for every row, put a new row into a slot,
end rows, and report what the host looks at."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.inference.requests import Completion
from minigpt4_jax.inference.sampling import SamplingParams, SamplingStages, sample
from minigpt4_jax.inference.stop_sequences import completing
from minigpt4_jax.models.kv_cache import cache_axes
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain

Array = Any  # of JAX inside the programs, of NumPy where they are called
PRNG = "threefry2x32"


class Rows(NamedTuple):
    """What a batch asks for, one entry a row; B is rounded up with rows that want nothing."""

    tokens: Array  # [B, T] int32
    lengths: Array  # [B] int32
    visual: Array  # [B, I * P, D] float32
    limit: Array  # [B] int32: tokens to generate at most
    stops: Array  # [B, R, W] int32, each sequence at the right end, -1 before it
    keys: Array  # [B] random streams
    options: SamplingParams  # arrays [B]


class State(NamedTuple):
    """A batch between two steps. Rows are slots: any can be replaced by a newly prefilled one."""

    cache: Any  # KVCache
    token: Array  # [B] int32: last token chosen, not yet in the cache
    position: Array  # [B] int32: its position in the row
    ids: Array  # [B, N] int32: generated so far, -1 after them
    logprobs: Array  # [B, N] float32 of those ids, by the model itself
    made: Array  # [B] int32: how many
    done: Array  # [B] bool
    stopped: Array  # [B] bool: done by a stop sequence
    limit: Array  # [B] int32
    stops: Array  # [B, R, W] int32
    keys: Array  # [B]
    options: SamplingParams


def placed(s: State) -> State:
    """The state as every program leaves it on a mesh: the cache split by rows and heads, the rest
    whole on every device."""
    cache = jax.tree.map(lambda a: constrain(a, *cache_axes(s.cache)), s.cache)
    return jax.tree.map(constrain, s._replace(cache=None))._replace(cache=cache)


def advance(s: State, logits: jax.Array, plan: SamplingStages) -> State:
    """Choose the next token of the rows that are not done, from logits [B, V] float32."""
    logits = constrain(logits, BATCH_AXES)
    ends = completing(s.ids, s.made, s.stops)
    token = sample(logits, s.ids, s.made, ends, s.keys, s.options, plan)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    logprob = chosen - jax.nn.logsumexp(logits, axis=1)
    ended = jnp.any(ends == token[:, None], axis=1)
    token = jnp.where(s.done, s.token, token)
    live = ~s.done
    at = jnp.where(live, s.made, s.ids.shape[1])  # a finished row writes nowhere
    rows = jnp.arange(s.ids.shape[0])
    made = s.made + live
    return s._replace(
        token=token,
        position=s.position + live,
        ids=s.ids.at[rows, at].set(token, mode="drop"),
        logprobs=s.logprobs.at[rows, at].set(logprob, mode="drop"),
        made=made,
        done=s.done | (made >= s.limit) | ended,
        stopped=s.stopped | (live & ended),
    )


def insert(state: State, new: State, slot: jax.Array) -> State:
    """Put the row of `new`, a batch of one with the same shapes, into a slot of `state`."""
    axis = 0 if isinstance(state.cache.k, list) else 1  # of stacked layers: [L, B, K, S, H]

    def put(old: jax.Array, row: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, row, slot, axis)

    keys = put(jax.random.key_data(state.keys), jax.random.key_data(new.keys))
    cache = jax.tree.map(partial(put, axis=axis), state.cache, new.cache)
    others = [s._replace(cache=None, keys=None) for s in (state, new)]
    return placed(
        jax.tree.map(put, *others)._replace(
            cache=cache, keys=jax.random.wrap_key_data(keys, impl=PRNG)
        )
    )


def end(state: State, rows: jax.Array) -> State:
    """No more steps for rows [B] that are True."""
    return placed(state._replace(done=state.done | rows))


def report(s: State) -> tuple[jax.Array, jax.Array]:
    """What the host reads: [B, 3 + N] int32 (made, done, stopped, ids) and the log-probabilities.

    New arrays, as the state is given up to the next chunk before they are read.
    """
    head = [a.astype(jnp.int32)[:, None] for a in (s.made, s.done, s.stopped)]
    return constrain(jnp.concatenate([*head, s.ids], axis=1)), constrain(jnp.copy(s.logprobs))


def read(owners: list[int], report: Any) -> Iterator[tuple[int, int, Completion, bool]]:
    """(slot, request, answer so far, done) of the slots that were in use."""
    numbers, logprobs = (np.asarray(a) for a in report)
    for slot, i in enumerate(owners):
        made, done, stopped = numbers[slot, :3].tolist()
        if i >= 0:
            some = logprobs[slot, :made].tolist()
            ids = numbers[slot, 3 : 3 + made].tolist()
            yield slot, i, Completion(ids, some, bool(stopped), sum(some)), bool(done)


def cut(answer: Completion, keep: int) -> Completion:
    logprobs = answer.logprobs[:keep]
    return Completion(answer.ids[:keep], logprobs, True, sum(logprobs))
