"""Inputs of the methods of `Model`."""

import numpy as np

ASK = "###Human: <Img><ImageHere></Img> what is it ###Assistant: "
TWO_IMAGES = "<ImageHere> or <ImageHere> then"


def picture(seed: int) -> np.ndarray:
    """Noise, 40 pixels wide and 30 high: uint8 [30, 40, 3]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)


# one image, two images, text only, image only (score only)
PROMPTS = [ASK, TWO_IMAGES, "no image here", None]
IMAGES = [[picture(0)], [picture(1), picture(2)], None, picture(3)]
