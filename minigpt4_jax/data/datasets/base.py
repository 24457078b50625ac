"""A published dataset as a Source: its rows packed in memory, its pictures in a folder."""

import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minigpt4_jax.data.json_records import Example
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import with_images

NO_IMAGE = "without their image"

_log = logging.getLogger(__name__)


class DatasetRow(NamedTuple):
    """What a dataset keeps of a row of its files."""

    image: str  # below the folder of images; "": none
    fields: tuple[Any, ...]  # JSON values, what `make` takes


class Unused(NamedTuple):
    """A row that makes no example."""

    cause: str  # in a few words that follow a count: "12 without a caption"
    fault: bool = True  # False: the dataset's own rule leaves it out, such as another split


# (images, a row's fields, generator) -> the example
Make = Callable[[tuple[str, ...], Sequence[Any], np.random.Generator], Example]


@dataclass(frozen=True)
class Layout:
    """How a dataset lies on disk, and what becomes of a row."""

    files: tuple[str, ...]  # annotation files below the folder that it is published as
    read: Callable[[Sequence[Path]], Iterator[DatasetRow | Unused]]  # from these files
    make: Make
    images: str | None = None  # where the images are below that folder; None: wherever, or none


class PackedRows:
    """A list of JSON values as one block of bytes: a tenth of the memory of Python's objects, shared
    by forked processes and quickly sent to others."""

    def __init__(self, rows: Iterable[Any]):
        block, ends = bytearray(), array("q", [0])
        for row in rows:
            block += json.dumps(row, separators=(",", ":")).encode()
            ends.append(len(block))
        self._block = bytes(block)
        self._ends = np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return json.loads(self._block[self._ends[index] : self._ends[index + 1]])


class Dataset:
    """A Source of one dataset.

    dropped: rows that something is wrong with, left_out: rows that the dataset's own rule does not
    take (another split, say), both counted by cause.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        annotations: Sequence[Path],
        images: Path | None,
        check_images: bool,
    ):
        self.name = name
        self.dropped: dict[str, int] = {}
        self.left_out: dict[str, int] = {}
        self._images = images
        self._make = layout.make
        self._missing = ""  # the first of them
        self._rows = PackedRows(self._used(layout.read(annotations), check_images))
        self._report(annotations)

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        image, *fields = self._rows[index]
        return self._make(self._paths(image), fields, rng)

    def _paths(self, image: str) -> tuple[str, ...]:
        return (os.path.join(self._images or "", image),) if image else ()

    def _used(self, rows: Iterator[DatasetRow | Unused], check: bool) -> Iterator[list[Any]]:
        dropped, left_out = Counter[str](), Counter[str]()
        folder = _Folder(self._images) if check else None
        for row in rows:
            if isinstance(row, Unused):
                (dropped if row.fault else left_out)[row.cause] += 1
            elif row.image and self._images is None:
                raise UserError(
                    f"data {self.name}: its folder of images is not named; name it as `images`"
                )
            elif row.image and folder and not folder.has(row.image):
                dropped[NO_IMAGE] += 1
                self._missing = self._missing or self._paths(row.image)[0]
            else:
                yield [row.image, *row.fields]
        self.dropped, self.left_out = dict(dropped), dict(left_out)

    def _report(self, annotations: Sequence[Path]) -> None:
        """Into the log; UserError when no example is left."""
        counts = [f"{n} {cause}" for cause, n in [*self.dropped.items(), *self.left_out.items()]]
        missing = f" (the first: {self._missing})" if self._missing else ""
        rest = f"; rows not used: {', '.join(counts)}{missing}" if counts else ""
        if not len(self):
            raise UserError(
                f"data {self.name}: there is no example in {', '.join(map(str, annotations))}{rest}"
            )
        level = logging.WARNING if self.dropped else logging.INFO
        _log.log(level, "data %s: %d examples%s", self.name, len(self), rest)


class _Folder:
    """Which files there are, found by listing each folder once: quicker than a question a file."""

    def __init__(self, path: Path | None):
        self._path = path
        self._names: dict[str, set[str]] = {}

    def has(self, image: str) -> bool:
        below, name = os.path.split(image)
        if below not in self._names:
            try:
                self._names[below] = set(os.listdir(os.path.join(self._path or "", below)))
            except (OSError, ValueError):
                self._names[below] = set()
        return name in self._names[below]


def asked(images: tuple[str, ...], question: str) -> str:
    """A first question: behind the images, without prompt template."""
    return with_images(question, len(images))


def pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    """One of them, all equally likely."""
    return choices[int(rng.integers(len(choices)))]
