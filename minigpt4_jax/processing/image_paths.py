"""Image paths as people write them: file:// addresses, ~, backslashes, URLs that are not read."""

import os
import re
from urllib.parse import unquote, urlsplit

from minigpt4_jax.errors import DataError
from minigpt4_jax.utils.text import shorten

_URL = re.compile("[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_FILE = re.compile("file://", re.IGNORECASE)
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif",
)  # fmt: skip


def is_url(path: str) -> bool:
    """Whether a path is an address. A drive letter is none."""
    return _URL.match(path) is not None


def local_path(path: str) -> str:
    """The path of a file:// address, and of one that begins with ~ where the shell left that; others as they
    are. DataError: another address."""
    if _FILE.match(path) and os.path.exists(file := unquote(urlsplit(path).path)):
        return file
    if not is_url(path):
        return os.path.expanduser(path) if path.startswith("~") else path
    if os.path.exists(path):
        return path
    advice = "download the image and give its path"
    if path[:5].lower() == "data:":
        advice += ", or pass its bytes, decoded"
    raise DataError(f"image {shorten(path)}: URLs are not read; {advice}", "image at a URL")


def path_in_folder(folder: str | os.PathLike[str], name: str) -> str:
    """Where an image lies that a row in `folder` names; an address as it is. Backslashes separate folders,
    as on Windows, unless there is such a file."""
    if is_url(name):
        return unquote(urlsplit(name).path) if _FILE.match(name) else name
    path = os.path.join(folder, name)
    if "\\" in name and os.sep == "/" and not os.path.exists(path):
        return os.path.join(folder, name.replace("\\", "/"))
    return path
