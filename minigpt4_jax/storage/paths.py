"""Paths on disk and in buckets (gs://), whose objects are read and written through etils' epath.

A path in a bucket has pathlib's methods. This module has what differs there: an object cannot be
appended to or renamed, it appears complete when its upload ends, there are no directories to create,
and libraries that need a local file get a copy.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import posixpath
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.text import one_line

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.S)  # also gs:/bucket, as pathlib writes it
# packages whose exceptions epath lets through
_STORAGE_LIBRARIES = {"aiohttp", "gcsfs", "google", "requests", "tensorflow", "urllib3"}


def parse_path(name: str, path: Path | str) -> Path:
    """A path as the user gave it: on disk, or in a bucket (gs://bucket/run).

    name: what messages call it. UserError: another kind of URL, or gcsfs is not installed.
    """
    url = _URL.match(str(path))
    if url is None:
        return Path(path)
    if url[1] != "gs" or not url[2].strip("/"):
        raise UserError(
            f"{name} {path} is a URL, and only local paths and gs://bucket/... work: mount the bucket "
            "(s3://: with mountpoint-s3) and give the directory it is mounted at"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{name} {path}: for gs:// install gcsfs (pip install '.[gcs]')")
    _configure_gcsfs()
    from etils import epath

    return cast(Path, epath.Path(f"gs://{url[2].rstrip('/')}"))


def parse_local_path(name: str, path: os.PathLike[str] | str) -> Path:
    """A path as the user gave it, on disk only: pathlib would make a directory "gs:" of a URL.

    name: what messages call it. UserError: it is a URL.
    """
    if _URL.match(str(path)):
        raise UserError(
            f"{name} {path} is a URL, and only local paths work: copy it here (gcloud storage cp), or "
            "mount the bucket and give the directory it is mounted at"
        )
    return Path(path)


@functools.cache
def _configure_gcsfs() -> None:
    """No cached directory listings, since other hosts write there too, and no logged tracebacks of
    errors that this package reports itself."""
    import fsspec

    logging.getLogger("gcsfs").addFilter(lambda record: not record.exc_info)
    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def _filesystem() -> Any:
    """The fsspec filesystem behind epath's paths in buckets."""
    import fsspec

    return fsspec.filesystem("gs", finalize_on_close=True)


def is_remote(path: Path | str) -> bool:
    """Whether a path is in a bucket."""
    return str(path).startswith("gs://")


class StorageError(OSError):
    """A bucket cannot be reached, read or written."""


@contextlib.contextmanager
def wrap_storage_errors(path: Path | str) -> Iterator[None]:
    """Within it, errors of the libraries behind a path in a bucket become StorageErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        # some are OSErrors with an errno; gcsfs also raises a plain OSError("Forbidden: ...")
        from_library = type(e).__module__.partition(".")[0] in _STORAGE_LIBRARIES
        plain = isinstance(e, OSError) and e.errno is None and not isinstance(e, FileNotFoundError)
        if not is_remote(path) or not (from_library or plain) or isinstance(e, StorageError):
            raise
        raise StorageError(one_line(e, 300)) from e


# --- the same operation on disk and in a bucket ------------------------------------------------


def absolute_path(path: Path) -> Path:
    return path if is_remote(path) else path.resolve()


def join_path(directory: Path, path: str) -> Path:
    """`path`, which is relative to the directory, absolute or a URL."""
    if is_remote(path) or os.path.isabs(path):
        return parse_path("path", path)
    if is_remote(directory):
        bucket = str(directory).removeprefix("gs://")
        return parse_path("path", "gs://" + posixpath.normpath(posixpath.join(bucket, path)))
    return Path(os.path.normpath(directory / path))


def relative_path(path: Path | str, directory: Path) -> str:
    """The inverse of `join_path`: relative if both are on disk or in the same bucket."""
    path = absolute_path(parse_path("path", path))
    if is_remote(path) != is_remote(directory) or (
        is_remote(path) and path.parts[2] != directory.parts[2]
    ):
        return str(path)
    if is_remote(path):
        return posixpath.relpath(*(str(p).removeprefix("gs://") for p in (path, directory)))
    return os.path.relpath(path, directory.resolve())


def make_directory(path: Path) -> None:
    """Create a directory and its parents. A bucket has no directories, and must exist already."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def wait_until_visible(path: Path, timeout: float = 10.0) -> bool:
    """Whether a path that another host created can be seen here within `timeout` seconds: a network file
    system shows it with a delay."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def file_size(path: Path) -> int:
    """Bytes of a file."""
    stat: Any = path.stat()
    return int(stat.length if is_remote(path) else stat.st_size)


def read_range(path: Path, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, fewer if it is shorter. Nothing else is fetched from a bucket."""
    if is_remote(path):
        return cast(bytes, _filesystem().cat_file(str(path), start=start, end=end))
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


# --- copies ----------------------------------------------------------------------------------


def upload(file: Path, target: Path) -> None:
    """Copy a local file into a bucket. (A file opened by epath would be retried twice on errors.)"""
    _filesystem().put_file(str(file), str(target))


def local_copy(directory: Path) -> Path:
    """A directory on disk with the same files: itself, or a copy that is deleted when Python exits."""
    return Path(_download(str(directory)).name) if is_remote(directory) else directory


@functools.cache
def _download(directory: str) -> "tempfile.TemporaryDirectory[str]":
    copy = tempfile.TemporaryDirectory(prefix="minigpt4_jax-")
    with wrap_storage_errors(directory):
        for path in parse_path("directory", directory).iterdir():
            (Path(copy.name) / path.name).write_bytes(path.read_bytes())
    return copy


class SyncedDirectory:
    """A local directory for files that grow, whose changes are uploaded to a bucket on request.

    local: where to write. If the target is on disk, it is the target itself.
    """

    def __init__(self, target: Path):
        self._target = target
        self._uploaded: dict[Path, tuple[int, int]] = {}  # file -> size and time of modification
        self._temporary = None
        self.local = target
        if is_remote(target):
            self._temporary = tempfile.TemporaryDirectory(prefix="minigpt4_jax-")
            self.local = Path(self._temporary.name)

    def download(self, name: str) -> None:
        """Copy a file from the bucket, if it exists there."""
        if self._temporary is not None:
            with wrap_storage_errors(self._target), contextlib.suppress(FileNotFoundError):
                (self.local / name).write_bytes((self._target / name).read_bytes())

    def upload_changes(self) -> None:
        """Upload the files that changed since the last call. StorageError: the bucket cannot be
        written."""
        if self._temporary is None:
            return
        for file in (f for f in self.local.rglob("*") if f.is_file()):
            version = file.stat().st_size, file.stat().st_mtime_ns
            if self._uploaded.get(file) != version:
                with wrap_storage_errors(self._target):
                    upload(file, self._target / file.relative_to(self.local).as_posix())
                self._uploaded[file] = version

    def close(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
