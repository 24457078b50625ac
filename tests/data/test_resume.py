"""A run stopped at any step and resumed sees the same batches: every source, on a miniature of its files,
and a mixture of them all; in other processes and on another number of hosts."""

import io
import json
from functools import partial

import pytest
from helpers.published_layouts import Disk, write_everything
from helpers.resuming import check_resumed, half, loader, uninterrupted
from PIL import Image

from minigpt4_jax.data.config import DataConfig, DatasetConfig
from minigpt4_jax.data.datasets import DATASETS
from minigpt4_jax.data.readers import open_parts
from minigpt4_jax.processing.chat_templates import STAGE2_PROMPTS
from minigpt4_jax.training.config_cli import read_config_file

ROWS = 5  # of a dataset
OWN = {
    "cc_sbu_align": DatasetConfig(path=("cc_sbu_align",), prompts=STAGE2_PROMPTS),
    "laion": DatasetConfig(path=("web/{0..1}.tar",)),
    "cc_sbu": DatasetConfig(path=("web/*.tar",)),
    "gzipped": DatasetConfig(reader="webdataset", path=("zip/0.tar.gz",)),
    "files": DatasetConfig(reader="files", path=("mine.jsonl",)),
    "stage2": DatasetConfig(reader="files", path=("cc_sbu_align",), prompts=STAGE2_PROMPTS),
}
NAMES = sorted({*DATASETS, *OWN})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    disk = Disk(tmp_path_factory.mktemp("data"))
    write_everything(disk, ROWS)
    for name, rows in (
        ("web/0.tar", range(3)),
        ("web/1.tar", range(3, 5)),
        ("zip/0.tar.gz", range(5)),
    ):
        disk.tar(name, [{"png": png(n), "txt": f"a {n}".encode()} for n in rows])
    mine = [{"image": f"gqa/images/{n}.jpg", "caption": f"mine {n}"} for n in range(7, 7 + ROWS)]
    disk.text("mine.jsonl", "".join(json.dumps(row) + "\n" for row in mine))
    return disk.root


def png(n):
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (40 * n, 90, 10)).save(out, "PNG")
    return out.getvalue()


def mixture(root, *names, mix_by="step"):
    """The parts of a training run, opened; batch sizes as the mixture allows."""
    published = read_config_file("v2_stage3")["data"]["mix"]
    every = {n: DatasetConfig(**{**d, "path": (d["path"],)}) for n, d in published.items()} | OWN
    return open_parts(DataConfig(root=str(root), mix_by=mix_by, mix={n: every[n] for n in names}))


@pytest.mark.parametrize("name", NAMES)
def test_every_source_resumes_at_any_step(root, name):
    made, states = uninterrupted(loader(mixture(root, name)), 6)
    assert len({batch.tokens.tobytes() for batch in made}) > 3  # what is compared tells rows apart
    for stop, state in enumerate(states):
        check_resumed(state, made[stop:], loader(mixture(root, name)))
    hosts = [loader(mixture(root, name), share=partial(half, n)) for n in (0, 1)]
    check_resumed(states[2], made[2:], *hosts)
    hosts = [loader(mixture(root, name), share=partial(half, n)) for n in (0, 1)]
    _, of_hosts = uninterrupted(hosts[0], 5)
    check_resumed(of_hosts[4], made[4:], loader(mixture(root, name)))


@pytest.mark.parametrize("mix_by", ["step", "example"])
def test_the_mixture_of_all_resumes_with_other_workers_and_hosts(root, mix_by):
    opened = partial(mixture, root, *NAMES, mix_by=mix_by)
    made, states = uninterrupted(loader(opened(), mix_by=mix_by), 40)
    for stop in range(0, 40, 3):
        check_resumed(states[stop], made[stop : stop + 2], loader(opened(), mix_by=mix_by))
    two = loader(opened(), mix_by=mix_by, workers=2, threads=1)
    two.restore(json.loads(states[7]))
    by_workers, saved = uninterrupted(two, 8)
    check_resumed(states[7], by_workers, loader(opened(), mix_by=mix_by))
    hosts = [loader(opened(), mix_by=mix_by, share=partial(half, n)) for n in (0, 1)]
    check_resumed(saved[-1], made[14:20], *hosts)
