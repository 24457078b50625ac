"""Trains the demonstrations' vision encoders on generated `shapes`: data, loop and output file.

In some of the training images the objects have colors without a name, so that the encoder does not
learn to recognize a shape by the colors that it occurred in.
"""

import argparse
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from flax import nnx
from optax.contrib import muon
from safetensors.numpy import save_file
from tqdm import tqdm

from minigpt4_jax.config import VisionConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import normalize
from minigpt4_jax.shapes import scene as scenes
from minigpt4_jax.shapes.drawing import render_with_owners

VISION = VisionConfig(image_size=112, patch_size=14, width=128, depth=4, heads=4, mlp=512)
GRID = VISION.image_size // VISION.patch_size
DATA_SEED = 11
UNNAMED_SHARE = 0.4  # of the training images: objects in colors without a name
CHUNK = 500  # images that a process draws at a time

Model = TypeVar("Model", bound=nnx.Module)
Split = dict[str, np.ndarray]  # "image" uint8 [N, S, S, 3], and labels [N, ...]
DrawExample = Callable[[str, int], Split]  # (split, index) -> one image and its labels
Batch = tuple[np.ndarray, Split]  # (pixels float32 [B, S, S, 3], labels)


def standardize(codes: np.ndarray) -> np.ndarray:
    """codes [..., width] shifted and scaled to mean 0 and variance 1, like the output of a norm."""
    centered = codes - codes.mean(axis=-1, keepdims=True)
    return np.asarray(centered / centered.std(axis=-1, keepdims=True), np.float32)


# --- data -----------------------------------------------------------------------------------------


def render_scene(split: str, index: int) -> tuple[scenes.Scene, np.ndarray, np.ndarray, bool]:
    """Scene number `index` of a split: (the scene, its image [S, S, 3], the object that owns each
    pixel [S, S], whether it is drawn in colors without a name)."""
    scene = scenes.scene_at(DATA_SEED, index, split)
    rng = np.random.default_rng([DATA_SEED, index])
    unnamed = split == "train" and rng.random() < UNNAMED_SHARE
    drawn = with_unnamed_colors(scene, rng) if unnamed else scene
    image, owners = render_with_owners(drawn)
    return scene, image, owners, bool(unnamed)


