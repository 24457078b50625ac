"""Where files lie: on disk, or in a bucket (gs://), whose objects are read and written by etils' epath.

A path in a bucket has the methods of pathlib's, and this module has what differs there: nothing is
appended to or renamed at once, an object appears whole when its writing ends, there are no folders to
make, and what a library wants as a file on disk it gets as a copy.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import posixpath
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from minigpt4_jax.errors import UserError

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.S)  # also gs:/bucket, as pathlib writes it
_LIBRARIES = {"aiohttp", "gcsfs", "google", "requests", "tensorflow", "urllib3"}  # behind epath


def any_path(name: str, path: Path | str) -> Path:
    """A path as the user gave it: on disk, or in a bucket (gs://bucket/run). UserError: another kind
    of address, or gcsfs is missing; `name` says there what the path is of."""
    address = _ADDRESS.match(str(path))
    if address is None:
        return Path(path)
    if address[1] != "gs" or not address[2].strip("/"):
        raise UserError(
            f"{name} {path} is an address and only local paths and gs://bucket/... work: mount the "
            "bucket (s3://: with mountpoint-s3) and give the folder it is mounted at"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{name} {path}: for gs:// install gcsfs (pip install '.[gcs]')")
    _set_up_gcsfs()
    from etils import epath

    return cast(Path, epath.Path(f"gs://{address[2].rstrip('/')}"))


def local_path(name: str, path: os.PathLike[str] | str) -> Path:
    """`path`, unless it is an address such as gs://bucket/run: pathlib would make a folder "gs:" of
    that. UserError; `name` says there what the path is of."""
    if _ADDRESS.match(str(path)):
        raise UserError(
            f"{name} {path} is an address and only local paths work: copy it here (gcloud storage "
            "cp), or mount the bucket and give the folder it is mounted at"
        )
    return Path(path)


@functools.cache
def _set_up_gcsfs() -> None:
    """It would remember what it found in a folder, where other hosts write too, and show a traceback
    of what is said by an error here."""
    import fsspec

    logging.getLogger("gcsfs").addFilter(lambda record: not record.exc_info)
    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)


def _store() -> Any:
    """The object behind epath's paths in buckets."""
    import fsspec

    return fsspec.filesystem("gs", finalize_on_close=True)


def is_remote(path: Path | str) -> bool:
    """Whether a path is in a bucket."""
    return str(path).startswith("gs://")


class StoreError(OSError):
    """What the libraries say when a bucket cannot be reached, read or written."""


@contextlib.contextmanager
def reaching(path: Path | str) -> Iterator[None]:
    """StoreError for the errors of the libraries behind a path in a bucket, whose types are their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        # theirs, some of which are OSErrors with a number, or gcsfs's plain OSError("Forbidden: ...")
        theirs = type(e).__module__.partition(".")[0] in _LIBRARIES
        plain = isinstance(e, OSError) and e.errno is None and not isinstance(e, FileNotFoundError)
        if not is_remote(path) or not (theirs or plain) or isinstance(e, StoreError):
            raise
        text = " ".join(str(e).split()) or type(e).__name__
        raise StoreError(text[:300]) from e


# --- what differs ----------------------------------------------------------------------------


def absolute(path: Path) -> Path:
    return path if is_remote(path) else path.resolve()


def joined(folder: Path, other: str) -> Path:
    """`other`, which is relative to a folder, absolute or an address."""
    if is_remote(other) or os.path.isabs(other):
        return any_path("path", other)
    if is_remote(folder):
        bucket = str(folder).removeprefix("gs://")
        return any_path("path", "gs://" + posixpath.normpath(posixpath.join(bucket, other)))
    return Path(os.path.normpath(folder / other))


def relative(path: Path | str, folder: Path) -> str:
    """`path` as `joined` takes it: relative where both are on disk or in the same bucket."""
    path = absolute(any_path("path", path))
    if is_remote(path) != is_remote(folder) or (
        is_remote(path) and path.parts[2] != folder.parts[2]
    ):
        return str(path)
    if is_remote(path):
        return posixpath.relpath(*(str(p).removeprefix("gs://") for p in (path, folder)))
    return os.path.relpath(path, folder.resolve())


def make_folder(path: Path) -> None:
    """With those above it. A bucket has no folders, and must be there already."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file."""
    found: Any = path.stat()
    return int(found.length if is_remote(path) else found.st_size)


def read_bytes(path: Path, start: int, end: int) -> bytes:
    """Bytes start to end of a file, fewer where it is shorter. From a bucket no more is fetched."""
    if is_remote(path):
        return cast(bytes, _store().cat_file(str(path), start=start, end=end))
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


# --- copies ----------------------------------------------------------------------------------


def send(file: Path, to: Path) -> None:
    """Copy a file on disk into a bucket. (What epath opens would be tried twice where it fails.)"""
    _store().put_file(str(file), str(to))


def local_copy(folder: Path) -> Path:
    """A folder whose files are on disk: itself, or a copy that lasts as long as this process."""
    return Path(_fetched(str(folder)).name) if is_remote(folder) else folder


@functools.cache
def _fetched(folder: str) -> "tempfile.TemporaryDirectory[str]":
    copy = tempfile.TemporaryDirectory(prefix="minigpt4_jax-")
    with reaching(folder):
        for path in any_path("folder", folder).iterdir():
            (Path(copy.name) / path.name).write_bytes(path.read_bytes())
    return copy


class Spool:
    """A folder on disk for files that grow: `folder` itself, or one that `send` copies to the bucket."""

    def __init__(self, folder: Path):
        self._folder, self._sent = folder, dict[Path, tuple[int, int]]()
        self._temporary = None
        self.here = folder
        if is_remote(folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="minigpt4_jax-")
            self.here = Path(self._temporary.name)

    def fetch(self, name: str) -> None:
        """Copy a file of the bucket, if it is there."""
        if self._temporary is not None:
            with reaching(self._folder), contextlib.suppress(FileNotFoundError):
                (self.here / name).write_bytes((self._folder / name).read_bytes())

    def send(self) -> None:
        """Copy what has changed. StoreError when the bucket cannot be written."""
        if self._temporary is None:
            return
        for file in (f for f in self.here.rglob("*") if f.is_file()):
            now = file.stat().st_size, file.stat().st_mtime_ns
            if self._sent.get(file) != now:
                with reaching(self._folder):
                    send(file, self._folder / file.relative_to(self.here).as_posix())
                self._sent[file] = now

    def close(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
