"""Image preprocessing: open and check, resize, normalize, as the vision encoder was trained.

Images travel between processes and to the device as uint8; the model normalizes them."""

import io
import os
import stat
import zlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from minigpt4_jax.config import IMAGE_MEAN, IMAGE_STD
from minigpt4_jax.errors import DataError, UserError
from minigpt4_jax.processing.image_paths import local_path
from minigpt4_jax.storage.failed_downloads import LFS_POINTER, WEB_PAGE, failed_download
from minigpt4_jax.storage.file_formats import HEAD_BYTES, describe_format
from minigpt4_jax.utils.text import one_line

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs: 537 MB decoded
# Causes by which unreadable images are counted (DataError.cause).
UNREADABLE = "image that cannot be read"
TOO_LARGE = "image that is too large"
CROP_SCALE = (0.5, 1.0)  # of the area, in version 1's training crop
CROP_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class FilePart:
    """An image stored inside a larger file, such as a tar."""

    path: str
    offset: int  # bytes
    size: int  # bytes


class ArrayLike(Protocol):
    """An array of NumPy, JAX or another library."""

    @property
    def ndim(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray: ...


ImageSource = (
    str | PathLike[str] | FilePart | bytes | bytearray | memoryview | BinaryIO | Image.Image
    | np.ndarray | ArrayLike
)  # fmt: skip
_MAX_NAME = 1000  # characters: longer ones are not of files
_BYTES = (bytes, bytearray, memoryview)

_ACCEPTED = (
    "a path, an open file, bytes, a PIL image or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8 "
    "(0-255) or floats (0-1)"
)


def is_image(value: Any) -> bool:
    """Whether a value is one image rather than several."""
    kinds = (str, PathLike, FilePart, *_BYTES, Image.Image)
    if isinstance(value, kinds) or hasattr(value, "read"):
        return True
    return getattr(value, "ndim", 0) in (2, 3)


def open_image(source: ImageSource, *, exif: bool = False) -> Image.Image:
    """Read one image as RGB.

    source: a path, a part of a file, a file opened in binary mode, a file's bytes, a PIL image, or an array
    (NumPy, JAX) [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8 in 0..255 or floats in 0..1.
    exif: rotate as the EXIF orientation says, as viewers show the picture. The original ignores it, and so
    do the published datasets, whose boxes are for the stored pixels.
    Palette, grayscale and CMYK images are converted as Pillow does; transparency is dropped, as in the
    original. 16-bit grayscale keeps its upper 8 bits (Pillow alone would saturate it to white).
    DataError: missing, not an image, truncated, too large. UserError: wrong type, dtype or shape.
    """
    if hasattr(source, "__array__") and not isinstance(source, (Image.Image, str)):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "image", exif=exif)
    name, data = _read(source)
    if not data:
        raise DataError(f"{name}: the file is empty", "image that is empty")
    try:
        opened = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as e:
        raise DataError(f"{name}: {one_line(e)}; resize it first", TOO_LARGE) from None
    except Exception as e:  # Pillow's parsers raise many types
        raise DataError(f"{name}: {_not_an_image(data, e)}", "file that is no image") from None
    return _decode(opened, name, copied=False, exif=exif)


def name_of(source: ImageSource) -> str:
    """The name of an image in messages, unique within a dataset."""
    if isinstance(source, FilePart):
        return f"{source.path} at byte {source.offset}"
    if isinstance(source, _BYTES):
        return f"of {len(source)} bytes ({zlib.crc32(source):08x})"
    if isinstance(source, (str, PathLike)):
        return os.fspath(source)
    if isinstance(getattr(source, "name", None), str):
        return source.name  # type: ignore[union-attr]
    if hasattr(source, "read"):
        return f"in an open {type(source).__name__}"
    size = source.size if isinstance(source, Image.Image) else source.shape[1::-1]
    return f"{size[0]} x {size[1]} ({zlib.crc32(np.asarray(source).tobytes()):08x})"


