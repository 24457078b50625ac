"""EXIF orientation: followed for own files, ignored for published datasets and shards."""

import json

import numpy as np
import pytest
from helpers.paths import TOKENIZER
from helpers.published_layouts import Disk
from helpers.resuming import data_config
from PIL import Image

from minigpt4_jax.config import ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.data.config import DatasetConfig
from minigpt4_jax.data.loader import make_loader
from minigpt4_jax.data.readers import open_components
from minigpt4_jax.processing.images import load_pixels
from minigpt4_jax.processing.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TOKENIZER)
CONFIG = ModelConfig(
    vision=VisionConfig(image_size=28), qformer=QFormerConfig(queries=8), max_text_length=20
)


@pytest.fixture(params=[3, 6, 8])  # upside down, to the right, to the left
def photo(tmp_path, request):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:5, :9] = 255
    exif = Image.Exif()
    exif[0x0112] = request.param
    Image.fromarray(pixels).save(tmp_path / "1.jpg", exif=exif)
    return tmp_path / "1.jpg"


def own(folder):
    return {"path": (str(folder / "rows.csv"),)}


def own_in_a_mixture(folder):
    return {"mix": {"mine": DatasetConfig(reader="files", path=own(folder)["path"])}}


def published(folder):
    row = {"image": "1.jpg", "question": "What?", "answer": ["a"]}
    Disk(folder).json("okvqa_train.json", [row])
    return {"mix": {"ok_vqa": DatasetConfig(path=(str(folder),), images=str(folder))}}


def shards(folder):
    row = {"jpg": (folder / "1.jpg").read_bytes(), "json": json.dumps({"caption": "a"}).encode()}
    path = Disk(folder).tar("0.tar", [row])
    return {"mix": {"cc": DatasetConfig(reader="webdataset", path=(str(path),))}}


@pytest.mark.parametrize(
    ("write", "options", "turned"),
    [
        (own, {}, True), (own, {"exif": False}, False), (own_in_a_mixture, {}, True),
        (own_in_a_mixture, {"exif": False}, False), (published, {}, False), (shards, {}, False),
    ],
)  # fmt: skip
def test_orientation(tmp_path, photo, write, options, turned):
    check_orientation(tmp_path, photo, write, options, turned)


@pytest.mark.parametrize("photo", [6], indirect=True)
@pytest.mark.parametrize("turned", [True, False])
def test_orientation_in_a_worker(tmp_path, photo, turned):
    check_orientation(tmp_path, photo, own, {} if turned else {"exif": False}, turned, workers=1)


def check_orientation(tmp_path, photo, write, options, turned, workers=0):
    (tmp_path / "rows.csv").write_text("image,caption\n1.jpg,a\n")
    data = data_config(**write(tmp_path), **options, workers=workers, threads=1)
    batches = make_loader(open_components(data), data, CONFIG, TOKENIZER, batch_size=1)
    pixels = next(batches).pixels[0, 0]
    batches.close()
    np.testing.assert_array_equal(pixels, load_pixels(photo, 28, exif=turned))
    assert not np.array_equal(pixels, load_pixels(photo, 28, exif=not turned))
