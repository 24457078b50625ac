"""Logits -> the next token of each row: penalties, filters, greedy or random choice.

The order is that of transformers: repetition penalty, minimum length, temperature, top-k, top-p, min-p.
OpenAI's frequency and presence penalties come after the repetition penalty.
Every option is an array over rows, so rows with different options share one compiled program;
`SamplingStages` says which stages a batch needs at all.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.platform import backend
from minigpt4_jax.utils.rounding import next_power_of_two

CANDIDATES = 64  # most likely tokens that the cheaper random choice considers
MIN_TEMPERATURE = 1e-30  # logits divided by less would not be finite


class SamplingParams(NamedTuple):
    """How the tokens of each row are chosen: arrays [B], or plain numbers for one row."""

    temperature: Any = 0.0  # 0 is greedy
    top_k: Any = 0  # 0 keeps every token
    top_p: Any = 1.0  # 1 keeps every token
    repetition_penalty: Any = 1.0  # on generated tokens only, not on the prompt
    min_new_tokens: Any = 0  # no stop token before this many
    min_p: Any = 0.0  # drops tokens less likely than min_p times the most likely one; 0 keeps all
    prior_token: Any = -1  # penalized as if it had been generated; -1 is none
    # OpenAI's penalties: subtracted from the score of a token once for each time that it was generated,
    # and once if it was generated at all
    frequency_penalty: Any = 0.0
    presence_penalty: Any = 0.0

    def check(self) -> "SamplingParams":
        """Return self (plain numbers). UserError names the value that is out of range."""
        rules = [
            (0 <= self.temperature < math.inf, "temperature", "0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", "more than 0 and at most 1"),
            (self.top_k >= 0, "top_k", "0 (off) or more"),
            (
                0 < self.repetition_penalty < math.inf,
                "repetition_penalty",
                "more than 0 (1 is off)",
            ),
            (self.min_new_tokens >= 0, "min_new_tokens", "0 or more"),
            (0 <= self.min_p <= 1, "min_p", "0 (off) to 1"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty", "-2 to 2 (0 is off)"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty", "-2 to 2 (0 is off)"),
        ]
        for holds, name, expected in rules:  # not `x < 0`: NaN must fail too
            if not holds:
                raise UserError(f"{name} {getattr(self, name)}: expected {expected}")
        return self


class SamplingStages(NamedTuple):
    """The stages a batch needs. Static: each combination is a compiled program, so there are few."""

    random: bool
    num_candidates: int  # most likely tokens that a random choice considers; 0 is the vocabulary
    penalties: bool  # repetition, frequency and presence penalty, min_new_tokens


def required_stages(rows: list[SamplingParams], vocab: int) -> SamplingStages:
    """The stages that rows with these parameters (plain numbers) need together.

    Options that cost little beside others come with them, so that changing one compiles nothing: all
    penalties with any of them or with a random choice, and CANDIDATES with a smaller top_k.
    """
    random = [row for row in rows if row.temperature > 0]
    largest = max((int(row.top_k) or vocab for row in random), default=0)
    candidates = next_power_of_two(max(largest, CANDIDATES))
    return SamplingStages(
        random=bool(random),
        num_candidates=candidates if random and candidates < vocab else 0,
        penalties=bool(random) or any(map(_has_penalty, rows)),
    )


def _has_penalty(row: SamplingParams) -> bool:
    counted = row.frequency_penalty or row.presence_penalty
    return bool(row.repetition_penalty != 1 or row.min_new_tokens > 0 or counted)


def stack_sampling_params(rows: list[SamplingParams]) -> SamplingParams:
    """Parameters of single rows -> arrays [B]."""
    dtypes = SamplingParams(
        np.float32, np.int32, np.float32, np.float32, np.int32, np.float32, np.int32, np.float32,
        np.float32,
    )  # fmt: skip
    columns = zip(*rows, strict=True)
    return SamplingParams(*map(np.asarray, columns, dtypes))


def penalized_tokens(generated: jax.Array, params: SamplingParams) -> jax.Array:
    """The prior token and the generated ids [B, N] -> [B, 1 + N]."""
    return jnp.concatenate([jnp.asarray(params.prior_token)[:, None], generated], axis=1)


def apply_repetition_penalty(logits: jax.Array, tokens: jax.Array, penalty: jax.Array) -> jax.Array:
    """Make these tokens less likely (CTRL paper, section 4.1).

    logits [B, V] float32, tokens [B, N] int32 with -1 for none, penalty [B].
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    scores = logits[rows, jnp.maximum(tokens, 0)]
    scores = jnp.where(scores < 0, scores * penalty[:, None], scores / penalty[:, None])
    out_of_range = logits.shape[1]  # dropped
    return logits.at[rows, jnp.where(tokens < 0, out_of_range, tokens)].set(scores, mode="drop")


def apply_count_penalties(
    logits: jax.Array, generated: jax.Array, frequency: jax.Array, presence: jax.Array
) -> jax.Array:
    """Subtract the penalties [B] of OpenAI's API: logits [B, V] float32, generated [B, N], -1 is none."""
    rows = jnp.arange(logits.shape[0])[:, None]
    ids = jnp.where(generated < 0, logits.shape[1], generated)  # out of range: dropped
    # a repeated id is set to the same value again, but subtracted from each time
    present = logits[rows, jnp.maximum(generated, 0)] - presence[:, None]
    logits = logits.at[rows, ids].set(present, mode="drop")
    return logits.at[rows, ids].add(-jnp.broadcast_to(frequency[:, None], ids.shape), mode="drop")


