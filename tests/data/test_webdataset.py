"""Webdataset shards: file names, index, rows, damage."""

import gzip
import io
import json
import logging
import os
import pickle
import tarfile

import numpy as np
import pytest
from helpers.paths import TOKENIZER
from helpers.published_layouts import Disk
from helpers.resuming import data_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minigpt4_jax.config import ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.data import shard_index, webdataset
from minigpt4_jax.data.loader import make_loader
from minigpt4_jax.data.mixture import MixtureComponent
from minigpt4_jax.data.webdataset import expand_braces, open_shards
from minigpt4_jax.errors import DataError, UserError
from minigpt4_jax.processing.images import open_image
from minigpt4_jax.processing.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TOKENIZER)
CONFIG = ModelConfig(
    vision=VisionConfig(image_size=28), qformer=QFormerConfig(queries=8), max_text_length=20
)
RNG = np.random.default_rng(0)


def jpeg(shade):
    out = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), shade, np.uint8)).save(out, "PNG")
    return out.getvalue()


def write(path, rows):
    return Disk(path.parent).tar(path.name, rows)


def rows(names, first=0):
    return [
        {"jpg": jpeg(first + n), "json": json.dumps({"caption": f"A {name}!", "url": "x"}).encode()}
        for n, name in enumerate(names)
    ]


def captions(source):
    return [source.example(n, RNG).answers[0] for n in range(len(source))]


def shade(source, index):
    (image,) = source.example(index, RNG).images
    return np.asarray(open_image(image))[0, 0, 0]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "000.tar", rows("abc"))
    write(tmp_path / "001.tar", rows("de", 3))
    return tmp_path


@pytest.mark.parametrize("pattern", ["{000..001}.tar", "*.tar", "", "{000,001}.tar"])
def test_rows_of_all_shards_in_order(folder, pattern):
    source = open_shards("cc", folder / pattern)
    assert captions(source) == ["a a", "a b", "a c", "a d", "a e"]
    assert [shade(source, n) for n in (4, 0, 3)] == [4, 0, 3]
    assert source.dropped == {}
    again = pickle.loads(pickle.dumps(source))  # as sent to a worker process
    assert captions(again) == captions(source)


def test_captions_that_are_not_cleaned(folder):
    assert captions(open_shards("mine", folder, clean_captions=False))[0] == "A a!"


def test_file_types_of_a_row(tmp_path):
    folder = write(tmp_path / "a.tar", [
        {"txt": b"one", "webp": jpeg(1)},
        {"JPEG": jpeg(2), "txt": b"no", "json": b'{"caption": "two"}'},
        {"json": b'{"caption": "without an image"}'},
        {"png": jpeg(3)},
        {"png": jpeg(4), "txt": b"three", "cls": b"7"},
    ])  # fmt: skip
    source = open_shards("mine", folder)
    assert captions(source) == ["one", "two", "three"]
    assert [shade(source, n) for n in range(3)] == [1, 2, 4]
    assert source.dropped == {"without an image": 1, "without a caption": 1}


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"\xff", b'{"caption": 3}', b'{"text": "a"}', b'{"caption": "!"}']
)
def test_invalid_caption(tmp_path, text):
    source = open_shards("mine", write(tmp_path / "a.tar", [{"jpg": jpeg(1), "json": text}]))
    with pytest.raises(DataError, match=r"a\.tar at byte \d+: .*caption"):
        source.example(0, RNG)


def test_index_is_rebuilt_only_when_a_shard_changes(folder, monkeypatch):
    open_shards("cc", folder)
    scanned = []
    scan = shard_index._scan
    monkeypatch.setattr(shard_index, "_scan", lambda tar: scanned.append(tar.name) or scan(tar))
    open_shards("cc", folder)
    assert scanned == []
    write(folder / "001.tar", rows("xyz"))
    assert captions(open_shards("cc", folder))[3:] == ["a x", "a y", "a z"]
    assert scanned == ["001.tar"]
    (folder / "000.tar.index").write_bytes(b'{"version": 1}\n')  # damaged
    assert len(open_shards("cc", folder)) == 6


