"""What a kind of files with rows can do for `batch --ray`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.cli.batch_output import OUTPUT_KEYS, BatchRow

Result = dict[str, Any]  # what is added to a row: some of OUTPUT_KEYS


class Format(ABC):
    """A kind of files with rows.

    Attributes:
        name: on the command line.
        suffix: of an output file.
    """

    name: str
    suffix: str

    @abstractmethod
    def matches(self, name: str) -> bool:
        """Whether a file of this name is of this kind."""

    @abstractmethod
    def scan(self, path: Path, rows: int) -> list[tuple[int, int]]:
        """Pieces of at most so many consecutive rows: (where it starts, number of rows).

        UserError: not such a file."""

    @abstractmethod
    def read(
        self, path: Path, start: int, count: int, number: int, prompt: str | None
    ) -> tuple[list[BatchRow], Any]:
        """The rows of a piece, and what `write` needs of them besides.

        number: of the first row, in the whole input. prompt: of rows without one."""

    @abstractmethod
    def write(
        self, path: Path, rows: Sequence[BatchRow], results: Sequence[Result], source: Any
    ) -> None:
        """Write the rows with their results."""

    @abstractmethod
    def read_results(self, path: Path) -> list[Result]:
        """The results in a file that `write` has written."""


def results_of(fields: dict[str, Any]) -> Result:
    """The columns of a written row that are its result."""
    return {name: fields[name] for name in OUTPUT_KEYS if fields.get(name) is not None}
