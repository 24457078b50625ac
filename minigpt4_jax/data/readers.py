"""The datasets of a run, opened as its configuration names them.

Where the package has a reader of the name, the name is enough; several of one kind say which by `reader`:

    c.data.root = "/data"
    c.data.mix.coco_vqa = ConfigDict(dict(ratio=15.0, batch_size=6, path="vqav2", images="coco/train2014"))
    c.data.mix.mine = ConfigDict(dict(reader="files", ratio=2.0, batch_size=6, path="mine.jsonl"))
"""

import os
from typing import TYPE_CHECKING

from minigpt4_jax.data.config import DataConfig, DatasetConfig

if TYPE_CHECKING:  # Grain is imported when a dataset is opened
    from minigpt4_jax.data.dataset import Source
    from minigpt4_jax.data.mixture import MixtureComponent

SHARDS = ("webdataset", "cc_sbu", "laion")  # the last two clean their captions, as the original


def open_parts(data: DataConfig) -> "list[MixtureComponent]":
    """The datasets of data.mix that have a ratio, opened. UserError: what is wrong with the first that
    cannot be."""
    from minigpt4_jax.data.mixture import MixtureComponent

    return [
        MixtureComponent(
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
        from minigpt4_jax.data.dataset import ExampleList
        from minigpt4_jax.data.json_records import read_sources

        return ExampleList(name, read_sources(paths, clean_captions=d.clean_captions))
    if reader in SHARDS:
        from minigpt4_jax.data.webdataset import open_shards

        clean = d.clean_captions or reader != "webdataset"
        return open_shards(name, paths, clean_captions=clean, max_broken=max_broken)
    if reader == "tfds":
        from minigpt4_jax.data.tfds_source import TfdsSource

        folder = paths[0] if paths else None
        return TfdsSource(name, d.dataset, d.split, folder, d.clean_captions)
    from minigpt4_jax.data.datasets import open_dataset

    images = os.path.join(root, os.path.expanduser(d.images)) if d.images else None
    return open_dataset(reader, paths, images)
