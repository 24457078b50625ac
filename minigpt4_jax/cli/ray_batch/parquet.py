"""Parquet shards, with images inside or as paths: as Hugging Face's datasets are published."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.cli import batch_rows
from minigpt4_jax.cli.batch_output import OUTPUT_KEYS, BatchRow
from minigpt4_jax.cli.ray_batch.file_format import Format, Result, results_of
from minigpt4_jax.data.parquet_rows import SUFFIX
from minigpt4_jax.errors import UserError

IMAGE_COLUMNS = ("image", "images")


class Parquet(Format):
    """Rows of a table. Pieces start at a row.

    The output has the columns of the input and those of the answers."""

    name, suffix = "parquet", SUFFIX

    def __init__(self, several: bool = False):
        """several: the answers to a row are lists."""
        self._several = several

    def matches(self, name: str) -> bool:
        return name.lower().endswith(SUFFIX)

    def scan(self, path: Path, rows: int) -> list[tuple[int, int]]:
        with _open(path) as file:
            taken = [name for name in OUTPUT_KEYS if name in file.schema_arrow.names]
            if taken:
                raise UserError(
                    f'--input={path} has the column "{taken[0]}", which the output needs; rename it'
                )
            total = file.metadata.num_rows
        return [(start, min(rows, total - start)) for start in range(0, total, rows)]

    def read(
        self, path: Path, start: int, count: int, number: int, prompt: str | None
    ) -> tuple[list[BatchRow], Any]:
        table = _read_table(path, start, count)
        rows = []
        for n, record in enumerate(table.to_pylist()):
            images = _take_images(record)
            fields = json.loads(json.dumps(_without_bytes(record), default=str))
            rows.append(batch_rows.make_row(number + n, fields, path.parent, prompt, images))
        return rows, table

    def write(
        self, path: Path, rows: Sequence[BatchRow], results: Sequence[Result], source: Any
    ) -> None:
        arrow, parquet = _modules(path)
        types = {
            "response": arrow.string(),
            "finish_reason": arrow.string(),
            "tokens": arrow.int32(),
        }
        if self._several:
            types = {name: arrow.list_(kind) for name, kind in types.items()}
        table = source
        for name, kind in {**types, "error": arrow.string()}.items():
            column = arrow.array([result.get(name) for result in results], kind)
            table = table.append_column(name, column)
        parquet.write_table(table, path)

    def read_results(self, path: Path) -> list[Result]:
        _, parquet = _modules(path)
        table = parquet.read_table(path, columns=list(OUTPUT_KEYS))
        return [results_of(record) for record in table.to_pylist()]


def _modules(path: Path) -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{path}: needs the package pyarrow: `pip install pyarrow`") from None


def _open(path: Path) -> Any:
    _, parquet = _modules(path)
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as e:  # pyarrow's errors are ValueErrors
        raise UserError(f"--input={path}: cannot be read as Parquet ({e})") from None


def _read_table(path: Path, start: int, count: int) -> Any:
    """These rows of a file, from the row groups that hold them."""
    with _open(path) as file:
        first = skipped = 0
        groups: list[int] = []
        for n in range(file.num_row_groups):
            end = first + file.metadata.row_group(n).num_rows
            if first < start + count and end > start:
                skipped = skipped if groups else start - first
                groups.append(n)
            first = end
        return file.read_row_groups(groups).slice(skipped, count)


def _take_images(record: dict[str, Any]) -> tuple[str | bytes, ...] | None:
    """The images of a row that holds any as bytes; in the row their names replace them."""
    for column in IMAGE_COLUMNS:
        value = record.get(column)
        values = value if isinstance(value, list) else [value]
        if not any(isinstance(one, (bytes, dict)) for one in values):
            continue
        parts = [_image(one) for one in values if one is not None]
        names = [name for _, name in parts if name]
        record[column] = names if isinstance(value, list) else next(iter(names), None)
        return tuple(data for data, _ in parts)
    return None


def _image(value: Any) -> tuple[str | bytes, str | None]:
    """(the image, its name) of a value of an image column."""
    if isinstance(value, dict):
        name = value.get("path")
        return (value.get("bytes") or name or ""), name
    return value, None


def _without_bytes(record: dict[str, Any]) -> dict[str, Any]:
    """The row's values that JSON can hold; dates become text."""
    return {k: v for k, v in record.items() if v is not None and not isinstance(v, bytes)}
