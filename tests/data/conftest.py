"""Images that the tests of this folder share."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Paths of ten PNG files of noise, 40 x 30."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for n in range(10):
        noise = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{n}.png")
    return [str(folder / f"{n}.png") for n in range(10)]
