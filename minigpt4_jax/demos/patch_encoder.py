"""Train the vision side of `tiny_v2`: the demonstration's ViT, whose patches now say their object's box.

    python -m minigpt4_jax.demos.patch_encoder --out=shapes_vision_v2.safetensors

makes the weights shipped in minigpt4_jax/assets/ (ten minutes on a CPU core). MiniGPT-v2 has no
Q-Former: the language model reads the patches. So each patch that shows an object learns to say all
about it, as shapes_vision's queries do: a word is one large value in a dimension of its own, for
number, size, color, shape and place; a coordinate of the box lies between two of 20 dimensions that
stand for 0 to 100. The other patches say the background. These labels are a short cut that a real
vision encoder does not have.
"""

import argparse
import dataclasses
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import muon
from safetensors.numpy import load_file, save_file

from minigpt4_jax.checkpoint.parameters import STACKED, named_tensors
from minigpt4_jax.demos.vision_encoder import (
    DATA_SEED,
    GRID,
    UNNAMED_SHARE,
    VISION,
    batches,
    make_data,
    standardized,
    unnamed_colors,
)
from minigpt4_jax.errors import UserError, run
from minigpt4_jax.models.layers import LayerNorm
from minigpt4_jax.models.minigpt import LN_VISION_EPS
from minigpt4_jax.models.vit import Vit
from minigpt4_jax.processing.boxes import iou
from minigpt4_jax.processing.images import normalize
from minigpt4_jax.shapes import scene as scenes

ASSETS = Path(__file__).parents[1] / "assets"
START, SHIPPED = ASSETS / "shapes_vision.safetensors", ASSETS / "shapes_vision_v2.safetensors"
STEPS_OF_A_SIDE = 20  # dimensions of one coordinate
KINDS = (scenes.MAX_OBJECTS, 2, 8, 6, 9, len(scenes.BACKGROUNDS))  # number, size, color, ...
FIRST = np.cumsum([0, *KINDS])  # the dimension of each kind's first word; the last: of the box
COLORS = np.s_[FIRST[2] : FIRST[3]]
OBJECT_WEIGHT = 3.0  # of a patch that shows an object over one that does not
# The last norm gives its values so many times larger: the projection's steps then are as large, beside
# LoRA's, as a new map needs them, with one learning rate for both.
GAIN = 20.0


def codes_of(scene: scenes.Scene) -> np.ndarray:
    """What a patch of the background (row 0) and of each object (rows 1 to 3) says: [4, width]
    float32, with mean 0 and variance 1 as the last norm gives them; 0 where there is no object."""
    codes = np.zeros((1 + scenes.MAX_OBJECTS, VISION.width), np.float32)
    codes[0, FIRST[5] + scenes.BACKGROUNDS.index(scene.background)] = 1
    for i, o in enumerate(scene.objects):
        words = (
            i,
            scenes.SIZES.index(o.size),
            scenes.COLOR_NAMES.index(o.color),
            scenes.SHAPES.index(o.shape),
            scenes.CELLS.index(o.cell),
        )
        codes[i + 1, FIRST[:5] + words] = 1
        for side, value in enumerate(o.box):
            at = np.clip(value / scene.image_size * STEPS_OF_A_SIDE - 0.5, 0, STEPS_OF_A_SIDE - 1)
            low = min(int(at), STEPS_OF_A_SIDE - 2)
            first = FIRST[6] + side * STEPS_OF_A_SIDE + low
            codes[i + 1, first : first + 2] = (1 - (at - low), at - low)
    said = 1 + len(scene.objects)
    codes[:said] = standardized(codes[:said])
    return codes


def read_box(tokens: np.ndarray) -> np.ndarray:
    """Patches [..., width] -> the boxes that they say [..., 4], as shares of the image."""
    sides = tokens[..., FIRST[6] : FIRST[6] + 4 * STEPS_OF_A_SIDE]
    sides = np.maximum(sides.reshape(*tokens.shape[:-1], 4, STEPS_OF_A_SIDE), 0) ** 2
    middles = (np.arange(STEPS_OF_A_SIDE) + 0.5) / STEPS_OF_A_SIDE
    return (sides @ middles) / np.maximum(sides.sum(-1), 1e-9)


class PatchVision(nnx.Module):
    """The ViT and its last norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.vit = Vit(VISION, rngs)
        self.ln_vision = LayerNorm(VISION.width, LN_VISION_EPS)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels [B, S, S, 3] -> what the patches say [B, patches, width]."""
        return self.ln_vision(self.vit(pixels))[:, 1:]

    def loss(self, pixels: jax.Array, labels: dict[str, jax.Array]) -> jax.Array:
        """Weighted mean square of the distance to the codes; colors without a name do not count."""
        owner = labels["owners"]  # [B, patches] which row of the codes each patch says
        wanted = jnp.take_along_axis(labels["codes"], owner[:, :, None], axis=1)
        error = jnp.square(self(pixels) - wanted)
        hidden = labels["unnamed"][:, None] & (owner > 0)
        error = error.at[..., COLORS].multiply(1 - hidden[:, :, None])
        weight = jnp.where(owner > 0, OBJECT_WEIGHT, 1.0)
        return (error.mean(-1) * weight).sum() / weight.sum()


