"""The generation engine: prefill by length bucket, then one compiled loop over all rows of a batch.

Every row has its own length, limit, stop rules, options and random stream, all of them arrays in
`State`, so requests of any kind share a program. Shapes are rounded up to buckets, so that few
programs are compiled; the cache is donated, so that decoding does not copy it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt4_jax.generate.sampling import Options, Plan, choose, plan_of, stack_options
from minigpt4_jax.models.llm import KVCache
from minigpt4_jax.models.minigpt import MiniGpt

Array = Any  # of JAX inside the programs, of NumPy where they are called
BATCH_SIZE = 32  # rows decoded together
GREEDY = Options()
STEPS = 1 << 30  # more than any limit: the loop runs until every row is done


@dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    tokens: Sequence[int]  # prompt ids, IMAGE in the visual slots
    visual: Any = None  # [I * P, D] float32, the visual tokens of those slots; None without images
    max_new_tokens: int = 20
    options: Options = GREEDY
    seed: int = 0
    stops: Sequence[Sequence[int]] = ()  # id sequences that end the answer


class Rows(NamedTuple):
    """What a batch asks for, one entry a row; B is rounded up with rows that want nothing."""

    tokens: Array  # [B, T] int32
    lengths: Array  # [B] int32
    visual: Array  # [B, I * P, D] float32
    limit: Array  # [B] int32: tokens to generate at most
    stops: Array  # [B, R, W] int32, each sequence at the right end, -1 before it
    keys: Array  # [B] random streams
    options: Options  # arrays [B]


class State(NamedTuple):
    """A batch between two steps. Rows are slots: any can be replaced by a newly prefilled one."""

    cache: KVCache
    token: Array  # [B] int32: last token chosen, not yet in the cache
    position: Array  # [B] int32: its position in the row
    ids: Array  # [B, N] int32: generated so far, -1 after them
    made: Array  # [B] int32: how many
    done: Array  # [B] bool
    limit: Array  # [B] int32
    stops: Array  # [B, R, W] int32
    keys: Array  # [B]
    options: Options


def bucket(n: int, least: int = 32) -> int:
    """The smallest of least * 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that n fits into."""
    size = least
    while size < n:
        size *= 2
    three_quarters = size * 3 // 4
    return three_quarters if size > 2 * least and n <= three_quarters else size


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class Engine:
    """Compiled programs of one model, whose parameters others of the same shapes can replace."""

    def __init__(self, model: MiniGpt):
        self.config = model.config
        self._graphdef, self._treedef = _structure(model)
        self._leaves = jax.tree.leaves(nnx.state(model))
        self._start = jax.jit(self._start_program, static_argnums=(2, 3, 4))
        self._decode = jax.jit(self._decode_program, static_argnums=(3,), donate_argnums=(1,))

    def set_parameters(self, model: MiniGpt) -> None:
        """Use the parameters of another model of the same structure; compiled programs stay."""
        self._leaves = jax.tree.leaves(nnx.state(model))

    def generate(
        self, requests: Sequence[Request], batch_size: int = BATCH_SIZE
    ) -> list[list[int]]:
        """New ids of each request, in order; a stop sequence that ended a row is its last ids."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].tokens))
        found: list[list[int]] = [[] for _ in requests]
        for at in range(0, len(order), batch_size):
            some = order[at : at + batch_size]
            rows = [requests[i] for i in some]
            state = self.decode(self.prefill(rows), plan_of([r.options for r in rows], self.vocab))
            ids, counts = np.asarray(state.ids), np.asarray(state.made)
            for row, i in enumerate(some):
                found[i] = ids[row, : counts[row]].tolist()
        return found

    @property
    def vocab(self) -> int:
        return self.config.llm.vocab

    def prefill(self, requests: Sequence[Request]) -> State:
        """Read the prompts and choose each row's first token."""
        rows = self._rows(requests)
        longest = int((rows.lengths + rows.limit).max())
        plan = plan_of([r.options for r in requests], self.vocab)
        room = bucket(int(rows.limit.max()), 16)
        return self._start(
            self._leaves, rows, max(bucket(longest), rows.tokens.shape[1]), room, plan
        )

    def decode(self, state: State, plan: Plan, steps: int = STEPS) -> State:
        """Up to `steps` more tokens for every row that is not done. `state` is given up."""
        return self._decode(self._leaves, state, steps, plan)

    def _rows(self, requests: Sequence[Request]) -> Rows:
        b = power_of_two(len(requests))
        none = Request(tokens=[0], max_new_tokens=0)
        padded = [*requests, *[none] * (b - len(requests))]
        lengths = np.array([len(r.tokens) for r in padded], np.int32)
        tokens = np.zeros((b, bucket(int(lengths.max()))), np.int32)
        for row, r in zip(tokens, padded, strict=True):
            row[: len(r.tokens)] = r.tokens
        seeds = jnp.asarray([r.seed % (1 << 32) for r in padded], jnp.uint32)
        return Rows(
            tokens, lengths, stack_visual([r.visual for r in padded], self.config.llm.width),
            np.array([r.max_new_tokens for r in padded], np.int32),
            _stack_stops([r.stops for r in padded]),
            jax.vmap(partial(jax.random.key, impl="threefry2x32"))(seeds),
            stack_options([r.options for r in padded]),
        )  # fmt: skip

    # --- the compiled programs --------------------------------------------------------------

    def _model(self, leaves: list[jax.Array]) -> MiniGpt:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _start_program(
        self, leaves: list[jax.Array], rows: Rows, cache_length: int, room: int, plan: Plan
    ) -> State:
        model = self._model(leaves)
        embeds = model.merge(rows.tokens, rows.visual)
        hidden, cache = model.llm.prefill(embeds, rows.lengths, cache_length)
        last = jnp.take_along_axis(hidden, rows.lengths[:, None, None] - 1, axis=1)[:, 0]
        b = rows.lengths.shape[0]
        state = State(
            cache,
            token=jnp.zeros(b, jnp.int32),
            position=rows.lengths - 1,
            ids=jnp.full((b, room), -1, jnp.int32),
            made=jnp.zeros(b, jnp.int32),
            done=rows.limit <= 0,
            limit=rows.limit,
            stops=rows.stops,
            keys=rows.keys,
            options=rows.options,
        )
        return _advance(state, model.llm.logits(last), plan)

    def _decode_program(
        self, leaves: list[jax.Array], state: State, steps: jax.Array, plan: Plan
    ) -> State:
        model = self._model(leaves)

        def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            i, s = carry
            embeds = model.llm.embed_tokens(s.token[:, None])
            hidden, cache = model.llm.decode(embeds, s.position[:, None], s.cache)
            return i + 1, _advance(s._replace(cache=cache), model.llm.logits(hidden[:, 0]), plan)

        def wanted(carry: tuple[jax.Array, State]) -> jax.Array:
            return (carry[0] < steps) & ~jnp.all(carry[1].done)

        return jax.lax.while_loop(wanted, step, (jnp.int32(0), state))[1]


