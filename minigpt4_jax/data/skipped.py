"""Rows that cannot be read: how they are reported, and how many a run tolerates."""

import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from minigpt4_jax.errors import DataError, UserError

_MAX_NAMED = 3  # missing images that a message names
_MIN_ROWS = 1000  # the tolerated share is applied to at least this many rows

_log = logging.getLogger(__name__)


class SkippedRow(NamedTuple):
    """A row that could not be read and was replaced by another."""

    dataset: str
    cause: str  # a few words, the same for all rows with this fault
    message: str  # which file, and what is wrong with it


def skipped_row(dataset: str, error: UserError) -> SkippedRow:
    """The row of a dataset whose reading raised this error."""
    cause = error.cause if isinstance(error, DataError) else "row that is wrong"
    return SkippedRow(dataset, cause, str(error))


class SkipCounter:
    """Counts rows, and skipped rows by cause.

    max_share: the share of rows that may be skipped; 0: the first one is an error.
    num_examples: size of the data. Up to 1000, the share is that of the broken rows among all, as for missing
        images, however often they are drawn; of larger data it is that of the rows drawn, at least 1000.
    """

    def __init__(self, max_share: float, num_examples: int = _MIN_ROWS):
        self.max_share, self._num_examples = max_share, num_examples
        self.rows = 0
        self._broken: set[int] = (
            set()
        )  # checksums of the messages, of which each broken row has its own
        self.causes: Counter[str] = Counter()
        self._last_message = ""

    @property
    def skipped(self) -> int:
        return self.causes.total()

    def add(self, rows: int, skipped: Iterable[SkippedRow]) -> None:
        """Count a batch. UserError: more rows than allowed have been skipped."""
        self.rows += rows
        for row in skipped:
            self.causes[row.cause] += 1
            self._last_message = f"{row.dataset}: {row.message}" if row.dataset else row.message
            if self._is_small:
                self._broken.add(zlib.crc32(self._last_message.encode()))
            if self.max_share == 0:
                raise UserError(self._last_message)
        if self.max_share < 1 and self._are_too_many():
            raise UserError(
                f"more rows are broken than config.data.max_broken = {self.max_share:g} of all: repair "
                "the data (`python -m minigpt4_jax.data check CONFIG` counts what is missing), or "
                f"raise that share; {self}"
            )

    @property
    def _is_small(self) -> bool:
        return self._num_examples <= _MIN_ROWS

    def _are_too_many(self) -> bool:
        if self._is_small:
            return len(self._broken) > self.max_share * self._num_examples
        # a skipped row is replaced by another draw, which may be broken too
        drawn = self.rows + self.skipped
        return self.skipped > self.max_share * max(drawn, _MIN_ROWS)

    def __str__(self) -> str:
        causes = ", ".join(f"{n} {cause}" for cause, n in self.causes.most_common())
        return (
            f"data: {self.skipped} of {self.rows} rows skipped ({causes}); "
            f"the last: {self._last_message}"
        )

    def state(self) -> dict[str, Any]:
        """JSON values for `restore`."""
        return {
            "rows": self.rows, "skipped": dict(self.causes), "broken": sorted(self._broken),
        }  # fmt: skip

    def report(self) -> dict[str, Any]:
        """JSON values for `total`."""
        return {**self.state(), "last": self._last_message}

    @classmethod
    def total(cls, reports: Iterable[dict[str, Any]]) -> "SkipCounter":
        """The sum over several processes, each of which counts its own rows."""
        total = cls(1.0)
        for report in reports:
            total.rows += report["rows"]
            total.causes += Counter(report["skipped"])
            total._broken |= set(report["broken"])
            total._last_message = report["last"] or total._last_message
        return total

    def restore(self, state: dict[str, Any]) -> None:
        self.rows = int(state.get("rows", 0))
        self.causes = Counter(state.get("skipped", {}))
        self._broken = set(state.get("broken", ()))
        self._last_message = ""


def check_missing_images(
    where: str, images_of_rows: Sequence[Sequence[object]], max_share: float
) -> None:
    """Look for the image files of all rows; log a warning if some are missing.

    images_of_rows: of each row, its images; only paths are looked for.
    UserError: more than this share of the rows lacks an image (0: any row).
    """
    exists: dict[str, bool] = {}
    rows = 0
    for images in images_of_rows:
        paths = [os.fspath(image) for image in images if isinstance(image, (str, os.PathLike))]
        for path in paths:
            if path not in exists:
                exists[path] = os.path.isfile(path)
        rows += not all(exists[path] for path in paths)
    if rows:
        missing = [path for path in exists if not exists[path]]
        text = (
            f"{where}: {len(missing)} of {len(exists)} images are missing: {_name_first(missing)}"
        )
        check_missing_share(text, rows, len(images_of_rows), max_share)
        _log.warning("%s; %d of %d rows cannot be used", text, rows, len(images_of_rows))


def check_missing_share(text: str, rows: int, total: int, max_share: float) -> None:
    """text: what is missing. rows: rows without their image, of `total`, which includes them.
    UserError: these are more than max_share of the rows."""
    if rows <= max_share * total:
        return
    if max_share:
        text += (
            f"; {rows} of {total} rows cannot be used, which is more than config.data.max_broken = "
            f"{max_share:g} of all: add the images, or raise that share"
        )
    raise UserError(text)


def _name_first(paths: Sequence[str]) -> str:
    named = [f"{p} (a folder)" if os.path.isdir(p) else p for p in paths[:_MAX_NAMED]]
    return ", ".join(named) + (", ..." if len(paths) > _MAX_NAMED else "")
