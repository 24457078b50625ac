"""What is known about the images of rows from elsewhere: captions, and objects that a detector found."""

from pathlib import Path
from typing import Any

from minigpt4_jax.curation.rows import Row
from minigpt4_jax.data.annotations import (
    expect_object,
    identity_of,
    keys,
    parse,
    read_text,
    texts_of,
)
from minigpt4_jax.errors import UserError


def add_references(path: Path, rows: list[Row]) -> list[Row]:
    """The rows with the "references" and "objects" that a file has for their ids, beside their own.

    path: JSONL of {"id", "references": list of captions, "objects": list of names}, one of both or both.
    UserError: an invalid row, an id twice, no row with an id of the rows.
    """
    known: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"data {path}, line {number}"
        row = expect_object(parse(where, line), where)
        name = str(identity_of(row, "id", where))
        if name in known:
            raise UserError(f'{where}: the id "{name}" is there twice')
        known[name] = {k: texts_of(row, k, where) for k in ("references", "objects") if k in row}
        if not known[name]:
            raise UserError(f'{where}: has {keys(row)}; expected "references" or "objects"')
    if not known.keys() & {str(row["id"]) for row in rows}:
        raise UserError(f"data {path}: none of its ids is the id of a row")
    return [_merge(row, known.get(str(row["id"]), {})) for row in rows]


def _merge(row: Row, more: dict[str, list[str]]) -> Row:
    merged = dict(row)
    for key, texts in more.items():
        merged[key] = list(dict.fromkeys([*(row.get(key) or []), *texts]))
    return merged
