"""python -m minigpt4_jax.batch merge --input=rows.jsonl --output=out.jsonl: one file of the answers of
`batch --shard=I/N`.

Every row of the input must be answered: what is missing is named, with the shards to start again, and
nothing is written. Exit code 1: rows of the output have an error.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.cli.batch_output import BatchRow, Output, settings_path
from minigpt4_jax.cli.batch_rows import read_rows
from minigpt4_jax.cli.batch_shards import shard_path, shard_rows
from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.storage.atomic import atomic_file, write_error, write_text_atomically

_NAMED = 8  # shards that a message names


def parse(argv: Sequence[str]) -> argparse.Namespace:
    p = Parser(
        prog="python -m minigpt4_jax.batch merge",
        description="Put the outputs of batch --shard=I/N together, and check that no row is missing.",
    )
    p.add_argument("--input", required=True, type=Path, metavar="FILE", help="of the shards")
    p.add_argument("--output", required=True, type=Path, metavar="FILE",
                   help="of the shards: the parts lie beside it, and it becomes the whole")  # fmt: skip
    return p.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """UserError: no parts, parts of several runs, rows that are not answered, an output of something else."""
    args = parse(argv)
    count, paths = find_parts(args.output)
    settings = _common_settings(paths)
    rows = read_rows(args.input, settings.get("prompt"))
    parts = [
        Output(shard_path(args.output, index, count), shard_rows(rows, index, count), settings)
        for index in range(1, count + 1)
    ]
    _check_complete(parts)
    if args.output.exists():
        Output(args.output, rows, settings)  # not of something else
    _concatenate(paths, args.output, settings)
    num_errors = sum(part.num_errors for part in parts)
    hint = "; pass --retry-errors to their shards to answer these again" if num_errors else ""
    print(f"{len(rows)} rows, {num_errors} of them with an error: {args.output}{hint}")
    return 1 if num_errors else 0


def find_parts(output: Path) -> tuple[int, list[Path]]:
    """-> (number of shards, existing parts of them in order). UserError: none, or of several numbers."""
    pattern = re.compile(re.escape(output.stem) + r"-(\d+)-of-(\d+)" + re.escape(output.suffix))
    found: dict[int, dict[int, Path]] = {}
    for path in output.parent.glob(f"*-of-*{output.suffix}"):
        if match := pattern.fullmatch(path.name):
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if not found:
        expected = shard_path(output, 1, 8)
        raise UserError(
            f"--output={output}: there are no parts beside it; expected files as {expected} of "
            "`batch --shard=1/8` with the same --output"
        )
    if len(found) > 1:
        counts = ", ".join(str(count) for count in sorted(found))
        raise UserError(
            f"--output={output}: the parts beside it are of runs with {counts} shards; delete those "
            "of all but one run"
        )
    ((count, parts),) = found.items()
    return count, [parts[index] for index in sorted(parts)]


def _common_settings(paths: Sequence[Path]) -> dict[str, Any]:
    """The options that all parts were answered with. UserError: they differ."""
    read = [_read_settings(path) for path in paths]
    for path, settings in zip(paths, read, strict=True):
        for name in sorted({*read[0], *settings}):
            if read[0].get(name) != settings.get(name):
                raise UserError(
                    f"{path} was answered with {name} {settings.get(name)}, {paths[0]} with "
                    f"{read[0].get(name)}; answer one of them again"
                )
    return read[0]


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(settings_path(path).read_bytes())
    except (OSError, ValueError) as e:
        raise UserError(f"{settings_path(path)}: cannot be read ({e})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{settings_path(path)}: expected an object")
    return settings


def _check_complete(parts: Sequence[Output]) -> None:
    """UserError: a part has rows that are not answered."""
    incomplete = [(n, part) for n, part in enumerate(parts, 1) if part.remaining]
    if not incomplete:
        return
    named = [
        f"{_ranges(part.remaining)} (--shard={n}/{len(parts)})" for n, part in incomplete[:_NAMED]
    ]
    more = f" and {len(incomplete) - _NAMED} more shards" if len(incomplete) > _NAMED else ""
    missing = sum(len(part.remaining) for _, part in incomplete)
    raise UserError(
        f"{missing} rows are not answered: {', '.join(named)}{more}; start these shards again, they "
        "continue where they stopped"
    )


def _ranges(rows: Sequence[BatchRow]) -> str:
    """The numbers, from 1, of consecutive rows."""
    first, last = rows[0].number + 1, rows[-1].number + 1
    return f"row {first}" if first == last else f"rows {first} to {last}"


def _concatenate(paths: Iterable[Path], output: Path, settings: dict[str, Any]) -> None:
    try:
        write_text_atomically(settings_path(output), json.dumps(settings, indent=1) + "\n")
        with atomic_file(output) as temporary, temporary.open("wb") as merged:
            for path in paths:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, merged)
    except OSError as e:
        raise write_error(output, e) from None
