"""The index of a webdataset shard: where its rows lie in the tar.

A shard is scanned once. The index is stored next to it as FILE.index, or in the user's cache directory if
that folder is not writable. A gzipped shard is decompressed once, as FILE.plain; that is about as large,
because images hardly compress.
"""

import gzip
import hashlib
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.atomic import atomic_file
from minigpt4_jax.utils.rounding import round_up

ROW_DTYPE = np.dtype([
    ("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<u4"), ("kind", "u1"),
])  # fmt: skip
TEXT_SUFFIXES = ("json", "txt")  # ROW_DTYPE's "kind" is an index into these
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_VERSION = 1
_CHUNK = 1 << 20  # bytes


class Shard(NamedTuple):
    """An indexed tar."""

    path: str  # as the user named it
    tar: str  # the file to read: path, or its decompressed copy
    index_file: str
    rows_offset: int  # bytes before the rows in the index file
    num_rows: int
    damage: str  # what is wrong after the last row; "": nothing
    dropped: Mapping[str, int]  # members that form no row, counted by cause

    def rows(self) -> np.ndarray:
        """[num_rows] of ROW_DTYPE, memory-mapped."""
        return np.memmap(self.index_file, ROW_DTYPE, "r", self.rows_offset, (self.num_rows,))


def read_index(path: Path) -> Shard | None:
    """The index of a shard; None if there is none or the shard has changed since."""
    index_file = _side_file(path, ".index")
    try:
        with index_file.open("rb") as file:
            header = json.loads(file.readline())
            offset = file.tell()
            num_rows = (file.seek(0, os.SEEK_END) - offset) / ROW_DTYPE.itemsize
        valid = (
            header["version"] == _VERSION
            and header["shard"] == _size_and_time(path)
            and header["rows"] == num_rows
            and header["tar_size"] == os.stat(header["tar"] or path).st_size
        )
        if not valid:
            return None
        return Shard(
            str(path), header["tar"] or str(path), str(index_file), offset, header["rows"],
            header["damage"], header["dropped"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build_index(path: Path) -> Shard:
    """Scan a shard and write its index. UserError: it cannot be read, or the index not be written."""
    size_and_time = _size_and_time(path)
    tar, damage = path, ""
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        if is_gzip:
            tar = _side_file(path, ".plain")
            tar.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(tar) as temporary, temporary.open("wb") as out:
                damage = _decompress(path, out)
        rows, dropped, tar_damage = _scan(tar)
        header = {
            "version": _VERSION, "shard": size_and_time, "tar": str(tar) if is_gzip else "",
            "tar_size": tar.stat().st_size, "rows": len(rows), "damage": damage or tar_damage,
            "dropped": dropped,
        }  # fmt: skip
        index_file = _side_file(path, ".index")
        index_file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(index_file) as temporary:
            temporary.write_bytes(json.dumps(header).encode() + b"\n" + rows.tobytes())
    except OSError as e:
        raise UserError(f"data {path}: cannot be indexed ({e.strerror or e})") from None
    shard = read_index(path)
    if shard is None:
        raise UserError(f"data {path}: changed while it was scanned; start again")
    return shard


def _side_file(path: Path, suffix: str) -> Path:
    """A file next to a shard, or in the user's cache directory."""
    beside = path.with_name(path.name + suffix)
    if beside.exists() or os.access(path.parent, os.W_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return cache / "minigpt4_jax" / "shards" / f"{key}-{path.name}{suffix}"


def _size_and_time(path: Path) -> list[int]:
    """Tells whether a file has changed."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def _decompress(path: Path, out: IO[bytes]) -> str:
    """Decompress as much as possible; -> what ended it early, or ""."""
    try:
        with gzip.open(path) as file:
            while chunk := file.read1(_CHUNK):
                out.write(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        return f"its compressed data is damaged ({e})"
    return ""


def _scan(tar: Path) -> tuple[np.ndarray, dict[str, int], str]:
    """-> (rows [N] of ROW_DTYPE, counts of incomplete rows by cause, damage after the last row)."""
    rows: list[tuple[int, int, int, int, int]] = []
    dropped = Counter[str]()
    members: dict[str, tuple[int, int]] = {}  # suffix -> (offset, size), of the current row
    current, damage = "", ""

    def finish_row() -> None:
        image = next((members[s] for s in _IMAGE_SUFFIXES if s in members), None)
        kind = next((n for n, s in enumerate(TEXT_SUFFIXES) if s in members), None)
        if image is not None and kind is not None:
            rows.append((*image, *members[TEXT_SUFFIXES[kind]], kind))
        elif members:
            dropped["without a picture" if image is None else "without a caption"] += 1
        members.clear()

    iterator = _members(tar)
    while True:
        try:
            member = next(iterator)
        except StopIteration:
            break
        except (tarfile.TarError, EOFError) as e:
            damage = f"it is damaged behind {len(rows)} rows ({e})"
            break
        folder, name = os.path.split(member.name)
        stem, _, suffix = name.partition(".")
        if (key := f"{folder}/{stem}") != current:
            finish_row()
            current = key
        members[suffix.lower()] = (member.offset_data, member.size)
    finish_row()
    return np.array(rows, ROW_DTYPE), dict(dropped), damage


def _members(tar: Path) -> Iterator[tarfile.TarInfo]:
    """The files in a tar. TarError: it is damaged, or ends without its end marker."""
    size = tar.stat().st_size
    with tarfile.open(tar, "r:") as archive:
        end = 0
        while (member := archive.next()) is not None:
            end = member.offset_data + member.size
            if end > size:
                raise tarfile.ReadError("the file ends in the middle of a member")
            archive.members = []  # type: ignore[attr-defined]  # it would keep all members in memory
            if member.isreg():
                yield member
    if round_up(end, tarfile.BLOCKSIZE) + tarfile.BLOCKSIZE > size:
        raise tarfile.ReadError("the file ends without the mark of its end")
