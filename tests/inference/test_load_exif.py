"""`load(exif=True)` turns photos in models of every kind."""

import numpy as np
import pytest
from helpers import tiny
from PIL import Image

import minigpt4_jax


@pytest.fixture
def photo(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:5, :9] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "1.png", exif=exif)
    return tmp_path / "1.png"


def test_a_loaded_model_turns_photos_on_request(photo, tmp_path):
    folder = tiny.write_random_model(tmp_path / "model")
    stored, turned = (minigpt4_jax.load(folder, exif=exif) for exif in (False, True))
    with Image.open(photo) as opened:
        upright = opened.transpose(Image.Transpose.ROTATE_270).convert("RGB")
    shown = stored.encode_images([upright])
    np.testing.assert_array_equal(turned.encode_images([photo]), shown)
    assert not np.array_equal(stored.encode_images([photo]), shown)
