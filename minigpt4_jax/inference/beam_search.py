"""Beam search: one compiled program reads the prompts once and follows their best continuations.

The beams of a request are branches of one row. Its cache holds the prompt once, in slots 0..T-1,
and after it every token of every beam: the token that beam q took at step i is in slot T + i Q + q. A
beam sees the prompt and its own ancestors, by a mask; so nothing is copied when beams change their
order, and the keys of a request are read once for all its beams.

Which beams go on and which are finished follows BeamSearchScorer and BeamHypotheses of transformers
4.30, that the original ran. Axis Q: beams.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.sampling import (
    SamplingParams,
    SamplingStages,
    apply_repetition_penalty,
    forbid,
    with_before,
)
from minigpt4_jax.inference.stop_sequences import completing
from minigpt4_jax.models.kv_cache import CacheUpdate, KVCache
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain

Array = Any  # of JAX inside the programs, of NumPy where they are called
UNLIKELY = -1e9  # of the beams that do not exist yet: all begin as the first


@dataclass(frozen=True)
class BeamSearchConfig:
    """How a request is searched."""

    count: int  # beams; 1 is not a search
    length_penalty: float = 1.0  # scores are sums of log-probabilities / length ** length_penalty
    early_stopping: bool = False  # stop at `count` finished answers, even if others may be better
    returned: int = 1  # answers wanted, the best first

    def check(self, options: SamplingParams) -> "BeamSearchConfig":
        """Return self. UserError: a value out of its range, or beams beside random choice."""
        if self.count < 1:
            raise UserError(f"num_beams {self.count}: expected 1 (no beam search) or more")
        if not abs(self.length_penalty) < float("inf"):
            raise UserError(f"length_penalty {self.length_penalty}: expected a finite number")
        if not 1 <= self.returned <= self.count:
            raise UserError(
                f"num_return_sequences {self.returned}: expected 1 to num_beams ({self.count})"
            )
        if not isinstance(self.early_stopping, bool):
            raise UserError(f"early_stopping {self.early_stopping!r}: expected True or False")
        for name, off in _RANDOM.items():
            if self.count > 1 and getattr(options, name) != off:
                raise UserError(
                    f"num_beams {self.count} with {name} {getattr(options, name)}: beam search "
                    f"does not choose at random; leave {name} out or set num_beams to 1"
                )
        return self


_RANDOM = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0}


class Rules(NamedTuple):
    """What the rows of a batch ask for, one entry a row."""

    lengths: Array  # [B] int32: tokens of the prompt
    limit: Array  # [B] int32: tokens to generate at most
    stops: Array  # [B, R, W] int32
    options: SamplingParams  # arrays [B]
    length_penalty: Array  # [B] float32
    early_stopping: Array  # [B] bool


class Hypotheses(NamedTuple):
    """Continuations with their scores, the best first."""

    ids: jax.Array  # [B, Q, N] int32; the tokens of a stop sequence that ended one are its last
    logprobs: jax.Array  # [B, Q, N] float32 of those ids, by the model itself
    made: jax.Array  # [B, Q] int32: how many
    scores: jax.Array  # [B, Q] float32; -inf where there is none
    ended: jax.Array  # [B, Q] bool: by a stop sequence


class State(NamedTuple):
    """A batch between two steps."""

    cache: Any  # KVCache
    ids: jax.Array  # [B, Q, N] int32: chosen so far; the last is not yet in the cache
    logprobs: jax.Array  # [B, Q, N] float32
    branch: jax.Array  # [B, Q, N] int32: as which beam each of these tokens was written
    sums: jax.Array  # [B, Q] float32: of (processed) log-probabilities
    made: jax.Array  # [B] int32: tokens of every beam
    complete: jax.Array  # [B] bool: no beam can replace a finished hypothesis any more
    done: jax.Array  # [B] bool: complete or at the limit
    finished: Hypotheses


def search(
    model: MiniGpt,
    tokens: jax.Array,  # [B, T] int32
    visual: jax.Array,  # [B, I * P, D] float32
    rules: Rules,
    beams: int,
    room: int,
    plan: SamplingStages,
) -> Hypotheses:
    """The best `beams` continuations of up to `room` tokens."""
    prompt = tokens.shape[1]
    embeds = model.merge(tokens, visual)
    hidden, cache = model.llm.prefill(embeds, rules.lengths, prompt + room * beams)
    last = jnp.take_along_axis(hidden, rules.lengths[:, None, None] - 1, axis=1)  # [B, 1, D]
    logits = jnp.repeat(model.llm.logits(last), beams, axis=1)
    state = _first_state(cache, rules, beams, room)
    state = _advance(state, logits, rules, plan)

    def step(s: State) -> State:
        at = jnp.maximum(s.made - 1, 0)  # of the tokens that are read now
        token = jnp.take_along_axis(s.ids, at[:, None, None], axis=2)[:, :, 0]
        positions = jnp.broadcast_to((rules.lengths + at)[:, None], token.shape)
        place = _place(s, rules.lengths, prompt, model.config.llm.window)
        embeds = model.llm.embed_tokens(token)
        hidden, cache = model.llm.decode(embeds, positions, s.cache, place)
        return _advance(s._replace(cache=cache), model.llm.logits(hidden), rules, plan)

    return _finish(jax.lax.while_loop(lambda s: ~jnp.all(s.done), step, state), rules)


def _first_state(cache: KVCache, rules: Rules, beams: int, room: int) -> State:
    b = rules.lengths.shape[0]
    none = jnp.full((b, beams, room), -1, jnp.int32)
    zero = jnp.zeros((b, beams, room), jnp.float32)
    nothing = Hypotheses(
        none, zero, jnp.zeros((b, beams), jnp.int32), jnp.full((b, beams), -jnp.inf),
        jnp.zeros((b, beams), bool),
    )  # fmt: skip
    sums = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, UNLIKELY), (b, beams))
    made, over = jnp.zeros(b, jnp.int32), rules.limit <= 0
    return State(cache, none, zero, jnp.zeros_like(none), sums, made, over, over, nothing)


def _place(s: State, lengths: jax.Array, prompt: int, window: int | None) -> CacheUpdate:
    """Where the beams' newest tokens go in the cache, and which slots each beam sees."""
    b, q, n = s.branch.shape
    steps, newest = jnp.arange(n), jnp.maximum(s.made - 1, 0)
    slots = prompt + newest[:, None] * q + jnp.arange(q)
    own = s.branch[..., None] == jnp.arange(q)  # [B, Q, N, Q]: beam, step, branch
    chosen = steps <= newest[:, None]  # [B, N]
    before = jnp.arange(prompt) < lengths[:, None]  # [B, T]
    if window is not None:
        first = (lengths + newest)[:, None] - window + 1  # the first position that is seen
        before &= jnp.arange(prompt) >= first
        chosen &= lengths[:, None] + steps >= first
    after = (own & chosen[:, None, :, None]).reshape(b, q, n * q)
    before = jnp.broadcast_to(before[:, None], (b, q, prompt))
    return CacheUpdate(slots, jnp.concatenate([before, after], axis=2))


