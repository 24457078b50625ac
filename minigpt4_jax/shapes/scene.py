"""Scenes of the generated dataset `shapes`: their content, their split, and how they look.

A scene is one to three coloured shapes, each in a different cell of a 3x3 grid, on one of four
backgrounds. Objects never overlap. Everything follows from a seed: `scene_at(seed, index, split)`
is the same scene on every machine and in every order of calls, so training may stream scenes
endlessly.

Splits are defined by a rule, not a list. `heldout` is a fixed share of all signatures, chosen by a hash
of the scene's content; `train` is the rest; `heldout_pairs` are the scenes with a colour-shape pair of
`HELDOUT_PAIRS`, which the other two never show.
"""

import dataclasses
import functools
import hashlib
import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLORS = {  # name: centre of the colour, RGB
    "red": (222, 38, 44),
    "green": (44, 164, 66),
    "blue": (44, 84, 222),
    "yellow": (248, 218, 42),
    "purple": (142, 52, 184),
    "orange": (248, 132, 22),
    "pink": (252, 158, 202),
    "brown": (122, 72, 34),
}
COLOR_NAMES = tuple(COLORS)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
CELLS = (  # raster order: cell i is row i // 3, column i % 3
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
BACKGROUNDS = ("white", "black", "gray", "striped")
SPLITS = ("train", "heldout", "heldout_pairs")
HELDOUT_PAIRS = (  # every colour and every shape stays common in training
    ("red", "cross"),
    ("blue", "triangle"),
    ("green", "star"),
    ("yellow", "ring"),
    ("purple", "square"),
)
HELDOUT_SHARE = 0.1  # of all signatures without a held-out pair
MAX_OBJECTS = 3
IMAGE_SIZE = 112  # pixels, the default side of an image

_EXTENT = {
    "small": (19 / 112, 23 / 112),
    "large": (30 / 112, 34 / 112),
}  # longer side of the box, share of the image
_MAX_ANGLE = 12.0  # degrees; more would make a square a diamond
_RING_HOLE = 0.55  # inner radius over outer radius
_COLOR_JITTER = 10  # of 255, per channel
_SUPERSAMPLE = 4


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape. `box` is (x1, y1, x2, y2) in pixels, edges exact; `angle` in degrees; `rgb` the
    colour drawn."""

    shape: str
    color: str
    size: str
    cell: str
    box: tuple[float, float, float, float]
    angle: float
    rgb: tuple[int, int, int]

    @property
    def row(self) -> int:
        return CELLS.index(self.cell) // 3

    @property
    def column(self) -> int:
        return CELLS.index(self.cell) % 3

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        """(size, color, shape, place), the order in which text states them."""
        return (self.size, self.color, self.shape, self.cell)


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in raster order of their cells, a background, the image's side in pixels, and the
    background's seed."""

    objects: tuple[Object, ...]
    background: str
    image_size: int = IMAGE_SIZE
    texture: int = 0


def scene_to_dict(scene: Scene) -> dict[str, Any]:
    """The scene as plain values for JSON; boxes to a hundredth of a pixel, a cell under the name
    "place"."""
    objects = []
    for o in scene.objects:
        box = [round(v, 2) for v in o.box]
        plain = {"size": o.size, "color": o.color, "shape": o.shape, "place": o.cell, "box": box}
        objects.append(plain | {"angle": round(o.angle, 2), "rgb": list(o.rgb)})
    plain = {"objects": objects, "background": scene.background}
    return plain | {"image_size": scene.image_size, "texture": scene.texture}


def scene_from_dict(plain: dict[str, Any]) -> Scene:
    """The scene that `scene_to_dict` wrote."""
    objects = tuple(
        Object(
            o["shape"],
            o["color"],
            o["size"],
            o["place"],
            tuple(o["box"]),
            o["angle"],
            tuple(o["rgb"]),
        )
        for o in plain["objects"]
    )
    return Scene(objects, plain["background"], plain["image_size"], plain["texture"])


# ------------------------------------------------------------------------------------------- splits


def signature(scene: Scene) -> str:
    """Identifies a scene's content, independent of jitter: its background and the attributes of its
    objects."""
    return f"{scene.background}|" + ";".join(sorted(",".join(o.attributes) for o in scene.objects))


def split_of(scene: Scene) -> str:
    """The one split that `scene` belongs to, from its content alone."""
    if any((o.color, o.shape) in HELDOUT_PAIRS for o in scene.objects):
        return "heldout_pairs"
    digest = hashlib.blake2b(signature(scene).encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64 else "train"


# ------------------------------------------------------------------------------------------- scenes


def random_scene(
    rng: np.random.Generator,
    split: str = "train",
    *,
    image_size: int = IMAGE_SIZE,
    counts: tuple[int, ...] = (1, 2, 3),
) -> Scene:
    """Draws a scene of `split`, uniform over attributes and over the numbers of objects `counts`.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    while True:
        scene = _propose(rng, split == "heldout_pairs", image_size, counts)
        if split_of(scene) == split:
            return scene


def scene_at(
    seed: int,
    index: int,
    split: str = "train",
    *,
    image_size: int = IMAGE_SIZE,
    counts: tuple[int, ...] = (1, 2, 3),
) -> Scene:
    """Scene number `index` of the endless stream that `seed` names: independent of the order of
    calls."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    return random_scene(rng, split, image_size=image_size, counts=counts)


def _propose(
    rng: np.random.Generator, with_pair: bool, image_size: int, counts: tuple[int, ...]
) -> Scene:
    count = counts[rng.integers(len(counts))]
    cells = np.sort(rng.permutation(9)[:count])
    forced = rng.integers(count) if with_pair else -1
    objects = []
    for i, cell in enumerate(cells):
        color, shape = COLOR_NAMES[rng.integers(8)], SHAPES[rng.integers(6)]
        if i == forced:
            color, shape = HELDOUT_PAIRS[rng.integers(len(HELDOUT_PAIRS))]
        objects.append(
            _place_object(rng, shape, color, SIZES[rng.integers(2)], int(cell), image_size)
        )
    return Scene(tuple(objects), BACKGROUNDS[rng.integers(4)], image_size, int(rng.integers(2**31)))


def _place_object(
    rng: np.random.Generator, shape: str, color: str, size: str, cell: int, image_size: int
) -> Object:
    """An object somewhere in its cell, at least a pixel (of 112) away from the cell's border."""
    angle = 0.0 if shape in ("circle", "ring") else float(rng.uniform(-_MAX_ANGLE, _MAX_ANGLE))
    low, high = _EXTENT[size]
    extent = rng.uniform(low, high) * image_size
    width, height = (extent * side for side in _outline(shape, angle)[1])
    pitch, margin = image_size / 3, image_size / 112
    x1 = (cell % 3) * pitch + rng.uniform(margin, pitch - width - margin)
    y1 = (cell // 3) * pitch + rng.uniform(margin, pitch - height - margin)
    rgb = np.clip(
        np.array(COLORS[color]) + rng.integers(-_COLOR_JITTER, _COLOR_JITTER + 1, 3), 0, 255
    )
    box = (float(x1), float(y1), float(x1 + width), float(y1 + height))
    return Object(
        shape, color, size, CELLS[cell], box, angle, (int(rgb[0]), int(rgb[1]), int(rgb[2]))
    )


# ------------------------------------------------------------------------------------------ drawing


@functools.cache
def _polygon(shape: str) -> np.ndarray:
    """Corners [N, 2] of a shape that has corners, unrotated, y down."""
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    if shape == "triangle":
        turns = np.arange(3) / 3
        return np.stack([np.sin(turns * math.tau), -np.cos(turns * math.tau)], 1)
    if shape == "star":
        turns, radius = np.arange(10) / 10, np.where(np.arange(10) % 2, 0.45, 1.0)
        return np.stack([radius * np.sin(turns * math.tau), -radius * np.cos(turns * math.tau)], 1)
    arm = 0.34  # half the width of a cross's arms
    corner = [(arm, -1), (arm, -arm), (1, -arm)]  # a quarter of the cross, then turned three times
    quarter = np.array(corner, float)
    turn = np.array([(0, 1), (-1, 0)], float)  # 90 degrees clockwise, row vectors, y down
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _outline(shape: str, angle: float) -> tuple[np.ndarray | None, tuple[float, float]]:
    """Rotated corners scaled into [0, width] x [0, height] and (width, height), whose longer side
    is 1; no corners for the round shapes."""
    if shape in ("circle", "ring"):
        return None, (1.0, 1.0)
    a = math.radians(angle)
    points = _polygon(shape) @ np.array([(math.cos(a), math.sin(a)), (-math.sin(a), math.cos(a))])
    points = points - points.min(0)
    points = points / points.max()
    width, height = points.max(0)
    return points, (float(width), float(height))


def _mask(thing: Object, scale: float, image_size: int) -> tuple[np.ndarray, int, int]:
    """Coverage uint8 [h, w] of an object on its own patch of the image, and the patch's left and
    top pixel."""
    x1, y1, x2, y2 = (v * scale for v in thing.box)
    left, top = max(int(x1), 0), max(int(y1), 0)
    right, bottom = min(math.ceil(x2), image_size), min(math.ceil(y2), image_size)
    k = _SUPERSAMPLE
    canvas = Image.new("L", ((right - left) * k, (bottom - top) * k))
    draw = ImageDraw.Draw(canvas)
    points, (width, _) = _outline(thing.shape, thing.angle)
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
    """float32 [size, size, 3]: a base tone with a faint tint, a slow change of brightness, and
    stripes if striped."""
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
    """Image uint8 [S, S, 3] and, for every pixel, which object covers it: uint8 [S, S], 0 for
    none, i + 1 for object i.

    S is the scene's own image size unless `image_size` says otherwise (boxes are scaled along).
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
    """The scene as an image, uint8 [S, S, 3]; S as in `render_with_owners`. The same scene gives
    the same bytes with the same NumPy and Pillow; others may round a pixel another way."""
    return render_with_owners(scene, image_size)[0]


# ------------------------------------------------------------------------------------------- labels


def scene_labels(
    scene: Scene, grid: int, owners: np.ndarray | None = None, min_share: float = 0.06
) -> dict[str, np.ndarray]:
    """Integer labels for training a vision encoder. Ids count from 1 in the order of SHAPES,
    COLOR_NAMES, SIZES and CELLS; 0 means none.

    objects     [3, 4] shape, color, size, cell of each object in raster order, then rows of 0
    cells       [9, 3] shape, color, size of the object in each cell
    patches     [grid, grid, 4] number (1..3), shape, color, size of the object that covers most of
                each patch (0 where none covers at least `min_share` of it)
    count       [] number of objects;  background [] index into BACKGROUNDS (from 0)

    owners: the result of `render_with_owners` for this scene, if available; avoids drawing it again.
    """
    if owners is None:
        owners = render_with_owners(scene)[1]
    ids = np.zeros((MAX_OBJECTS + 1, 4), np.int32)  # row 0: no object
    for i, thing in enumerate(scene.objects):
        ids[i + 1] = (
            SHAPES.index(thing.shape) + 1,
            COLOR_NAMES.index(thing.color) + 1,
            SIZES.index(thing.size) + 1,
            CELLS.index(thing.cell) + 1,
        )
    cells = np.zeros((9, 3), np.int32)
    cells[ids[1 : len(scene.objects) + 1, 3] - 1] = ids[1 : len(scene.objects) + 1, :3]
    owner = _patch_owners(owners, grid, min_share)
    patches = np.concatenate([owner[..., None], ids[owner][..., :3]], -1)
    return {
        "objects": ids[1:],
        "cells": cells,
        "patches": patches.astype(np.int32),
        "count": np.array(len(scene.objects), np.int32),
        "background": np.array(BACKGROUNDS.index(scene.background), np.int32),
    }


def _patch_owners(owners: np.ndarray, grid: int, min_share: float) -> np.ndarray:
    """[grid, grid]: the object with most pixels in each patch, 0 where it has less than `min_share`
    of them."""
    size = owners.shape[0]
    edges = np.arange(size) * grid // size  # the patch that each pixel row or column falls into
    patch = edges[:, None] * grid + edges[None, :]
    counts = np.bincount(
        (patch * (MAX_OBJECTS + 1) + owners).ravel(), minlength=grid * grid * (MAX_OBJECTS + 1)
    )
    counts = counts.reshape(grid, grid, MAX_OBJECTS + 1)
    best = counts[..., 1:].argmax(-1) + 1
    owner: np.ndarray = np.where(counts[..., 1:].max(-1) >= min_share * counts.sum(-1), best, 0)
    return owner
