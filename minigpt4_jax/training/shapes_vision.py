"""Train the demonstration's vision side, a small EVA-style ViT with a Q-Former, on generated `shapes`.

    python -m minigpt4_jax.training.shapes_vision --out=shapes_vision.safetensors

makes the weights shipped in minigpt4_jax/assets/ (half an hour to an hour on two CPU cores). They learn
from labels, a short cut that a real vision encoder does not have: each patch names what it shows
(shape, color, size, and which of its pixels are the object's), and each query names one word of
the scene: four queries an object in raster order (size, color, shape, place, the order in which
captions say them, so that the language model can read one off after the other), one the background.
The linear heads that read these answers are thrown away. No language model takes part.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tqdm import tqdm

from minigpt4_jax.config import QFormerConfig, VisionConfig
from minigpt4_jax.data import shapes_scene as scenes
from minigpt4_jax.errors import UserError, run
from minigpt4_jax.images import normalize
from minigpt4_jax.models.layers import LayerNorm, Linear
from minigpt4_jax.models.minigpt import LN_VISION_EPS
from minigpt4_jax.models.qformer import QFormer
from minigpt4_jax.models.vit import Vit
from minigpt4_jax.weights import tensors_of

VISION = VisionConfig(image_size=112, patch_size=14, width=128, depth=4, heads=4, mlp=512)
QFORMER = QFormerConfig(queries=13, hidden=128, layers=2, heads=4, ffn=384, vision_width=128)
GRID = VISION.image_size // VISION.patch_size
CLASSES = (len(scenes.SHAPES), len(scenes.COLOR_NAMES), len(scenes.SIZES), len(scenes.CELLS))
WORDS = (
    2,
    1,
    0,
    3,
)  # the label that each of an object's four queries names: size, color, shape, place
MASK = 7  # a patch's pixels are labelled on a grid of 7 x 7
DATA_SEED = 11
DENSE_WEIGHT = 3.0  # of the patch labels' losses over the queries'


def grid_embedding(width: int, grid: int) -> np.ndarray:
    """Sines and cosines of row and column [grid * grid, width], as a start for the position embedding:
    from random positions the queries had not found the objects after ten times as many steps."""
    frequencies = np.pi / 2 * 10.0 ** (-0.9 * np.linspace(0, 1, width // 4))
    rows, columns = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


class ShapesVision(nnx.Module):
    """The vision side, and the linear heads that its labels are read with (0 is none in each)."""

    def __init__(self, rngs: nnx.Rngs):
        self.vit = Vit(VISION, rngs)
        start = 0.5 * grid_embedding(VISION.width, GRID)
        self.vit.pos[...] = jnp.asarray(np.pad(start, [(1, 0), (0, 0)]), jnp.float32)
        self.ln_vision = LayerNorm(VISION.width, LN_VISION_EPS)
        self.qformer = QFormer(QFORMER, rngs)
        self.patches = nnx.List([Linear(VISION.width, n + 1, rngs=rngs) for n in CLASSES[:3]])
        self.queries = nnx.List([Linear(QFORMER.hidden, n + 1, rngs=rngs) for n in CLASSES])
        self.background = Linear(QFORMER.hidden, len(scenes.BACKGROUNDS), rngs=rngs)
        self.mask = Linear(VISION.width, MASK * MASK, rngs=rngs)

    def loss(self, pixels: jax.Array, labels: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """pixels [B, S, S, 3] -> the loss, and for every scene whether its queries are all right [B]."""
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        tokens = self.ln_vision(self.vit(pixels))  # [B, 1 + patches, D]
        queries = self.qformer(tokens)  # [B, 13, D]
        objects = queries[:, :-1].reshape(-1, scenes.MAX_OBJECTS, len(CLASSES), QFORMER.hidden)

        mask = optax.sigmoid_binary_cross_entropy(self.mask(tokens[:, 1:]), labels["mask"]).mean()
        for i, head in enumerate(self.patches):
            mask += cross_entropy(head(tokens[:, 1:]), labels["patches"][..., i]).mean()

        logits = self.background(queries[:, -1])
        loss = cross_entropy(logits, labels["background"]).mean() + DENSE_WEIGHT * mask
        right = logits.argmax(-1) == labels["background"]
        for i, head in enumerate(self.queries):
            logits = head(objects[:, :, WORDS.index(i)])  # [B, objects, n + 1]
            loss += cross_entropy(logits, labels["objects"][..., i]).mean()
            right &= (logits.argmax(-1) == labels["objects"][..., i]).all(-1)
        return loss, right


def make_data(seed: int, count: int, split: str) -> dict[str, np.ndarray]:
    """`count` scenes of a split: image uint8 [N, S, S, 3]; labels objects [N, 3, 4], patches
    [N, patches, 3], mask [N, patches, 49] and background [N], all int8."""
    made: dict[str, list[np.ndarray]] = {
        k: [] for k in ("image", "objects", "patches", "mask", "background")
    }
    for index in tqdm(range(count), desc=f"drawing {split}", unit="image"):
        scene = scenes.scene_at(seed, index, split)
        image, owners = scenes.render_with_owners(scene)
        labels = scenes.scene_labels(scene, GRID, owners)
        fine = owners[:: VISION.patch_size // MASK, :: VISION.patch_size // MASK] > 0
        fine = fine.reshape(GRID, MASK, GRID, MASK).swapaxes(1, 2).reshape(GRID * GRID, MASK * MASK)
        made["image"].append(image)
        made["objects"].append(labels["objects"].astype(np.int8))
        made["patches"].append(labels["patches"].reshape(-1, 4)[:, 1:].astype(np.int8))
        made["mask"].append(fine.astype(np.int8))
        made["background"].append(labels["background"].astype(np.int8))
    return {k: np.stack(v) for k, v in made.items()}


def take(data: dict[str, np.ndarray], rows: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Some rows of the data as (pixels, labels)."""
    labels = {k: v[rows].astype(np.int32) for k, v in data.items() if k != "image"}
    return normalize(data["image"][rows]), labels


