"""Curated rows written as a dataset: MiniGPT-4's stage-2 folder, JSONL, webdataset or Parquet.

JPEG files are copied as they are. Other images, and JPEG files that viewers would rotate, are encoded as JPEG
(quality 95), since the original reads `image/{id}.jpg` and ignores EXIF.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from minigpt4_jax.curation.rows import Row, image_of, json_line
from minigpt4_jax.curation.statistics import image_key
from minigpt4_jax.data.json_records import STAGE2_FILE
from minigpt4_jax.errors import DataError, UserError
from minigpt4_jax.processing.images import FilePart, ImageSource, open_image

JPEG_QUALITY = 95
CONFIG_FILE = "stage2_config.py"
_CONFIG = '''"""Stage 2 on the shards beside this file: python -m minigpt4_jax.train --config=FILE ..."""

from pathlib import Path

from ml_collections import ConfigDict

from configs.stage2 import get_config as stage2


def get_config(arg: str = "") -> ConfigDict:
    c = stage2(arg)
    shards = dict(reader="webdataset", path=str(Path(__file__).parent))
    c.data.mix = ConfigDict(dict(curated=shards))
    return c
'''
_ORIENTATION = 0x0112  # EXIF tag
_KEPT_FIELDS = ("references", "original", "unconfirmed")


class ExportedImage(NamedTuple):
    """name: of its file, without suffix. data: of a JPEG file. encoded: whether it was not copied."""

    name: str
    data: bytes
    encoded: bool


class ExportedRow(NamedTuple):
    """A row with its image; `new` if the image was in no row before."""

    row: Row
    image: ExportedImage
    new: bool


@dataclass
class Files:
    """What was written: SHA-256 by path relative to the dataset."""

    hashes: dict[str, str] = field(default_factory=dict)
    num_images: int = 0
    num_encoded: int = 0

    def write(self, folder: Path, name: str, data: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.hashes[name] = hashlib.sha256(data).hexdigest()

    def add(self, folder: Path, name: str) -> None:
        """A file that is written already."""
        with (folder / name).open("rb") as file:
            self.hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()

    def count(self, rows: Iterable[ExportedRow]) -> Iterator[ExportedRow]:
        for exported in rows:
            if exported.new:
                self.num_images += 1
                self.num_encoded += exported.image.encoded
            yield exported


# --- images -----------------------------------------------------------------------------------


def jpeg(source: ImageSource, *, exif: bool) -> tuple[bytes, bool]:
    """(bytes of a JPEG file, whether it was encoded) of an image. DataError: it cannot be read."""
    data = _file_bytes(source)
    with Image.open(io.BytesIO(data)) as opened:
        turned = exif and opened.getexif().get(_ORIENTATION, 1) != 1
        copied = opened.format == "JPEG" and opened.mode in ("RGB", "L") and not turned
    image = open_image(data, exif=exif)  # also finds a truncated file
    if copied:
        return data, False
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), True


def _file_bytes(source: ImageSource) -> bytes:
    part = source if isinstance(source, FilePart) else None
    path = part.path if part else os.fspath(source)  # type: ignore[arg-type]
    try:
        with open(path, "rb") as file:
            file.seek(part.offset if part else 0)
            data = file.read(part.size if part else -1)
        Image.open(io.BytesIO(data)).close()
    except Exception as e:  # Pillow's parsers raise many types
        raise DataError(
            f"image {path}: cannot be read ({e})", "image that cannot be read"
        ) from None
    return data


def read_rows_with_images(
    rows: Sequence[Row], folder: Path, *, exif: bool, progress: Callable[[], object] = lambda: None
) -> Iterator[ExportedRow]:
    """Rows in order, each with its image as a JPEG file. Images are read in threads.
    UserError: an image that cannot be read."""
    names = _image_names(rows)

    def read(indexed: tuple[int, Row]) -> tuple[bytes, bool]:
        index, row = indexed
        return jpeg(image_of(row, folder, f"row {index + 1}"), exif=exif)

    seen: set[str] = set()
    waiting = iter(enumerate(rows))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(waiting, 256)):
            for (_, row), (data, encoded) in zip(chunk, pool.map(read, chunk), strict=True):
                key = image_key(row)
                yield ExportedRow(row, ExportedImage(names[key], data, encoded), key not in seen)
                seen.add(key)
                progress()


def _image_names(rows: Sequence[Row]) -> dict[str, str]:
    """A file name for each image: its id, with what file systems dislike replaced."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for row in rows:
        key = image_key(row)
        if key in names:
            continue
        base = re.sub(r"[^\w.-]", "_", str(row["id"])).strip(".")[:100] or "image"
        name, number = base, 1
        while name.lower() in taken:  # some file systems do not tell cases apart
            number += 1
            name = f"{base}-{number}"
        taken.add(name.lower())
        names[key] = name
    return names


