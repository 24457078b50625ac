"""Requests to the engine and their completions; the bucket sizes that requests are padded to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from minigpt4_jax.config import IMAGE
from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.sampling import SamplingParams
from minigpt4_jax.inference.visual_tokens import VisualTokens
from minigpt4_jax.utils.rounding import next_power_of_two, round_up

UNUSED_READS = 0.04  # of a decoding step: the bytes of cache slots that hold no token
NUM_STOPS, STOP_WIDTH = 32, 16  # stop sequences of a row, ids of each, unless there are more
GREEDY = SamplingParams()
ONE_BEAM = BeamSearchConfig(1)


@dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    tokens: Sequence[int]  # prompt ids, IMAGE in the visual slots
    visual: VisualTokens | None = None  # [I * P, D] float32: visual tokens of those slots
    max_new_tokens: int = 20
    sampling: SamplingParams = GREEDY
    seed: int = 0
    stop_sequences: Sequence[Sequence[int]] = ()  # token ids that end the answer
    beam_search: BeamSearchConfig = ONE_BEAM
    # Texts that end the answer and are cut off; `stop_check` finds them in the engine.
    stop_texts: tuple[str, ...] = ()
    # Stop rules that ids cannot express: generated ids -> how many of them to keep, None to continue.
    # Called between chunks of decoding steps; not used in beam search.
    stop_check: Callable[[list[int]], int | None] | None = None

    def stopped_after(self, ids: list[int]) -> int | None:
        """After how many of the generated ids `stop_check` ends the answer, which min_new_tokens may delay;
        None to continue."""
        length = self.stop_check(ids) if self.stop_check else None
        if length is None:
            return None
        length = max(length, int(self.sampling.min_new_tokens))
        return length if length <= len(ids) else None


@dataclass(frozen=True)
class Completion:
    """What was generated for a request."""

    ids: list[int]  # including those of the stop sequence that ended it
    logprobs: list[float]  # of each id, by the model itself: before penalties and filters
    hit_stop: bool  # ended by a stop sequence or `stop_check`, else by max_new_tokens
    # the sum of logprobs; in beam search divided as BeamSearchConfig.length_penalty says
    score: float
    nonfinite: bool = False  # ended because the logits of the next token were NaN or infinite


class Progress(NamedTuple):
    """The state of one request in a running batch."""

    key: Any  # what the request was added with; in `Engine.run` its index
    request: Request
    completion: Completion  # so far
    finished: bool
    error: Exception | None = None  # why its prompt could not be processed; then it is finished
    num_cached: int = 0  # tokens of the prompt that were in the prefix cache


class BucketSizes(NamedTuple):
    """Array sizes that the requests of a call share, so that any row can reuse another's slot."""

    cache_length: int  # S
    max_new_tokens: int  # N
    num_stops: int  # R: stop sequences of a row
    stop_width: int  # W: ids of a stop sequence


def bucket_sizes(
    requests: Sequence[Request], cache_bucket: Callable[[int], int] | None = None
) -> BucketSizes:
    """The smallest buckets that all the requests fit into. cache_bucket: tokens -> cache slots.

    Coarse where size costs little: another max_new_tokens or list of stops rarely compiles again.
    """
    stops = [request.stop_sequences for request in requests]
    tokens = max([128, *(len(r.tokens) + r.max_new_tokens for r in requests)])
    return BucketSizes(
        (cache_bucket or bucket)(tokens),
        next_power_of_two(max([256, *(request.max_new_tokens for request in requests)])),
        next_power_of_two(max([NUM_STOPS, *(len(row) for row in stops)])),
        next_power_of_two(max([STOP_WIDTH, *(len(ids) for row in stops for ids in row)])),
    )


def bucket(n: int, smallest: int = 32) -> int:
    """The smallest of 16, 32, 48, 64, 96, 128, 192, ..., from `smallest` on, that is at least n."""
    size = smallest
    while size < n:
        size *= 2
    three_quarters = size * 3 // 4
    return three_quarters if three_quarters >= 48 and n <= three_quarters else size


def fine_bucket(n: int, others: float) -> int:
    """A cache length of at least n, at most `bucket(n)`, of whose slots few are unused: reading them takes
    UNUSED_READS of a decoding step at most, or they are fewer than 16.

    others: what a step reads besides the cache, the weights, as a number of slots of all rows.
    """
    step = 16
    while 2 * step <= UNUSED_READS * (others + n):
        step *= 2
    return min(bucket(n), round_up(n, step))


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> tokens [B, T] and lengths [B] int32, with B and T rounded up to limit compilations.

    Rows that fill up B have one token."""
    b = next_power_of_two(len(rows))
    tokens = np.zeros((b, bucket(max(map(len, rows)))), np.int32)
    lengths = np.ones(b, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def section(request: Request, start: int, stop: int | None = None) -> Request:
    """The request for the tokens start..stop of a request's prompt, with their visual tokens."""
    slots = [token == IMAGE for token in request.tokens[:stop]]
    first, last = sum(slots[:start]), sum(slots)
    visual = None if request.visual is None or first == last else request.visual[first:last]
    return replace(request, tokens=request.tokens[start:stop], visual=visual)