def test_interrupted_indexing_leaves_no_file(folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    before = sorted(os.listdir(folder))
    monkeypatch.setattr(shard_index.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        open_shards("cc", folder)
    assert sorted(os.listdir(folder)) == before


def test_index_is_in_the_cache_if_the_folder_is_not_writable(folder, tmp_path, monkeypatch):
    before = sorted(os.listdir(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_index.os, "access", lambda path, mode: False)
    assert len(open_shards("cc", folder)) == 5
    assert sorted(os.listdir(folder)) == sorted([*before, "cache"])
    assert len(list((tmp_path / "cache" / "minigpt4_jax" / "shards").iterdir())) == 2


def test_gzip(folder):
    data = (folder / "001.tar").read_bytes()
    (folder / "001.tar").unlink()
    (folder / "001.tar.gz").write_bytes(gzip.compress(data))
    for _ in range(2):
        source = open_shards("cc", folder)
        assert captions(source) == ["a a", "a b", "a c", "a d", "a e"]
        assert shade(source, 4) == 4
    (folder / "001.tar.gz.plain").unlink()
    assert shade(open_shards("cc", folder), 4) == 4
    compressed = (folder / "001.tar.gz").read_bytes()
    (folder / "001.tar.gz").write_bytes(compressed[:-20])
    source = open_shards("cc", folder, max_broken=0.5)
    assert source.dropped[webdataset.BROKEN] == 1
    assert captions(source)[:3] == ["a a", "a b", "a c"]


# --- damage --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_rows_before_a_truncation_are_used(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    path = write(folder / "a.tar", rows("abcde"))
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar][1::2]
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(ends) * 2048))
    path.write_bytes(content[:cut])
    complete = sum(end <= cut for end in ends)
    if complete == 0:
        with pytest.raises(UserError, match="no row of an image and a caption"):
            open_shards("cc", path, max_broken=1)
        return
    source = open_shards("cc", path, max_broken=1)
    assert captions(source) == [f"a {name}" for name in "abcde"][:complete]
    assert all(shade(source, n) == n for n in range(complete))
    assert source.dropped[webdataset.BROKEN] == 1


def test_faulty_shards_are_named_and_counted(folder, caplog):
    (folder / "002.tar").write_bytes(b"<html> not here </html>" * 100)
    pattern = folder / "{000..003}.tar"
    with pytest.raises(
        UserError, match=r"2 of 4 shards are missing or damaged: .*003\.tar: there is no"
    ):
        open_shards("cc", pattern, max_broken=0.3)
    with caplog.at_level(logging.WARNING):
        source = open_shards("cc", pattern, max_broken=0.5)
    assert len(source) == 5
    assert source.dropped == {webdataset.BROKEN: 1, webdataset.MISSING: 1}
    assert "002.tar" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none*.tar", "there is no shard at"),
        ("{5..1}.tar", "counts down"),
        ("https://host/{0..3}.tar", "is not local"),
        ("pipe:aws s3 cp x -", "is not local"),
    ],
)
def test_invalid_patterns(tmp_path, pattern, message):
    path = pattern if ":" in pattern else tmp_path / pattern
    with pytest.raises(UserError, match=message):
        open_shards("cc", path)


@settings(deadline=None)
@given(st.integers(0, 99999), st.integers(0, 30), st.integers(1, 6))
def test_ranges_in_braces(first, more, width):
    text = f"{first:0{width}d}"
    names = expand_braces(f"a{{{text}..{first + more}}}.tar")
    assert names == [f"a{n:0{width}d}.tar" for n in range(first, first + more + 1)]


def test_several_braces():
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert expand_braces("a{b}.tar") == ["a{b}.tar"]


def test_shards_resume_with_workers(folder):
    """Worker processes get only positions of rows; a resumed run reads the same batches."""

    def loader(workers):
        component = MixtureComponent("cc", open_shards("cc", folder), batch_size=2)
        data = data_config(workers=workers, threads=1)
        return make_loader([component], data, CONFIG, TOKENIZER, batch_size=2, seed=3)

    uninterrupted = loader(0)
    expected = [next(uninterrupted) for _ in range(6)]
    uninterrupted.close()
    first = loader(0)
    for _ in range(2):
        next(first)
    state = json.loads(json.dumps(first.state()))
    first.close()
    again = loader(2)
    again.restore(state)
    for batch in expected[2:]:
        for ours, theirs in zip(next(again), batch, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    again.close()
