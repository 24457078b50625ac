"""Webdataset shards: tars of images with captions, with random access.

A row is the members with one name: `000012.jpg` (or .jpeg, .png, .webp, .gif, .bmp, .tif) with
`000012.json` that has a "caption", or with `000012.txt`, .caption or .cls (the layout of webdataset and
img2dataset; MiniGPT-4's dataset/README_1_STAGE.md). Hidden files and `__MACOSX` are not read.
"""

import glob
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minigpt4_jax.data.annotations import read_text
from minigpt4_jax.data.json_records import DataPath, Example, blip_caption
from minigpt4_jax.data.shard_index import TEXT_SUFFIXES, Shard, build_index, read_index
from minigpt4_jax.errors import DataError, UserError
from minigpt4_jax.processing.images import FilePart

BROKEN, MISSING = "shards that are damaged", "shards that are missing"
_TAR_SUFFIXES = (
    ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"
)  # fmt: skip
_LIST_SUFFIX = ".txt"  # of a file that names shards
_REMOTE = re.compile(r"pipe:|[a-z0-9]+://")
_MAX_NAMED = 3  # faulty shards that a message names

_log = logging.getLogger(__name__)


class Shards:
    """A Source of the rows of several shards, in order."""

    def __init__(self, name: str, shards: Sequence[Shard], num_missing: int, clean_captions: bool):
        self.name, self._clean_captions = name, clean_captions
        self._shards = [shard for shard in shards if shard.num_rows]
        dropped = sum((Counter(shard.dropped) for shard in shards), Counter[str]())
        dropped += Counter({BROKEN: sum(bool(s.damage) for s in shards), MISSING: num_missing})
        self.dropped: dict[str, int] = dict(dropped)
        self.left_out: dict[str, int] = {}
        self._ends = np.cumsum([shard.num_rows for shard in self._shards])
        self._rows: dict[int, np.ndarray] = {}  # memory-mapped, by number of the shard

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": {}}  # pickling would copy the mapped files

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """An image, as its position in the tar, and its caption. DataError: there is no caption."""
        n = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[n]
        if n not in self._rows:
            self._rows[n] = shard.rows()
        row = self._rows[n][index - (self._ends[n - 1] if n else 0)]
        caption = self._caption(shard, row)
        image = FilePart(shard.tar, int(row["image"]), int(row["image_size"]))
        return Example((image,), (), (caption,))

    def _caption(self, shard: Shard, row: np.void) -> str:
        where = f"{shard.tar} at byte {row['text']}"
        try:
            with open(shard.tar, "rb", buffering=0) as file:
                file.seek(int(row["text"]))
                text = file.read(int(row["text_size"])).decode("utf-8")
            is_json = TEXT_SUFFIXES[row["kind"]] == "json"
            value = json.loads(text).get("caption") if is_json else text
        except OSError as e:
            raise DataError(f"{where}: cannot be read ({e})", "row that cannot be read") from None
        except (ValueError, AttributeError, RecursionError) as e:
            raise DataError(
                f"{where}: is not JSON with a caption ({e})", "caption that is no JSON"
            ) from None
        caption = value if isinstance(value, str) else ""
        caption = blip_caption(caption) if self._clean_captions else caption.strip()
        if not caption:
            raise DataError(f'{where}: has no "caption"', "row without a caption")
        return caption


