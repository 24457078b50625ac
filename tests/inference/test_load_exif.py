"""`load(exif=True)` turns photos in models of every kind (InstructBLIP: test_instructblip.py)."""

import numpy as np
import pytest
from helpers import blip2_reference as reference
from helpers import tiny
from helpers.blip2_reference import NEEDS_BLIP2
from helpers.sideways import upright, write_photo

import minigpt4_jax
from minigpt4_jax.processing.images import load_pixels


@pytest.fixture
def photo(tmp_path):
    return write_photo(tmp_path / "1.png")


def check(features, stored, turned, photo):
    """features: of an image, by a model."""
    shown = features(stored, upright(photo))
    np.testing.assert_array_equal(features(turned, photo), shown)
    assert not np.array_equal(features(stored, photo), shown)


def test_a_loaded_model_turns_photos_on_request(photo, tmp_path):
    folder = tiny.write_random_model(tmp_path / "model", llm_layers=1)
    stored, turned = (minigpt4_jax.load(folder, exif=exif) for exif in (False, True))
    check(lambda model, image: model.encode_images([image]), stored, turned, photo)
    # what generation reads
    size = stored.config.vision.image_size
    check(lambda model, image: model._load_pixels(image), stored, turned, photo)
    np.testing.assert_array_equal(turned._load_pixels(photo), load_pixels(upright(photo), size))


@NEEDS_BLIP2
def test_blip2_turns_photos_on_request(photo):
    turned = minigpt4_jax.load(reference.shared("opt"), "float32", exif=True)
    check(lambda model, image: model.encode_images([image]), reference.load("opt"), turned, photo)


@NEEDS_BLIP2
def test_a_qformer_turns_photos_on_request(photo):
    turned = minigpt4_jax.load(reference.shared("pretrain"), "float32", exif=True)
    stored = reference.load("pretrain")
    check(lambda model, image: model.encode_image([image]).embeds, stored, turned, photo)
