"""Beam search: one compiled program prefills the prompts and extends their best continuations.

The beams of a request share one row of the cache. It holds the prompt once, in slots 0..T-1, and
then every token of every beam: the token of beam q at step i is in slot T + i Q + q. A beam attends to
the prompt and to its own ancestors, through a mask. So the cache is never reordered, and the prompt's
keys and values are read once for all beams.

The rules for continuing and finishing beams are those of BeamSearchScorer and BeamHypotheses in
transformers 4.30, which the original uses. Axes: Q beams, C candidates.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.sampling import (
    SamplingParams,
    SamplingStages,
    apply_repetition_penalty,
    forbid,
    penalized_tokens,
)
from minigpt4_jax.inference.stop_sequences import completing_tokens
from minigpt4_jax.models.kv_cache import CacheUpdate, KVCache
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain

Array: TypeAlias = Any  # of JAX inside the programs, of NumPy where they are called
UNUSED_BEAM = -1e9  # score of all beams but the first before the first step, as they are equal

# Sampling parameters that beam search excludes, and the values that turn them off.
_SAMPLING_OFF = {
    "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "frequency_penalty": 0, "presence_penalty": 0,
}  # fmt: skip


@dataclass(frozen=True)
class BeamSearchConfig:
    """How a request is searched."""

    num_beams: int  # 1 is no search
    length_penalty: float = 1.0  # scores are sums of log-probabilities / length ** length_penalty
    early_stopping: bool = False  # stop at num_beams finished answers, even if better may follow
    num_return_sequences: int = 1  # answers to return, best first

    def check(self, sampling: SamplingParams) -> "BeamSearchConfig":
        """Return self. UserError: a value out of range, or beams together with random sampling."""
        if self.num_beams < 1:
            raise UserError(f"num_beams {self.num_beams}: expected 1 (no beam search) or more")
        if not abs(self.length_penalty) < float("inf"):
            raise UserError(f"length_penalty {self.length_penalty}: expected a finite number")
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise UserError(
                f"num_return_sequences {self.num_return_sequences}: expected 1 to num_beams "
                f"({self.num_beams})"
            )
        if not isinstance(self.early_stopping, bool):
            raise UserError(f"early_stopping {self.early_stopping!r}: expected True or False")
        for name, off in _SAMPLING_OFF.items():
            if self.num_beams > 1 and getattr(sampling, name) != off:
                raise UserError(
                    f"num_beams {self.num_beams} with {name} {getattr(sampling, name)}: beam search "
                    f"does not sample; leave {name} out or set num_beams to 1"
                )
        return self


class SearchInputs(NamedTuple):
    """What each row of a batch asks for."""

    lengths: Array  # [B] int32: tokens of the prompt
    max_new_tokens: Array  # [B] int32
    stop_sequences: Array  # [B, R, W] int32
    sampling: SamplingParams  # arrays [B]
    length_penalty: Array  # [B] float32
    early_stopping: Array  # [B] bool


class Hypotheses(NamedTuple):
    """Continuations with their scores, best first."""

    ids: Array  # [B, Q, N] int32, including a stop sequence at the end
    logprobs: Array  # [B, Q, N] float32 of those ids, by the model itself
    num_generated: Array  # [B, Q] int32
    scores: Array  # [B, Q] float32; -inf where there is no hypothesis
    hit_stop: Array  # [B, Q] bool: ended by a stop sequence


class SearchState(NamedTuple):
    """A batch between two steps."""

    cache: Any  # KVCache
    ids: jax.Array  # [B, Q, N] int32: generated so far; the last is not in the cache yet
    logprobs: jax.Array  # [B, Q, N] float32
    beam_index: jax.Array  # [B, Q, N] int32: the beam that wrote each of these tokens to the cache
    sums: jax.Array  # [B, Q] float32: sums of (processed) log-probabilities
    num_generated: jax.Array  # [B] int32: tokens of every beam
    complete: jax.Array  # [B] bool: no open beam can replace a finished hypothesis
    nonfinite: jax.Array  # [B] bool: the logits of a beam's next token were NaN or infinite
    done: jax.Array  # [B] bool: complete, nonfinite, or max_new_tokens reached
    finished: Hypotheses


def search(
    model: MiniGpt,
    tokens: jax.Array,  # [B, T] int32
    visual: jax.Array,  # [B, I * P, D] float32
    inputs: SearchInputs,
    num_beams: int,
    max_new_tokens: int,
    stages: SamplingStages,
) -> tuple[Hypotheses, jax.Array]:
    """The best `num_beams` continuations, and the rows [B] whose search ended early because logits
    were NaN or infinite. `max_new_tokens` is N, the most of all rows."""
    decoder = model.decoder
    cache_length = model.prompt_slots(tokens.shape[1]) + max_new_tokens * num_beams
    read = model.prefill(tokens, visual, inputs.lengths, cache_length)
    logits = jnp.repeat(decoder.logits(read.last[:, None]), num_beams, axis=1)
    state = _first_state(read.cache, inputs, num_beams, max_new_tokens)
    state = _advance(state, logits, inputs, stages)

    def step(s: SearchState) -> SearchState:
        newest = jnp.maximum(s.num_generated - 1, 0)  # index of the tokens that are read now
        token = jnp.take_along_axis(s.ids, newest[:, None, None], axis=2)[:, :, 0]
        positions = jnp.broadcast_to((read.lengths + newest)[:, None], token.shape)
        update = _cache_update(s, read.lengths, read.slots, model.config.llm.window)
        embeds = decoder.embed_tokens(token)
        hidden, cache = decoder.decode(embeds, positions, s.cache, update)
        return _advance(s._replace(cache=cache), decoder.logits(hidden), inputs, stages)

    state = jax.lax.while_loop(lambda s: ~jnp.all(s.done), step, state)
    return _final_hypotheses(state, inputs), state.nonfinite


def _first_state(
    cache: KVCache, inputs: SearchInputs, num_beams: int, max_new_tokens: int
) -> SearchState:
    b = inputs.lengths.shape[0]
    ids = jnp.full((b, num_beams, max_new_tokens), -1, jnp.int32)
    logprobs = jnp.zeros((b, num_beams, max_new_tokens), jnp.float32)
    finished = Hypotheses(
        ids, logprobs, jnp.zeros((b, num_beams), jnp.int32), jnp.full((b, num_beams), -jnp.inf),
        jnp.zeros((b, num_beams), bool),
    )  # fmt: skip
    sums = jnp.where(jnp.arange(num_beams) == 0, 0.0, UNUSED_BEAM)
    sums = jnp.broadcast_to(sums, (b, num_beams))
    num_generated, done = jnp.zeros(b, jnp.int32), inputs.max_new_tokens <= 0
    return SearchState(
        cache, ids, logprobs, jnp.zeros_like(ids), sums, num_generated, done, jnp.zeros_like(done),
        done, finished,
    )  # fmt: skip


def _cache_update(
    s: SearchState, lengths: jax.Array, prompt_length: int, window: int | None
) -> CacheUpdate:
    """The cache slots of the beams' newest tokens, and the slots that each beam attends to."""
    b, q, n = s.beam_index.shape
    steps, newest = jnp.arange(n), jnp.maximum(s.num_generated - 1, 0)
    slots = prompt_length + newest[:, None] * q + jnp.arange(q)
    own = s.beam_index[..., None] == jnp.arange(q)  # [B, Q, N, Q]: beam, step, writing beam
    in_prompt = jnp.arange(prompt_length) < lengths[:, None]  # [B, T]
    in_answer = steps <= newest[:, None]  # [B, N]
    if window is not None:
        first = (lengths + newest)[:, None] - window + 1  # first position within the window
        in_prompt &= jnp.arange(prompt_length) >= first
        in_answer &= lengths[:, None] + steps >= first
    answer_mask = (own & in_answer[:, None, :, None]).reshape(b, q, n * q)
    prompt_mask = jnp.broadcast_to(in_prompt[:, None], (b, q, prompt_length))
    prompt_positions = jnp.broadcast_to(jnp.arange(prompt_length), (b, prompt_length))
    answer_positions = lengths[:, None] + jnp.repeat(steps, q)
    return CacheUpdate(
        slots,
        jnp.concatenate([prompt_mask, answer_mask], axis=2),
        jnp.concatenate([prompt_positions, answer_positions], axis=1),
    )


