"""Webdataset shards: the members of a tar with one name before the first dot are a row."""

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4_jax.cli import batch_rows
from minigpt4_jax.cli.batch_output import BatchRow, json_line
from minigpt4_jax.cli.ray_batch.file_format import Format, Result, results_of
from minigpt4_jax.data.shard_index import IMAGE_SUFFIXES, MAC_FOLDER, read_members
from minigpt4_jax.data.webdataset import is_shard
from minigpt4_jax.errors import UserError


class Member(NamedTuple):
    """A file of a row: its name after the key, and its content."""

    suffix: str
    data: bytes


class TarSample(NamedTuple):
    """A row: its key with the folder, and its files."""

    key: str
    members: list[Member]


class WebDataset(Format):
    """Tars whose rows are images with a JSON object. Pieces start at a byte.

    The output has the files of the input; the answer is in the JSON object."""

    name, suffix = "webdataset", ".tar"

    def matches(self, name: str) -> bool:
        return is_shard(name)

    def scan(self, path: Path, rows: int) -> list[tuple[int, int]]:
        if not path.name.lower().endswith(".tar"):
            raise UserError(f"--input={path} is compressed; decompress it, images do not shrink")
        starts: list[int] = []
        last, total = None, 0
        try:
            for member in read_members(path):
                key, _ = _split(member.name)
                if key is not None and key != last:
                    starts += [member.offset] if total % rows == 0 else []
                    last, total = key, total + 1
        except (OSError, tarfile.TarError) as e:
            raise UserError(f"--input={path}: is damaged after {total} rows ({e})") from None
        return [(start, min(rows, total - n * rows)) for n, start in enumerate(starts)]

    def read(
        self, path: Path, start: int, count: int, number: int, prompt: str | None
    ) -> tuple[list[BatchRow], Any]:
        samples = []
        for sample in _read_samples(path, start):
            samples.append(sample)
            if len(samples) == count:
                break
        return [_row(s, number + n, path.parent, prompt) for n, s in enumerate(samples)], samples

    def write(
        self, path: Path, rows: Sequence[BatchRow], results: Sequence[Result], source: Any
    ) -> None:
        with tarfile.open(path, "w") as archive:
            for sample, row, result in zip(source, rows, results, strict=True):
                fields = {k: v for k, v in (row.fields | result).items() if k != "__key__"}
                kept = [member for member in sample.members if member.suffix != "json"]
                for suffix, data in [*kept, Member("json", json_line(fields))]:
                    info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))

    def read_results(self, path: Path) -> list[Result]:
        return [results_of(_fields(sample)) for sample in _read_samples(path, 0)]


def _split(name: str) -> tuple[str | None, str]:
    """ "a/0.0.jpg" -> ("a/0", "0.jpg"); no key for hidden files."""
    folder, base = os.path.split(name)
    stem, _, suffix = base.partition(".")
    if not stem or not suffix or MAC_FOLDER in folder.split("/"):
        return None, ""
    return os.path.join(folder, stem), suffix.lower()


def _read_samples(path: Path, start: int) -> Iterator[TarSample]:
    """The rows from a byte on."""
    current: TarSample | None = None
    with path.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                key, suffix = _split(info.name)
                if key is None or not info.isreg():
                    continue
                if current is None or key != current.key:
                    if current is not None:
                        yield current
                    current = TarSample(key, [])
                content = archive.extractfile(info)
                current.members.append(Member(suffix, content.read() if content else b""))
    if current is not None:
        yield current


def _fields(sample: TarSample) -> dict[str, Any]:
    """The sample's JSON object. ValueError: it is none."""
    for suffix, data in sample.members:
        if suffix == "json":
            fields = json.loads(data)
            if not isinstance(fields, dict):
                raise ValueError("not an object")
            return fields
    return {}


def _row(sample: TarSample, number: int, folder: Path, prompt: str | None) -> BatchRow:
    images = tuple(
        data for suffix, data in sample.members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES
    )
    key = {"__key__": sample.key}
    try:
        fields = key | _fields(sample)
    except (ValueError, RecursionError) as e:
        return BatchRow(number, key, error=f"{sample.key}.json is not a JSON object ({e})")
    return batch_rows.make_row(number, fields, folder, prompt, images)