def _advance(s: State, logits: jax.Array, rules: Rules, plan: SamplingStages) -> State:
    """Extend every beam by the best tokens, from logits [B, Q, V] float32."""
    logits = constrain(logits, BATCH_AXES)
    b, q, v = logits.shape
    natural = jax.nn.log_softmax(logits, axis=-1)
    ends = _over_beams(completing, s, rules.stops)  # [B, Q, R]
    total = _process(natural, s, ends, rules.options, plan) + s.sums[..., None]
    # Enough that `q` of them go on, whichever end: each beam has at most R ends.
    best, index = jax.lax.top_k(total.reshape(b, q * v), min(q * (1 + ends.shape[2]), q * v))
    # XLA on CPU knows a top_k by the slices of a sort, and sorts it all if they are sliced further. Each by
    # itself: on some meshes XLA on CPU aborts where a barrier takes both.
    best, index = jax.lax.optimization_barrier(best), jax.lax.optimization_barrier(index)
    parent, token = index // v, index % v  # [B, C]
    stops = jnp.any(_of_beams(ends, parent) == token[..., None], axis=2)
    finished = _collect(s, natural, parent[:, :q], token[:, :q])._replace(
        scores=jnp.where(stops, best, -jnp.inf)[:, :q] / _length(s.made, rules),
        ended=stops[:, :q],
    )
    finished = _best(s.finished, finished)
    going = jnp.argsort(stops, axis=1, stable=True)[:, :q]  # those that do not end, best first
    parent, token = (jnp.take_along_axis(a, going, axis=1) for a in (parent, token))
    chosen = _collect(s, natural, parent, token)
    branch = _of_beams(s.branch, parent)
    attainable = best[:, 0] / _length(s.made + 1, rules)[:, 0]
    worst = finished.scores[:, -1]
    complete = (worst > -jnp.inf) & (rules.early_stopping | (worst >= attainable))
    new = s._replace(
        ids=chosen.ids,
        logprobs=chosen.logprobs,
        branch=_at(branch, s.made, jnp.broadcast_to(jnp.arange(q), (b, q))),
        sums=jnp.take_along_axis(best, going, axis=1),
        made=s.made + 1,
        complete=complete,
        done=complete | (s.made + 1 >= rules.limit),
        finished=finished,
    )
    return _unless_done(s, new)


