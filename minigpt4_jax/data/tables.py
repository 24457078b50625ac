"""Read rows from CSV and TSV files."""

import ast
import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import UserError

SUFFIXES = (".csv", ".tsv")
# Other names of columns.
_ALIASES = {
    "image_path": "image", "filename": "file_name", "text": "caption", "description": "caption",
    "prompt": "question", "instruction": "question", "response": "answer", "output": "answer",
}  # fmt: skip
_IMAGE_COLUMNS = {"image", "images", "file_name", "file_names"}
_DELIMITERS = (",", "\t", ";", "|")  # tried if a file has a single column


def read_table(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(location for messages, row) of every row of a table whose first line names the columns.

    Empty cells are left out of a row. A cell of the column "images" is a list or is split at ";".
    UserError: missing columns, a row with another number of cells, broken quotes.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    first, _, rest = text.partition("\n")
    stated = re.fullmatch(r"sep=(.)\r?", first)  # as Excel writes it
    if stated:
        delimiter, first = stated[1], rest.partition("\n")[0]
    if delimiter not in first:
        delimiter = next((d for d in _DELIMITERS if d in first), delimiter)
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        if stated:
            next(reader)
        columns = _columns(path, next(reader, []))
        for cells in reader:
            where = f"data {path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{where}: has {len(cells)} cells; expected {len(columns)}, as the first line has; "
                    "is a text with a comma not in quotes?"
                )
            row: dict[str, Any] = {k: v for k, v in zip(columns, cells, strict=True) if v.strip()}
            for key in _IMAGE_COLUMNS & row.keys():
                row[key] = row[key].strip()
            if "images" in row:
                row["images"] = _split_images(row["images"], where)
            yield where, row
    except csv.Error as e:
        raise UserError(f"data {path}, line {reader.line_num}: is not CSV ({e})") from None


def _columns(path: Path, names: Sequence[str]) -> list[str]:
    """The names of the columns, as rows of JSON files spell them."""
    lower = [name.strip().lower() for name in names]
    columns = [
        _ALIASES[name] if name in _ALIASES and _ALIASES[name] not in lower else name
        for name in lower
    ]
    if not ("caption" in columns or {"question", "answer"} <= {*columns}):
        raise UserError(
            f"data {path}: has the columns {', '.join(map(repr, names)) or '(none)'}; expected the first "
            'line to name "image" and "caption", or "question" and "answer"'
        )
    if twice := {name for name in columns if name and columns.count(name) > 1}:
        raise UserError(f"data {path}: has several columns for {', '.join(sorted(twice))}")
    return columns


def _split_images(cell: str, where: str) -> Any:
    """The paths in a cell, or whatever JSON list it holds."""
    if not cell.lstrip().startswith("["):
        return [name.strip() for name in cell.split(";") if name.strip()]
    try:
        return json.loads(cell)
    except ValueError as e:
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(cell)  # with single quotes, as pandas writes a list
        raise UserError(f'{where}: "images" is not a JSON list ({e})') from None
