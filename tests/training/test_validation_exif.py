"""Validation turns photos as training does: as `data.exif` says."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.paths import TOKENIZER
from helpers.sideways import stored, upright, write_photo

from minigpt4_jax.data.json_records import Example
from minigpt4_jax.parallel.sharding import make_mesh
from minigpt4_jax.processing.images import load_pixels
from minigpt4_jax.processing.tokenizer import load_tokenizer
from minigpt4_jax.training import evaluation
from minigpt4_jax.training.config import TrainConfig

CONFIG = tiny.config(max_text_length=12)


@pytest.mark.parametrize("exif", [True, False])
def test_loss_and_samples(tmp_path, monkeypatch, exif):
    photo = write_photo(tmp_path / "1.png")
    expected = (upright if exif else stored)(photo)
    pixels, shown = [], []

    def evaluate(trainable, frozen, batch):
        pixels.append(np.asarray(batch.pixels)[0, 0])
        return 1.0, 1.0

    def generate(images, prompts, **options):
        shown.extend(images)
        return ["text"] * len(prompts)

    monkeypatch.setattr(evaluation, "make_evaluation", lambda *_: evaluate)
    model = SimpleNamespace(with_parameters=lambda _: SimpleNamespace(generate=generate))
    c = TrainConfig(batch_size=1, sample_images=1)
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, exif=exif, threads=1))
    validation = evaluation.Validation(
        c, CONFIG, load_tokenizer(TOKENIZER), make_mesh({"data": 1}, jax.devices()[:1]),
        SimpleNamespace(frozen=None), [Example((str(photo),), (), ("a",))], model,
    )  # fmt: skip
    assert validation.loss(None, lambda: False) == 1.0
    np.testing.assert_array_equal(pixels[0], load_pixels(expected, CONFIG.vision.image_size))
    (sample,) = validation.captions(None)
    np.testing.assert_array_equal(shown[0][0], expected)
    np.testing.assert_array_equal(sample.images[0], expected)
