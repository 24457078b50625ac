"""The images to describe: a folder, webdataset shards, or a JSONL file."""

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from minigpt4_jax.data.annotations import expect_object, kind, parse, read_text
from minigpt4_jax.data.shard_index import (
    IMAGE_SUFFIXES,
    MAC_FOLDER,
    TEXT_SUFFIXES,
    build_index,
    read_index,
    read_members,
)
from minigpt4_jax.data.webdataset import find_shards, is_shard
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import FilePart, ImageSource


@dataclass(frozen=True)
class ImageRow:
    """An image with what is known about it.

    id: unique in the list. source: where to read it. references: captions that came with it. fields:
    further fields of a JSONL row, which are kept.
    """

    id: str
    source: ImageSource
    references: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


def list_images(path: str) -> list[ImageRow]:
    """The images of a folder (with those below it), of shards, or of a JSONL file, in order.

    path: a folder; one or several .tar files, also as a pattern with * or {00..99} or a folder of them; or
    a .jsonl file of rows {"image": path relative to the file, ["id"], ["caption" or "references"]}.
    UserError: there is none, a row is invalid, an id twice.
    """
    rows = _read(os.path.expanduser(path))
    if not rows:
        raise UserError(
            f"--images={path}: has no image; expected a folder with images "
            f"(.{', .'.join(IMAGE_SUFFIXES)}) or .tar shards, or a .jsonl file with a row for each image"
        )
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise UserError(f'--images={path}: two images have the id "{row.id}"; expected one')
        seen.add(row.id)
    return rows


def _read(path: str) -> list[ImageRow]:
    if os.path.isdir(path):
        has_shards = any(is_shard(name) for name in os.listdir(path))
        return _read_shards(path) if has_shards else _read_folder(Path(path))
    if path.lower().endswith((".jsonl", ".ndjson")):
        return list(_read_jsonl(Path(path)))
    if is_shard(path) or glob.has_magic(path) or "{" in path or path.startswith("@"):
        return _read_shards(path)
    what = "is no folder, .tar or .jsonl file" if os.path.exists(path) else "there is no such file"
    raise UserError(
        f"--images={path}: {what}; expected a folder, webdataset shards or a .jsonl file"
    )


def _read_folder(folder: Path) -> list[ImageRow]:
    paths = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower()[1:] in IMAGE_SUFFIXES and p.is_file() and not p.name.startswith(".")
    )
    names = [p.relative_to(folder).as_posix() for p in paths]
    stems = Counter(os.path.splitext(name)[0] for name in names)
    return [
        # a.jpg and a.png are two images
        ImageRow(name if stems[stem := os.path.splitext(name)[0]] > 1 else stem, str(p))
        for name, p in zip(names, paths, strict=True)
    ]


# --- JSONL ------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Iterator[ImageRow]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"data {path}, line {number}"
            yield _parse_row(expect_object(parse(where, line), where), where, path.parent)


def _parse_row(row: dict[str, Any], where: str, folder: Path) -> ImageRow:
    image = row.get("image", row.get("file_name"))
    if not isinstance(image, str) or not image or "\0" in image:
        raise UserError(f'{where}: "image" is {kind(image)}; expected the path of an image')
    name = row.get("id", row.get("image_id", os.path.splitext(image)[0]))
    if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
        raise UserError(f'{where}: "id" is {kind(name)}; expected a string or an integer')
    kept = {
        k: v
        for k, v in row.items()
        if k not in ("image", "file_name", "id", "image_id", "caption", "references")
    }
    return ImageRow(str(name), os.path.join(folder, image), _references(row, where), kept)


def _references(row: dict[str, Any], where: str) -> tuple[str, ...]:
    value = row.get("references", row.get("caption", []))
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where}: its captions are {kind(value)}; expected a string or a list of them"
        )
    return tuple(text.strip() for text in texts if text.strip())


# --- shards -----------------------------------------------------------------------------------


def _read_shards(pattern: str) -> list[ImageRow]:
    files, missing = find_shards("images", pattern)
    if missing:
        raise UserError(f"--images={pattern}: {missing[0]}: there is no such file")
    rows: list[ImageRow] = []
    for file in tqdm(files, "reading shards", unit="shard", leave=False, disable=None):
        shard = read_index(file) or build_index(file)
        if shard.damage:
            raise UserError(f"--images={pattern}: {file}: {shard.damage}; download it again")
        rows += _read_shard(file.name.split(".")[0], Path(shard.tar))
    return rows


def _read_shard(name: str, tar: Path) -> Iterator[ImageRow]:
    """The images of a tar, in order; a caption with the same key is a reference. Ids are SHARD/KEY."""
    images: dict[str, FilePart] = {}
    texts: dict[str, tuple[int, FilePart]] = {}  # by key: rank of its type, the first is preferred
    for member in read_members(tar):
        folder, file = os.path.split(member.name)
        stem, _, suffix = file.partition(".")
        if not stem or not suffix or MAC_FOLDER in folder.split("/"):
            continue
        key, suffix = os.path.join(folder, stem), suffix.lower()
        part = FilePart(str(tar), member.offset_data, member.size)
        if suffix in IMAGE_SUFFIXES:
            images.setdefault(key, part)
        elif suffix in TEXT_SUFFIXES:
            rank = TEXT_SUFFIXES.index(suffix)
            if key not in texts or rank < texts[key][0]:
                texts[key] = (rank, part)
    with tar.open("rb") as file_of_tar:
        for key, image in images.items():
            caption = _read_caption(file_of_tar, *texts[key]) if key in texts else ""
            yield ImageRow(f"{name}/{key}", image, (caption,) if caption else ())


def _read_caption(tar: BinaryIO, rank: int, part: FilePart) -> str:
    """The caption in a member of a tar; "" if there is none, since it is not needed to describe."""
    tar.seek(part.offset)
    text = tar.read(part.size).decode("utf-8", "replace")
    if TEXT_SUFFIXES[rank] != "json":
        return text.strip()
    try:
        caption = json.loads(text).get("caption")
    except (ValueError, AttributeError, RecursionError):
        return ""
    return caption.strip() if isinstance(caption, str) else ""
