"""Rows that cannot be read: what a batch says of them, and how many a run puts up with."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from minigpt4_jax.errors import DataError, UserError

_JUDGED_FROM = 1000  # rows: before so many were read, as many may be broken as of so many


class Broken(NamedTuple):
    """A row that another took the place of."""

    dataset: str
    cause: str  # in a few words, the same for all rows with this fault
    message: str  # which file, and what is wrong with it


def broken(dataset: str, error: UserError) -> Broken:
    """What an error says of a row of a dataset."""
    cause = error.cause if isinstance(error, DataError) else "row that is wrong"
    return Broken(dataset, cause, str(error))


class SkipCounter:
    """Counts rows, and those left out by cause. share: of the rows, how many may be broken; 0: the
    first is an error. examples: how many there are; of a few, one is more than a small share."""

    def __init__(self, share: float, examples: int = _JUDGED_FROM):
        self.share, self._least = share, min(examples, _JUDGED_FROM)
        self.rows = 0
        self.causes: Counter[str] = Counter()
        self._last = ""

    @property
    def skipped(self) -> int:
        return self.causes.total()

    def add(self, rows: int, found: Iterable[Broken]) -> None:
        """Count a batch. UserError: more rows are broken than may be."""
        self.rows += rows
        for one in found:
            self.causes[one.cause] += 1
            self._last = f"{one.dataset}: {one.message}" if one.dataset else one.message
            if self.share == 0:
                raise UserError(self._last)
        if self.share < 1 and self.skipped > self.share * max(self.rows, self._least):
            raise UserError(
                f"more rows are broken than config.data.max_broken = {self.share:g} of them: repair "
                "the data (`python -m minigpt4_jax.data check CONFIG` counts what is missing), or "
                f"raise that share; {self}"
            )

    def __str__(self) -> str:
        causes = ", ".join(f"{n} {cause}" for cause, n in self.causes.most_common())
        return (
            f"data: {self.skipped} of {self.rows} rows left out ({causes}); the last: {self._last}"
        )

    def state(self) -> dict[str, Any]:
        """JSON values; `restore` takes them."""
        return {"rows": self.rows, "skipped": dict(self.causes)}

    def report(self) -> dict[str, Any]:
        """JSON values for `total`."""
        return {**self.state(), "last": self._last}

    @classmethod
    def total(cls, reports: Iterable[dict[str, Any]]) -> "SkipCounter":
        """What several processes counted, each its own rows."""
        all_of_them = cls(1.0)
        for report in reports:
            all_of_them.rows += report["rows"]
            all_of_them.causes += Counter(report["skipped"])
            all_of_them._last = report["last"] or all_of_them._last
        return all_of_them

    def restore(self, state: dict[str, Any]) -> None:
        self.rows = int(state.get("rows", 0))
        self.causes = Counter(state.get("skipped", {}))
        self._last = ""
