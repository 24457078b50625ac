"""Scores of the next token -> one token a row: penalties, filters, greedy or random choice.

The order is that of `transformers`: repetition penalty, minimum length, temperature, top-k,
top-p, min-p.
Every value is an array over rows, so rows with different options share one compiled program; `SamplingStages`
says which stages a batch needs at all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.errors import UserError

COLDEST = 1e-30  # temperature; scores divided by less would not be finite


class SamplingParams(NamedTuple):
    """How the tokens of each row are chosen: arrays [B], or plain numbers for one row."""

    temperature: Any = 0.0  # 0 is greedy
    top_k: Any = 0  # 0 keeps every token
    top_p: Any = 1.0  # 1 keeps every token
    repetition_penalty: Any = 1.0  # on generated tokens alone, not on the prompt's
    min_new_tokens: Any = 0  # no stop token before this many
    min_p: Any = 0.0  # 0 keeps every token; else those at least min_p times as likely as the first
    before: Any = -1  # a token that is penalized as if it were generated; -1 is none

    def check(self) -> "SamplingParams":
        """Return self (plain numbers). UserError names the value that is out of its range."""
        rules = [
            (self.temperature >= 0, "temperature", "0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", "more than 0 and at most 1"),
            (self.top_k >= 0, "top_k", "0 (off) or more"),
            (self.repetition_penalty > 0, "repetition_penalty", "more than 0 (1 is off)"),
            (self.min_new_tokens >= 0, "min_new_tokens", "0 or more"),
            (0 <= self.min_p <= 1, "min_p", "0 (off) to 1"),
        ]
        for holds, name, expected in rules:  # not `x < 0`: NaN must fail too
            if not holds:
                raise UserError(f"{name} {getattr(self, name)}: expected {expected}")
        return self


class SamplingStages(NamedTuple):
    """The stages a batch needs; part of the compiled program's identity."""

    random: bool
    candidates: int  # tokens a random choice looks at; 0 is the whole vocabulary
    penalty: bool
    minimum: bool


def stages_of(options: list[SamplingParams], vocab: int) -> SamplingStages:
    """The stages that rows with these options (plain numbers) need together."""
    drawn = [o for o in options if o.temperature > 0]
    k = max((int(o.top_k) or vocab for o in drawn), default=0)
    k = 1 << (k - 1).bit_length() if k else 0  # few different programs
    return SamplingStages(
        random=bool(drawn),
        candidates=k if k < vocab else 0,
        penalty=any(o.repetition_penalty != 1 for o in options),
        minimum=any(o.min_new_tokens > 0 for o in options),
    )


def stack_options(options: list[SamplingParams]) -> SamplingParams:
    """Options of single rows -> arrays [B]."""
    kinds = SamplingParams(
        np.float32, np.int32, np.float32, np.float32, np.int32, np.float32, np.int32
    )
    return SamplingParams(
        *(np.asarray(v, k) for v, k in zip(zip(*options, strict=True), kinds, strict=True))
    )


def with_before(generated: jax.Array, options: SamplingParams) -> jax.Array:
    """Ids [B, N] behind the one that counts as generated before them: [B, 1 + N]."""
    return jnp.concatenate([jnp.asarray(options.before)[:, None], generated], axis=1)


def apply_repetition_penalty(
    logits: jax.Array, generated: jax.Array, penalty: jax.Array
) -> jax.Array:
    """Make tokens that a row has generated less likely (CTRL paper, section 4.1).

    logits [B, V] float32, generated [B, N] int32 with -1 where there is none yet, penalty [B].
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    at = logits[rows, jnp.maximum(generated, 0)]
    at = jnp.where(at < 0, at * penalty[:, None], at / penalty[:, None])
    nowhere = logits.shape[1]
    return logits.at[rows, jnp.where(generated < 0, nowhere, generated)].set(at, mode="drop")


def forbid(logits: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """logits [B, V] with ids [B, E] (-1 is none) impossible in the rows [B] that are True."""
    ids = jnp.where((ids >= 0) & rows[:, None], ids, logits.shape[1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].set(-jnp.inf, mode="drop")


def filter_logits(
    logits: jax.Array, options: SamplingParams, candidates: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Temperature, top-k, top-p and min-p: logits [B, V] -> scores and ids [B, C], most likely first.

    What a filter removed has the score -inf. C is `candidates`, or V when that is 0; no row's top_k
    may exceed it. A row of temperature 0 is left as if it were 1.
    """
    warm = jnp.where(options.temperature > 0, jnp.maximum(options.temperature, COLDEST), 1.0)
    scores, ids = jax.lax.top_k(logits / warm[:, None], candidates or logits.shape[1])
    rank = jnp.arange(scores.shape[1])
    top_k = jnp.asarray(options.top_k)[:, None]
    scores = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, scores)
    probs = jax.nn.softmax(scores, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # of the tokens that are more likely
    top_p = jnp.asarray(options.top_p)[:, None]
    scores = jnp.where((top_p < 1) & (rank > 0) & (before >= top_p), -jnp.inf, scores)
    # A filter before this one changes every probability by the same factor, and so no ratio.
    ratio = jnp.exp(scores - scores[:, :1])
    return jnp.where(ratio < jnp.asarray(options.min_p)[:, None], -jnp.inf, scores), ids


def draw(scores: jax.Array, ids: jax.Array, keys: jax.Array, step: jax.Array) -> jax.Array:
    """One token a row with probability softmax(scores): scores, ids [B, C], sorted -> [B] int32.

    keys [B]: a row's random stream; step [B]: which draw of the stream. A row uses one uniform
    number a step, so neither the rows around it nor C change what it draws.
    """
    uniform = jax.vmap(lambda key, i: jax.random.uniform(jax.random.fold_in(key, i)))(keys, step)
    cumulative = jnp.cumsum(jax.nn.softmax(scores, axis=-1), axis=-1)
    index = jnp.sum(cumulative <= uniform[:, None] * cumulative[:, -1:], axis=-1)
    last = jnp.sum(scores > -jnp.inf, axis=-1) - 1  # rounding may step past the last possible token
    return jnp.take_along_axis(ids, jnp.minimum(index, last)[:, None], axis=1)[:, 0]


def sample(
    logits: jax.Array,
    generated: jax.Array,
    made: jax.Array,
    stop_ids: jax.Array,
    keys: jax.Array,
    options: SamplingParams,
    plan: SamplingStages,
) -> jax.Array:
    """The next token of each row [B] int32.

    logits [B, V] float32; generated [B, N], -1 where there is none yet; made [B] how many there;
    stop_ids [B, E]: those that would end it, -1 is none; keys [B] random streams; options: arrays [B].
    """
    if plan.penalty:
        logits = apply_repetition_penalty(
            logits, with_before(generated, options), options.repetition_penalty
        )
    if plan.minimum:
        logits = forbid(logits, stop_ids, made < options.min_new_tokens)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not plan.random:
        return best
    drawn = draw(*filter_logits(logits, options, plan.candidates), keys, made)
    return jnp.where(options.temperature > 0, drawn, best)