# --- formats ----------------------------------------------------------------------------------------


def write_minigpt4(
    rows: Iterable[ExportedRow], folder: Path, files: Files, shard_rows: int
) -> None:
    """filter_cap.json and image/{image_id}.jpg, as MiniGPT-4's second stage reads them."""
    annotations = []
    for exported in files.count(rows):
        if exported.new:
            files.write(folder, f"image/{exported.image.name}.jpg", exported.image.data)
        annotations.append({"image_id": exported.image.name, "caption": exported.row["caption"]})
    content = json.dumps({"annotations": annotations}, ensure_ascii=False, indent=1) + "\n"
    files.write(folder, STAGE2_FILE, _utf8(content))


def write_jsonl(rows: Iterable[ExportedRow], folder: Path, files: Files, shard_rows: int) -> None:
    """rows.jsonl of {"image", "caption", "id", ...} and images/."""
    lines = []
    for exported in files.count(rows):
        name = f"images/{exported.image.name}.jpg"
        if exported.new:
            files.write(folder, name, exported.image.data)
        lines.append(
            json_line({"image": name, "caption": exported.row["caption"], **_more(exported.row)})
        )
    files.write(folder, "rows.jsonl", "".join(lines).encode())


def write_webdataset(
    rows: Iterable[ExportedRow], folder: Path, files: Files, shard_rows: int
) -> None:
    """00000.tar ... of KEY.jpg and KEY.json with "caption", and a configuration that reads them."""
    numbered = enumerate(files.count(rows))
    for number, shard in enumerate(_chunks(numbered, shard_rows)):
        name = f"{number:05}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for i, exported in shard:
                content = {"caption": exported.row["caption"], **_more(exported.row)}
                _add_member(tar, f"{i:09}.jpg", exported.image.data)
                _add_member(tar, f"{i:09}.json", json_line(content).encode())
        files.add(folder, name)

    files.write(folder, CONFIG_FILE, _CONFIG.encode())


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member without time and owner, so that equal rows make equal files."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_parquet(rows: Iterable[ExportedRow], folder: Path, files: Files, shard_rows: int) -> None:
    """data-00000.parquet ... with the columns id, image {bytes, path} and caption, as Hugging Face's datasets
    has them. UserError: pyarrow is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            "--format=parquet needs the package pyarrow: pip install 'minigpt4_jax[curate]'"
        ) from None
    features = {
        "id": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"},
        "caption": {"dtype": "string", "_type": "Value"},
    }  # fmt: skip
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("caption", pa.string()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for number, shard in enumerate(_chunks(files.count(rows), shard_rows)):
        values = [
            {
                "id": str(e.row["id"]),
                "image": {"bytes": e.image.data, "path": f"{e.image.name}.jpg"},
                "caption": e.row["caption"],
            }
            for e in shard
        ]
        name = f"data-{number:05}.parquet"
        # JPEG data do not compress, and small row groups need little memory
        pq.write_table(
            pa.Table.from_pylist(values, schema),
            folder / name,
            row_group_size=100,
            compression="none",
        )
        files.add(folder, name)


FORMATS: dict[str, Callable[[Iterable[ExportedRow], Path, Files, int], None]] = {
    "minigpt4": write_minigpt4,
    "jsonl": write_jsonl,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
}


def _more(row: Row) -> dict[str, Any]:
    """Fields of a row that formats with room for them keep."""
    return {"id": str(row["id"]), **{name: row[name] for name in _KEPT_FIELDS if row.get(name)}}


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _chunks(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk
