"""The index of a webdataset shard: where its rows lie in the tar.

A shard is scanned once. The index is stored next to it as FILE.index, or in the user's cache directory if
that folder is not writable. A compressed shard is decompressed once, as FILE.plain; that is about as large,
because images hardly compress.
"""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minigpt4_jax.data.decompression import decompress, find_decompressor
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.atomic import atomic_file
from minigpt4_jax.utils.rounding import round_up

ROW_DTYPE = np.dtype([
    ("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<u4"), ("kind", "u1"),
])  # fmt: skip
# The first type of a sample's members is used. ROW_DTYPE's "kind" is an index into TEXT_SUFFIXES.
TEXT_SUFFIXES = ("json", "txt", "caption", "cls")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAC_FOLDER = "__MACOSX"  # with the resource forks of macOS
_VERSION = 2  # of the index: raise it when other rows are read from the same tar


class _Part(NamedTuple):
    """A member of a sample."""

    rank: int  # of its type among the image or text types
    offset: int  # bytes in the tar
    size: int


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
    """Scan a shard and write its index. UserError: it cannot be read, or the index cannot be written."""
    size_and_time = _size_and_time(path)
    tar, damage = path, ""
    try:
        opener = find_decompressor(path)
        if opener is not None:
            tar = _side_file(path, ".plain")
            tar.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(tar) as temporary, temporary.open("wb") as out:
                damage = decompress(path, opener, out)
        rows, dropped, tar_damage = _scan(tar)
        header = {
            "version": _VERSION, "shard": size_and_time, "tar": str(tar) if opener else "",
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


class _Sample:
    """The image and the text of a sample, of the preferred file types so far."""

    __slots__ = ("image", "text")

    def __init__(self) -> None:
        self.image: _Part | None = None
        self.text: _Part | None = None

    def add(self, part: _Part, *, is_image: bool) -> bool:
        """False: the sample has a member of this type already."""
        known = self.image if is_image else self.text
        if known is not None and known.rank == part.rank:
            return False
        if known is None or part.rank < known.rank:
            if is_image:
                self.image = part
            else:
                self.text = part
        return True


def _scan(tar: Path) -> tuple[np.ndarray, dict[str, int], str]:
    """-> (rows [N] of ROW_DTYPE, counts of incomplete rows by cause, damage after the last row).

    As in webdataset, the key of a sample is the member's path up to the first dot of its name. Members of
    a sample need not be adjacent. A second member of one type begins another sample with the same key.
    """
    samples: list[_Sample] = []
    by_key: dict[str, _Sample] = {}
    error: Exception | None = None
    iterator = read_members(tar)
    while True:
        try:
            member = next(iterator)
        except StopIteration:
            break
        except (tarfile.TarError, EOFError) as e:
            error = e
            break
        folder, name = os.path.split(member.name)
        stem, _, suffix = name.partition(".")
        if not stem or not suffix or MAC_FOLDER in folder.split("/"):
            continue  # hidden files, such as ._0.jpg and .DS_Store, are no samples
        key, suffix = f"{folder}/{stem}", suffix.lower()
        if key not in by_key:
            samples.append(by_key.setdefault(key, _Sample()))
        for types, is_image in ((IMAGE_SUFFIXES, True), (TEXT_SUFFIXES, False)):
            if suffix in types:
                part = _Part(types.index(suffix), member.offset_data, member.size)
                if not by_key[key].add(part, is_image=is_image):
                    by_key[key] = _Sample()
                    by_key[key].add(part, is_image=is_image)
                    samples.append(by_key[key])
    rows = [
        (s.image.offset, s.image.size, s.text.offset, s.text.size, s.text.rank)
        for s in samples
        if s.image and s.text
    ]
    dropped = Counter(
        "without a caption" if s.image else "without an image"
        for s in samples
        if not (s.image and s.text)
    )
    damage = f"it is damaged after {len(rows)} rows ({error})" if error else ""
    return np.array(rows, ROW_DTYPE), dict(dropped), damage


def read_members(tar: Path) -> Iterator[tarfile.TarInfo]:
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
        raise tarfile.ReadError("the file ends without the end-of-archive marker")