def _advance(
    s: SearchState, logits: jax.Array, inputs: SearchInputs, stages: SamplingStages
) -> SearchState:
    """Extend every beam by the best tokens, from logits [B, Q, V] float32."""
    logits = constrain(logits, BATCH_AXES)
    b, q, v = logits.shape
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    finite = jnp.all(jnp.isfinite(jnp.max(logprobs, axis=-1)), axis=1)  # max is NaN if a logit is
    s = s._replace(nonfinite=s.nonfinite | (~s.done & ~finite), done=s.done | ~finite)
    stop_tokens = _completing_tokens_of_beams(s, inputs.stop_sequences)  # [B, Q, R]
    total = _process(logprobs, s, stop_tokens, inputs.sampling, stages) + s.sums[..., None]
    # Enough candidates that q of them continue: each beam has at most R that end it.
    num_candidates = min(q * (1 + stop_tokens.shape[2]), q * v)
    best, index = jax.lax.top_k(total.reshape(b, q * v), num_candidates)
    # XLA on CPU recognizes a top_k by the slices of a sort, and sorts everything if they are sliced
    # further. Two barriers, as on some meshes XLA on CPU aborts if one takes both.
    barrier: Any = jax.lax.optimization_barrier  # untyped
    best, index = barrier(best), barrier(index)
    parent, token = index // v, index % v  # [B, C]
    ends = jnp.any(_take_beams(stop_tokens, parent) == token[..., None], axis=2)
    finished = _extend(s, logprobs, parent[:, :q], token[:, :q])._replace(
        scores=jnp.where(ends, best, -jnp.inf)[:, :q] / _penalized_length(s.num_generated, inputs),
        hit_stop=ends[:, :q],
    )
    finished = _best_of_both(s.finished, finished)
    open_ = jnp.argsort(ends, axis=1, stable=True)[:, :q]  # candidates that continue, best first
    parent, token = (jnp.take_along_axis(a, open_, axis=1) for a in (parent, token))
    extended = _extend(s, logprobs, parent, token)
    beam_index = _take_beams(s.beam_index, parent)
    attainable = best[:, 0] / _penalized_length(s.num_generated + 1, inputs)[:, 0]
    worst = finished.scores[:, -1]
    complete = (worst > -jnp.inf) & (inputs.early_stopping | (worst >= attainable))
    new = s._replace(
        ids=extended.ids,
        logprobs=extended.logprobs,
        beam_index=_set_token(beam_index, s.num_generated, jnp.broadcast_to(jnp.arange(q), (b, q))),
        sums=jnp.take_along_axis(best, open_, axis=1),
        num_generated=s.num_generated + 1,
        complete=complete,
        done=complete | (s.num_generated + 1 >= inputs.max_new_tokens),
        finished=finished,
    )
    return _keep_done_rows(s, new)