def _read(source: Any) -> tuple[str, bytes]:
    """(name in messages, content of the file)"""
    if isinstance(source, _BYTES):
        return f"image {name_of(source)}", bytes(source)
    if isinstance(source, str):
        if not source:
            raise DataError("image: the path is empty", "image that is missing")
        source = local_path(source)
    if isinstance(source, FilePart):
        path, is_whole_file = Path(source.path), False
    elif hasattr(source, "read"):
        return _read_open_file(source)
    elif isinstance(source, (str, PathLike)):
        path, is_whole_file = Path(source), True
    else:
        raise UserError(f"image: got {type(source).__name__}; expected {_ACCEPTED}")
    name = f"image {name_of(source)}"
    if len(name) > _MAX_NAME and not os.path.exists(path):
        raise DataError(
            f"image {name[6:60]}...: there is no such file; is it an encoded image? decode it and pass the "
            "bytes",
            "image that is missing",
        )
    try:
        if is_whole_file:
            if stat.S_ISFIFO(path.stat().st_mode):  # reading would wait for a writer
                raise DataError(f"{name}: is a pipe; expected an image file", UNREADABLE)
            return name, path.read_bytes()
        with path.open("rb", buffering=0) as file:
            file.seek(source.offset)
            data = file.read(source.size)
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file", "image that is missing") from None
    except IsADirectoryError:
        raise DataError(
            f"{name}: is a directory; expected an image file", "image that is a directory"
        ) from None
    except (OSError, ValueError) as e:  # ValueError: a null byte in the path
        raise DataError(f"{name}: cannot be read ({one_line(e)})", UNREADABLE) from None
    if len(data) < source.size:
        raise DataError(f"{name}: the file is truncated", UNREADABLE)
    return name, data


def _read_open_file(file: Any) -> tuple[str, bytes]:
    name = f"image {name_of(file)}"
    as_text = f"{name}: is opened as text; open it in binary mode, as open(path, 'rb') does"
    if isinstance(file, io.TextIOBase):
        raise UserError(as_text)
    try:
        data = file.read()
    except (OSError, ValueError) as e:
        raise DataError(f"{name}: cannot be read ({one_line(e)})", UNREADABLE) from None
    if not isinstance(data, bytes):
        raise UserError(as_text)
    if not data and hasattr(file, "tell") and file.tell():
        raise UserError(f"{name}: has been read to its end already; call its seek(0) before")
    return name, data


