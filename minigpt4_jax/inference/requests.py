"""What is asked of the engine and what comes back; the shapes that requests are padded to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.sampling import SamplingParams
from minigpt4_jax.utils.rounding import next_power_of_two

GREEDY = SamplingParams()
ONE_BEAM = BeamSearchConfig(1)


@dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    tokens: Sequence[int]  # prompt ids, IMAGE in the visual slots
    visual: Any = None  # [I * P, D] float32, the visual tokens of those slots; None without images
    max_new_tokens: int = 20
    options: SamplingParams = GREEDY
    seed: int = 0
    stops: Sequence[Sequence[int]] = ()  # id sequences that end the answer
    beams: BeamSearchConfig = ONE_BEAM
    # Rules that ids cannot express: from the ids so far, how many of them to keep, and None to go
    # on. It is asked between chunks of steps, and not in beam search.
    halt: Callable[[list[int]], int | None] | None = None


@dataclass(frozen=True)
class Completion:
    """What was generated for a request."""

    ids: list[int]  # a stop sequence that ended it is its last ids
    logprobs: list[float]  # of each id, by the model itself: before penalties and filters
    stopped: bool  # by a stop sequence or `halt`; else by the limit
    score: (
        float  # the sum of logprobs; of beams: by their rules, see BeamSearchConfig.length_penalty
    )


class Shapes(NamedTuple):
    """What the requests of a call share, so that any row can take the slot of another."""

    cache: int  # S
    room: int  # N: generated tokens
    stops: int  # R: stop sequences of a row
    width: int  # W: ids of a stop sequence


def shapes_of(requests: Sequence[Request]) -> Shapes:
    """The smallest buckets that all the requests fit into."""
    longest = max(len(r.tokens) + r.max_new_tokens for r in requests)
    stops = [r.stops for r in requests]
    return Shapes(
        bucket(longest),
        bucket(max(r.max_new_tokens for r in requests), 16),
        next_power_of_two(max([1, *(len(row) for row in stops)])),
        next_power_of_two(max([2, *(len(ids) for row in stops for ids in row)])),
    )


def bucket(n: int, least: int = 32) -> int:
    """The smallest of least * 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that n fits into."""
    size = least
    while size < n:
        size *= 2
    three_quarters = size * 3 // 4
    return three_quarters if size > 2 * least and n <= three_quarters else size


def stack_visual(visual: Sequence[Any], width: int) -> np.ndarray:
    """Visual tokens [I * P, D] of rows, or None -> [B, I * P, D] float32, the shorter padded."""
    slots = max((0 if v is None else len(v) for v in visual), default=0)
    table = np.zeros((len(visual), slots, width), np.float32)
    for row, v in zip(table, visual, strict=True):
        if v is not None:
            row[: len(v)] = v
    return table
