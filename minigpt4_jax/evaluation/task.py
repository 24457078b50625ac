"""One benchmark to be run on one split: its rows, its images on disk, its folder of results."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Benchmark, Row
from minigpt4_jax.evaluation.benchmarks import find
from minigpt4_jax.evaluation.layout import rows_of
from minigpt4_jax.evaluation.ranking import RANKED_BATCH


@dataclass(frozen=True)
class Task:
    """rows: all of the split. num_rows: how many of them, the first ones, are used."""

    benchmark: Benchmark
    split: str
    root: Path
    rows: Sequence[Row]
    num_rows: int

    @property
    def name(self) -> str:
        """As in the names of folders: "refcoco_val"."""
        return f"{self.benchmark.name}_{self.split}" if self.split else self.benchmark.name

    @property
    def title(self) -> str:
        return f"{self.benchmark.title} {self.split}".strip()

    @property
    def used_rows(self) -> Sequence[Row]:
        return self.rows[: self.num_rows]

    @property
    def fingerprint(self) -> str:
        """Of the ids and questions of all rows."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.id, row.question, row.candidates]).encode())
        return digest.hexdigest()[:16]

    def first_images(self, count: int) -> "Task":
        """The task on the rows about its first images, however many rows each has."""
        seen: set[tuple[str, ...]] = set()
        for number, row in enumerate(self.rows):
            seen.add(row.images)
            if len(seen) > count:
                return dataclasses.replace(self, num_rows=number)
        return self

    def image(self, row: Row) -> Path | None:
        """The image file of a row, or the place where it is expected; None for a row of text alone."""
        paths = [self.root / place for place in row.images]
        return next((path for path in paths if path.is_file()), paths[0] if paths else None)


def open_tasks(
    names: Sequence[str], root: Path, splits: Sequence[str] = (), limit: int | None = None
) -> list[Task]:
    """The tasks of benchmarks, each on the chosen splits that it has, by default on all that are usual.

    limit: rows of each. UserError: an unknown benchmark or split, files that are missing or wrong."""
    if not root.is_dir():
        raise UserError(f"--data.root={root}: there is no such directory")
    tasks = []
    used: set[str] = set()
    for name in names:
        benchmark = find(name)
        chosen = [split for split in benchmark.splits if not splits or split in splits]
        if benchmark.splits and not chosen:
            known = ", ".join(benchmark.splits)
            raise UserError(f"--split={','.join(splits)}: {name} has none of them, but {known}")
        used.update(chosen)
        tasks += [_open(benchmark, split, root, limit) for split in chosen or [""]]
    if unknown := [split for split in splits if split not in used]:
        raise UserError(f"--split={unknown[0]}: none of {', '.join(names)} has this split")
    return tasks


def _open(benchmark: Benchmark, split: str, root: Path, limit: int | None) -> Task:
    rows = rows_of(benchmark, root / benchmark.folder, split)
    number = len(rows) if limit is None else min(limit, len(rows))
    if benchmark.ranked:  # losses depend on the rows of a batch
        number = min(-(-number // RANKED_BATCH) * RANKED_BATCH, len(rows))
    return Task(benchmark, split, root, rows, number)
