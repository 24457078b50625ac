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


def find_decompressor(path: Path) -> Opener | None:
    """What opens a compressed file for reading; None: it is not compressed.
    UserError: it is compressed with zstd, and the package for that is not installed."""
    with path.open("rb") as file:
        start = file.read(6)
    for magic, opener in _OPENERS.items():
        if start.startswith(magic):
            if opener is _open_zstd:
                _import_zstandard(path)
            return opener
    return None


def decompress(path: Path, opener: Opener, out: IO[bytes]) -> str:
    """Write the decompressed file to `out`, as far as possible; -> what ended it early, or ""."""
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


def _open_zstd(path: Path) -> Any:
    decompressor = _import_zstandard(path).ZstdDecompressor()
    return decompressor.stream_reader(path.open("rb"), read_across_frames=True, closefd=True)


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
    b"\x28\xb5\x2f\xfd": _open_zstd,
}