def _advance(s: State, logits: jax.Array, plan: Plan) -> State:
    """Choose the next token of the rows that are not done, from logits [B, V] float32."""
    token = choose(logits, s.ids, s.made, _single_ids(s.stops), s.keys, s.options, plan)
    token = jnp.where(s.done, s.token, token)
    live = ~s.done
    at = jnp.where(live, s.made, s.ids.shape[1])  # a finished row writes nowhere
    ids = s.ids.at[jnp.arange(s.ids.shape[0]), at].set(token, mode="drop")
    made = s.made + live
    done = s.done | (made >= s.limit) | _ended(ids, made, s.stops)
    return s._replace(token=token, position=s.position + live, ids=ids, made=made, done=done)


def _ended(ids: jax.Array, made: jax.Array, stops: jax.Array) -> jax.Array:
    """Whether a row's last tokens are one of its stop sequences: [B] bool."""
    width = stops.shape[2]
    at = made[:, None] - width + jnp.arange(width)  # [B, W]
    tail = jnp.take_along_axis(ids, jnp.maximum(at, 0), axis=1)
    tail = jnp.where(at >= 0, tail, -2)  # nothing generated there
    equal = (stops == tail[:, None]) | (stops == -1)
    return jnp.any(jnp.all(equal, axis=2) & (stops[:, :, -1] >= 0), axis=1)


def _single_ids(stops: jax.Array) -> jax.Array:
    """The stop sequences of one id: [B, R], -1 for the others."""
    return jnp.where(jnp.all(stops[:, :, :-1] == -1, axis=2), stops[:, :, -1], -1)


def _stack_stops(stops: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    count = power_of_two(max(1, *(len(row) for row in stops)))
    width = power_of_two(max([2, *(len(ids) for row in stops for ids in row)]))
    table = np.full((len(stops), count, width), -1, np.int32)
    for row, sequences in zip(table, stops, strict=True):
        for place, ids in zip(row, sequences, strict=False):
            if ids:
                place[width - len(ids) :] = ids
    return table


def stack_visual(visual: Sequence[Any], width: int) -> np.ndarray:
    """Visual tokens [I * P, D] of rows, or None -> [B, I * P, D] float32, the shorter padded."""
    slots = max((0 if v is None else len(v) for v in visual), default=0)
    table = np.zeros((len(visual), slots, width), np.float32)
    for row, v in zip(table, visual, strict=True):
        if v is not None:
            row[: len(v)] = v
    return table


def _structure(model: MiniGpt) -> tuple[Any, Any]:
    graphdef, state = nnx.split(model)
    return graphdef, jax.tree.structure(state)
