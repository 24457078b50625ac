"""Find and read the files of a benchmark's published layout."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.data.annotations import expect_object, parse, read_list, read_text
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Benchmark, Row

NAMED = 3  # ids that a message names


def rows_of(benchmark: Benchmark, data: Path, split: str) -> list[Row]:
    """The rows of a benchmark. UserError: as its `read`, no rows, or two rows with one id (only
    expressions about one object share theirs)."""
    rows = benchmark.read(data, split)
    if not rows:
        raise UserError(f"data {data}: {benchmark.name} has no rows there")
    counts = Counter(str(row.id) for row in rows)
    double = [name for name, count in counts.items() if count > 1]
    if double and benchmark.kind != "box":
        shown = ", ".join(double[:NAMED]) + (", ..." if len(double) > NAMED else "")
        raise UserError(
            f"data {data}: {len(double)} ids of {benchmark.name} are there twice ({shown})"
        )
    return rows


def find_file(data: Path, names: Sequence[str], benchmark: str) -> Path:
    """`data` if it is a file, else the first of `names` in the folder. UserError: there is none."""
    if data.is_file():
        return data
    if not data.is_dir():
        raise UserError(
            f"--data={data}: there is no such file or folder; {benchmark} needs {_either(names)}"
        )
    for name in names:
        if (data / name).is_file():
            return data / name
    raise UserError(
        f"--data={data}: {benchmark} needs {_either(names)} in this folder; it has {contents(data)}"
    )


def contents(folder: Path) -> str:
    """The first names in a folder, for messages."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "no files"


def _either(names: Sequence[str]) -> str:
    return " or ".join(names)


def read_rows(path: Path, key: str = "") -> list[tuple[str, dict[str, Any]]]:
    """(location for messages, row) of a JSON list, a list under `key`, or JSON lines.

    UserError: no JSON, other contents, or no rows at all."""
    rows = list(_rows(path, key))
    if not rows:
        raise UserError(f"data {path}: has no rows")
    return rows


def _rows(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not read_text(path).strip():
        raise UserError(f"data {path}: is empty; expected rows")
    if is_json_lines(path, key):
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                where = f"data {path}, line {number}"
                yield where, expect_object(parse(where, line), where)
    else:
        yield from read_list(path, key)


def is_json_lines(path: Path, key: str = "") -> bool:
    """Whether a file has a JSON object in each line. One line alone may also be an object of rows by
    their id, or an object with a list of rows under `key`, and then is not."""
    text = read_text(path).strip()
    if not text.startswith("{"):
        return False
    first, _, others = text.partition("\n")
    if key and not others:
        return f'"{key}"' not in text  # not parsed: such a file may have hundreds of megabytes
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return bool(others) or not all(isinstance(value, dict) for value in row.values())


def coco_paths(image_id: int, *folders: str) -> tuple[str, ...]:
    """Where a COCO image may be: the folders of 2017 name images by number alone, those of 2014 with a
    prefix."""
    return tuple(
        f"coco/{folder}/{f'COCO_{folder}_' if folder.endswith('2014') else ''}{image_id:0>12}.jpg"
        for folder in folders
    )
