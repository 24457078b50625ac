"""Draws scenes of the dataset `shapes` as images."""

import math

import numpy as np
from PIL import Image, ImageDraw

from minigpt4_jax.shapes.outlines import outline
from minigpt4_jax.shapes.scene import Object, Scene

_RING_HOLE = 0.55  # inner radius over outer radius
_SUPERSAMPLE = 4


def _mask(thing: Object, scale: float, image_size: int) -> tuple[np.ndarray, int, int]:
    """How much of each pixel an object covers, uint8 [h, w], in the part of the image around it; and the
    left and top pixel of that part."""
    x1, y1, x2, y2 = (v * scale for v in thing.box)
    left, top = max(int(x1), 0), max(int(y1), 0)
    right, bottom = min(math.ceil(x2), image_size), min(math.ceil(y2), image_size)
    k = _SUPERSAMPLE
    canvas = Image.new("L", ((right - left) * k, (bottom - top) * k))
    draw = ImageDraw.Draw(canvas)
    points, (width, _) = outline(thing.shape, thing.angle)
    if points is not None:
        corners = (points * ((x2 - x1) / width) + (x1 - left, y1 - top)) * k - 0.5
        draw.polygon([(float(x), float(y)) for x, y in corners], fill=255)
    else:
        cx, cy, r = (
            ((x1 + x2) / 2 - left) * k - 0.5,
            ((y1 + y2) / 2 - top) * k - 0.5,
            (x2 - x1) / 2 * k - 0.5,
        )
        draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=255)
        if thing.shape == "ring":
            r *= _RING_HOLE
            draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=0)
    return np.asarray(canvas.reduce(k)), left, top


def _background(name: str, texture: int, size: int) -> np.ndarray:
    """float32 [size, size, 3]: a base tone with a faint tint, a brightness gradient, and stripes if the
    background is striped."""
    rng = np.random.default_rng(texture)
    low, high = {"white": (238, 250), "black": (8, 28), "gray": (112, 146), "striped": (206, 236)}[
        name
    ]
    tone, tint, slope = rng.uniform(low, high), rng.uniform(-3, 3, 3), rng.uniform(-6, 6, 2)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    brightness = tone + slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    if name == "striped":
        angle, period, phase = (
            rng.uniform(0, math.pi),
            rng.uniform(9, 15) / 112 * size,
            rng.uniform(0, math.tau),
        )
        x = np.arange(size, dtype=np.float32)
        wave = np.cos(
            math.tau / period * (math.cos(angle) * x[None, :] + math.sin(angle) * x[:, None])
            + phase
        )
        depth = rng.uniform(55, 75)
        brightness = brightness - depth * np.clip(0.5 + 1.5 * wave, 0, 1)  # soft-edged bands
    pixels: np.ndarray = (brightness[..., None] + tint).astype(np.float32)
    return pixels


def render_with_owners(
    scene: Scene, image_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The image uint8 [S, S, 3], and the object that covers each pixel, uint8 [S, S]: i + 1 for object i,
    0 for none.

    image_size: S; by default the scene's own. Boxes are scaled to it.
    """
    size = image_size or scene.image_size
    image = _background(scene.background, scene.texture, size)
    owners = np.zeros((size, size), np.uint8)
    for i, thing in enumerate(scene.objects):
        mask, left, top = _mask(thing, size / scene.image_size, size)
        at = np.s_[top : top + mask.shape[0], left : left + mask.shape[1]]
        share = mask[..., None].astype(np.float32) / 255
        image[at] += share * (np.array(thing.rgb, np.float32) - image[at])
        owners[at][mask >= 128] = i + 1
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), owners


def render(scene: Scene, image_size: int | None = None) -> np.ndarray:
    """The scene as an image, uint8 [S, S, 3]; S as in `render_with_owners`. Other versions of NumPy and
    Pillow may round single pixels differently."""
    return render_with_owners(scene, image_size)[0]