def _process(
    scores: jax.Array,
    s: SearchState,
    stop_tokens: jax.Array,
    params: SamplingParams,
    stages: SamplingStages,
) -> jax.Array:
    """Penalties on log-probabilities [B, Q, V], as transformers applies them in beam search."""
    b, q, v = scores.shape
    flat = scores.reshape(b * q, v)
    if stages.penalties:
        per_beam = jax.tree.map(lambda a: jnp.repeat(a, q), params)
        tokens = penalized_tokens(s.ids.reshape(b * q, -1), per_beam)
        flat = apply_repetition_penalty(flat, tokens, per_beam.repetition_penalty)
        too_short = jnp.repeat(s.num_generated < params.min_new_tokens, q)
        flat = forbid(flat, stop_tokens.reshape(b * q, -1), too_short)
    return flat.reshape(b, q, v)


def _penalized_length(num_generated: jax.Array, inputs: SearchInputs) -> jax.Array:
    """The divisor of the score of num_generated [B] tokens and an end token: [B, 1].

    The original's ids begin with a BOS, which its lengths count, and end before the EOS.
    """
    divisor: jax.Array = (num_generated + 1).astype(jnp.float32) ** inputs.length_penalty
    return divisor[:, None]


def _extend(s: SearchState, logprobs: jax.Array, parent: jax.Array, token: jax.Array) -> Hypotheses:
    """The beams `parent` [B, Q] with one more token [B, Q]; scores and hit_stop are not set yet."""
    b, q = parent.shape
    logprob = logprobs[jnp.arange(b)[:, None], parent, token]
    return Hypotheses(
        _set_token(_take_beams(s.ids, parent), s.num_generated, token),
        _set_token(_take_beams(s.logprobs, parent), s.num_generated, logprob),
        jnp.broadcast_to(s.num_generated[:, None] + 1, (b, q)),
        jnp.zeros((b, q)),
        jnp.zeros((b, q), bool),
    )


