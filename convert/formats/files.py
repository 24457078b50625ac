"""Reads a file while hashing it, and recognizes checkpoint formats by their first bytes."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.failed_downloads import LFS_POINTER, WEB_PAGE, failed_download

CHUNK = 1 << 24


class HashedFile:
    """A file that is read in pieces and hashed (SHA-256) in the same pass.

    Pieces that are read in ascending order are hashed from the returned buffer, so a 13 GB file is
    read from disk once. It is not memory-mapped: a truncated file is then an error instead of a
    SIGBUS, and its pages do not count as this process's memory.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 (stays open with the object)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from e
        self.size = path.stat().st_size
        self._hash = hashlib.sha256()
        self._hashed = 0

    def peek(self, offset: int, count: int) -> bytes:
        """Read bytes without hashing them (headers)."""
        self._file.seek(offset)
        data = self._file.read(count)
        if len(data) != count:
            raise UserError(f"{self.path} is truncated: it ends before byte {offset + count}")
        return data

    def read(self, offset: int, count: int) -> np.ndarray:
        """`count` bytes as a fresh uint8 array."""
        if offset > self._hashed:
            self._hash_until(offset)
        buffer = np.empty(count, np.uint8)
        self._fill(offset, buffer)
        if offset <= self._hashed < offset + count:
            self._hash.update(buffer[self._hashed - offset :].data)
            self._hashed = offset + count
        return buffer

    def sha256(self) -> str:
        """Hex digest of the whole file; reads what has not been read yet."""
        self._hash_until(self.size)
        return self._hash.hexdigest()

    def _hash_until(self, end: int) -> None:
        while self._hashed < end:
            buffer = np.empty(min(CHUNK, end - self._hashed), np.uint8)
            self._fill(self._hashed, buffer)
            self._hash.update(buffer.data)
            self._hashed += buffer.size

    def _fill(self, offset: int, buffer: np.ndarray) -> None:
        try:
            self._file.seek(offset)
            count = self._file.readinto(buffer.data)
        except OSError as e:
            raise UserError(f"cannot read {self.path}: {e.strerror}") from e
        if count != buffer.size:
            raise UserError(f"{self.path} is truncated: it ends before byte {offset + buffer.size}")


def detect_format(path: Path) -> str:
    """The format of a file by its first bytes: "zip", "pickle", "gguf" or "safetensors".

    UserError, with the likely cause, when it is missing, empty, a web page, a Git LFS pointer, or of
    an unknown format.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory; expected a checkpoint file")
    try:
        with open(path, "rb") as f:
            head = f.read(512)
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist") from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    for name, matches in _FORMATS:
        if matches(head):
            return name
    raise UserError(f"{path} {_describe_unknown(head)}")


_FORMATS: list[tuple[str, Callable[[bytes], bool]]] = [
    ("zip", lambda h: h[:4] == b"PK\x03\x04"),
    ("gguf", lambda h: h[:4] == b"GGUF"),
    ("safetensors", lambda h: len(h) > 8 and h[8:9] == b"{" and h[7] == 0),
    ("pickle", lambda h: h[:1] == b"\x80" and h[1:2] in b"\x01\x02\x03\x04\x05"),
]


def _describe_unknown(head: bytes) -> str:
    """What an unrecognized file is, and what to do about it."""
    if not head:
        return "is empty (0 bytes): the download failed, fetch it again"
    kind = failed_download(head)
    if kind == WEB_PAGE:
        return f"is {kind}, not weights: the link led to a page; download the file itself"
    if kind == LFS_POINTER:
        return f"is {kind}, not weights: run `git lfs pull`, or download the file itself"
    if not head.strip(b"\0"):
        return "begins with zeros: the download is incomplete, fetch it again"
    return (
        f"is not a checkpoint (it begins with {head[:12]!r}): "
        "expected .pth/.bin, .safetensors or .gguf"
    )
