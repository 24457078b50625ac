"""Two sets of results beside each other: the paired difference, and the rows where they part."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmarks import BENCHMARKS
from minigpt4_jax.evaluation.metrics.statistics import bootstrap_interval, bootstrap_statistic

NAMED = 3


class Pair(NamedTuple):
    """A row in both results."""

    id: str | int
    a: Mapping[str, Any]
    b: Mapping[str, Any]

    @property
    def difference(self) -> float:
        """Of the scores, in percent."""
        return float(self.b["score"]) - float(self.a["score"])


class Comparison(NamedTuple):
    """difference: the score of these rows in B minus that in A, in points, with its 95 % bootstrap interval.
    parted: the rows whose scores differ, those where B loses most first."""

    title: str
    scores: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    better: int
    worse: int
    rows: int
    parted: list[Pair]


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Two results of one benchmark on the same rows. UserError: other rows."""
    pairs = _pair(a["per_row"], b["per_row"], str(a.get("title", a["benchmark"])))
    sign = 1 if a.get("higher_is_better", True) else -1
    differences = [pair.difference for pair in pairs]
    difference, interval = _difference(str(a["benchmark"]), pairs)
    parted = sorted((p for p in pairs if p.difference), key=lambda p: sign * p.difference)
    return Comparison(
        str(a.get("title", a["benchmark"])),
        (float(a["score"]), float(b["score"])),
        difference,
        interval,
        sum(sign * d > 0 for d in differences),
        sum(sign * d < 0 for d in differences),
        len(pairs),
        parted,
    )


def _difference(benchmark: str, pairs: Sequence[Pair]) -> tuple[float, tuple[float, float]]:
    """(difference of the score, its interval): rows are drawn in pairs."""
    headline = BENCHMARKS[benchmark].headline if benchmark in BENCHMARKS else None
    if headline is None:
        differences = [pair.difference for pair in pairs]
        return sum(differences) / len(differences), bootstrap_interval(differences)

    def difference(sample: Sequence[int]) -> float:
        return headline([pairs[i].b for i in sample]) - headline([pairs[i].a for i in sample])

    return difference(range(len(pairs))), bootstrap_statistic(difference, len(pairs))


def _pair(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], title: str) -> list[Pair]:
    """Rows with equal ids are paired in order."""
    names = [Counter(str(row["id"]) for row in rows) for rows in (a, b)]
    if names[0] != names[1]:
        only = [sorted((x - y).elements()) for x, y in (names, names[::-1])]
        parts = [
            f"{len(ids)} rows are only in {which} ({', '.join(ids[:NAMED])})"
            for which, ids in zip(("A", "B"), only, strict=True)
            if ids
        ]
        raise UserError(f"{title}: the results are of other rows: {'; '.join(parts)}")
    waiting: dict[str, list[Mapping[str, Any]]] = {}
    for row in b:
        waiting.setdefault(str(row["id"]), []).append(row)
    return [Pair(row["id"], row, waiting[str(row["id"])].pop(0)) for row in a]
