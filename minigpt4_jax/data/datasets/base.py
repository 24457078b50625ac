"""A published dataset as a Source: compact rows in memory, images in a folder."""

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
from minigpt4_jax.data.skipped import check_missing_share
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import with_images

NO_IMAGE = "without their image"

_log = logging.getLogger(__name__)


class DatasetRow(NamedTuple):
    """The part of a row of the files that examples are made of."""

    image: str  # path below the image folder; "": none
    fields: tuple[Any, ...]  # JSON values for Layout.make


class Unused(NamedTuple):
    """A row that is not an example."""

    cause: str  # words that follow a count: "12 without a caption"
    fault: bool = True  # False: a valid row that the dataset excludes, such as another split


# (image paths, DatasetRow.fields, generator) -> the example
MakeExample = Callable[[tuple[str, ...], Sequence[Any], np.random.Generator], Example]


@dataclass(frozen=True)
class Layout:
    """The files of a dataset, and how to read them."""

    files: tuple[str, ...]  # annotation files below the published folder
    read: Callable[[Sequence[Path]], Iterator[DatasetRow | Unused]]  # reads these files
    make: MakeExample
    images: str | None = None  # image folder below the published folder; None: separate, or none


class PackedRows:
    """A list of JSON values in one bytes object: a tenth of the memory of Python objects, shared by forked
    processes and fast to send to others."""

    def __init__(self, rows: Iterable[Any]):
        encoded, ends = bytearray(), array("q", [0])
        for row in rows:
            encoded += json.dumps(row, separators=(",", ":")).encode()
            ends.append(len(encoded))
        self._encoded = bytes(encoded)
        self._ends = np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return json.loads(self._encoded[self._ends[index] : self._ends[index + 1]])


class Dataset:
    """A Source of the examples of one published dataset."""

    def __init__(
        self,
        name: str,
        layout: Layout,
        annotations: Sequence[Path],
        images: Path | None,
        check_images: bool,
        max_broken: float,
    ):
        self.name = name
        self.dropped: dict[str, int] = {}
        self.left_out: dict[str, int] = {}
        self._images = images
        self._make = layout.make
        self._first_missing = ""  # path of the first missing image
        self._rows = PackedRows(self._usable(layout.read(annotations), check_images))
        self._report(annotations)
        if missing := self.dropped.get(NO_IMAGE, 0):
            text = f"data {name}: {missing} rows without their image (the first: {self._first_missing})"
            check_missing_share(text, missing, len(self) + missing, max_broken)

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        image, *fields = self._rows[index]
        return self._make(self._paths(image), fields, rng)

    def _paths(self, image: str) -> tuple[str, ...]:
        return (os.path.join(self._images or "", image),) if image else ()

    def _usable(self, rows: Iterator[DatasetRow | Unused], check: bool) -> Iterator[list[Any]]:
        """The rows to keep, as JSON values; counts the others."""
        dropped, left_out = Counter[str](), Counter[str]()
        folder = _FolderListing(self._images) if check else None
        for row in rows:
            if isinstance(row, Unused):
                (dropped if row.fault else left_out)[row.cause] += 1
            elif row.image and self._images is None:
                raise UserError(
                    f"data {self.name}: its image folder is not named; name it as `images`"
                )
            elif row.image and folder and not folder.has(row.image):
                dropped[NO_IMAGE] += 1
                self._first_missing = self._first_missing or self._paths(row.image)[0]
            else:
                yield [row.image, *row.fields]
        self.dropped, self.left_out = dict(dropped), dict(left_out)

    def _report(self, annotations: Sequence[Path]) -> None:
        """Log the counts. UserError: no example is left."""
        counts = [f"{n} {cause}" for cause, n in [*self.dropped.items(), *self.left_out.items()]]
        missing = f" (the first: {self._first_missing})" if self._first_missing else ""
        rest = f"; rows not used: {', '.join(counts)}{missing}" if counts else ""
        if not len(self):
            raise UserError(
                f"data {self.name}: there is no example in {', '.join(map(str, annotations))}{rest}"
            )
        level = logging.WARNING if self.dropped else logging.INFO
        _log.log(level, "data %s: %d examples%s", self.name, len(self), rest)


class _FolderListing:
    """Which files exist, from listing each folder once: faster than checking each file."""

    def __init__(self, path: Path | None):
        self._path = path
        self._names: dict[str, set[str]] = {}

    def has(self, image: str) -> bool:
        subfolder, name = os.path.split(image)
        if subfolder not in self._names:
            try:
                self._names[subfolder] = set(os.listdir(os.path.join(self._path or "", subfolder)))
            except (OSError, ValueError):
                self._names[subfolder] = set()
        return name in self._names[subfolder]


def image_question(images: tuple[str, ...], question: str) -> str:
    """The first question of an example, after its image slots and without prompt template."""
    return with_images(question, len(images))


def choose(choices: Sequence[str], rng: np.random.Generator) -> str:
    """One of the choices, uniformly."""
    return choices[int(rng.integers(len(choices)))]
