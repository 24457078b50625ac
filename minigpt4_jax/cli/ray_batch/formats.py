"""What `batch --ray` reads and writes: files of rows, in pieces that become one output file each."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.cli import batch_rows
from minigpt4_jax.cli.batch_output import BatchRow, json_line
from minigpt4_jax.cli.ray_batch.file_format import Format, Result, results_of
from minigpt4_jax.errors import UserError


class JsonLines(Format):
    """JSONL, an object on each line. Pieces start at a byte."""

    name, suffix = "jsonl", ".jsonl"

    def matches(self, name: str) -> bool:
        return name.lower().endswith((".jsonl", ".ndjson", ".json"))

    def scan(self, path: Path, rows: int) -> list[tuple[int, int]]:
        batch_rows.check_lines(path)
        pieces: list[tuple[int, int]] = []
        start = offset = count = 0
        with path.open("rb") as file:
            for line in file:
                offset += len(line)
                count += _num_rows(line)
                if count >= rows:
                    pieces.append((start, count))
                    start, count = offset, 0
        if count:
            pieces.append((start, count))
        return pieces

    def read(
        self, path: Path, start: int, count: int, number: int, prompt: str | None
    ) -> tuple[list[BatchRow], Any]:
        lines: list[bytes] = []
        with path.open("rb") as file:
            file.seek(start)
            while len(lines) < count and (line := file.readline()):
                lines += [row for row in line.splitlines() if row.strip()]
        return [
            batch_rows.parse_row(number + n, line, path.parent, prompt)
            for n, line in enumerate(lines)
        ], None

    def write(
        self, path: Path, rows: Sequence[BatchRow], results: Sequence[Result], source: Any
    ) -> None:
        with path.open("wb") as file:
            for row, result in zip(rows, results, strict=True):
                file.write(json_line(row.fields | result))

    def read_results(self, path: Path) -> list[Result]:
        return [results_of(json.loads(line)) for line in path.read_bytes().splitlines()]


def _num_rows(line: bytes) -> int:
    """How many rows `bytes.splitlines` finds in what the file calls a line."""
    if b"\r" not in line:
        return bool(line.strip())
    return sum(bool(row.strip()) for row in line.splitlines())


def all_formats(several: bool = False) -> Iterator[Format]:
    """several: the answers to a row are lists."""
    from minigpt4_jax.cli.ray_batch.parquet import Parquet
    from minigpt4_jax.cli.ray_batch.tars import WebDataset

    yield from (JsonLines(), Parquet(several), WebDataset())


def format_named(name: str, several: bool = False) -> Format:
    return next(known for known in all_formats(several) if known.name == name)


def format_of(path: Path) -> Format:
    """The format of an input file, by its name. UserError: none of them."""
    for known in all_formats():
        if known.matches(path.name):
            return known
    raise UserError(f"--input={path}: expected files that end in .jsonl, .parquet or .tar")