def draw_one(split: str, index: int) -> dict[str, np.ndarray]:
    """Image number `index` of a split [S, S, 3] and its labels: owners [patches], codes [4, width],
    unnamed []."""
    scene = scenes.scene_at(DATA_SEED, index, split)
    rng = np.random.default_rng([DATA_SEED, index])
    unnamed = split == "train" and rng.random() < UNNAMED_SHARE
    image, owners = scenes.render_with_owners(unnamed_colors(scene, rng) if unnamed else scene)
    patches = scenes.scene_labels(scene, GRID, owners)["patches"][..., 0]
    return {
        "image": image,
        "owners": patches.reshape(-1).astype(np.int8),
        "codes": codes_of(scene).astype(np.float16),
        "unnamed": np.array(unnamed),
    }


def draw_many(task: tuple[str, int, int]) -> dict[str, np.ndarray]:
    split, begin, end = task
    rows = [draw_one(split, i) for i in range(begin, end)]
    return {k: np.stack([row[k] for row in rows]) for k in rows[0]}


def take(data: dict[str, np.ndarray], rows: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Some rows of the data as (pixels, labels)."""
    labels = {
        "owners": data["owners"][rows].astype(np.int32),
        "codes": data["codes"][rows].astype(np.float32),
        "unnamed": data["unnamed"][rows],
    }
    return normalize(data["image"][rows]), labels


def start(path: Path = START) -> PatchVision:
    """A vision side as it is shipped, without its Q-Former."""
    known = load_file(path)
    graphdef, state = nnx.split(PatchVision(nnx.Rngs(0)))
    filled = []
    for at, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, at))
        if at[:2] in STACKED:
            rest = ".".join(map(str, at[2:]))
            value = np.stack([known[f"vit.blocks.{i}.{rest}"] for i in range(VISION.depth)])
        else:
            value = known[name]
        filled.append((at, leaf.replace(jnp.asarray(value, jnp.float32))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def train(out: Path, *, steps: int, batch: int, lr: float, images: int, judged: int = 500) -> None:
    """Train and write vit and ln_vision to `out` (float16 safetensors). judged: images of each
    held-out kind."""
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.parent}")
    counts = zip(scenes.SPLITS, (images, judged, judged), strict=True)
    workers = os.cpu_count() or 1
    data = {split: make_data(n, split, workers, draw_many) for split, n in counts}
    graphdef, state = nnx.split(start())
    schedule = optax.warmup_cosine_decay_schedule(0, lr, min(100, steps // 4), steps, lr / 100)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(schedule, adam_b2=0.98, weight_decay=0.02, consistent_rms=0.2),
    )
    opt_state = tx.init(state)

    @jax.jit
    def step(state: Any, opt_state: Any, pixels: Any, labels: Any) -> tuple[Any, Any, jax.Array]:
        loss = lambda s: nnx.merge(graphdef, s).loss(pixels, labels)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(state)
        updates, opt_state = tx.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, value

    say = jax.jit(lambda state, pixels: nnx.merge(graphdef, state)(pixels))
    begin = time.perf_counter()
    for i, rows in zip(range(1, steps + 1), batches(images, batch, 0), strict=False):
        state, opt_state, loss = step(state, opt_state, *take(data["train"], rows))
        if i % 250 == 0 or i == steps:
            left = (time.perf_counter() - begin) / i * (steps - i) / 60
            print(f"step {i}/{steps}  loss {float(loss):.3f}  {left:.0f} min left", flush=True)
            for split in scenes.SPLITS[1:]:
                print(f"  {split} {judge(lambda p, s=state: say(s, p), data[split])}", flush=True)
            save(state, out)


def judge(say: Any, data: dict[str, np.ndarray]) -> str:
    """Shares of a split's object patches whose words are right, and whose box is."""
    right: list[np.ndarray] = []
    for k in range(0, len(data["image"]), 100):
        pixels, labels = take(data, np.s_[k : k + 100])
        said = np.asarray(say(pixels))
        true = np.take_along_axis(labels["codes"], labels["owners"][:, :, None], axis=1)
        said, true = (a[labels["owners"] > 0] for a in (said, true))  # [patches of objects, width]
        words = [
            said[:, a:b].argmax(-1) == true[:, a:b].argmax(-1)
            for a, b in itertools.pairwise(FIRST[:6])
        ]
        boxes = (VISION.image_size * read_box(a) for a in (said, true))
        overlap = [iou(a, b) for a, b in zip(*boxes, strict=True)]
        right.append(np.stack([*words, np.array(overlap) > 0.5, np.array(overlap) > 0.75]))
    told = (
        "number {:.1%}, size {:.1%}, color {:.1%}, shape {:.1%}, place {:.1%}, box {:.1%}, {:.1%}"
    )
    return told.format(*np.concatenate(right, axis=1).mean(1))


def save(state: Any, out: Path) -> None:
    tensors = {k: np.asarray(v, np.float32) for k, v in named_tensors(state)}
    for name in ("ln_vision.scale", "ln_vision.bias"):
        tensors[name] = tensors[name] * GAIN
    tensors = {k: v.astype(np.float16) for k, v in tensors.items()}
    sizes = {"vision": dataclasses.asdict(VISION)}
    save_file(tensors, out, metadata={"config": json.dumps(sizes)})  # convert reads the heads there


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--images", type=int, default=24_000, help="training scenes drawn")
    a = parser.parse_args()
    train(a.out, steps=a.steps, batch=a.batch, lr=a.lr, images=a.images)
    return 0


if __name__ == "__main__":
    run(main)
