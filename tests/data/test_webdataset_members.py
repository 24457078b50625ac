"""Webdataset shards as people make them: junk, order, file types, compression, lists of shards."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile

import numpy as np
import pytest
import zstandard
from PIL import Image

from minigpt4_jax.data import shard_index
from minigpt4_jax.data.config import DatasetConfig
from minigpt4_jax.data.readers import open_source
from minigpt4_jax.data.webdataset import BROKEN, open_shards
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import open_image


def image(shade, file_format="PNG"):
    out = io.BytesIO()
    Image.new("L", (8, 6), shade).save(out, file_format)
    return out.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pair(name, shade):
    return [(f"{name}.png", image(shade)), (f"{name}.txt", f"number {shade}".encode())]


def contents(source):
    """[(caption, shade)] of all rows."""
    examples = [source.example(n, np.random.default_rng(0)) for n in range(len(source))]
    return [
        (example.answers[0], int(np.asarray(open_image(example.images[0]))[0, 0, 0]))
        for example in examples
    ]


EXPECTED = [(f"number {shade}", shade) for shade in range(3)]
SORTED = [*pair("0", 0), *pair("1", 1), *pair("2", 2)]


@pytest.mark.parametrize(
    "junk",
    [
        [("._{}.png", b"\0\5\x16\7")],
        [("__MACOSX/{}.png", b"x"), ("__MACOSX/._{}.txt", b"x")],
        [("__MACOSX/photos/{}.txt", b"x")],
        [(".DS_Store", b"x"), ("photos/.DS_Store", b"x"), ("README", b"x")],
        [("./._{}.txt", b"x")],
    ],
)
def test_junk_of_macos_is_skipped(tmp_path, junk):
    members = []
    for n in range(3):
        members += [(name.format(n), data) for name, data in junk] + pair(str(n), n)
    source = open_shards("cc", write(tmp_path / "a.tar", members))
    assert contents(source) == EXPECTED
    assert source.dropped == {}


def test_hidden_shards_of_macos_are_skipped(tmp_path):
    write(tmp_path / "A.TAR", SORTED)
    (tmp_path / "._A.TAR").write_bytes(b"\0\5\x16\7" * 100)
    assert contents(open_shards("cc", tmp_path)) == EXPECTED


@pytest.mark.parametrize(
    "order", [[0, 2, 4, 1, 3, 5], [0, 2, 4, 5, 3, 1], [1, 2, 5, 0, 3, 4], [0, 3, 4, 2, 5, 1]]
)
def test_members_of_a_sample_need_not_be_adjacent(tmp_path, order):
    source = open_shards("cc", write(tmp_path / "a.tar", [SORTED[n] for n in order]))
    assert sorted(contents(source)) == EXPECTED
    assert source.dropped == {}


def test_samples_with_one_name(tmp_path):
    members = [*pair("0", 0), *pair("1", 1), *pair("0", 2), ("0.png", image(9))]
    source = open_shards("cc", write(tmp_path / "a.tar", members))
    assert contents(source) == EXPECTED
    assert source.dropped == {"without a caption": 1}


def test_equal_names_in_different_folders(tmp_path):
    members = [*pair("a/0", 0), *pair("b/0", 1), *pair("a.b/0", 2)]
    assert contents(open_shards("cc", write(tmp_path / "a.tar", members))) == EXPECTED


@pytest.mark.parametrize(
    ("suffix", "file_format"),
    [("jpeg", "PNG"), ("JPG", "PNG"), ("webp", "PNG"), ("gif", "GIF"), ("bmp", "BMP"),
     ("TIF", "TIFF"), ("tiff", "TIFF")],
)  # fmt: skip
@pytest.mark.parametrize("text", ["txt", "TXT", "caption", "cls", "json", "Json"])
def test_file_types(tmp_path, suffix, file_format, text):
    content = json.dumps({"caption": "it"}) if text.lower() == "json" else "it\n"
    members = [(f"0.{text}", content.encode()), (f"0.{suffix}", image(7, file_format))]
    source = open_shards("cc", write(tmp_path / "a.tar", members))
    assert contents(source) == [("it", 7)]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_json_is_preferred_to_text_and_jpg_to_png(tmp_path, order):
    members = [
        ("0.jpg", image(1)), ("0.png", image(2)), ("0.txt", b"no"), ("0.json", b'{"caption": "x"}'),
    ]  # fmt: skip
    source = open_shards("cc", write(tmp_path / "a.tar", [members[n] for n in order]))
    assert contents(source) == [("x", 1)]
    assert source.dropped == {}


def test_an_index_of_older_rules_is_rebuilt(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", [("._0.png", b"x"), *SORTED])
    with monkeypatch.context() as old:
        old.setattr(shard_index, "_VERSION", 1)
        old.setattr(shard_index, "_scan", lambda tar: (np.zeros(0, shard_index.ROW_DTYPE), {}, ""))
        shard_index.build_index(path)
    assert contents(open_shards("cc", path)) == EXPECTED


# --- compression ---------------------------------------------------------------------------------


def zstd_in_frames(data):
    """Several frames, as `pzstd` and appending write them."""
    size = len(data) // 4
    return b"".join(zstandard.compress(data[i : i + size]) for i in range(0, len(data), size))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("gz", gzip.compress),
        ("bz2", bz2.compress),
        ("xz", lzma.compress),
        ("zst", zstd_in_frames),
    ],
)
def test_compressed(tmp_path, suffix, compress):
    plain = write(tmp_path / "a.tar", SORTED)
    data = compress(plain.read_bytes())
    plain.unlink()
    path = tmp_path / f"a.tar.{suffix}"
    path.write_bytes(data)
    assert contents(open_shards("cc", tmp_path)) == EXPECTED
    path.write_bytes(data[:-9])
    assert open_shards("cc", path, max_broken=1).dropped == {BROKEN: 1}


@pytest.mark.parametrize("end", [None, -3])
def test_zstd_that_ends_within_a_frame(tmp_path, end):
    """What precedes the end is a complete archive."""
    plain = write(tmp_path / "a.tar", SORTED)
    data = zstandard.compress(plain.read_bytes()) + zstandard.compress(b"\0" * 99)[:end]
    plain.unlink()
    (tmp_path / "a.tar.zst").write_bytes(data)
    source = open_shards("cc", tmp_path / "a.tar.zst", max_broken=1)
    assert contents(source) == EXPECTED
    assert source.dropped == ({} if end is None else {BROKEN: 1})


def test_zstd_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"x" * 99)
    with pytest.raises(UserError, match=r"a\.tar\.zst: .*zstd.*pip install zstandard"):
        open_shards("cc", tmp_path)
    assert os.listdir(tmp_path) == ["a.tar.zst"]


# --- lists of shards -------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path):
    """A folder with lists of shards in another folder."""
    (tmp_path / "shards").mkdir()
    for n in range(3):
        write(tmp_path / "shards" / f"{n}.tar", pair("0", n))
    (tmp_path / "lists").mkdir()
    absolute = "\n".join(str(tmp_path / "shards" / f"{n}.tar") for n in range(3))
    (tmp_path / "lists" / "absolute.txt").write_text(absolute)
    (tmp_path / "lists" / "relative.TXT").write_text(
        "# training\n\n../shards/0.tar\r\n../shards/{1..2}.tar\n"
    )
    (tmp_path / "lists" / "pattern").write_text("../shards/*.tar")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["lists/absolute.txt", "@lists/absolute.txt", "lists/relative.TXT", "@lists/pattern"]
)
def test_lists_of_shards(listed, name):
    d = DatasetConfig(reader="webdataset", path=(name,))
    assert contents(open_source("mine", d, str(listed))) == EXPECTED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# none\n", "names no shard"),
        ("../shards/0.tar\n../shards/9.tar", r"1 of 2 shards are missing .*9\.tar"),
        ("https://host/0.tar", r"https://host/0\.tar is not local"),
    ],
)
def test_invalid_lists(listed, text, message):
    path = listed / "lists" / "mine.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        open_shards("cc", path)
    with pytest.raises(UserError, match="there is no such file"):
        open_shards("cc", listed / "none.txt")
