"""Webdataset shards, tars of pictures with captions, read at random access.

A row is the members of one name in a row: `000012.jpg` (or .jpeg, .png, .webp) with `000012.json`
that has a "caption", or with `000012.txt` (webdataset's and img2dataset's layout; MiniGPT-4's
dataset/README_1_STAGE.md). A shard is gone through once; where its rows lie is kept in a file
beside it, FILE.index, or in the user's cache where that folder cannot be written. A gzipped shard
is unpacked beside it, once, as FILE.plain: pictures hardly shrink, so it is about as large.
"""

import glob
import gzip
import hashlib
import json
import logging
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from minigpt4_jax.data.json_records import Example, blip_caption
from minigpt4_jax.errors import DataError, UserError
from minigpt4_jax.processing.images import FilePart
from minigpt4_jax.storage.atomic import atomic_file

BROKEN, MISSING = "shards that are damaged", "shards that are missing"
_VERSION = 1
_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("json", "txt")  # the first that a row has
_ROW = np.dtype([
    ("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<u4"), ("kind", "u1"),
])  # fmt: skip
_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_CHUNK = 1 << 20
_NAMED = 3  # faulty shards that a message names

_log = logging.getLogger(__name__)


class Shard(NamedTuple):
    """A tar whose rows are known."""

    path: str  # as the user named it
    tar: str  # what is read: path, or the same unpacked
    rows_file: str  # its index
    start: int  # bytes of that file before the rows
    rows: int  # how many
    damage: str  # what is wrong behind the last row; "": nothing
    dropped: Mapping[str, int]


class Shards:
    """A Source over shards, their rows in order. dropped: counts what could not be used."""

    def __init__(self, name: str, shards: Sequence[Shard], missing: int, clean: bool):
        self.name, self._clean = name, clean
        self._shards = [shard for shard in shards if shard.rows]
        dropped = sum((Counter(shard.dropped) for shard in shards), Counter[str]())
        dropped += Counter({BROKEN: sum(bool(s.damage) for s in shards), MISSING: missing})
        self.dropped: dict[str, int] = dict(dropped)
        self.left_out: dict[str, int] = {}
        self._ends = np.cumsum([shard.rows for shard in self._shards])
        self._open: dict[int, np.ndarray] = {}  # rows of shards, mapped into memory

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a map would be copied to a worker process

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """A picture, as its place in the tar, and its caption. DataError: the caption is missing."""
        n = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[n]
        if n not in self._open:
            self._open[n] = np.memmap(shard.rows_file, _ROW, "r", shard.start, (shard.rows,))
        row = self._open[n][index - (self._ends[n - 1] if n else 0)]
        caption = self._caption(shard, row)
        return Example(
            (FilePart(shard.tar, int(row["image"]), int(row["image_size"])),), (), (caption,)
        )

    def _caption(self, shard: Shard, row: Any) -> str:
        where = f"{shard.tar} at byte {row['text']}"
        try:
            with open(shard.tar, "rb", buffering=0) as file:
                file.seek(int(row["text"]))
                text = file.read(int(row["text_size"])).decode("utf-8")
            value = json.loads(text).get("caption") if row["kind"] == 0 else text
        except OSError as e:
            raise DataError(f"{where}: cannot be read ({e})", "row that cannot be read") from None
        except (ValueError, AttributeError, RecursionError) as e:
            raise DataError(
                f"{where}: is not JSON with a caption ({e})", "caption that is no JSON"
            ) from None
        caption = value if isinstance(value, str) else ""
        caption = blip_caption(caption) if self._clean else caption.strip()
        if not caption:
            raise DataError(f'{where}: has no "caption"', "row without a caption")
        return caption


def open_shards(
    name: str,
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    clean_captions: bool = True,
    max_broken: float = 0.0,
) -> Shards:
    """Open shards, looking through those that are new or have changed.

    paths: files, folders, patterns with * or {00000..01255}. max_broken: the share of shards that may be
    missing or damaged; of a damaged one the rows before the damage are used.
    UserError: more than that, no shard, no row, no room for an index.
    """
    files, missing = find_shards(name, paths)
    known = [_read_index(path) for path in files]
    new = [path for path, shard in zip(files, known, strict=True) if shard is None]
    made = iter(
        tqdm(map(_index, new), f"{name}: looking through shards", len(new), unit="shard", leave=False,
             disable=None)
        if new else ()
    )  # fmt: skip
    shards = [shard if shard is not None else next(made) for shard in known]
    damaged = [f"{s.path}: {s.damage}" for s in shards if s.damage]
    faults = [f"{path}: there is no such file" for path in missing] + damaged
    if faults:
        some = "; ".join(faults[:_NAMED]) + ("; ..." if len(faults) > _NAMED else "")
        total = len(files) + len(missing)
        told = f"data {name}: {len(faults)} of {total} shards are missing or damaged: {some}"
        if len(faults) > max_broken * total:
            raise UserError(
                f"{told}. Fetch them again, or raise config.data.max_broken, the share that may be"
            )
        _log.warning("%s", told)
    if not any(shard.rows for shard in shards):
        raise UserError(f"data {name}: {len(shards)} shards have no row of a picture and a caption")
    opened = Shards(name, shards, len(missing), clean_captions)
    _log.info("data %s: %d rows in %d shards", name, len(opened), len(shards))
    return opened


# --- names ---------------------------------------------------------------------------------------