def train(out: Path, *, steps: int, batch: int, lr: float, images: int, seed: int) -> None:
    """Train and write vit, ln_vision and qformer to `out` (float16 safetensors)."""
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.parent}")
    data = {
        split: make_data(DATA_SEED, n, split)
        for split, n in zip(scenes.SPLITS, (images, 1000, 1000), strict=True)
    }
    graphdef, state = nnx.split(ShapesVision(nnx.Rngs(seed)))
    schedule = optax.warmup_cosine_decay_schedule(0, lr, min(200, steps // 4), steps, lr / 100)
    matrices = lambda tree: jax.tree.map(lambda a: a.ndim >= 2, tree)  # noqa: E731
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=matrices),
    )
    opt_state = tx.init(state)

    @jax.jit
    def step(state: Any, opt_state: Any, pixels: Any, labels: Any) -> tuple[Any, Any, jax.Array]:
        loss = lambda s: nnx.merge(graphdef, s).loss(pixels, labels)  # noqa: E731
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(state)
        updates, opt_state = tx.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, value

    right = jax.jit(
        lambda state, pixels, labels: nnx.merge(graphdef, state).loss(pixels, labels)[1]
    )
    rng, order, begin = np.random.default_rng(seed), np.empty(0, int), time.perf_counter()
    for i in range(1, steps + 1):
        if len(order) < batch:
            order = rng.permutation(images)
        rows, order = order[:batch], order[batch:]
        state, opt_state, loss = step(state, opt_state, *take(data["train"], rows))
        if i % 500 == 0 or i == steps:
            shares = {
                split: np.mean(
                    [
                        right(state, *take(data[split], np.s_[k : k + 100]))
                        for k in range(0, 1000, 100)
                    ]
                )
                for split in scenes.SPLITS[1:]
            }
            told = ", ".join(
                f"{split} {share:.1%} entirely right" for split, share in shares.items()
            )
            left = (time.perf_counter() - begin) / i * (steps - i) / 60
            print(
                f"step {i}/{steps}  loss {float(loss):.3f}  {told}  {left:.0f} min left", flush=True
            )
    kept = ("vit.", "ln_vision.", "qformer.")
    sizes = {"vision": dataclasses.asdict(VISION), "qformer": dataclasses.asdict(QFORMER)}
    tensors = {k: v.astype(np.float16) for k, v in tensors_of(state) if k.startswith(kept)}
    save_file(tensors, out, metadata={"config": json.dumps(sizes)})  # convert reads the heads there
    print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--images", type=int, default=48_000, help="training scenes drawn")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    train(a.out, steps=a.steps, batch=a.batch, lr=a.lr, images=a.images, seed=a.seed)
    return 0


if __name__ == "__main__":
    run(main)