def forbid(logits: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """logits [B, V] with ids [B, E] (-1 is none) set to -inf in the rows [B] that are True."""
    ids = jnp.where((ids >= 0) & rows[:, None], ids, logits.shape[1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].set(-jnp.inf, mode="drop")


def filter_logits(
    logits: jax.Array, params: SamplingParams, num_candidates: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Temperature, top-k, top-p and min-p: logits [B, V] -> scores and ids [B, C], most likely first.

    Tokens that a filter removes get the score -inf. C is `num_candidates`, or V if that is 0; no
    row's top_k may exceed it. A row of temperature 0 is treated as if it were 1.
    """
    temperature = jnp.where(
        params.temperature > 0, jnp.maximum(params.temperature, MIN_TEMPERATURE), 1.0
    )
    scores, ids = jax.lax.top_k(logits / temperature[:, None], num_candidates or logits.shape[1])
    rank = jnp.arange(scores.shape[1])
    top_k = jnp.asarray(params.top_k)[:, None]
    scores = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, scores)
    probs = jax.nn.softmax(scores, axis=-1)
    more_likely = jnp.cumsum(probs, axis=-1) - probs  # total probability of the tokens before
    top_p = jnp.asarray(params.top_p)[:, None]
    scores = jnp.where((top_p < 1) & (rank > 0) & (more_likely >= top_p), -jnp.inf, scores)
    # The filters before scale all probabilities alike, so they do not change these ratios.
    ratio = jnp.exp(scores - scores[:, :1])
    return jnp.where(ratio < jnp.asarray(params.min_p)[:, None], -jnp.inf, scores), ids


def draw(scores: jax.Array, ids: jax.Array, keys: jax.Array, step: jax.Array) -> jax.Array:
    """Draw a token of each row from softmax(scores): scores, ids [B, C], sorted -> [B] int32.

    keys [B]: each row's PRNG key; step [B]: the number of the draw. A row uses one uniform number
    a step, so its draws depend neither on other rows nor on C.
    """
    uniform = jax.vmap(lambda key, i: jax.random.uniform(jax.random.fold_in(key, i)))(keys, step)
    cumulative = jnp.cumsum(jax.nn.softmax(scores, axis=-1), axis=-1)
    index = jnp.sum(cumulative <= uniform[:, None] * cumulative[:, -1:], axis=-1)
    last = jnp.sum(scores > -jnp.inf, axis=-1) - 1  # rounding may step past the last allowed token
    return jnp.take_along_axis(ids, jnp.minimum(index, last)[:, None], axis=1)[:, 0]


def sample(
    logits: jax.Array,
    generated: jax.Array,
    num_generated: jax.Array,
    stop_tokens: jax.Array,
    keys: jax.Array,
    params: SamplingParams,
    stages: SamplingStages,
    live: jax.Array | bool = True,
) -> jax.Array:
    """The next token of each row [B] int32.

    logits [B, V] float32; generated [B, N] ids so far, -1 after the first num_generated [B];
    stop_tokens [B, R]: tokens that would end the row, -1 is none; keys [B]: PRNG keys; params: [B];
    live [B]: rows whose token is used.
    """
    if stages.penalties:
        repeats = (params.repetition_penalty != 1) | (params.frequency_penalty != 0)
        logits = _where_needed(
            live & (repeats | (params.presence_penalty != 0)),
            lambda scores: _penalize(scores, generated, params), lambda scores: scores, logits,
        )  # fmt: skip
        too_short = num_generated < params.min_new_tokens
        logits = _where_needed(
            live & too_short,
            lambda scores: forbid(scores, stop_tokens, too_short), lambda scores: scores, logits,
        )  # fmt: skip

    def greedy(scores: jax.Array) -> jax.Array:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def drawn(scores: jax.Array) -> jax.Array:
        found = filter_logits(scores, params, stages.num_candidates)
        tokens = draw(*found, keys, num_generated)
        return jnp.where(params.temperature > 0, tokens, greedy(scores))

    if not stages.random:
        return greedy(logits)
    return _where_needed(live & (params.temperature > 0), drawn, greedy, logits)


def branches() -> bool:
    """Whether a program skips what no row needs. On a GPU, a branch waits for the host."""
    return backend() != "gpu"


def _where_needed(
    rows: jax.Array,
    stage: Callable[[jax.Array], jax.Array],
    otherwise: Callable[[jax.Array], jax.Array],
    logits: jax.Array,
) -> jax.Array:
    """`stage` of the logits if any of the rows [B] is True or if there are no branches, or `otherwise`."""
    if not branches():
        return stage(logits)
    chosen: jax.Array = jax.lax.cond(jnp.any(rows), stage, otherwise, logits)
    return chosen


def _penalize(logits: jax.Array, generated: jax.Array, params: SamplingParams) -> jax.Array:
    tokens = penalized_tokens(generated, params)
    logits = apply_repetition_penalty(logits, tokens, params.repetition_penalty)
    return apply_count_penalties(
        logits, generated, params.frequency_penalty, params.presence_penalty
    )
