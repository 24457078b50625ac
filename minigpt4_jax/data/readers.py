"""Open the datasets that a configuration names.

A published dataset is known by its name; otherwise `reader` says how to read it:

    c.data.root = "/data"
    c.data.mix.coco_vqa = ConfigDict(dict(ratio=15.0, path="vqav2", images="coco/train2014"))
    c.data.mix.mine = ConfigDict(dict(reader="files", ratio=2.0, path="mine.jsonl"))
"""

import os
from typing import TYPE_CHECKING

from minigpt4_jax.data.config import DataConfig, DatasetConfig
from minigpt4_jax.data.dataset import ExampleList, Source
from minigpt4_jax.data.datasets import open_dataset
from minigpt4_jax.data.json_records import read_sources
from minigpt4_jax.data.tfds_source import TfdsSource
from minigpt4_jax.data.webdataset import open_shards

if TYPE_CHECKING:  # imports Grain, which check-data does not need
    from minigpt4_jax.data.mixture import MixtureComponent

SHARD_READERS = ("webdataset", "cc_sbu", "laion")  # the last two clean captions, as the original


def open_components(data: DataConfig) -> "list[MixtureComponent]":
    """Open data.path as one dataset, or the datasets of data.mix with a ratio above 0.
    UserError: what is wrong with the first one that cannot be opened."""
    from minigpt4_jax.data.mixture import MixtureComponent

    if not data.mix:
        examples = read_sources(
            data.path, clean_captions=data.clean_captions, max_broken=data.max_broken
        )
        return [
            MixtureComponent("", ExampleList("", examples), prompts=data.prompts, exif=data.exif)
        ]
    return [
        MixtureComponent(
            name, open_source(name, d, data.root, data.max_broken), d.ratio, d.batch_size, d.tokens,
            d.prompts or data.prompts, data.exif and is_own(name, d),
        )
        for name, d in data.mix.items() if d.ratio > 0
    ]  # fmt: skip


def is_own(name: str, d: DatasetConfig) -> bool:
    """Whether a dataset is the user's own files, to which DataConfig.exif applies."""
    return (d.reader or name) == "files"


def open_source(name: str, d: DatasetConfig, root: str = "", max_broken: float = 0.0) -> Source:
    """Open one dataset. root: folder of relative paths. max_broken: the share of its rows whose image may be
    missing, or of its shards that may be missing or damaged. UserError: what is wrong with it."""
    paths = tuple(_join(root, path) for path in d.path)
    reader = d.reader or name
    if reader == "files":
        examples = read_sources(paths, clean_captions=d.clean_captions, max_broken=max_broken)
        return ExampleList(name, examples)
    if reader in SHARD_READERS:
        clean = d.clean_captions or reader != "webdataset"
        return open_shards(name, paths, clean_captions=clean, max_broken=max_broken)
    if reader == "tfds":
        data_dir = paths[0] if paths else None
        return TfdsSource(name, d.dataset, d.split, data_dir, d.clean_captions)
    images = _join(root, d.images) if d.images else None
    return open_dataset(reader, paths, images, max_broken=max_broken)


def _join(root: str, path: str) -> str:
    if path.startswith("@"):  # a list of shards
        return "@" + _join(root, path[1:])
    return os.path.join(root, os.path.expanduser(path))
