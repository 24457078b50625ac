"""Trains the vision encoder of `tiny_v2`: the quickstart's ViT, whose patches learn their object's box.

    python -m minigpt4_jax.demos.patch_encoder --out=shapes_vision_v2.safetensors

makes the weights in minigpt4_jax/assets/ (ten minutes on a CPU core). MiniGPT-v2 has no Q-Former: the
language model reads the patches. So each patch that shows an object learns to describe all of it, as
the queries of vision_encoder.py do. One dimension stands for each word: number, size, color, shape and
position. Each coordinate of the box is interpolated between two of 20 dimensions that stand for 0 to
100. The other patches describe the background. These labels are a shortcut that a real vision encoder
does not have.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from minigpt4_jax.checkpoint.parameters import STACKED, named_tensors
from minigpt4_jax.demos.encoder_training import (
    GRID,
    VISION,
    Split,
    TrainingOptions,
    argument_parser,
    check_output,
    chunks,
    draw_splits,
    render_scene,
    save_encoder,
    standardize,
    train_loop,
)
from minigpt4_jax.errors import run
from minigpt4_jax.models.layers import LayerNorm
from minigpt4_jax.models.minigpt import LN_VISION_EPS
from minigpt4_jax.models.vit import Vit
from minigpt4_jax.processing.boxes import iou
from minigpt4_jax.shapes import scene as scenes
from minigpt4_jax.shapes.labels import scene_labels

ASSETS = Path(__file__).parents[1] / "assets"
START, SHIPPED = ASSETS / "shapes_vision.safetensors", ASSETS / "shapes_vision_v2.safetensors"
BINS = 20  # dimensions of one box coordinate
# Number of values of: the object's number, size, color, shape, position, and the background.
VALUES = (scenes.MAX_OBJECTS, 2, 8, 6, 9, len(scenes.BACKGROUNDS))
FIRST_DIM = np.cumsum([0, *VALUES])  # first dimension of each of those, and then of the box
COLORS = np.s_[FIRST_DIM[2] : FIRST_DIM[3]]
OBJECT_WEIGHT = 3.0  # of the loss of a patch that shows an object, relative to the background's
# The last norm's output is scaled by this in the file. Then the projection needs steps as large as
# LoRA's, and one learning rate serves both.
GAIN = 20.0


def patch_codes(scene: scenes.Scene) -> np.ndarray:
    """Targets of the patches of the background (row 0) and of objects 1 to 3: [4, width] float32.

    Standardized like the output of the last norm; rows of missing objects are 0.
    """
    codes = np.zeros((1 + scenes.MAX_OBJECTS, VISION.width), np.float32)
    codes[0, FIRST_DIM[5] + scenes.BACKGROUNDS.index(scene.background)] = 1
    for i, o in enumerate(scene.objects):
        values = (
            i,
            scenes.SIZES.index(o.size),
            scenes.COLOR_NAMES.index(o.color),
            scenes.SHAPES.index(o.shape),
            scenes.CELLS.index(o.cell),
        )
        codes[i + 1, FIRST_DIM[:5] + values] = 1
        for side, value in enumerate(o.box):
            position = np.clip(value / scene.image_size * BINS - 0.5, 0, BINS - 1)
            low = min(int(position), BINS - 2)
            first = FIRST_DIM[6] + side * BINS + low
            codes[i + 1, first : first + 2] = (1 - (position - low), position - low)
    rows = 1 + len(scene.objects)
    codes[:rows] = standardize(codes[:rows])
    return codes


def decode_boxes(tokens: np.ndarray) -> np.ndarray:
    """Patches [..., width] -> the boxes they encode [..., 4], as fractions of the image."""
    bins = tokens[..., FIRST_DIM[6] : FIRST_DIM[6] + 4 * BINS]
    weights = np.maximum(bins.reshape(*tokens.shape[:-1], 4, BINS), 0) ** 2
    centers = (np.arange(BINS) + 0.5) / BINS
    return np.asarray((weights @ centers) / np.maximum(weights.sum(-1), 1e-9))


class PatchVision(nnx.Module):
    """The ViT and its last norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.vit = Vit(VISION, rngs)
        self.ln_vision = LayerNorm(VISION.width, LN_VISION_EPS)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels [B, S, S, 3] -> patches [B, patches, width]."""
        return self.ln_vision(self.vit(pixels))[:, 1:]

    def loss(self, pixels: jax.Array, labels: dict[str, jax.Array]) -> jax.Array:
        """Weighted mean squared distance to the codes; colors without a name do not count."""
        owners = labels["owners"]  # [B, patches] the row of the codes for each patch
        target = jnp.take_along_axis(labels["codes"], owners[:, :, None], axis=1)
        error = jnp.square(self(pixels) - target)
        unnamed = labels["unnamed"][:, None] & (owners > 0)
        error = error.at[..., COLORS].multiply(1 - unnamed[:, :, None])
        weight = jnp.where(owners > 0, OBJECT_WEIGHT, 1.0)
        return (error.mean(-1) * weight).sum() / weight.sum()


def draw_example(split: str, index: int) -> Split:
    """Image number `index` of a split [S, S, 3] and its labels.

    owners [patches], codes [4, width], unnamed [].
    """
    scene, image, owners, unnamed = render_scene(split, index)
    patches = scene_labels(scene, GRID, owners)["patches"][..., 0]
    return {
        "image": image,
        "owners": patches.reshape(-1).astype(np.int8),
        "codes": patch_codes(scene).astype(np.float16),
        "unnamed": np.array(unnamed),
    }


def load_encoder(path: Path = START) -> PatchVision:
    """The ViT and last norm of a shipped encoder, without its Q-Former."""
    tensors = load_file(path)
    graphdef, state = nnx.split(PatchVision(nnx.Rngs(0)))
    loaded = []
    for key, leaf in nnx.to_flat_state(state):
        if key[:2] in STACKED:
            suffix = ".".join(map(str, key[2:]))
            blocks = [tensors[f"vit.blocks.{i}.{suffix}"] for i in range(VISION.depth)]
            value = np.stack(blocks)
        else:
            value = tensors[".".join(map(str, key))]
        loaded.append((key, leaf.replace(jnp.asarray(value, jnp.float32))))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def train(out: Path, *, steps: int, batch: int, lr: float, images: int, judged: int = 500) -> None:
    """Train, and write vit and ln_vision to `out`. judged: images of each held-out split."""
    check_output(out)
    data = draw_splits(draw_example, images, judged)
    model = load_encoder()
    graphdef = nnx.graphdef(model)
    encode = jax.jit(lambda state, pixels: nnx.merge(graphdef, state)(pixels))

    def report(state: Any) -> None:
        for split in scenes.SPLITS[1:]:
            print(f"  {split} {evaluate(lambda p: encode(state, p), data[split])}", flush=True)

    options = TrainingOptions(steps, batch, lr, warmup=100, report_every=250)
    model = train_loop(model, PatchVision.loss, data["train"], options, report)
    tensors = {name: np.asarray(array) for name, array in named_tensors(nnx.state(model))}
    for name in ("ln_vision.scale", "ln_vision.bias"):
        tensors[name] = tensors[name] * GAIN
    save_encoder(tensors, {"vision": VISION}, out)


def evaluate(encode: Callable[[np.ndarray], Any], data: Split) -> str:
    """Shares of a split's object patches with the right words, and with a box of IoU > 0.5, > 0.75."""
    right: list[np.ndarray] = []
    for pixels, labels in chunks(data):
        owners = labels["owners"]
        codes = np.take_along_axis(labels["codes"], owners[:, :, None], axis=1)
        # [object patches, width]
        predicted, true = np.asarray(encode(pixels))[owners > 0], codes[owners > 0]
        words = [
            predicted[:, a:b].argmax(-1) == true[:, a:b].argmax(-1)
            for a, b in itertools.pairwise(FIRST_DIM[:6])
        ]
        boxes = (VISION.image_size * decode_boxes(a) for a in (predicted, true))
        overlap = np.array([iou(a, b) for a, b in zip(*boxes, strict=True)])
        right.append(np.stack([*words, overlap > 0.5, overlap > 0.75]))
    return (
        "number {:.1%}, size {:.1%}, color {:.1%}, shape {:.1%}, position {:.1%}, "
        "box IoU > 0.5 {:.1%}, > 0.75 {:.1%}"
    ).format(*np.concatenate(right, axis=1).mean(1))


def main() -> int:
    a = argument_parser((__doc__ or "").splitlines()[0], steps=2500, images=24_000).parse_args()
    train(a.out, steps=a.steps, batch=a.batch, lr=a.lr, images=a.images)
    return 0


if __name__ == "__main__":
    run(main)