def _best_of_both(a: Hypotheses, b: Hypotheses) -> Hypotheses:
    """The Q hypotheses of a and b with the highest scores."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)
    _, order = jax.lax.top_k(both.scores, a.scores.shape[1])
    best: Hypotheses = jax.tree.map(partial(_take_beams, beams=order), both)
    return best


def _final_hypotheses(s: SearchState, inputs: SearchInputs) -> Hypotheses:
    """The best hypotheses; beams that are still open at max_new_tokens compete too."""
    shape = s.sums.shape
    scores = jnp.where(
        s.complete[:, None], -jnp.inf, s.sums / _penalized_length(s.num_generated, inputs)
    )
    num_generated = jnp.broadcast_to(s.num_generated[:, None], shape)
    open_beams = Hypotheses(s.ids, s.logprobs, num_generated, scores, jnp.zeros(shape, bool))
    return _best_of_both(s.finished, open_beams)


def _take_beams(x: jax.Array, beams: jax.Array) -> jax.Array:
    """Entries `beams` [B, C] of x [B, Q, ...] -> [B, C, ...]."""
    return x[jnp.arange(x.shape[0])[:, None], beams]


def _set_token(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """x [B, Q, N] with values [B, Q] at index [B] of the last axis."""
    b, q, _ = x.shape
    return x.at[jnp.arange(b)[:, None], jnp.arange(q), index[:, None]].set(values, mode="drop")


def _completing_tokens_of_beams(s: SearchState, stop_sequences: jax.Array) -> jax.Array:
    """completing_tokens of every beam: [B, Q, R]."""
    of_beams = jax.vmap(completing_tokens, in_axes=(1, None, None), out_axes=1)
    return of_beams(s.ids, s.num_generated, stop_sequences)


def _keep_done_rows(old: SearchState, new: SearchState) -> SearchState:
    """`new`, with the rows of `old` that are done."""

    def pick(before: jax.Array, after: jax.Array) -> jax.Array:
        done = old.done.reshape(-1, *[1] * (before.ndim - 1))
        return jnp.where(done, before, after)

    # A done row writes the same slots again, and what it computes from them is discarded.
    picked: SearchState = jax.tree.map(pick, old._replace(cache=None), new._replace(cache=None))
    return picked._replace(cache=new.cache)
