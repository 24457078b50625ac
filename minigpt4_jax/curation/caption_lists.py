"""The caption lists of MiniGPT-4's first stage as tables for img2dataset.

`ccs_synthetic_filtered_large.json` and `laion_synthetic_filtered_large.json` of BLIP are lists of {"url",
"caption", ...}, of gigabytes. They are read in pieces, so memory does not grow with the file. The original's
convert_cc_sbu.py and convert_laion.py load them whole and write the same TSV.
"""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from minigpt4_jax.data.annotations import expect_object, kind
from minigpt4_jax.data.decompression import find_decompressor
from minigpt4_jax.errors import UserError

CHUNK = 1 << 20  # bytes read at a time
MAX_ROW = 64 << 20  # characters of a row; more means that the file is damaged
_SPACE = re.compile(r"[ \t\n\r]*")

Row = dict[str, Any]


@dataclass
class Counts:
    """Rows read and dropped, by cause."""

    rows: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def read_list(path: Path, progress: Callable[[int], object] = lambda read: None) -> Iterator[Row]:
    """The objects of a JSON list, or of JSON lines, one after another. Compressed files are decompressed.

    progress: called with the number of bytes of the file that were read. UserError: the file cannot be read,
    is no list of objects, is cut or damaged (with the number of the row).
    """
    try:
        opener = find_decompressor(path)
        with path.open("rb") as raw:
            file = raw if opener is None else opener(path)
            with file:
                yield from _objects(
                    path, file, lambda: progress(raw.tell() if opener is None else 0)
                )
    except OSError as e:
        raise UserError(f"data {path}: cannot be read ({e.strerror or e})") from None
    except EOFError as e:
        raise UserError(
            f"data {path}: its compressed data is cut ({e}); download it again"
        ) from None


def _objects(path: Path, file: IO[bytes], progress: Callable[[], object]) -> Iterator[Row]:
    text = _Text(path, file, progress)
    opening = text.next_character()
    if opening not in ("[", "{"):
        raise UserError(
            f"data {path}: starts with {opening!r}; expected a JSON list of rows, or a row on each line"
        )
    is_list = opening == "["
    if is_list:
        text.position += 1
    number = 0
    while True:
        character = text.next_character()
        if is_list and character == "]":
            text.position += 1
            if text.next_character():
                raise UserError(f"data {path}: has more after the end of its list")
            return
        if not is_list and not character:
            return
        if is_list and number:
            if character != ",":
                raise _damaged(path, number, character)
            text.position += 1
            text.next_character()
        number += 1
        yield expect_object(text.value(number), f"data {path}, row {number}")


class _Text:
    """The text of a file that is read in pieces. position: of what is next in `buffer`."""

    def __init__(self, path: Path, file: IO[bytes], progress: Callable[[], object]):
        self._path, self._file, self._progress = path, file, progress
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder().raw_decode
        self.buffer, self.position, self._ended = "", 0, False

    def next_character(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            match = _SPACE.match(self.buffer, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self._read():
                return ""

    def value(self, number: int) -> Any:
        """The JSON value that begins here. number: of the row, for messages."""
        while True:
            try:
                value, end = self._scan(self.buffer, self.position)
            except json.JSONDecodeError as e:
                if len(self.buffer) - self.position > MAX_ROW or not self._read():
                    rest = self.buffer[self.position : self.position + 40]
                    raise UserError(
                        f"data {self._path}, row {number}: is not JSON ({e.msg}): {rest!r}. Is the file "
                        "cut? Download it again"
                    ) from None
                continue
            except RecursionError:
                raise UserError(f"data {self._path}, row {number}: is nested too deeply") from None
            self.position = end
            return value

    def _read(self) -> bool:
        """Read on; False at the end of the file. The pieces of a long value grow."""
        if self._ended:
            return False
        rest = self.buffer[self.position :]
        try:
            data = self._file.read(max(CHUNK, len(rest)))
            self.buffer, self.position = rest + self._decode(data, final=not data), 0
        except UnicodeDecodeError as e:
            raise UserError(f"data {self._path}: is not UTF-8 ({e})") from None
        self._ended = not data
        self._progress()
        return True


def _damaged(path: Path, number: int, character: str) -> UserError:
    found = repr(character) if character else "the end of the file"
    return UserError(
        f"data {path}: after row {number} comes {found}; expected , or ]. Is the file cut? Download it "
        "again"
    )


# --- rows -------------------------------------------------------------------------------------


def usable_rows(rows: Iterable[Row], counts: Counts) -> Iterator[Row]:
    """The rows with an http(s) URL and a caption; the others are counted."""
    for row in rows:
        counts.rows += 1
        url, caption = row.get("url"), row.get("caption")
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            counts.dropped["without a URL"] += 1
        elif not isinstance(caption, str) or not caption.strip():
            counts.dropped["without a caption"] += 1
        else:
            counts.written += 1
            yield row


# --- tables ---------------------------------------------------------------------------------------


def write_tsv(rows: Iterable[Row], path: Path) -> None:
    """A table with the columns of the first row, as the original's scripts write it.
    UserError: a row with other keys."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, "excel-tab", lineterminator="\n")
        columns: list[str] = []
        for number, row in enumerate(rows, 1):
            if not columns:
                columns = list(row)
                writer.writerow(columns)
            if row.keys() != {*columns}:
                raise _other_columns(number, row, columns)
            writer.writerow([_cell(row[name], number, name) for name in columns])


def _cell(value: Any, number: int, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise UserError(
            f'usable row {number}: "{name}" is {kind(value)}; expected a string or a number'
        )
    # Half a surrogate pair has no place in UTF-8.
    return str(value).encode("utf-8", "replace").decode()


def write_parquet(rows: Iterable[Row], path: Path, batch: int = 50_000) -> None:
    """A Parquet file with the columns of the first row as strings. UserError: a row with other keys, pyarrow
    is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            "Parquet needs the package pyarrow: pip install 'minigpt4_jax[curate]'"
        ) from None
    writer: Any = None
    columns: list[str] = []
    values: dict[str, list[str]] = {}

    def flush() -> None:
        assert writer is not None
        writer.write_table(pa.table(values, schema=writer.schema))
        for column in values.values():
            column.clear()

    try:
        for number, row in enumerate(rows, 1):
            if writer is None:
                columns = list(row)
                writer = pq.ParquetWriter(
                    path, pa.schema([(name, pa.string()) for name in columns])
                )
                values = {name: [] for name in columns}
            if row.keys() != {*columns}:
                raise _other_columns(number, row, columns)
            for name in columns:
                values[name].append(_cell(row[name], number, name))
            if number % batch == 0:
                flush()
        if writer is not None:
            flush()
    finally:
        if writer is not None:
            writer.close()


def _other_columns(number: int, row: Row, columns: list[str]) -> UserError:
    return UserError(
        f"usable row {number}: has the keys {', '.join(row)}; expected {', '.join(columns)}, as the first "
        "row has"
    )


WRITERS: dict[str, Callable[[Iterable[Row], Path], None]] = {
    ".tsv": write_tsv,
    ".parquet": write_parquet,
}
