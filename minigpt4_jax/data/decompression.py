"""Decompress files whose compression is recognized by their first bytes: gzip, bzip2, xz, zstd."""

import bz2
import gzip
import importlib
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from minigpt4_jax.errors import UserError

Opener = Callable[[Path], Any]  # -> a file with read1

_CHUNK = 1 << 20  # bytes
_ZSTD_INPUT = 1 << 16  # compressed bytes that are decompressed at once


def find_decompressor(path: Path) -> Opener | None:
    """The function that opens a compressed file; None: it is not compressed.
    UserError: it is compressed with zstd, and the package for that is not installed."""
    with path.open("rb") as file:
        start = file.read(6)
    for magic, opener in _OPENERS.items():
        if start.startswith(magic):
            if opener is _ZstdFile:
                _import_zstandard(path)
            return opener
    return None


def decompress(path: Path, opener: Opener, out: IO[bytes]) -> str:
    """Write the decompressed file to `out`, as far as possible; -> what is damaged, or ""."""
    with opener(path) as file:
        while True:
            try:
                chunk = file.read1(_CHUNK)  # read() would lose what precedes a damage
            except Exception as e:  # each decompressor has types of its own
                if isinstance(e, OSError) and e.errno is not None:
                    raise
                return f"its compressed data is damaged ({e})"
            if not chunk:
                return ""
            out.write(chunk)


class _ZstdFile:
    """A zstd file opened for reading. zstandard's own reader takes a file that ends within a frame for a
    complete one; here it is an error."""

    def __init__(self, path: Path):
        self._new_frame = _import_zstandard(path).ZstdDecompressor().decompressobj
        self._frame: Any = None  # None: between two frames
        self._file = path.open("rb")
        self._unread = b""

    def __enter__(self) -> "_ZstdFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read1(self, size: int) -> bytes:
        """Some bytes, more than `size` where they compress well; b"" at the end."""
        while data := self._unread or self._file.read(min(size, _ZSTD_INPUT)):
            self._frame = self._frame or self._new_frame()
            out: bytes = self._frame.decompress(data)
            self._unread = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
            if out:
                return out
        if self._frame is not None:
            raise EOFError("it ends within a frame")
        return b""


def _import_zstandard(path: Path) -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        raise UserError(
            f"data {path}: is compressed with zstd, which needs the package zstandard: "
            "`pip install zstandard`, or decompress it with `zstd -d`"
        ) from None


_OPENERS: dict[bytes, Opener] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _ZstdFile,
}
