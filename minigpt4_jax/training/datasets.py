"""The datasets of a run: how a configuration names them, and the same opened.

Where the package has a reader of the name, the name is enough; several of one kind say which by `reader`:

    c.data.root = "/data"
    c.data.mix.coco_vqa = ConfigDict(dict(ratio=15.0, batch_size=6, path="vqav2", images="coco/train2014"))
    c.data.mix.mine = ConfigDict(dict(reader="files", ratio=2.0, batch_size=6, path="mine.jsonl"))
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minigpt4_jax.errors import UserError

if TYPE_CHECKING:
    from minigpt4_jax.data.mixing import Part
    from minigpt4_jax.data.source import Source
    from minigpt4_jax.training.config import DataConfig

SHARDS = ("webdataset", "cc_sbu", "laion")  # the last two clean their captions, as the original
# Those of minigpt4_jax.data.mixing, which is not imported here: it would bring Grain with it.
MIXED_BY = ("step", "example")


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of a mixture. Its key in data.mix is its name in logs."""

    ratio: float = 1.0  # of turns, beside the others' ratios; 0: left out
    batch_size: int = 0  # of its own batches; 0: config.batch_size
    tokens: int = 0  # instead: as many rows as together have so many tokens, padding included
    reader: str = ""  # files, webdataset, tfds or a published dataset; "": the one of its name
    path: tuple[
        str, ...
    ] = ()  # files or a folder, as the reader wants them; shards; TFDS's data_dir
    images: str = ""  # the folder of images, for published datasets; "": where they are published
    dataset: str = ""  # with tfds: name[:version]
    split: str = "train"  # with tfds
    prompts: tuple[str, ...] = ()  # for its rows without a question; (): data.prompts
    clean_captions: bool = False  # with files, webdataset, tfds; see data.clean_captions


def check(data: "DataConfig", batch_size: int, accumulate: int) -> None:
    """UserError names the first value that makes no sense."""
    mix = data.mix
    _require("data.mix_by", data.mix_by, data.mix_by in MIXED_BY, " or ".join(MIXED_BY))
    _require("data.max_broken", data.max_broken, 0 <= data.max_broken <= 1, "a share from 0 to 1")
    for name, d in mix.items():
        key = f"data.mix.{name}"
        _require(
            key, name, re.fullmatch(r"[\w-]+", name) is not None, "a name of letters and digits"
        )
        _require(f"{key}.ratio", d.ratio, 0 <= d.ratio < math.inf, "0 or more")
        for field in ("batch_size", "tokens"):
            value = getattr(d, field)
            _require(f"{key}.{field}", value, value >= 0, "0 or more")
        one = not (d.batch_size and d.tokens)
        _require(f"{key}.tokens", d.tokens, one, "0 with a batch_size, or no batch_size")
        size = d.batch_size or batch_size
        whole = size % accumulate == 0
        _require(f"{key}.batch_size", size, whole, f"a multiple of accumulate ({accumulate})")
        own = bool(d.batch_size or d.tokens) and data.mix_by == "example"
        _require(f"{key}.batch_size", size, not own, "none of its own with mix_by=example")
        tfds = d.reader == "tfds"
        _require(
            f"{key}.dataset", d.dataset, bool(d.dataset) == tfds, "a name, with reader=tfds alone"
        )
        needs = d.ratio > 0 and not d.path and not tfds
        _require(f"{key}.path", d.path, not needs, f"its files: --config.{key}.path=...")
    if mix:
        used = any(d.ratio > 0 for d in mix.values())
        _require("data.mix", list(mix), used, "a dataset with a ratio above 0")
        _require("data.path", data.path, not data.path, "nothing beside data.mix")


def _require(key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"config.{key} is {value!r}: expected {expected}")


def open_parts(data: "DataConfig") -> "list[Part]":
    """The datasets of data.mix that have a ratio, opened. UserError: what is wrong with the first that
    cannot be."""
    from minigpt4_jax.data.mixing import Part

    return [
        Part(
            name, open_source(name, d, data.root, data.max_broken), d.ratio, d.batch_size, d.tokens,
            d.prompts or data.prompts,
        )
        for name, d in data.mix.items() if d.ratio > 0
    ]  # fmt: skip


def open_source(name: str, d: DatasetConfig, root: str = "", max_broken: float = 0.0) -> "Source":
    """One dataset; relative paths begin at root. max_broken: the share of shards that may be."""
    paths = tuple(os.path.join(root, os.path.expanduser(p)) for p in d.path)
    reader = d.reader or name
    if reader == "files":
        from minigpt4_jax.data.source import ExampleList
        from minigpt4_jax.data.sources import read_sources

        return ExampleList(name, read_sources(paths, clean_captions=d.clean_captions))
    if reader in SHARDS:
        from minigpt4_jax.data.shards import open_shards

        clean = d.clean_captions or reader != "webdataset"
        return open_shards(name, paths, clean_captions=clean, max_broken=max_broken)
    if reader == "tfds":
        from minigpt4_jax.data.tfds_source import TfdsSource

        folder = paths[0] if paths else None
        return TfdsSource(name, d.dataset, d.split, folder, d.clean_captions)
    from minigpt4_jax.data.datasets import open_dataset

    images = os.path.join(root, os.path.expanduser(d.images)) if d.images else None
    return open_dataset(reader, paths, images)


def known_keys(mix: Mapping[str, object]) -> list[str]:
    """The keys of a mixture as the command line spells them, without `--config.`."""
    fields = DatasetConfig.__dataclass_fields__
    return [f"data.mix.{name}.{field}" for name in mix for field in fields]
