"""A run resumed at any step sees the same batches: every source, on a miniature of its files, and a mixture
of all; with worker processes and with another number of processes."""

import io
import json
from functools import partial

import pytest
from helpers.published_layouts import Disk, write_everything
from helpers.resuming import check_resumed, half, loader, uninterrupted
from PIL import Image

from minigpt4_jax.data.config import DataConfig, DatasetConfig
from minigpt4_jax.data.datasets import DATASETS
from minigpt4_jax.data.readers import open_components
from minigpt4_jax.processing.chat_templates import STAGE2_PROMPTS
from minigpt4_jax.training.config_cli import read_config_file

ROWS = 5  # per dataset
OTHER_DATASETS = {
    "cc_sbu_align": DatasetConfig(path=("cc_sbu_align",), prompts=STAGE2_PROMPTS),
    "laion": DatasetConfig(path=("web/{0..1}.tar",)),
    "cc_sbu": DatasetConfig(path=("web/*.tar",)),
    "gzipped": DatasetConfig(reader="webdataset", path=("zip/0.tar.gz",)),
    "files": DatasetConfig(reader="files", path=("mine.jsonl",)),
    "stage2": DatasetConfig(reader="files", path=("cc_sbu_align",), prompts=STAGE2_PROMPTS),
}
NAMES = sorted({*DATASETS, *OTHER_DATASETS})


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
    """The opened datasets of a training run."""
    published = read_config_file("v2_stage3")["data"]["mix"]
    datasets = {n: DatasetConfig(**{**d, "path": (d["path"],)}) for n, d in published.items()}
    mix = {name: (datasets | OTHER_DATASETS)[name] for name in names}
    return open_components(DataConfig(root=str(root), mix_by=mix_by, mix=mix))


@pytest.mark.parametrize("name", NAMES)
def test_every_source_resumes_at_any_step(root, name):
    batches, states = uninterrupted(loader(mixture(root, name)), 6)
    assert (
        len({batch.tokens.tobytes() for batch in batches}) > 3
    )  # the comparison distinguishes rows
    for stop, state in enumerate(states):
        check_resumed(state, batches[stop : stop + 1], loader(mixture(root, name)))
    processes = [loader(mixture(root, name), shard=partial(half, n)) for n in (0, 1)]
    check_resumed(states[2], batches[2:], *processes)
    processes = [loader(mixture(root, name), shard=partial(half, n)) for n in (0, 1)]
    _, process_states = uninterrupted(processes[0], 5)
    check_resumed(process_states[4], batches[4:], loader(mixture(root, name)))


@pytest.mark.parametrize("mix_by", ["step", "example"])
def test_mixture_of_all_sources_resumes_with_other_workers_and_processes(root, mix_by):
    components = partial(mixture, root, *NAMES, mix_by=mix_by)
    batches, states = uninterrupted(loader(components(), mix_by=mix_by), 40)
    for stop in range(0, 40, 3):
        check_resumed(states[stop], batches[stop : stop + 2], loader(components(), mix_by=mix_by))
    with_workers = loader(components(), mix_by=mix_by, workers=2, threads=1)
    with_workers.restore(json.loads(states[7]))
    of_workers, worker_states = uninterrupted(with_workers, 8)
    check_resumed(states[7], of_workers, loader(components(), mix_by=mix_by))
    processes = [loader(components(), mix_by=mix_by, shard=partial(half, n)) for n in (0, 1)]
    check_resumed(worker_states[-1], batches[14:20], *processes)