def with_unnamed_colors(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    """The scene with its objects in random colors, far from all named ones and its background's."""
    gray = {"white": 244, "black": 18, "gray": 129, "striped": 190}[scene.background]
    avoided = np.array([*scenes.COLORS.values(), (gray,) * 3])

    def random_color() -> tuple[int, int, int]:
        while True:
            r, g, b = (int(v) for v in rng.integers(0, 256, 3))
            if np.linalg.norm(avoided - (r, g, b), axis=1).min() > 65:
                return r, g, b

    objects = tuple(dataclasses.replace(o, rgb=random_color()) for o in scene.objects)
    return dataclasses.replace(scene, objects=objects)


def draw_range(draw_example: DrawExample, split: str, begin: int, end: int) -> Split:
    """Examples `begin` to `end` of a split, stacked."""
    return _collate(np.stack, [draw_example(split, i) for i in range(begin, end)])


def draw_split(draw_example: DrawExample, split: str, count: int) -> Split:
    """The first `count` examples of a split, drawn in one process per CPU if they are many.

    draw_example: a function at the top of a module.
    """
    if count <= CHUNK:
        return draw_range(draw_example, split, 0, count)
    begins = range(0, count, CHUNK)
    ends = [min(begin + CHUNK, count) for begin in begins]
    draw = functools.partial(draw_range, draw_example, split)
    workers = min(os.cpu_count() or 1, len(begins))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        parts = list(tqdm(pool.map(draw, begins, ends), f"drawing {split}", len(ends)))
    return _collate(np.concatenate, parts)


def _collate(combine: Callable[..., np.ndarray], parts: list[Split]) -> Split:
    return {name: combine([part[name] for part in parts]) for name in parts[0]}


def draw_splits(draw_example: DrawExample, images: int, held_out: int) -> dict[str, Split]:
    """The training split with `images` examples, and the held-out splits with `held_out` each."""
    counts = zip(scenes.SPLITS, (images, held_out, held_out), strict=True)
    return {split: draw_split(draw_example, split, count) for split, count in counts}


def select(data: Split, rows: Any) -> Batch:
    """Some rows of a split: normalized pixels, and labels as int32, float32 or bool."""
    wide = {np.dtype(np.int8): np.int32, np.dtype(np.float16): np.float32}
    labels = {
        name: values[rows].astype(wide.get(values.dtype, values.dtype))
        for name, values in data.items()
        if name != "image"
    }
    return normalize(data["image"][rows]), labels


def chunks(data: Split, size: int = 100) -> Iterator[Batch]:
    """All rows of a split, `size` at a time."""
    for start in range(0, len(data["image"]), size):
        yield select(data, np.s_[start : start + size])


def shuffled_batches(images: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of one batch after the other, every image once an epoch, forever."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(images)[: images // batch_size * batch_size]
        yield from order.reshape(-1, batch_size)


# --- training -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """Steps, batch size, peak learning rate and its warm-up; reports come every `report_every` steps."""

    steps: int
    batch_size: int
    lr: float
    warmup: int
    report_every: int
    seed: int = 0


def train_loop(
    model: Model,
    loss: Callable[[Any, jax.Array, dict[str, jax.Array]], jax.Array],
    data: Split,
    options: TrainingOptions,
    report: Callable[[Any], None],
) -> Model:
    """Train all parameters with Muon and a cosine schedule; returns the trained model.

    loss(model, pixels, labels) -> scalar. report(state): called now and then, and at the end.
    """
    o = options
    graphdef, state = nnx.split(model)
    warmup = min(o.warmup, o.steps // 4)
    schedule = optax.warmup_cosine_decay_schedule(0, o.lr, warmup, o.steps, o.lr / 100)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(schedule, adam_b2=0.98, weight_decay=0.02, consistent_rms=0.2),
    )
    opt_state = tx.init(state)

    @jax.jit
    def step(state: Any, opt_state: Any, pixels: Any, labels: Any) -> tuple[Any, Any, jax.Array]:
        state_loss = lambda s: loss(nnx.merge(graphdef, s), pixels, labels)  # noqa: E731
        value, grads = jax.value_and_grad(state_loss)(state)
        updates, opt_state = tx.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, value

    begin = time.perf_counter()
    batches = shuffled_batches(len(data["image"]), o.batch_size, o.seed)
    for i, rows in zip(range(1, o.steps + 1), batches, strict=False):
        state, opt_state, value = step(state, opt_state, *select(data, rows))
        if i % o.report_every == 0 or i in (100, o.steps):
            minutes = (time.perf_counter() - begin) / i * (o.steps - i) / 60
            print(
                f"step {i}/{o.steps}  loss {float(value):.3f}  {minutes:.0f} min left", flush=True
            )
            report(state)
    return nnx.merge(graphdef, state)


def argument_parser(description: str, steps: int, images: int) -> argparse.ArgumentParser:
    """The options of both encoders, with these defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--images", type=int, default=images, help="training images to draw")
    return parser


def check_output(out: Path) -> None:
    """UserError unless the directory of `out` exists."""
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.parent}")


def save_encoder(tensors: Mapping[str, np.ndarray], sizes: Mapping[str, Any], out: Path) -> None:
    """Write float16 safetensors. sizes: part -> its config, from which `convert` reads the heads."""
    halves = {name: array.astype(np.float16) for name, array in tensors.items()}
    config = {part: dataclasses.asdict(size) for part, size in sizes.items()}
    save_file(halves, out, metadata={"config": json.dumps(config)})
    print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB", flush=True)