def open_shards(
    name: str,
    paths: DataPath | Sequence[DataPath],
    *,
    clean_captions: bool = True,
    max_broken: float = 0.0,
) -> Shards:
    """Open shards; new or changed ones are indexed first.

    paths: files, folders, patterns with * or {00000..01255}, or a .txt file (also as @FILE) with one of
    these on each line, relative to it. max_broken: the share of shards that may be
    missing or damaged; the rows before the damage are used.
    UserError: more than that, no shard, no row, no space for an index.
    """
    files, missing = find_shards(name, paths)
    indexed = [read_index(path) for path in files]
    new = [path for path, shard in zip(files, indexed, strict=True) if shard is None]
    built = iter(
        tqdm(map(build_index, new), f"{name}: indexing shards", len(new), unit="shard", leave=False,
             disable=None)
        if new else ()
    )  # fmt: skip
    shards = [shard if shard is not None else next(built) for shard in indexed]
    faults = [f"{path}: there is no such file" for path in missing]
    faults += [f"{shard.path}: {shard.damage}" for shard in shards if shard.damage]
    if faults:
        named = "; ".join(faults[:_MAX_NAMED]) + ("; ..." if len(faults) > _MAX_NAMED else "")
        total = len(files) + len(missing)
        message = f"data {name}: {len(faults)} of {total} shards are missing or damaged: {named}"
        if len(faults) > max_broken * total:
            raise UserError(
                f"{message}. Download them again, or raise config.data.max_broken, the share allowed"
            )
        _log.warning("%s", message)
    if not any(shard.num_rows for shard in shards):
        raise UserError(f"data {name}: {len(shards)} shards have no row of an image and a caption")
    source = Shards(name, shards, len(missing), clean_captions)
    _log.info("data %s: %d rows in %d shards", name, len(source), len(shards))
    return source


# --- file names ----------------------------------------------------------------------------------


def find_shards(name: str, paths: DataPath | Sequence[DataPath]) -> tuple[list[Path], list[str]]:
    """-> (existing shards, names that do not exist), in order. UserError: none exists."""
    patterns = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files, missing = dict[Path, None](), list[str]()
    for pattern in patterns:
        for path in _expand(name, os.path.expanduser(os.fspath(pattern))):
            if _REMOTE.match(path):
                raise UserError(f"data {name}: {path} is not local; download the shards first")
            matches = [path]
            if os.path.isdir(path):
                matches = sorted(os.path.join(path, n) for n in os.listdir(path) if is_shard(n))
            elif glob.has_magic(path) and not os.path.exists(path):
                matches = sorted(glob.glob(path)) or [path]
            for match in matches:
                if os.path.isfile(match):
                    files[Path(match)] = None
                else:
                    missing.append(match)
    if not files:
        raise UserError(
            f"data {name}: there is no shard at {', '.join(map(str, patterns))}; "
            "expected .tar files, also compressed (.tar.gz, .tar.zst), or a .txt file that names them"
        )
    return list(files), missing


def is_shard(name: str) -> bool:
    """Whether a file of a folder is a shard; macOS writes hidden files such as ._000.tar."""
    return name.lower().endswith(_TAR_SUFFIXES) and not name.startswith(".")


def _expand(name: str, pattern: str) -> list[str]:
    """Expand braces; replace a list of shards by what it names."""
    paths: list[str] = []
    for path in expand_braces(pattern):
        is_list = path.startswith("@") or path.lower().endswith(_LIST_SUFFIX)
        paths += _read_list(name, path.removeprefix("@")) if is_list else [path]
    return paths


def _read_list(name: str, path: str) -> list[str]:
    """The shards that a text file names, one pattern on a line; empty lines and # comments are skipped.
    UserError: it cannot be read, or names none."""
    path = os.path.expanduser(path)
    lines = [line.strip() for line in read_text(Path(path)).splitlines()]
    folder = os.path.dirname(path)
    patterns = [
        line if _REMOTE.match(line) else os.path.join(folder, os.path.expanduser(line))
        for line in lines
        if line and not line.startswith("#")
    ]
    if not patterns:
        raise UserError(f"data {name}: {path} names no shard; expected one path on each line")
    return [path for pattern in patterns for path in expand_braces(pattern)]


def expand_braces(pattern: str) -> list[str]:
    """`a{00..02}.tar` -> a00.tar, a01.tar, a02.tar; `{a,b}` -> a, b; other braces are kept."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    if choices is not None:
        replacements = choices.split(",")
    elif int(first) > int(last):
        raise UserError(
            f"data: {match[0]} in {pattern} counts down; expected the lower number first"
        )
    else:
        replacements = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    prefix, suffixes = pattern[: match.start()], expand_braces(pattern[match.end() :])
    return [prefix + middle + suffix for middle in replacements for suffix in suffixes]
