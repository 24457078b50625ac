"""What a benchmark needs on disk and what of it is missing: `evaluate check`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Benchmark, DataFile
from minigpt4_jax.evaluation.task import open_tasks

NAMED = 3  # images that a message names


class Finding(NamedTuple):
    """A line about one benchmark. ok: nothing is missing."""

    benchmark: str
    ok: bool
    text: str


def check(benchmark: Benchmark, root: Path, splits: Sequence[str] = ()) -> Iterator[Finding]:
    """What is there and what is missing, and where people get it."""
    name = benchmark.name
    missing = [
        _describe(file, root, split)
        for split in splits or benchmark.splits or ("",)
        for file in benchmark.files
        if not _exists(file, root, split)
    ]
    missing += [
        _describe(file, root, "") for file in benchmark.images if not _exists(file, root, "")
    ]
    for text in dict.fromkeys(missing):
        yield Finding(name, False, text)
    if missing:
        return
    try:
        tasks = open_tasks([name], root, splits)
    except UserError as e:
        yield Finding(name, False, str(e))
        return
    for task in tasks:
        images = {task.image(row) for row in task.rows} - {None}
        absent = sorted(str(image) for image in images if image and not image.is_file())
        if absent:
            shown = ", ".join(absent[:NAMED]) + (", ..." if len(absent) > NAMED else "")
            text = f"{len(absent)} of {len(images)} images are missing: {shown}"
            yield Finding(task.name, False, text)
        else:
            yield Finding(task.name, True, f"{len(task.rows)} rows, {len(images)} images")


def _exists(file: DataFile, root: Path, split: str) -> bool:
    return any((root / path.format(split=split)).exists() for path in file.paths)


def _describe(file: DataFile, root: Path, split: str) -> str:
    places = " or ".join(str(root / path.format(split=split)) for path in file.paths)
    return f"missing: {places} (from {file.source})"
