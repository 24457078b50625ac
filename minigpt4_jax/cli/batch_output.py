"""The output file of `batch` and `curate describe`: answers in the order of the input, resumable."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.atomic import atomic_file, write_text_atomically

if TYPE_CHECKING:
    from minigpt4_jax.inference.preprocess import PreparedPrompt

OUTPUT_KEYS = ("response", "finish_reason", "tokens", "error")  # not allowed in the input


@dataclass
class BatchRow:
    """A line of the input with the prompt made from it, or the error why there is none."""

    number: int  # from 0
    fields: dict[str, Any]
    images: tuple[str | bytes, ...] = ()  # paths, or files' bytes
    prompt: "PreparedPrompt | None" = None
    error: str | None = None


def settings_path(output: Path) -> Path:
    """The file of the options that an output was written with."""
    return output.with_name(output.name + ".settings.json")


class Output:
    """The file of answers, one line per row, in order; every line is written at once.

    FILE.settings.json beside it records the options that the answers were generated with.

    Attributes:
        remaining: the rows that are still to be answered, in order.
        num_errors: rows in the file that have an error.
    """

    def __init__(
        self,
        path: Path,
        rows: Sequence[BatchRow],
        settings: dict[str, Any],
        *,
        retry_errors: bool = False,
        result_keys: Sequence[str] = OUTPUT_KEYS,
    ):
        """Check an existing file. UserError: it is unreadable, or of other rows or settings.

        rows: consecutive ones.
        result_keys: what `put` adds to a row.
        retry_errors: rows with an error are answered again, even if the input changed them. The file
        is then replaced as a whole when the rows are answered.
        """
        self._path, self._settings, self._retry_errors = path, settings, retry_errors
        self._result_keys = result_keys
        self._settings_path = settings_path(path)
        self._pending: dict[int, bytes] = {}  # lines that wait for earlier rows
        self._first = rows[0].number if rows else 0
        self._contexts = contextlib.ExitStack()
        self._file: BinaryIO
        if not path.parent.is_dir():
            raise UserError(f"--output={path}: there is no directory {path.parent}")
        try:
            lines = self._complete_lines() if path.exists() and path.stat().st_size else []
        except (OSError, ValueError) as e:
            raise UserError(f"--output={path}: cannot be read ({e})") from None
        has_error = [_has_error(line) for line in lines]
        retried = {n for n, failed in enumerate(has_error) if failed and retry_errors}
        for n, line in enumerate(lines):
            if n >= len(rows) or not (n in retried or self._is_answer_to(line, rows[n])):
                raise self._conflict(
                    f"line {n + 1} is not the answer to row {self._first + n + 1} of the input"
                )
        self.remaining = [row for n, row in enumerate(rows) if n >= len(lines) or n in retried]
        self.num_errors = sum(has_error) - len(retried)
        self._num_written = len(lines)
        self._size = sum(len(line) + 1 for line in lines)
        self._replaces_file = bool(retried)
        if retried:
            self._num_written = self._size = 0
            kept = {n: line + b"\n" for n, line in enumerate(lines) if n not in retried}
            self._pending.update(kept)

    def _complete_lines(self) -> list[bytes]:
        """The lines of the file, without one that an interruption cut."""
        if not self._settings_path.exists():
            raise self._conflict("exists already, and was not written by this command")
        previous = json.loads(self._settings_path.read_bytes())
        # The lines themselves show which prompt their rows had.
        unchecked = {"prompt"} if self._retry_errors else set()
        for name, value in self._settings.items():
            # an option that did not exist yet was off
            before = previous.get(name, False if isinstance(value, bool) else None)
            if before != value and name not in unchecked:
                raise self._conflict(f"was started with {name} {before}, now {value}")
        data = self._path.read_bytes()
        return data[: data.rfind(b"\n") + 1].splitlines()

    def _is_answer_to(self, line: bytes, row: BatchRow) -> bool:
        try:
            fields = json.loads(line)
            result = {name: value for name, value in fields.items() if name in self._result_keys}
        except (ValueError, AttributeError):
            return False
        # compared as text, because NaN is not equal to itself
        return bool(result) and json.dumps(row.fields | result) == json.dumps(fields)

    def _conflict(self, reason: str) -> UserError:
        return UserError(f"--output={self._path}: {reason}; choose another --output, or delete it")

    def __enter__(self) -> "Output":
        """Open the file for writing. UserError: it cannot be written."""
        try:  # the settings first: answers without them could not be continued
            settings = json.dumps(self._settings, indent=1) + "\n"
            write_text_atomically(self._settings_path, settings)
            path = self._path
            if self._replaces_file:
                path = self._contexts.enter_context(atomic_file(path))
            self._file = self._contexts.enter_context(path.open("ab"))
            self._file.truncate(self._size)
            self._write_pending()
        except OSError as e:
            raise UserError(f"--output={self._path}: cannot be written ({e.strerror})") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._contexts.__exit__(kind, error, traceback)

    def put(self, row: BatchRow, result: dict[str, Any]) -> int:
        """Write a row's result as soon as all rows before it are written; how many were written now."""
        self._pending[row.number - self._first] = json_line(row.fields | result)
        self.num_errors += "error" in result
        try:
            return self._write_pending()
        except OSError as e:
            state = f"{self._num_written} rows are written, the same command continues from there"
            if self._replaces_file:
                state = "the file is unchanged"
            raise UserError(f"cannot write {self._path}: {e.strerror}; {state}") from None

    def _write_pending(self) -> int:
        before = self._num_written
        while self._num_written in self._pending:
            self._file.write(self._pending.pop(self._num_written))
            self._file.flush()
            self._num_written += 1
        return self._num_written - before


def _has_error(line: bytes) -> bool:
    try:
        fields = json.loads(line)
    except ValueError:
        return False
    return isinstance(fields, dict) and "error" in fields


def json_line(fields: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(fields, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can express and UTF-8 cannot
        return (json.dumps(fields) + "\n").encode()
