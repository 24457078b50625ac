"""Image paths as people write them: keys of rows, file:// addresses, ~, backslashes; URLs are not read."""

import os
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from minigpt4_jax.errors import DataError, UserError
from minigpt4_jax.utils.text import shorten

_URL = re.compile("[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_FILE = re.compile("file://", re.IGNORECASE)
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif",
)  # fmt: skip
_KEYS = ("image", "images", "file_name", "file_names")


def image_names(row: Mapping[str, Any], where: str) -> list[str]:
    """The image paths in a row, as they are written; [] without any. UserError: different ones under two
    keys, or no paths."""
    given = {key: row[key] for key in _KEYS if row.get(key) is not None}
    lists = [value if isinstance(value, list) else [value] for value in given.values()]
    if any(names != lists[0] for names in lists):
        raise UserError(f"{where}: has {' and '.join(map(repr, given))}; expected one of them")
    names = lists[0] if lists else []
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name:
            key = next(iter(given))
            raise UserError(f'{where}: "{key}" holds {name!r}; expected a path or a list of paths')
    return names


def check_other_images(row: Mapping[str, Any], text_keys: Collection[str], where: str) -> None:
    """Of a row without images. UserError: a key that is none of text_keys holds the name of one."""
    for key, value in row.items():
        is_name = isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES)
        if is_name and " " not in value and key not in text_keys:
            raise UserError(
                f'{where}: has no "image", but "{key}" is {shorten(value, 60)!r}; name the key "image", or '
                "remove it if the row is text only"
            )


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