def _process(
    scores: jax.Array, s: State, ends: jax.Array, options: SamplingParams, plan: SamplingStages
) -> jax.Array:
    """Penalties on log-probabilities [B, Q, V], as transformers applies them in beam search."""
    b, q, v = scores.shape
    flat = scores.reshape(b * q, v)
    if plan.penalty:
        each = jax.tree.map(lambda a: jnp.repeat(a, q), options)
        used = with_before(s.ids.reshape(b * q, -1), each)
        flat = apply_repetition_penalty(flat, used, each.repetition_penalty)
    if plan.minimum:
        early = jnp.repeat(s.made < options.min_new_tokens, q)
        flat = forbid(flat, ends.reshape(b * q, -1), early)
    return flat.reshape(b, q, v)


def _length(made: jax.Array, rules: Rules) -> jax.Array:
    """What the sum over `made` [B] tokens and an end is divided by: [B, 1].

    The ids of the original begin with a BOS, which its lengths count, and end before the EOS.
    """
    return ((made + 1).astype(jnp.float32) ** rules.length_penalty)[:, None]


def _collect(s: State, natural: jax.Array, parent: jax.Array, token: jax.Array) -> Hypotheses:
    """The beams `parent` [B, Q] with one more token [B, Q]; scores and ended are yet to be set."""
    b, q = parent.shape
    logprob = natural[jnp.arange(b)[:, None], parent, token]
    ids = _at(_of_beams(s.ids, parent), s.made, token)
    logprobs = _at(_of_beams(s.logprobs, parent), s.made, logprob)
    made = jnp.broadcast_to(s.made[:, None] + 1, (b, q))
    return Hypotheses(ids, logprobs, made, jnp.zeros((b, q)), jnp.zeros((b, q), bool))


def _best(a: Hypotheses, b: Hypotheses) -> Hypotheses:
    """The best Q of both."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)
    _, order = jax.lax.top_k(both.scores, a.scores.shape[1])
    return jax.tree.map(partial(_of_beams, beam=order), both)


def _finish(s: State, rules: Rules) -> Hypotheses:
    """The best hypotheses, to which the beams that were still open at the limit belong too."""
    shape = s.sums.shape
    scores = jnp.where(s.complete[:, None], -jnp.inf, s.sums / _length(s.made, rules))
    made = jnp.broadcast_to(s.made[:, None], shape)
    return _best(s.finished, Hypotheses(s.ids, s.logprobs, made, scores, jnp.zeros(shape, bool)))


def _of_beams(x: jax.Array, beam: jax.Array) -> jax.Array:
    """Entries `beam` [B, C] of x [B, Q, ...] -> [B, C, ...]."""
    return x[jnp.arange(x.shape[0])[:, None], beam]


def _at(x: jax.Array, made: jax.Array, value: jax.Array) -> jax.Array:
    """x [B, Q, N] with value [B, Q] as entry made [B]."""
    b, q, _ = x.shape
    return x.at[jnp.arange(b)[:, None], jnp.arange(q), made[:, None]].set(value, mode="drop")


def _over_beams(rule: Any, s: State, stops: jax.Array) -> jax.Array:
    """completing() for every beam: [B, Q, R]."""
    return jax.vmap(rule, in_axes=(1, None, None), out_axes=1)(s.ids, s.made, stops)


def _unless_done(old: State, new: State) -> State:
    """The new state of the rows that were not done."""

    def pick(before: jax.Array, after: jax.Array) -> jax.Array:
        done = old.done.reshape(-1, *[1] * (before.ndim - 1))
        return jnp.where(done, before, after)

    cache = new.cache  # a row that is done writes where it wrote before
    kept = jax.tree.map(pick, old._replace(cache=None), new._replace(cache=None))
    return kept._replace(cache=cache)
