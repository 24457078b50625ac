"""Rows of Parquet files with the images inside, as Hugging Face's datasets are published.

The columns are those of a row of JSONL; "image" is the bytes of a file, a struct of "bytes" and "path", or a
path relative to the file. The images of a file are read into memory.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import UserError

SUFFIX = ".parquet"


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files in a folder, in order."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
    """(location for messages, row, bytes of its image or None) of every row. With bytes, the row's "image"
    is a name. UserError: not Parquet, pyarrow is not installed."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"data {path}: needs the package pyarrow: `pip install pyarrow`") from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    where = f"data {path}, row {number}"
                    data = _take_image(row)
                    yield where, {k: v for k, v in row.items() if v is not None}, data
    except (OSError, ValueError) as e:  # pyarrow's errors are ValueErrors
        raise UserError(f"data {path}: cannot be read as Parquet ({e})") from None


def _take_image(row: dict[str, Any]) -> bytes | None:
    """The bytes of a row's image, whose place in the row a name takes."""
    image = row.get("image")
    data, name = (
        (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    )
    if isinstance(data, bytes) or isinstance(image, dict):
        row["image"] = name or "image"
    return data if isinstance(data, bytes) else None
