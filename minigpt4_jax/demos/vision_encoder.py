"""Train the demonstration's vision side, a small EVA-style ViT with a Q-Former, on generated `shapes`.

    python -m minigpt4_jax.demos.vision_encoder --out=shapes_vision.safetensors

makes the weights shipped in minigpt4_jax/assets/ (half an hour on two CPU cores). They learn from
labels, a short cut that a real vision encoder does not have: each patch names what it shows (shape,
color, size, and which of its pixels are the object's), and each query names one word of the scene:
four queries an object in raster order (size, color, shape, place, the order in which captions say
them, so that the language model can read one off after the other), one the background. A query names
a word by one large value in that word's dimension: Adam then gives each word of a new projection a
rate of its own, which halves the examples that stage 1 needs (random codes at right angles do worse).
In a second phase a query also says, by a smaller value, which object it speaks of: without it the
language model confuses objects that share a word. No language model takes part; the heads of the
patches are thrown away.

In some of the training images the objects have colours without a name, so that a shape is not known
by the colours it came in.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import muon
from safetensors.numpy import save_file
from tqdm import tqdm

from minigpt4_jax.checkpoint.parameters import named_tensors
from minigpt4_jax.config import QFormerConfig, VisionConfig
from minigpt4_jax.errors import UserError, run
from minigpt4_jax.models.layers import LayerNorm, Linear
from minigpt4_jax.models.minigpt import LN_VISION_EPS
from minigpt4_jax.models.qformer import QFormer
from minigpt4_jax.models.vit import Vit
from minigpt4_jax.processing.images import normalize
from minigpt4_jax.shapes import scene as scenes

VISION = VisionConfig(image_size=112, patch_size=14, width=128, depth=4, heads=4, mlp=512)
QFORMER = QFormerConfig(queries=13, hidden=128, layers=2, heads=4, ffn=384, vision_width=128)
GRID = VISION.image_size // VISION.patch_size
MASK = 7  # a patch's pixels are labelled on a grid of 7 x 7
CLASSES = (len(scenes.SHAPES), len(scenes.COLOR_NAMES), len(scenes.SIZES), len(scenes.CELLS))
ORDER = (2, 1, 0, 3)  # the label that each of an object's four queries names: size, color, ...
FIRST = np.cumsum([0, *(n + 1 for n in CLASSES)])  # of each label's words; its first is "none"
WORDS = int(FIRST[-1]) + len(scenes.BACKGROUNDS)
IGNORED = -1  # a label that does not count
DATA_SEED = 11
UNNAMED_SHARE = 0.4  # of the training images: objects in colours without a name
DENSE_WEIGHT = 3.0  # of the patch labels' losses over the queries'
CODE_WEIGHT = 2.0  # of the distance to the code over the choice among codes
SHARPNESS = 12.0  # of the choice: logits are this times the cosine
NUMBER = 0.5  # size of the object's number beside the word's 1, in the second phase


def standardized(codes: np.ndarray) -> np.ndarray:
    """codes [..., hidden] shifted and scaled to mean 0 and variance 1, as the Q-Former's last norm
    gives its queries."""
    codes = codes - codes.mean(axis=-1, keepdims=True)
    return (codes / codes.std(axis=-1, keepdims=True)).astype(np.float32)


def query_codes(number: float) -> np.ndarray:
    """Codes of the words as each query says them [13, WORDS, hidden]: a word's one and `number` in the
    dimension of the query's object, the background being the fourth."""
    codes = np.tile(np.eye(WORDS, QFORMER.hidden), (QFORMER.queries, 1, 1))
    for query in range(QFORMER.queries):
        codes[query, :, WORDS + query // len(ORDER)] = number
    return standardized(codes)


def grid_embedding(width: int, grid: int) -> np.ndarray:
    """Sines and cosines of row and column [grid * grid, width], as a start for the position embedding:
    from random positions the queries had not found the objects after ten times as many steps."""
    frequencies = np.pi / 2 * 10.0 ** (-0.9 * np.linspace(0, 1, width // 4))
    rows, columns = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the labels that count. logits [..., n], labels [...] -> []."""
    counts = labels != IGNORED
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.where(counts, each, 0).sum() / jnp.maximum(counts.sum(), 1)


class ShapesVision(nnx.Module):
    """The vision side, and the linear heads that the patches' labels are read with."""

    def __init__(self, rngs: nnx.Rngs):
        self.vit = Vit(VISION, rngs)
        start = 0.5 * grid_embedding(VISION.width, GRID)
        self.vit.pos[...] = jnp.asarray(np.pad(start, [(1, 0), (0, 0)]), jnp.float32)
        self.ln_vision = LayerNorm(VISION.width, LN_VISION_EPS)
        self.qformer = QFormer(QFORMER, rngs)
        self.patches = nnx.List([Linear(VISION.width, n + 1, rngs=rngs) for n in CLASSES[:3]])
        self.mask = Linear(VISION.width, MASK * MASK, rngs=rngs)

    def loss(
        self, pixels: jax.Array, labels: dict[str, jax.Array], codes: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """pixels [B, S, S, 3], codes [13, WORDS, hidden] -> the loss, and for every query whether it
        is right [B, 13]."""
        tokens = self.ln_vision(self.vit(pixels))  # [B, 1 + patches, D]
        dense = optax.sigmoid_binary_cross_entropy(self.mask(tokens[:, 1:]), labels["mask"]).mean()
        for i, head in enumerate(self.patches):
            dense += cross_entropy(head(tokens[:, 1:]), labels["patches"][..., i])

        queries, words = self.qformer(tokens), labels["words"]  # [B, 13, hidden], [B, 13]
        logits = SHARPNESS / QFORMER.hidden * jnp.einsum("bqd,qwd->bqw", queries, codes)
        distance = jnp.square(queries - codes[jnp.arange(QFORMER.queries), words]).mean(-1)
        counts = words != IGNORED
        distance = jnp.where(counts, distance, 0).sum() / counts.sum()
        # Thirteen words a scene, five kinds: a loss of the same size as of one head a kind.
        loss = 5 * (cross_entropy(logits, words) + CODE_WEIGHT * distance) + DENSE_WEIGHT * dense
        return loss, (logits.argmax(-1) == words) | ~counts


def label_words(labels: dict[str, np.ndarray]) -> np.ndarray:
    """Labels of a scene -> the word that each query names [13]."""
    words = labels["objects"][:, ORDER] + FIRST[list(ORDER)]
    return np.append(words.reshape(-1), FIRST[-1] + labels["background"])


def unnamed_colors(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    """The scene with its objects in random colours, far from every named one and from what a
    background may be."""
    ground = {"white": 244, "black": 18, "gray": 129, "striped": 190}[scene.background]
    far = np.array([*scenes.COLORS.values(), (ground,) * 3])

    def draw() -> tuple[int, int, int]:
        while True:
            r, g, b = (int(v) for v in rng.integers(0, 256, 3))
            if np.linalg.norm(far - (r, g, b), axis=1).min() > 65:
                return r, g, b

    objects = tuple(dataclasses.replace(o, rgb=draw()) for o in scene.objects)
    return dataclasses.replace(scene, objects=objects)


def draw_one(split: str, index: int) -> dict[str, np.ndarray]:
    """Image number `index` of a split, uint8 [S, S, 3], and its labels, int8: words [13], patches
    [patches, 3] (shape, color, size), mask [patches, 49]."""
    scene = scenes.scene_at(DATA_SEED, index, split)
    rng = np.random.default_rng([DATA_SEED, index])
    unnamed = split == "train" and rng.random() < UNNAMED_SHARE
    image, owners = scenes.render_with_owners(unnamed_colors(scene, rng) if unnamed else scene)
    labels = scenes.scene_labels(scene, GRID, owners)
    words, patches = label_words(labels), labels["patches"].reshape(-1, 4)[:, 1:]
    if unnamed:
        color = labels["objects"][:, 1] > 0
        words[1:-1:4][color] = IGNORED
        patches[:, 1] = np.where(patches[:, 1] > 0, IGNORED, 0)
    step = VISION.patch_size // MASK
    fine = (owners[::step, ::step] > 0).reshape(GRID, MASK, GRID, MASK).swapaxes(1, 2)
    drawn = {"words": words, "patches": patches, "mask": fine.reshape(GRID * GRID, -1)}
    return {"image": image} | {k: v.astype(np.int8) for k, v in drawn.items()}


def draw_many(task: tuple[str, int, int]) -> dict[str, np.ndarray]:
    split, begin, end = task
    rows = [draw_one(split, i) for i in range(begin, end)]
    return {k: np.stack([row[k] for row in rows]) for k in rows[0]}


def make_data(
    count: int,
    split: str,
    workers: int,
    draw: Callable[[tuple[str, int, int]], dict[str, np.ndarray]] = draw_many,
) -> dict[str, np.ndarray]:
    """`count` images of a split with their labels, stacked. draw: makes those from one number up to
    another."""
    tasks = [(split, k, min(k + 500, count)) for k in range(0, count, 500)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        parts = list(tqdm(pool.map(draw, tasks), f"drawing {split}", len(tasks)))
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def take(data: dict[str, np.ndarray], rows: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Some rows of the data as (pixels, labels)."""
    labels = {k: v[rows].astype(np.int32) for k, v in data.items() if k != "image"}
    return normalize(data["image"][rows]), labels


def batches(images: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of one batch after the other, every image once an epoch."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(images)[: images // batch * batch].reshape(-1, batch)


Data = dict[str, dict[str, np.ndarray]]


def train(
    out: Path, *, steps: int, batch: int, lr: float, images: int, seed: int, judged: int = 1000
) -> None:
    """Train and write vit, ln_vision and qformer to `out` (float16 safetensors). judged: images of
    each held-out kind."""
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.parent}")
    counts = zip(scenes.SPLITS, (images, judged, judged), strict=True)
    data = {split: make_data(n, split, os.cpu_count() or 1) for split, n in counts}
    graphdef, state = nnx.split(ShapesVision(nnx.Rngs(seed)))
    state = train_phase(graphdef, state, data, 0.0, steps, batch, lr, seed)
    state = train_phase(graphdef, state, data, NUMBER, max(1, steps // 4), batch, lr / 2, seed + 1)
    save(state, out)


def save(state: Any, out: Path) -> None:
    kept = ("vit.", "ln_vision.", "qformer.")
    sizes = {"vision": dataclasses.asdict(VISION), "qformer": dataclasses.asdict(QFORMER)}
    tensors = {k: np.asarray(v, np.float16) for k, v in named_tensors(state) if k.startswith(kept)}
    save_file(tensors, out, metadata={"config": json.dumps(sizes)})  # convert reads the heads there
    print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB")


def train_phase(
    graphdef: Any,
    state: Any,
    data: Data,
    number: float,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> Any:
    """The state after `steps` more steps with the codes of `number`."""
    codes = jnp.asarray(query_codes(number))
    schedule = optax.warmup_cosine_decay_schedule(0, lr, min(300, steps // 4), steps, lr / 100)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(schedule, adam_b2=0.98, weight_decay=0.02, consistent_rms=0.2),
    )
    opt_state = tx.init(state)

    @jax.jit
    def step(state: Any, opt_state: Any, pixels: Any, labels: Any) -> tuple[Any, Any, jax.Array]:
        loss = lambda s: nnx.merge(graphdef, s).loss(pixels, labels, codes)  # noqa: E731
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(state)
        updates, opt_state = tx.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, value

    right = jax.jit(lambda state, *batch: nnx.merge(graphdef, state).loss(*batch, codes)[1])
    begin = time.perf_counter()
    train_rows = batches(len(data["train"]["image"]), batch, seed)
    for i, rows in zip(range(1, steps + 1), train_rows, strict=False):
        state, opt_state, loss = step(state, opt_state, *take(data["train"], rows))
        if i % 500 == 0 or i == steps or i == 100:
            left = (time.perf_counter() - begin) / i * (steps - i) / 60
            print(f"step {i}/{steps}  loss {float(loss):.3f}  {left:.0f} min left", flush=True)
            for split in scenes.SPLITS[1:]:
                print(f"  {split} {judge(right, state, data[split])}", flush=True)
    return state


def judge(right: Any, state: Any, data: dict[str, np.ndarray]) -> str:
    """Shares of a split's images and words that are read right."""
    rows = [np.s_[k : k + 100] for k in range(0, len(data["image"]), 100)]
    words = np.concatenate([right(state, *take(data, r)) for r in rows])  # [judged, 13]
    kinds = [words[:, i:-1:4].mean() for i in range(4)]
    told = "size {:.1%}, color {:.1%}, shape {:.1%}, place {:.1%}".format(*kinds)
    return f"{words.all(1).mean():.1%} entirely right ({told})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--images", type=int, default=96_000, help="training scenes drawn")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    train(a.out, steps=a.steps, batch=a.batch, lr=a.lr, images=a.images, seed=a.seed)
    return 0


if __name__ == "__main__":
    run(main)
