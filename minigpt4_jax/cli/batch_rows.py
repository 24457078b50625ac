"""The rows of `batch`: objects with images and a prompt, from the lines of a JSONL file."""

import codecs
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minigpt4_jax.cli.batch_output import OUTPUT_KEYS, BatchRow
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.image_paths import check_other_images, image_names, path_in_folder

_CHECKED = 64 << 20  # bytes of a file that are searched for another format


def read_rows(path: Path, default_prompt: str | None) -> list[BatchRow]:
    """The rows of a file; broken ones have an error. UserError: unreadable file, no rows, no JSONL."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"--input={path}: cannot be read ({e.strerror})") from None
    _check_encoding(path, data)
    lines = [line for line in data.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--input={path} has no rows; expected a JSON object per line")
    _check_one_object_per_line(path, data, lines)
    return [parse_row(n, line, path.parent, default_prompt) for n, line in enumerate(lines)]


def check_lines(path: Path) -> None:
    """The checks of `read_rows` without reading a large file whole. UserError: no JSONL."""
    try:
        with path.open("rb") as file:
            data = file.read(_CHECKED + 1)
    except OSError as e:
        raise UserError(f"--input={path}: cannot be read ({e.strerror})") from None
    _check_encoding(path, data)
    lines = [line for line in data.splitlines() if line.strip()]
    if len(data) <= _CHECKED and lines:
        _check_one_object_per_line(path, data, lines)


def _check_encoding(path: Path, data: bytes) -> None:
    """UserError: UTF-16 or UTF-32, with or without a byte order mark, or a compressed file."""
    if data.startswith(b"\x1f\x8b"):
        raise UserError(
            f"--input={path} is compressed by gzip; expected JSON: unpack it, for instance with "
            f"`gzip -dc {path} > rows.jsonl`"
        )
    encoding = json.detect_encoding(data[:4])
    if encoding.startswith("utf-8") or not (
        data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
        or data.count(0) >= len(data) // 4  # every second or fourth byte of ASCII characters
    ):
        return
    name = encoding.upper().removesuffix("-LE").removesuffix("-BE")
    raise UserError(
        f"--input={path} is {name}; expected UTF-8: save it as UTF-8, for instance with "
        f"`iconv -f {name} -t UTF-8 {path} > rows.jsonl`"
    )


def _check_one_object_per_line(path: Path, data: bytes, lines: Sequence[bytes]) -> None:
    """UserError: the file is one JSON document, an array or an object over several lines."""
    if not lines[0].lstrip(codecs.BOM_UTF8).strip().startswith((b"[", b"{")):
        return
    if len(lines) > 1 and isinstance(_json_or_none(lines[0]), dict):
        return
    document = _json_or_none(data)
    if document == []:
        raise UserError(f"--input={path} has no rows; expected a JSON object per line")
    if isinstance(document, list):
        raise UserError(
            f"--input={path} is one JSON array of {len(document)} rows; expected a JSON object per "
            f"line: convert it, for instance with `jq -c '.[]' {path} > rows.jsonl`"
        )
    if isinstance(document, dict) and len(lines) > 1:
        raise UserError(
            f"--input={path} is one JSON object over {len(lines)} lines; expected a JSON object per "
            f"line: convert it, for instance with `jq -c . {path} > rows.jsonl`"
        )


def _json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def parse_row(number: int, line: bytes, folder: Path, default_prompt: str | None) -> BatchRow:
    """The row of a line of JSON; a broken one has an error."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as e:
        return BatchRow(number, {}, error=f"the row is not JSON ({type(e).__name__}: {e})")
    if not isinstance(fields, dict):
        return BatchRow(number, {}, error=f"the row is {line[:40]!r}; expected an object")
    return make_row(number, fields, folder, default_prompt)


def make_row(
    number: int,
    fields: dict[str, Any],
    folder: Path,
    default_prompt: str | None,
    images: tuple[str | bytes, ...] | None = None,
) -> BatchRow:
    """The row of an object.

    images: files' bytes, or paths relative to the folder; by default the paths that the object names.
    """
    try:
        fields = _with_prompt(fields, default_prompt)
        if images is None:
            images = _image_paths(fields)
        return BatchRow(number, fields, tuple(map(partial(_in_folder, folder), images)))
    except UserError as e:
        return BatchRow(number, fields, error=str(e))


def _with_prompt(fields: dict[str, Any], default_prompt: str | None) -> dict[str, Any]:
    if reserved := [name for name in OUTPUT_KEYS if name in fields]:
        raise UserError(f'the row has "{reserved[0]}", which the output needs; rename it')
    if "prompt" in fields or "question" in fields:
        return fields
    if default_prompt is None:
        raise UserError('the row has no "prompt"; add it, or pass --prompt')
    return fields | {"prompt": default_prompt}


def _image_paths(fields: dict[str, Any]) -> tuple[str, ...]:
    names = image_names(fields, "the row")
    if not names:
        check_other_images(fields, ("prompt", "question"), "the row")
    return tuple(names)


def _in_folder(folder: Path, image: str | bytes) -> str | bytes:
    return image if isinstance(image, bytes) else path_in_folder(folder, image)
