"""Copies of pictures that browsers show as they are stored, for models that do not rotate by EXIF."""

import hashlib
import io
import struct
import zlib
from pathlib import Path

from PIL import Image

from minigpt4_jax.storage.atomic import atomic_file

# Formats whose EXIF orientation browsers follow -> suffix of a copy
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
_ORIENTATION, _SHORT = 0x0112, 3  # tag and type of EXIF


def stored_copy(path: Path, folder: Path) -> Path:
    """A copy in `folder` of a picture that browsers would rotate, with the same pixels and EXIF orientation
    1; other files' own path. OSError: it cannot be read, or the copy not be written."""
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=tuple(_SUFFIXES)) as image:
            suffix = _SUFFIXES.get(image.format or "", ".jpg")  # MPO, a JPEG of several pictures
            changed = _without_orientation(data, image.info.get("exif", b""))
    except Exception:  # of Pillow's parsers, of many types; a question about the picture says it
        return path
    if changed is None:
        return path
    copy = folder / f"{hashlib.sha256(changed).hexdigest()}-stored{suffix}"
    if not copy.exists():
        with atomic_file(copy) as temporary:
            temporary.write_bytes(changed)
    return copy


def _without_orientation(data: bytes, exif: bytes) -> bytes | None:
    """The file's bytes with EXIF orientation 1; None if browsers do not rotate it.

    exif: the EXIF block in them, as Pillow gives it. Two bytes change (and a PNG's CRC), so that the pixels
    are not compressed again."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    place = order and _orientation_place(tiff, order)
    if not order or not place:
        return None
    start = data.find(tiff[: place + 2])
    if start < 0:  # for instance ImageMagick's own field of a PNG, which browsers do not read
        return None
    changed = bytearray(data)
    struct.pack_into(f"{order}H", changed, start + place, 1)
    if data[start - 4 : start] == b"eXIf":
        end = start + len(tiff)
        struct.pack_into(">I", changed, end, zlib.crc32(changed[start - 4 : end]))
    return bytes(changed)


def _orientation_place(tiff: bytes, order: str) -> int | None:
    """Where an orientation other than 1 stands in an EXIF block; None if it has none. struct.error: the
    block is cut off."""
    (first,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, first)
    for entry in range(first + 2, first + 2 + 12 * count, 12):
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
        if (tag, kind) == (_ORIENTATION, _SHORT):
            return entry + 8 if 2 <= value <= 8 else None
    return None
