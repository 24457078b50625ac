"""Means, ratios and bootstrap intervals."""

from collections.abc import Callable, Sequence

import numpy as np


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 where whole is 0."""
    return part / whole if whole else 0.0


def mean_percent(values: Sequence[float]) -> float:
    """The mean of fractions or flags, in percent."""
    return sum(values) / len(values) * 100


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values`: rows are drawn with replacement.

    A difference of two models on the same rows is an interval over the paired differences."""
    array = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    block = max(1, 4_000_000 // max(1, len(array)))  # draws held at a time
    for start in range(0, samples, block):
        stop = min(start + block, samples)
        means[start:stop] = array[rng.integers(0, len(array), (stop - start, len(array)))].mean(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_statistic(
    statistic: Callable[[Sequence[int]], float], rows: int, *, confidence: float = 0.95,
    samples: int = 200, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """As `bootstrap_interval`, of a figure that is not a mean: statistic(numbers of rows)."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, rows, rows).tolist()) for _ in range(samples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
