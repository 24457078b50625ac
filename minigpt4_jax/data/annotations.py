"""Rows of JSON files, read so that every mistake is one line that says where."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import UserError

_GAP = re.compile(r"[ \t\n\r]*")  # what JSON calls white space


def read_text(path: Path) -> str:
    """UserError: there is no such file, or it is not UTF-8 text."""
    if not path.is_file():
        raise UserError(f"data {path}: there is no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"data {path}: cannot be read as UTF-8 text ({e})") from None


def parse(where: str, text: str) -> Any:
    """The value that a text of JSON holds."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise _not_json(where, e) from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply to be a row") from None


def read_list(path: Path, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of every object in a file's list; with `key`, of the list that an
    object has under it instead. One row is made after another: files of a gigabyte are usual."""
    text = read_text(path)
    begin = _skip(text, 0)
    if text[begin : begin + 1] == "[":
        rows = _elements(f"data {path}", text, begin + 1)
    else:
        value = parse(f"data {path}", text)
        if not isinstance(value, dict) or not key:
            raise UserError(f"data {path}: holds {kind(value)}; expected a list of rows")
        if not isinstance(value.get(key), list):
            raise UserError(f'data {path}: has {keys(value)}; expected a list under "{key}"')
        rows = iter(value[key])
    for number, row in enumerate(rows, 1):
        where = f"data {path}, row {number}"
        yield where, expect_object(row, where)


def read_object(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where it stands, key, row) of every object in a file's object."""
    value = parse(f"data {path}", read_text(path))
    if not isinstance(value, dict):
        raise UserError(f"data {path}: holds {kind(value)}; expected an object of rows by their id")
    for name, row in value.items():
        where = f'data {path}, row "{name}"'
        yield where, name, expect_object(row, where)


def first_mark(path: Path) -> str:
    """The mark a file of JSON begins with: "[", "{", or "" when that is far from its beginning."""
    try:
        with path.open("rb") as file:
            begin = file.read(1024)
    except OSError as e:
        raise UserError(f"data {path}: cannot be read ({e})") from None
    return begin.decode("utf-8-sig", "replace").lstrip()[:1]


def _elements(where: str, text: str, at: int) -> Iterator[Any]:
    """The values of the array whose `[` ends at `at`."""
    decoder = json.JSONDecoder()
    try:
        at = _skip(text, at)
        more = text[at : at + 1] != "]"
        while more:
            value, at = decoder.raw_decode(text, at)
            yield value
            at = _skip(text, at)
            more = text[at : at + 1] == ","
            if more:
                at = _skip(text, at + 1)
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if (at := _skip(text, at + 1)) != len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except json.JSONDecodeError as e:
        raise _not_json(where, e) from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply to be rows") from None


def _skip(text: str, at: int) -> int:
    gap = _GAP.match(text, at)
    return gap.end() if gap else at


def _not_json(where: str, e: json.JSONDecodeError) -> UserError:
    place = "" if ", line " in where else f" at line {e.lineno}"
    return UserError(f"{where}: is not JSON{place} ({e.msg}, column {e.colno})")


# --- fields of a row -------------------------------------------------------------------------


def expect_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is {kind(row)}; expected an object")
    return row


def field_of(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise UserError(f'{where}: has {keys(row)}; "{key}" is missing')
    return row[key]


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """A string, which may be empty."""
    value = field_of(row, key, where)
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" is {kind(value)}; expected a string')
    return value


def texts_of(row: dict[str, Any], key: str, where: str) -> list[str]:
    """A list of strings."""
    value = field_of(row, key, where)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UserError(f'{where}: "{key}" is {kind(value)}; expected a list of strings')
    return value


def objects_of(row: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """A list of objects."""
    value = field_of(row, key, where)
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise UserError(f'{where}: "{key}" is {kind(value)}; expected a list of objects')
    return value


def number_of(row: dict[str, Any], key: str, where: str) -> float:
    value = field_of(row, key, where)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UserError(f'{where}: "{key}" is {kind(value)}; expected a number')
    return value


def identity_of(row: dict[str, Any], key: str, where: str) -> str | int:
    """What names a picture: text or a whole number."""
    value = field_of(row, key, where)
    if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
        raise UserError(f'{where}: "{key}" is {kind(value)}; expected a name or a whole number')
    return value


def keys(row: dict[str, Any]) -> str:
    return "the keys " + ", ".join(map(repr, list(row)[:8])) if row else "no keys"


def kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", type(None): "null"}
    return names.get(type(value), f"{type(value).__name__} {value!r:.40}")