def resize(image: Image.Image, size: int) -> np.ndarray:
    """RGB image -> uint8 [size, size, 3], by Pillow's antialiased bicubic; the aspect ratio is not kept.

    One axis after the other, in the order of Pillow 13, with which the reference was made. Earlier
    versions always began with the rows, which rounds some pixels of tall images to a neighboring value.
    """
    width, height = image.size
    columns_first = height - size > max(0, 2 * (width - size))
    between = (width, size) if columns_first else (size, height)
    bicubic = Image.Resampling.BICUBIC
    return np.asarray(image.resize(between, bicubic).resize((size, size), bicubic))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Version 1's training augmentation: a random crop, resized to uint8 [size, size, 3].

    The crop has 0.5-1 of the area and an aspect ratio of 3/4-4/3 (torchvision's RandomResizedCrop);
    the same generator state gives the same crop. No flip. MiniGPT-v2 uses `resize`, since a crop would
    move its boxes.
    """
    return resize(image.crop(_crop_box(*image.size, rng)), size)


def normalize(image: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> float32 (x / 255 - mean) / std, bit-identical to torchvision."""
    x = image.astype(np.float32, order="C")
    # Long rows, because NumPy is slow on an axis of 3.
    rows = x.reshape(-1, 3 * (x.shape[-2] if x.ndim > 1 else 1))
    rows /= np.float32(255)
    rows -= np.tile(np.array(IMAGE_MEAN, np.float32), rows.shape[1] // 3)
    rows /= np.tile(np.array(IMAGE_STD, np.float32), rows.shape[1] // 3)
    return x


def load_pixels(source: ImageSource, size: int, *, exif: bool = False) -> np.ndarray:
    """Open and resize: uint8 [size, size, 3], the model's input. Otherwise as `open_image`."""
    return resize(open_image(source, exif=exif), size)


def _crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_SCALE)
        ratio = np.exp(rng.uniform(*np.log(CROP_RATIO)))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    # A very long image: its center, with the nearest allowed aspect ratio.
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _from_array(source: Any) -> Image.Image:
    try:
        array = np.asarray(source)
    except Exception as e:  # for instance a tensor of PyTorch on a GPU, or with a gradient
        kind = type(source).__name__
        raise UserError(f"image: this {kind} is no array in memory ({one_line(e)})") from None
    channels = array.shape[2] if array.ndim == 3 else 1
    values = _to_uint8(array)
    if values is None or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4) and channels not in (1, 3, 4):
            hint = "; channels come last: transpose it to [H, W, C]"
        raise UserError(
            f"image: got an array {array.dtype} {list(array.shape)}"
            + (f" with values {array.min():.4g} to {array.max():.4g}" if array.size else "")
            + f"; expected {_ACCEPTED}{hint}"
        )
    _check_size("image", array.shape[1], array.shape[0])
    return Image.fromarray(values[..., 0] if array.ndim == 3 and channels == 1 else values).convert(
        "RGB"
    )


def _to_uint8(array: np.ndarray) -> np.ndarray | None:
    """uint8 values as they are, floats and booleans in 0..1 times 255, integers in 0..255; else None."""
    if array.dtype == np.uint8 or array.size == 0:
        return array.astype(np.uint8)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    # bfloat16 (ml_dtypes) is of kind "V"
    is_float = array.dtype.kind == "f" or "float" in array.dtype.name
    if is_float and array.min() >= 0 and array.max() <= 1:
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    return None


def _check_size(name: str, width: int, height: int) -> None:
    if width == 0 or height == 0:
        raise DataError(f"{name}: has no pixels ({width} x {height})", "image without pixels")
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} = {width * height} pixels; "
            f"at most {MAX_PIXELS} are read; resize it first",
            TOO_LARGE,
        )


def _decode(
    image: Image.Image, name: str, *, copied: bool = True, exif: bool = False
) -> Image.Image:
    """Convert to RGB. copied: return a new image even if the given one is RGB."""
    _check_size(name, *image.size)
    if image.mode == "F":
        raise DataError(
            f"{name}: has floating-point pixels of unknown range; convert it to 8 bits",
            "image of unknown range",
        )
    try:
        image.load()
        if exif:
            image = ImageOps.exif_transpose(image)
        return (
            image if image.mode == "RGB" and not copied else _sixteen_to_eight(image).convert("RGB")
        )
    except Image.DecompressionBombError as e:
        raise DataError(f"{name}: {one_line(e)}; resize it first", TOO_LARGE) from None
    except Exception as e:  # Pillow's decoders raise many types
        raise DataError(
            f"{name}: cannot be decoded ({one_line(e)}); is the file truncated?",
            "image that cannot be decoded",
        ) from None


def _sixteen_to_eight(image: Image.Image) -> Image.Image:
    """16-bit grayscale (modes I;16*, and I of PGM and TIFF) -> 8 bits; other modes are unchanged."""
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8))
    return image


def _not_an_image(data: bytes, error: Exception) -> str:
    if known := describe_format(data[:HEAD_BYTES]):
        return f"is {known[0]}, which is not read; {known[1]}"
    kind = failed_download(data[:200])
    if kind == WEB_PAGE:
        return f"is {kind}, not an image; was the download refused?"
    if kind == LFS_POINTER:
        return f"is {kind}, not an image; run `git lfs pull`"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image that Pillow knows"
    return f"is not a readable image ({one_line(error)})"
