"""The file of a benchmark's answers: a line for each answer, written as it comes, resumable.

answers.jsonl has {"n": number of the row from 0, "id", "answer", "finish_reason", "tokens"}, or "error"
instead of an answer, and "round" where a question was asked again. answers.settings.json beside it says
what the answers were generated with.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Answer, Row
from minigpt4_jax.storage.atomic import atomic_file, write_error, write_text_atomically

Line = dict[str, Any]


class AnswerFile:
    """The answers of one benchmark, of one process where several share the work.

    Attributes:
        lines: (row, round) -> the line with its answer or error.
    """

    def __init__(
        self, path: Path, rows: Sequence[Row], settings: Mapping[str, Any], *, retry_errors: bool
    ):
        """Read an existing file; a line that an interruption cut is dropped. retry_errors: rows with an
        error count as unanswered. UserError: the file has other settings, or rows of other questions."""
        self._path = path
        self._settings_path = path.with_suffix(".settings.json")
        self._settings = dict(settings)
        self._file: BinaryIO | None = None
        self._rows = rows
        self.lines: dict[tuple[int, int], Line] = {}
        if path.exists() and path.stat().st_size:
            self._check_settings()
            self._read(retry_errors)

    def _check_settings(self) -> None:
        try:
            before = json.loads(self._settings_path.read_bytes())
        except (OSError, ValueError):
            raise self._conflict("exists already, and was not written by this command") from None
        for name, value in self._settings.items():
            if before.get(name) != value:
                raise self._conflict(f"was started with {name} {before.get(name)}, now {value}")

    def _read(self, retry_errors: bool) -> None:
        data = self._path.read_bytes()
        for number, text in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
            try:
                line = json.loads(text)
                key = (int(line["n"]), int(line.get("round", 0)))
            except (ValueError, KeyError, TypeError):
                raise self._conflict(f"line {number} is not an answer of this command") from None
            if key[0] < len(self._rows) and line["id"] != self._rows[key[0]].id:
                raise self._conflict(
                    f"line {number} answers row {line['id']}, which is another now"
                )
            if not (retry_errors and "error" in line):
                self.lines[key] = line

    def _conflict(self, reason: str) -> UserError:
        return UserError(f"{self._path}: {reason}; choose another --out, or delete it")

    def __enter__(self) -> "AnswerFile":
        """Open the file for further answers. UserError: it cannot be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self._settings_path, json.dumps(self._settings, indent=1) + "\n")
            # Without the line that was cut, and without errors that are retried.
            kept = b"".join(map(_encode, self.lines.values()))
            if self._path.exists() and self._path.read_bytes() != kept:
                with atomic_file(self._path) as temporary:
                    temporary.write_bytes(kept)
            self._file = self._path.open("ab")
        except OSError as e:
            raise write_error(self._path, e) from None
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, n: int, values: Mapping[str, Any], round: int = 0) -> None:
        """Write the answer to a row at once. UserError: it cannot be written."""
        line = {"n": n, "id": self._rows[n].id, **({"round": round} if round else {}), **values}
        assert self._file is not None, "the file is not open"
        try:
            self._file.write(_encode(line))
            self._file.flush()
        except OSError as e:
            note = "the same command continues from there"
            raise write_error(self._path, e, note) from None
        self.lines[n, round] = line

    def rounds(self, n: int) -> list[Line]:
        """The lines of a row: of the first question, and of the rounds after it."""
        found: list[Line] = []
        while (n, len(found)) in self.lines:
            found.append(self.lines[n, len(found)])
        return found


def _encode(line: Line) -> bytes:
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return (json.dumps(line) + "\n").encode()


def given_answer(lines: Sequence[Line], *, resample: bool) -> Answer:
    """What `judge` gets of a row's lines: the answer, or with `resample` those of all rounds. A row with
    an error has the empty answer, which is wrong."""
    answers: list[Any] = ["" if "error" in line else line["answer"] for line in lines]
    return answers if resample else answers[0]
