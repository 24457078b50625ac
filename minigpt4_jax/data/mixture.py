"""Which examples make batch number n: one dataset, or several mixed by ratio.

Everything here is a function of the seed and of n, found without going through what came before, so
that a run resumes anywhere and the number of processes changes nothing.

Datasets take turns as cards are dealt: a pack holds each dataset's cards by its ratio, and every
pack is shuffled anew. Over a pack the ratios hold exactly; within it the order is random. A turn is
a whole batch (as the original draws one dataset a step) or one row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np

from minigpt4_jax.data.dataset import Source

MIXED_BY = ("step", "example")
_MOST_CARDS = 10_000  # in a pack; ratios that need more are rounded to as many


class MixtureComponent(NamedTuple):
    """A dataset of a mixture."""

    name: str
    source: Source
    ratio: float = 1.0  # of turns, beside the other parts' ratios
    batch_size: int = 0  # of its own batches, 0: that of the mixture
    tokens: int = 0  # instead: as many rows as together have so many, padding included
    prompts: tuple[str, ...] = ()  # one is drawn for a batch, for examples without a question


class Pick(NamedTuple):
    """A place in a batch: the `turn`-th example (from 0) that part number `part` gives."""

    part: int
    turn: int


def cards(ratios: Sequence[float]) -> np.ndarray:
    """The part of each card of a pack: [cards] int, sorted. Whole ratios are kept exactly; others
    to one card in 10,000, and every part has a card."""
    if all(float(r).is_integer() for r in ratios):
        counts = [int(r) for r in ratios]
        counts = [n // math.gcd(*counts) for n in counts]
        if sum(counts) <= _MOST_CARDS:
            return np.repeat(np.arange(len(counts)), counts)
    total = sum(ratios)
    return np.repeat(
        np.arange(len(ratios)), [max(1, round(_MOST_CARDS * r / total)) for r in ratios]
    )


@dataclass(frozen=True)
class MixtureSchedule:
    """Whose turn it is."""

    pack: np.ndarray  # see `cards`
    seed: int

    def deal(self, turn: int) -> tuple[int, int]:
        """-> (the part whose turn it is, how many turns that part had before)."""
        number, place = divmod(turn, len(self.pack))
        if self.pack[-1] == 0:
            return 0, turn
        dealt = np.random.default_rng([self.seed, number]).permutation(self.pack)
        part = int(dealt[place])
        each = int((self.pack == part).sum())
        return part, number * each + int((dealt[:place] == part).sum())


class Order:
    """The examples of every batch.

    sizes: rows of a batch of each part; by "example" they are all the same. epochs: how often a
    single part is gone through, None: without end; keep_remainder: its last batch may be short.
    """

    def __init__(
        self,
        lengths: Sequence[int],  # examples of each part
        ratios: Sequence[float],
        sizes: Sequence[int],
        *,
        by: str = "step",
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        keep_remainder: bool = False,
    ):
        self.sizes, self.by = tuple(sizes), by
        self._deck = MixtureSchedule(cards(ratios), seed)
        self._streams = [_stream(n, seed, part, shuffle) for part, n in enumerate(lengths)]
        self._total = None if epochs is None else lengths[0] * epochs
        self.steps = None
        if self._total is not None:
            whole, rest = divmod(self._total, sizes[0])
            self.steps = whole + (rest > 0 and keep_remainder)

    def batch(self, step: int) -> list[Pick]:
        """The places of batch number `step`; fewer than its size in the last batch of the data."""
        if self.by == "example":
            first = step * self.sizes[0]
            return [Pick(*self._deck.deal(turn)) for turn in range(first, first + self.sizes[0])]
        part, before = self._deck.deal(step)
        first, end = before * self.sizes[part], (before + 1) * self.sizes[part]
        if self._total is not None:
            end = min(end, self._total)
        return [Pick(part, turn) for turn in range(first, end)]

    def size(self, step: int) -> int:
        """Rows of batch number `step`, with those that fill it up."""
        return self.sizes[0 if self.by == "example" else self._deck.deal(step)[0]]

    def index(self, pick: Pick) -> int:
        """The example's number in its source."""
        return int(self._streams[pick.part][pick.turn])


def _stream(length: int, seed: int, part: int, shuffle: bool) -> grain.MapDataset:
    """Numbers of examples without end, in another order each epoch."""
    numbers = grain.MapDataset.range(length)
    if shuffle:  # by a hash of the seed: Grain's second epoch is its first with the next seed
        seed = int(np.random.SeedSequence([seed, part]).generate_state(1)[0])
        numbers = numbers.shuffle(seed=seed)
    return numbers.repeat(None)
