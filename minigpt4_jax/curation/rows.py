"""Rows between the steps of curation: JSONL files, each with a record of how it was made.

A row has "id", "caption" and its image: "image", a path relative to the file, or "shard", "offset" and "size"
of an image in a tar. FILE.settings.json beside it holds the settings of the step that wrote it and, under
"history", those of the steps before.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minigpt4_jax import __version__
from minigpt4_jax.data.annotations import expect_object, kind, parse, read_text, text_of
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import FilePart, ImageSource
from minigpt4_jax.storage.atomic import atomic_file, write_error, write_text_atomically

Row = dict[str, Any]


def image_fields(source: ImageSource, folder: Path) -> Row:
    """How a row of a file in `folder` names an image."""
    if isinstance(source, FilePart):
        shard = os.path.relpath(source.path, folder)
        return {"shard": shard, "offset": source.offset, "size": source.size}
    return {"image": os.path.relpath(str(source), folder)}


def image_of(row: Row, folder: Path, where: str) -> ImageSource:
    """The image that a row of a file in `folder` names. UserError: it names none."""
    if "shard" in row:
        offset, size = row.get("offset"), row.get("size")
        if not isinstance(offset, int) or not isinstance(size, int):
            raise UserError(f'{where}: "offset" and "size" are not numbers')
        return FilePart(os.path.join(folder, text_of(row, "shard", where)), offset, size)
    image = row.get("image", row.get("file_name"))
    if not isinstance(image, str) or not image or "\0" in image:
        raise UserError(f'{where}: "image" is {kind(image)}; expected the path of an image')
    return os.path.join(folder, image)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, each with an "id", an image and a "caption" or an "error".
    UserError: no such file, an invalid row, no row."""
    rows: list[Row] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"data {path}, line {number}"
        row = expect_object(parse(where, line), where)
        image_of(row, path.parent, where)
        if "error" not in row:
            text_of(row, "caption", where)
        image = str(row.get("image", row.get("shard")))
        rows.append({"id": os.path.splitext(image)[0], **row})
    if not rows:
        raise UserError(f"data {path}: has no row")
    return rows


def moved(row: Row, source: Path, target: Path) -> Row:
    """A row of a file in folder `source` as it is written into folder `target`."""
    key = "shard" if "shard" in row else "image" if "image" in row else "file_name"
    path = os.path.join(source, row[key])
    return {**row, key: path if os.path.isabs(row[key]) else os.path.relpath(path, target)}


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write a file of rows, complete or not at all; how many. UserError: it cannot be written."""
    count = 0
    try:
        with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json_line(row))
                count += 1
    except OSError as e:
        raise write_error(path, e) from None
    return count


def json_line(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can express and UTF-8 cannot
        text = json.dumps(row)
    return text + "\n"


def removed_path(output: Path) -> Path:
    """Where the rows go that are not in an output, with their causes."""
    return output.with_name(output.stem + ".removed.jsonl")


def decisions_path(path: Path) -> Path:
    """Where decisions about the rows of a file are written."""
    return path.with_name(path.stem + ".decisions.jsonl")


def report_path(output: Path) -> Path:
    """Where the numbers about an output are written."""
    return output.with_name(output.stem + ".report.json")


# --- how a file was made --------------------------------------------------------------------------


def settings_path(path: Path) -> Path:
    return path.with_name(path.name + ".settings.json")


def read_history(path: Path) -> list[Row]:
    """The settings of the steps that made a file, the first one first; [] if they are unknown."""
    try:
        settings = json.loads(settings_path(path).read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise UserError(f"{settings_path(path)}: cannot be read ({e})") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("history", []), list):
        raise UserError(f"{settings_path(path)}: is not a record of settings")
    return [*settings.pop("history", []), settings]


def check_output(path: Path, command: str, source: Path) -> None:
    """UserError: a file to write has no directory, or exists and was not written by this command from
    `source`."""
    if not path.parent.is_dir():
        raise UserError(f"--output={path}: there is no directory {path.parent}")
    if not path.exists():
        return
    last = (read_history(path) or [{}])[-1]
    if last.get("command") != command or last.get("input", {}).get("file") != source.name:
        raise UserError(
            f"--output={path}: exists already, and was not written by curate {command} from a file "
            f"{source.name}; choose another --output, or delete it"
        )


def write_settings(path: Path, command: str, settings: Row, source: Path) -> None:
    """Record how `path` was made from the file `source`."""
    record = {
        "command": command,
        "version": __version__,
        **settings,
        "input": {"file": source.name, "sha256": file_hash(source)},
        "history": read_history(source),
    }
    try:
        write_text_atomically(settings_path(path), json.dumps(record, indent=1) + "\n")
    except OSError as e:
        raise write_error(settings_path(path), e) from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file. UserError: it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
