"""Images of requests: data URLs and files -> checked, resized pixels."""

import base64
import binascii
import hashlib
import io
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import open_image, resize
from minigpt4_jax.serving.errors import RequestError, invalid
from minigpt4_jax.serving.jobs import ImageInput
from minigpt4_jax.serving.limits import Limits
from minigpt4_jax.utils.text import one_line

# Other formats of Pillow are rare, and some of their decoders start programs. MPO is opened as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
READER_THREADS = 4  # a decoded image may take some hundred MB
KEPT_PIXELS = 64  # images whose pixels are kept for the next turn
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[\w=.+-]+)*;base64,", re.IGNORECASE)


class RequestImage(NamedTuple):
    """An image as the scheduler takes it, and its size in pixels as a viewer shows it."""

    input: ImageInput
    size: tuple[int, int]  # width, height


def decode_data_url(url: str, limits: Limits, param: str | None = None) -> bytes:
    """The file in a data URL. RequestError: not one, not base64, too large."""
    match = _DATA_URL.match(url)
    if match is None:
        raise invalid(
            f"{url[:40]!r} is no image as a data URL; expected data:image/png;base64,...",
            param, "invalid_image_url",
        )  # fmt: skip
    if (len(url) - match.end()) * 3 // 4 > limits.image_bytes + 2:
        raise _too_large(len(url) * 3 // 4, limits, param)
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as e:
        raise invalid(
            f"the data URL is not base64 ({one_line(e)})", param, "invalid_base64"
        ) from None


class ImageReader:
    """Decodes and resizes images in threads; keeps the pixels of the last ones."""

    def __init__(self, size: int, limits: Limits, *, exif: bool):
        """size: of the model's input; exif: rotate as the EXIF orientation says."""
        self._size, self._limits, self._exif = size, limits, exif
        self.threads = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="images")
        self._kept: OrderedDict[bytes, RequestImage] = OrderedDict()

    def read(self, data: bytes, param: str | None = None) -> RequestImage:
        """One image file. RequestError: too large, or not readable."""
        if len(data) > self._limits.image_bytes:
            raise _too_large(len(data), self._limits, param)
        digest = hashlib.sha256(data).digest()
        kept = self._kept.get(digest)
        if kept is None:
            size, pixels = self._decode(data, param)
            kept = self._kept[digest] = RequestImage(ImageInput(digest, pixels), size)
            while len(self._kept) > KEPT_PIXELS:
                self._kept.popitem(last=False)
        return kept

    def _decode(self, data: bytes, param: str | None) -> tuple[tuple[int, int], np.ndarray]:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > self._limits.pixels:
                raise _too_many_pixels(image.size, self._limits, param)
            shown = open_image(image, exif=self._exif)
            return shown.size, resize(shown, self._size)
        except (RequestError, MemoryError):
            raise
        except UserError as e:
            raise invalid(str(e), param, "invalid_image") from None
        except Exception as e:  # Pillow's parsers raise many types
            unknown = isinstance(e, UnidentifiedImageError)
            cause = "another file, or damaged" if unknown else one_line(e)
            raise invalid(
                f"the image cannot be read ({cause}); expected one of {', '.join(FORMATS)}",
                param, "invalid_image",
            ) from None  # fmt: skip


def _too_large(size: int, limits: Limits, param: str | None) -> RequestError:
    return RequestError(
        413, f"an image of {size} bytes; at most {limits.image_bytes} are read", "image_too_large",
        param=param,
    )  # fmt: skip


def _too_many_pixels(size: tuple[int, int], limits: Limits, param: str | None) -> RequestError:
    return invalid(
        f"an image of {size[0]} x {size[1]} pixels; at most {limits.pixels} are read; resize it first",
        param, "image_too_large",
    )  # fmt: skip
