"""Which rows become which output file, and what an earlier run has finished already.

The output is a folder:

    settings.json           the options that answers depend on
    plan.json               the input files and their pieces
    part-00000.jsonl        the answers to a piece (or .parquet, .tar)
    part-00000.stats.json   {"rows", "errors", "seconds"}: written last, so this part is complete

Every file appears whole or not at all, and a part depends on its piece and the settings alone. So it may be
written twice, by a worker that was lost and by another, and nothing is lost or doubled.
"""

import argparse
import glob
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from minigpt4_jax.cli.ray_batch.file_format import Format
from minigpt4_jax.cli.ray_batch.formats import format_named, format_of
from minigpt4_jax.data.webdataset import expand_braces
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.atomic import write_error, write_text_atomically

_READERS = 16  # threads that look for the pieces of files


class Piece(NamedTuple):
    """Consecutive rows of an input file.

    Attributes:
        number: of the part that they become.
        path: the input file.
        start: where it begins (Format.scan).
        rows: their number.
        first: number of its first row in the whole input.
    """

    number: int
    path: str
    start: int
    rows: int
    first: int


class Stats(NamedTuple):
    """A complete part."""

    rows: int
    errors: int
    seconds: float


class Parts:
    """The output folder."""

    def __init__(self, folder: Path, output_format: Format):
        self.folder, self.format = folder, output_format

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:05}{self.format.suffix}"

    def stats_path(self, number: int) -> Path:
        return self.folder / f"part-{number:05}.stats.json"

    def remove_fragments(self) -> None:
        """Delete what workers that were killed were writing; only when no worker runs any more."""
        for path in self.folder.glob(".*.part-*"):
            path.unlink(missing_ok=True)

    def stats(self, number: int) -> Stats | None:
        """None: the part is not complete."""
        try:
            return Stats(**json.loads(self.stats_path(number).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


# --- input ----------------------------------------------------------------------------------------


def find_files(pattern: str) -> list[Path]:
    """A file, those of a folder, or those that match a pattern with * or {00..15}, in order.

    UserError: none, or of several formats.
    """
    found: list[Path] = []
    for name in expand_braces(os.path.expanduser(pattern)):
        if os.path.isdir(name):
            found += sorted(path for path in Path(name).iterdir() if _is_input(path))
        elif os.path.isfile(name):
            found.append(Path(name))
        elif matches := sorted(glob.glob(name)):
            found += map(Path, matches)
        else:
            raise UserError(f"--input={name}: there is no such file")
    if not found:
        raise UserError(f"--input={pattern}: has no .jsonl, .parquet or .tar files")
    kinds = {format_of(path).name for path in found}
    if len(kinds) > 1:
        raise UserError(
            f"--input={pattern}: has files of {' and '.join(sorted(kinds))}; name one kind"
        )
    return [path.resolve() for path in found]


def _is_input(path: Path) -> bool:
    try:
        return path.is_file() and not path.name.startswith(".") and bool(format_of(path))
    except UserError:
        return False


def make_pieces(files: Sequence[Path], rows: int) -> Iterator[Piece]:
    """The pieces of all files. UserError: a file cannot be read, or there are no rows."""
    known = format_of(files[0])
    number = first = 0
    with ThreadPoolExecutor(_READERS) as threads:
        found = threads.map(lambda path: known.scan(path, rows), files)
        progress = tqdm(
            found, "reading the input", len(files), unit="file", leave=False,
            disable=None if len(files) > 1 else True,
        )  # fmt: skip
        for path, pieces in zip(files, progress, strict=True):
            for start, count in pieces:
                yield Piece(number, str(path), start, count, first)
                number, first = number + 1, first + count
    if not number:
        raise UserError(
            f"--input={files[0]} has no rows; expected a JSON object per line, or a row"
        )


# --- the output folder ------------------------------------------------------------------------------


def open_output(
    args: argparse.Namespace, settings: dict[str, Any]
) -> tuple[list[Piece], Parts, Format]:
    """-> (all pieces, the output folder, the input's format). An earlier run is continued.

    UserError: wrong input, or an output of other rows or settings.
    """
    files = find_files(str(args.input))
    source = format_of(files[0])
    output_format = _output_format(args.output_format, source, (args.num_return_sequences or 1) > 1)
    folder: Path = args.output
    settings = settings | {
        "output_format": output_format.name,
        "rows_per_shard": args.rows_per_shard,
    }
    parts = Parts(folder, output_format)
    inputs = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    if folder.exists() and any(folder.iterdir()):
        _check_settings(folder, settings)
        plan = _read(folder / "plan.json")
        if plan is not None:
            if plan["inputs"] != inputs:
                raise _conflict(
                    folder, "was started with other input files, or they have changed since"
                )
            return [Piece(*piece) for piece in plan["pieces"]], parts, source
    pieces = list(make_pieces(files, args.rows_per_shard))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / "settings.json", json.dumps(settings, indent=1) + "\n")
        write_text_atomically(
            folder / "plan.json", json.dumps({"inputs": inputs, "pieces": pieces}) + "\n"
        )
    except OSError as e:
        raise write_error(folder, e) from None
    return pieces, parts, source


def _output_format(name: str | None, source: Format, several: bool) -> Format:
    if name not in (None, "jsonl", source.name):
        expected = " or ".join(sorted({source.name, "jsonl"}))
        raise UserError(f"--output-format={name}: the input is {source.name}; expected {expected}")
    return format_named(name or source.name, several)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    previous = _read(folder / "settings.json")
    if previous is None:
        raise _conflict(folder, "is not empty, and was not written by this command")
    for name, value in settings.items():
        if previous.get(name) != value:
            raise _conflict(folder, f"was started with {name} {previous.get(name)}, now {value}")


def _read(path: Path) -> Any:
    """The content of a JSON file; None if it is not there."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None


def _conflict(folder: Path, reason: str) -> UserError:
    return UserError(f"--output={folder}: {reason}; choose another --output, or delete it")