def find_shards(name: str, paths: Any) -> tuple[list[Path], list[str]]:
    """(shards that are there, names that are not), in order. UserError: none is there."""
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files, missing = dict[Path, None](), list[str]()
    for pattern in given:
        for path in expand_braces(os.path.expanduser(os.fspath(pattern))):
            if re.match(r"pipe:|[a-z0-9]+://", path):
                raise UserError(f"data {name}: {path} is not local; fetch the shards first")
            found = [path]
            if os.path.isdir(path):
                names = os.listdir(path)
                found = sorted(os.path.join(path, n) for n in names if n.endswith(_TAR_ENDINGS))
            elif glob.has_magic(path) and not os.path.exists(path):
                found = sorted(glob.glob(path)) or [path]
            for one in found:
                if os.path.isfile(one):
                    files[Path(one)] = None
                else:
                    missing.append(one)
    if not files:
        named = ", ".join(map(str, given))
        raise UserError(
            f"data {name}: there is no shard at {named}; expected .tar or .tar.gz files"
        )
    return list(files), missing


def expand_braces(pattern: str) -> list[str]:
    """`a{00..02}.tar` -> a00.tar, a01.tar, a02.tar; `{a,b}` -> a, b; other braces are left as they
    are."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, listed = match.groups()
    if listed is not None:
        middle = listed.split(",")
    elif int(first) > int(last):
        raise UserError(
            f"data: {match[0]} in {pattern} counts down; expected the lower number first"
        )
    else:
        middle = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    head, tail = pattern[: match.start()], expand_braces(pattern[match.end() :])
    return [head + part + rest for part in middle for rest in tail]


# --- the index -----------------------------------------------------------------------------------


def _side_file(path: Path, ending: str) -> Path:
    """Where something is kept about a shard: beside it, or in the user's cache."""
    beside = path.with_name(path.name + ending)
    if beside.exists() or os.access(path.parent, os.W_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return cache / "minigpt4_jax" / "shards" / f"{key}-{path.name}{ending}"


def _stamp(path: Path | str) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def _read_index(path: Path) -> Shard | None:
    """What is known of a shard; None: nothing, or of another content than it has now."""
    index = _side_file(path, ".index")
    try:
        with index.open("rb") as file:
            head = json.loads(file.readline())
            start = file.tell()
            rows = (file.seek(0, os.SEEK_END) - start) / _ROW.itemsize
        fresh = (
            head["version"] == _VERSION
            and head["shard"] == _stamp(path)
            and head["rows"] == rows
            and head["tar_size"] == os.stat(head["tar"] or path).st_size
        )
        if not fresh:
            return None
        tar = head["tar"] or str(path)
        return Shard(
            str(path), tar, str(index), start, head["rows"], head["damage"], head["dropped"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _index(path: Path) -> Shard:
    """Look through a shard and write what is found. UserError: it cannot be written."""
    stamp = _stamp(path)
    tar, damage = path, ""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        if zipped:
            tar = _side_file(path, ".plain")
            tar.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(tar) as temporary, temporary.open("wb") as out:
                damage = _unpack(path, out)
        rows, dropped, torn = _scan(tar)
        head = {
            "version": _VERSION, "shard": stamp, "tar": str(tar) if zipped else "",
            "tar_size": tar.stat().st_size, "rows": len(rows), "damage": damage or torn,
            "dropped": dropped,
        }  # fmt: skip
        content = json.dumps(head).encode() + b"\n" + rows.tobytes()
        index = _side_file(path, ".index")
        index.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(index) as temporary:
            temporary.write_bytes(content)
    except OSError as e:
        raise UserError(f"data {path}: cannot be indexed ({e.strerror or e})") from None
    found = _read_index(path)
    if found is None:
        raise UserError(f"data {path}: changed while it was looked through; start again")
    return found


def _unpack(path: Path, out: IO[bytes]) -> str:
    """Decompress as much as there is; returns what ended it before its end."""
    try:
        with gzip.open(path) as file:
            while chunk := file.read1(_CHUNK):
                out.write(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        return f"its compressed data is damaged ({e})"
    return ""


def _scan(tar: Path) -> tuple[np.ndarray, dict[str, int], str]:
    """-> (rows [N] of _ROW, counts of what makes no row, what is wrong behind the last row)."""
    rows, dropped = [], Counter[str]()
    members: dict[str, tuple[int, int]] = {}  # of the row that is being read, by ending
    current, damage = "", ""

    def close_row() -> None:
        image = next((members[e] for e in _IMAGES if e in members), None)
        kind = next((n for n, e in enumerate(_TEXTS) if e in members), None)
        if image is not None and kind is not None:
            rows.append((*image, *members[_TEXTS[kind]], kind))
        elif members:
            dropped["without a picture" if image is None else "without a caption"] += 1
        members.clear()

    members_of = _members(tar)
    while True:
        try:
            member = next(members_of)
        except StopIteration:
            break
        except (tarfile.TarError, EOFError) as e:
            damage = f"it is damaged behind {len(rows)} rows ({e})"
            break
        folder, name = os.path.split(member.name)
        stem, _, ending = name.partition(".")
        if (key := f"{folder}/{stem}") != current:
            close_row()
            current = key
        members[ending.lower()] = (member.offset_data, member.size)
    close_row()
    return np.array(rows, _ROW), dict(dropped), damage


def _members(tar: Path) -> Iterator[tarfile.TarInfo]:
    """The files of a tar. TarError: it is damaged, or ends without its end mark."""
    size = tar.stat().st_size
    with tarfile.open(tar, "r:") as archive:
        end = 0
        while (member := archive.next()) is not None:
            end = member.offset_data + member.size
            if end > size:
                raise tarfile.ReadError("the file ends in the middle of a member")
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.isreg():
                yield member
    if (-(-end // tarfile.BLOCKSIZE) + 1) * tarfile.BLOCKSIZE > size:
        raise tarfile.ReadError("the file ends without the mark of its end")
