"""Read and check the rows of JSON files. Errors are one line and say where the mistake is."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.file_formats import HEAD_BYTES, describe_format
from minigpt4_jax.utils.text import one_line, shorten

_WHITESPACE = re.compile(r"[ \t\n\r]*")  # as JSON defines it
NAMED = 3  # keys that a message names


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError: it has a key twice; the json module would keep the last value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = [f'"{shorten(key, 40)}"' for key, count in counts.items() if count > 1]
        shown = ", ".join(twice[:NAMED]) + (", ..." if len(twice) > NAMED else "")
        raise ValueError(f"an object has {shown} twice; expected each key once")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def read_text(path: Path, what: str = "data") -> str:
    """The text of a file. what: for messages. UserError: there is no such file, or it is not UTF-8."""
    if not path.is_file():
        raise UserError(f"{what} {path}: there is no such file")
    try:
        with path.open("rb") as file:
            known = describe_format(file.read(HEAD_BYTES))
        if known:
            raise UserError(f"{what} {path}: is {known[0]}; expected text: {known[1]}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{what} {path}: cannot be read as UTF-8 text ({e}); save it as UTF-8 (from Windows often: "
            f"iconv -f WINDOWS-1252 -t UTF-8)"
        ) from None
    except OSError as e:
        raise UserError(f"{what} {path}: cannot be read ({one_line(e)})") from None


def parse(where: str, text: str) -> Any:
    """Parse JSON. where: what error messages start with."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as e:
        raise _not_json(where, e) from None
    except ValueError as e:  # a key twice, or an integer of thousands of digits
        raise UserError(f"{where}: cannot be read ({e})") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply to be a row") from None


def read_list(path: Path, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(location for messages, row) of every object in a list.

    key: the file may also be an object that has the list under this key. Rows of a plain list are
    parsed one at a time, because such files may be gigabytes large.
    """
    text = read_text(path)
    start = _skip_whitespace(text, 0)
    if text[start : start + 1] == "[":
        rows = _elements(f"data {path}", text, start + 1)
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
    """(location for messages, key, row) of every object in an object of rows."""
    value = parse(f"data {path}", read_text(path))
    if not isinstance(value, dict):
        raise UserError(f"data {path}: holds {kind(value)}; expected an object of rows by their id")
    for name, row in value.items():
        where = f'data {path}, row "{name}"'
        yield where, name, expect_object(row, where)


def first_character(path: Path) -> str:
    """The first character that is not whitespace, such as "[" or "{"; "" if the file starts with more
    than a kilobyte of whitespace."""
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as e:
        raise UserError(f"data {path}: cannot be read ({e})") from None
    return start.decode("utf-8-sig", "replace").lstrip()[:1]


def _elements(where: str, text: str, start: int) -> Iterator[Any]:
    """The values of a JSON array, parsed one at a time. start: the position after its `[`."""
    try:
        position = _skip_whitespace(text, start)
        more = text[position : position + 1] != "]"
        while more:
            value, position = _DECODER.raw_decode(text, position)
            yield value
            position = _skip_whitespace(text, position)
            more = text[position : position + 1] == ","
            if more:
                position = _skip_whitespace(text, position + 1)
        if text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        if (position := _skip_whitespace(text, position + 1)) != len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except json.JSONDecodeError as e:
        raise _not_json(where, e) from None
    except ValueError as e:  # as in `parse`
        raise UserError(f"{where}: cannot be read ({e})") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply to be rows") from None


def _skip_whitespace(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    return match.end() if match else position


def _not_json(where: str, e: json.JSONDecodeError) -> UserError:
    line = "" if ", line " in where else f" at line {e.lineno}"
    return UserError(f"{where}: is not JSON{line} ({e.msg}, column {e.colno})")


# --- fields of a row -------------------------------------------------------------------------


# Each raises UserError with the location, the key and what was expected.


def expect_object(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is {kind(row)}; expected an object")
    return row


def field_of(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise UserError(f'{where}: has {keys(row)}; "{key}" is missing')
    return row[key]


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """A string, possibly empty."""
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


def integer_of(row: dict[str, Any], key: str, where: str) -> int:
    """An integer; a number such as 7.0 is one too."""
    value = number_of(row, key, where)
    if isinstance(value, float) and not value.is_integer():  # NaN and infinity included
        raise UserError(f'{where}: "{key}" is {kind(value)}; expected an integer')
    return int(value)


def identity_of(row: dict[str, Any], key: str, where: str) -> str | int:
    """An identifier: a non-empty string or an integer."""
    value = field_of(row, key, where)
    if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
        raise UserError(f'{where}: "{key}" is {kind(value)}; expected a string or an integer')
    return value


def keys(row: dict[str, Any]) -> str:
    """The first keys of a row, for messages."""
    return "the keys " + ", ".join(map(repr, list(row)[:8])) if row else "no keys"


def kind(value: object) -> str:
    """What a JSON value is, for messages: "a list", "int 3"."""
    names = {list: "a list", dict: "an object", str: "a string", type(None): "null"}
    return names.get(type(value), f"{type(value).__name__} {value!r:.40}")
