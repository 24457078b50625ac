"""Scenes of the generated dataset `shapes`: their content and their split.

A scene is one to three coloured shapes, each in a different cell of a 3x3 grid, on one of four
backgrounds. Objects never overlap. A scene is a function of its seed, index and split: `scene_at`
returns the same one on every machine and in any order of calls, so training can stream scenes endlessly.

Splits are defined by a rule, not a list. `heldout_pairs` are the scenes with a colour-shape pair of
`HELDOUT_PAIRS`, which the other splits never contain. Of the remaining scenes, `heldout` is a fixed share,
chosen by a hash of the content, and `train` is the rest.
"""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from minigpt4_jax.shapes.outlines import outline

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
_COLOR_JITTER = 10  # of 255, per channel


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape.

    box: (x1, y1, x2, y2) in pixels, not rounded. angle: in degrees. rgb: the colour it is drawn in.
    """

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
        """(size, color, shape, cell), in the order of the texts."""
        return (self.size, self.color, self.shape, self.cell)


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of an image."""

    objects: tuple[Object, ...]  # in raster order of their cells
    background: str
    image_size: int = IMAGE_SIZE  # side in pixels
    texture: int = 0  # seed of the background


def scene_to_dict(scene: Scene) -> dict[str, Any]:
    """The scene as JSON values; boxes are rounded to 0.01 pixels, and the key of a cell is "place"."""
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


# --- splits ----------------------------------------------------------------------------------------


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


# --- scenes ----------------------------------------------------------------------------------------


def random_scene(
    rng: np.random.Generator,
    split: str = "train",
    *,
    image_size: int = IMAGE_SIZE,
    counts: tuple[int, ...] = (1, 2, 3),
) -> Scene:
    """A random scene of a split, uniform over attributes and over the numbers of objects in `counts`.
    ValueError: unknown split."""
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
    """Scene number `index` of the endless stream of a split and a seed. ValueError: unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    return random_scene(rng, split, image_size=image_size, counts=counts)


def _propose(
    rng: np.random.Generator, with_pair: bool, image_size: int, counts: tuple[int, ...]
) -> Scene:
    """A random scene, possibly of another split. with_pair: one object is of HELDOUT_PAIRS."""
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
    """An object at a random place in its cell, at least 1/112 of the image's side from its border."""
    angle = 0.0 if shape in ("circle", "ring") else float(rng.uniform(-_MAX_ANGLE, _MAX_ANGLE))
    low, high = _EXTENT[size]
    extent = rng.uniform(low, high) * image_size
    width, height = (extent * side for side in outline(shape, angle)[1])
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
