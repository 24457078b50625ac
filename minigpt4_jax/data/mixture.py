"""Which examples are in batch number n: of one dataset, or of several mixed by ratio.

Everything is a function of the seed and of n, computed without going through earlier batches. A run
therefore resumes anywhere, and the number of processes changes nothing.

The mixture is stratified: a cycle holds a number of turns for each dataset by its ratio, and every cycle
is shuffled anew. Over a cycle the ratios hold exactly; within it the order is random. A turn is a whole
batch (the original also draws one dataset per step) or one row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np

from minigpt4_jax.data.dataset import Source

_MAX_CYCLE = 10_000  # turns; ratios that need more are rounded


class MixtureComponent(NamedTuple):
    """A dataset of a mixture."""

    name: str
    source: Source
    ratio: float = 1.0  # share of the turns, relative to the other components' ratios
    batch_size: int = 0  # rows in a batch of this dataset; 0: the run's batch size
    tokens: int = 0  # alternative to batch_size: a budget of tokens, padding included
    prompts: tuple[str, ...] = ()  # for examples without a question; one is drawn for each batch
    exif: bool = False  # rotate images as their EXIF orientation says


class ExampleRef(NamedTuple):
    """One row of a batch: the `draw`-th example (from 0) drawn from a component."""

    component: int
    draw: int


def mixture_cycle(ratios: Sequence[float]) -> np.ndarray:
    """The component of each turn of a cycle: [turns] int, sorted.

    Integer ratios are kept exactly if the cycle is not too long; others are rounded to one turn in
    10,000, and every component has at least one turn.
    """
    if all(float(r).is_integer() for r in ratios):
        counts = [int(r) for r in ratios]
        counts = [n // math.gcd(*counts) for n in counts]
        if sum(counts) <= _MAX_CYCLE:
            return np.repeat(np.arange(len(counts)), counts)
    total = sum(ratios)
    return np.repeat(
        np.arange(len(ratios)), [max(1, round(_MAX_CYCLE * r / total)) for r in ratios]
    )


@dataclass(frozen=True)
class MixtureSchedule:
    """Which component has which turn."""

    cycle: np.ndarray  # see mixture_cycle
    seed: int

    def turn(self, number: int) -> tuple[int, int]:
        """-> (the component of turn `number`, how many turns that component had before)."""
        cycle_number, position = divmod(number, len(self.cycle))
        if self.cycle[-1] == 0:  # a single component
            return 0, number
        shuffled = np.random.default_rng([self.seed, cycle_number]).permutation(self.cycle)
        component = int(shuffled[position])
        per_cycle = int((self.cycle == component).sum())
        in_this_cycle = int((shuffled[:position] == component).sum())
        return component, cycle_number * per_cycle + in_this_cycle


class BatchOrder:
    """The examples of every batch.

    steps: number of batches, None if endless.
    """

    def __init__(
        self,
        lengths: Sequence[int],  # examples of each component
        ratios: Sequence[float],
        batch_sizes: Sequence[int],  # of each component; all the same with mix_by="example"
        *,
        mix_by: str = "step",  # see DataConfig.mix_by
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,  # None: endless; only for a single component
        keep_remainder: bool = False,  # the last batch of the last epoch may be short
    ):
        if epochs is not None and len(lengths) > 1:
            raise ValueError(f"epochs={epochs}: a mixture is endless, expected None")
        self.batch_sizes, self.mix_by = tuple(batch_sizes), mix_by
        self._schedule = MixtureSchedule(mixture_cycle(ratios), seed)
        self._indices = [_index_stream(n, seed, i, shuffle) for i, n in enumerate(lengths)]
        self._total = None if epochs is None else lengths[0] * epochs
        self.steps = None
        if self._total is not None:
            full, rest = divmod(self._total, batch_sizes[0])
            self.steps = full + (rest > 0 and keep_remainder)

    def examples(self, step: int) -> list[ExampleRef]:
        """The rows of batch number `step`; fewer than its size in the last batch of the data."""
        if self.mix_by == "example":
            first = step * self.batch_sizes[0]
            turns = range(first, first + self.batch_sizes[0])
            return [ExampleRef(*self._schedule.turn(turn)) for turn in turns]
        component, earlier_batches = self._schedule.turn(step)
        size = self.batch_sizes[component]
        first, end = earlier_batches * size, (earlier_batches + 1) * size
        if self._total is not None:
            end = min(end, self._total)
        return [ExampleRef(component, draw) for draw in range(first, end)]

    def batch_size(self, step: int) -> int:
        """Rows of batch number `step`, including rows that pad a short last batch."""
        component = 0 if self.mix_by == "example" else self._schedule.turn(step)[0]
        return self.batch_sizes[component]

    def source_index(self, ref: ExampleRef) -> int:
        """The number of the example in its source."""
        return int(self._indices[ref.component][ref.draw])


def _index_stream(length: int, seed: int, component: int, shuffle: bool) -> grain.MapDataset:
    """Endless indices of examples, in a new order each epoch."""
    indices = grain.MapDataset.range(length)
    if shuffle:
        # A hash of the seed, because Grain shuffles epoch 2 of seed n like epoch 1 of seed n + 1.
        seed = int(np.random.SeedSequence([seed, component]).generate_state(1)[0])
        indices = indices.shuffle(seed=seed)
    return indices.repeat(None)
