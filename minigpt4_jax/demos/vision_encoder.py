"""Trains the quickstart's vision encoder, a small EVA-style ViT with a Q-Former, on generated `shapes`.

    python -m minigpt4_jax.demos.vision_encoder --out=shapes_vision.safetensors

makes the weights in minigpt4_jax/assets/ (half an hour on two CPU cores). Training uses labels, a
shortcut that a real vision encoder does not have. Each patch predicts what it shows: shape, color,
size, and which of its pixels belong to the object. Each query names one word of the scene: four
queries for each object in raster order (size, color, shape, position: the order of the words in a
caption, so that the language model can read them one after the other), and one for the background.

A query names a word by one large value in that word's own dimension. Adam then has a learning rate of
its own for each word of a new projection, which halves the examples that stage 1 needs (random
orthogonal codes do worse). In a second phase a query also says, by a smaller value, which object it
describes; otherwise the language model confuses objects that share a word. No language model takes
part, and the prediction heads of the patches are thrown away.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from minigpt4_jax.checkpoint.parameters import named_tensors
from minigpt4_jax.config import QFormerConfig
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
from minigpt4_jax.models.layers import LayerNorm, Linear
from minigpt4_jax.models.minigpt import LN_VISION_EPS
from minigpt4_jax.models.qformer import QFormer
from minigpt4_jax.models.vit import Vit
from minigpt4_jax.shapes import scene as scenes
from minigpt4_jax.shapes.labels import scene_labels

QFORMER = QFormerConfig(queries=13, hidden=128, layers=2, heads=4, ffn=384, vision_width=128)
MASK = 7  # a patch's pixels are labelled on a grid of 7 x 7
CLASSES = (len(scenes.SHAPES), len(scenes.COLOR_NAMES), len(scenes.SIZES), len(scenes.CELLS))
QUERY_ORDER = (2, 1, 0, 3)  # the index in CLASSES that each of an object's four queries names
# The first word of each label in the list of all words. Word 0 of a label is "none".
FIRST_WORD = np.cumsum([0, *(n + 1 for n in CLASSES)])
WORDS = int(FIRST_WORD[-1]) + len(scenes.BACKGROUNDS)
IGNORED = -1  # a label that does not count
PATCH_WEIGHT = 3.0  # of the patch labels' losses, relative to the queries'
CODE_WEIGHT = 2.0  # of the distance to the code, relative to the cross-entropy over codes
LOGIT_SCALE = 12.0  # logits are this times the cosine similarity
OBJECT_VALUE = 0.5  # marks a query's object, beside 1 for its word, in the second phase


def query_codes(object_value: float) -> np.ndarray:
    """The target of each query for each word [13, WORDS, hidden].

    1 in the word's dimension and `object_value` in the dimension of the query's object (the background
    is the fourth), standardized.
    """
    codes = np.tile(np.eye(WORDS, QFORMER.hidden), (QFORMER.queries, 1, 1))
    for query in range(QFORMER.queries):
        codes[query, :, WORDS + query // len(QUERY_ORDER)] = object_value
    return standardize(codes)


def grid_embedding(width: int, grid: int) -> np.ndarray:
    """Sines and cosines of row and column [grid * grid, width]: initial position embeddings.

    With random ones the queries had not found the objects after ten times as many steps.
    """
    frequencies = np.pi / 2 * 10.0 ** (-0.9 * np.linspace(0, 1, width // 4))
    rows, columns = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the labels that are not IGNORED. logits [..., n], labels [...] -> []."""
    counts = labels != IGNORED
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.where(counts, each, 0).sum() / jnp.maximum(counts.sum(), 1)


class ShapesVision(nnx.Module):
    """Vision encoder and Q-Former, with linear heads that predict the patches' labels."""

    def __init__(self, rngs: nnx.Rngs):
        self.vit = Vit(VISION, rngs)
        positions = 0.5 * grid_embedding(VISION.width, GRID)
        self.vit.pos[...] = jnp.asarray(np.pad(positions, [(1, 0), (0, 0)]), jnp.float32)
        self.ln_vision = LayerNorm(VISION.width, LN_VISION_EPS)
        self.qformer = QFormer(QFORMER, rngs)
        self.patches = nnx.List([Linear(VISION.width, n + 1, rngs=rngs) for n in CLASSES[:3]])
        self.mask = Linear(VISION.width, MASK * MASK, rngs=rngs)

    def loss(
        self, pixels: jax.Array, labels: dict[str, jax.Array], codes: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(loss [], whether each query is right or ignored [B, 13]).

        pixels [B, S, S, 3], codes [13, WORDS, hidden].
        """
        tokens = self.ln_vision(self.vit(pixels))  # [B, 1 + patches, D]
        dense = optax.sigmoid_binary_cross_entropy(self.mask(tokens[:, 1:]), labels["mask"]).mean()
        for i, head in enumerate(self.patches):
            dense += cross_entropy(head(tokens[:, 1:]), labels["patches"][..., i])

        queries, words = self.qformer(tokens), labels["words"]  # [B, 13, hidden], [B, 13]
        logits = LOGIT_SCALE / QFORMER.hidden * jnp.einsum("bqd,qwd->bqw", queries, codes)
        distance = jnp.square(queries - codes[jnp.arange(QFORMER.queries), words]).mean(-1)
        counts = words != IGNORED
        distance = jnp.where(counts, distance, 0).sum() / counts.sum()
        # 5: a scene has 13 words of five kinds, and each patch head's loss is for one kind
        loss = 5 * (cross_entropy(logits, words) + CODE_WEIGHT * distance) + PATCH_WEIGHT * dense
        return loss, (logits.argmax(-1) == words) | ~counts


def query_words(labels: dict[str, np.ndarray]) -> np.ndarray:
    """Labels of a scene -> the word that each query names [13]."""
    words = labels["objects"][:, QUERY_ORDER] + FIRST_WORD[list(QUERY_ORDER)]
    return np.append(words.reshape(-1), FIRST_WORD[-1] + labels["background"])


def draw_example(split: str, index: int) -> Split:
    """Image number `index` of a split, uint8 [S, S, 3], and its labels, int8.

    words [13], patches [patches, 3] (shape, color, size), mask [patches, 49].
    """
    scene, image, owners, unnamed = render_scene(split, index)
    labels = scene_labels(scene, GRID, owners)
    words, patches = query_words(labels), labels["patches"].reshape(-1, 4)[:, 1:]
    if unnamed:
        has_color = labels["objects"][:, 1] > 0
        words[1:-1:4][has_color] = IGNORED
        patches[:, 1] = np.where(patches[:, 1] > 0, IGNORED, 0)
    step = VISION.patch_size // MASK
    mask = (owners[::step, ::step] > 0).reshape(GRID, MASK, GRID, MASK).swapaxes(1, 2)
    int8 = {"words": words, "patches": patches, "mask": mask.reshape(GRID * GRID, -1)}
    return {"image": image} | {k: v.astype(np.int8) for k, v in int8.items()}


def train(
    out: Path, *, steps: int, batch: int, lr: float, images: int, seed: int, judged: int = 1000
) -> None:
    """Train, and write vit, ln_vision and qformer to `out`. judged: images of each held-out split."""
    check_output(out)
    data = draw_splits(draw_example, images, judged)
    first = TrainingOptions(steps, batch, lr, warmup=300, report_every=500, seed=seed)
    second = TrainingOptions(
        max(1, steps // 4), batch, lr / 2, warmup=300, report_every=500, seed=seed + 1
    )
    model = train_phase(ShapesVision(nnx.Rngs(seed)), data, 0.0, first)
    model = train_phase(model, data, OBJECT_VALUE, second)
    prefixes = ("vit.", "ln_vision.", "qformer.")
    named = named_tensors(nnx.state(model))
    tensors = {name: np.asarray(array) for name, array in named if name.startswith(prefixes)}
    save_encoder(tensors, {"vision": VISION, "qformer": QFORMER}, out)


def train_phase(
    model: ShapesVision, data: dict[str, Split], object_value: float, options: TrainingOptions
) -> ShapesVision:
    """Train with the codes of `object_value`; returns the trained model."""
    codes, graphdef = jnp.asarray(query_codes(object_value)), nnx.graphdef(model)

    def loss(model: ShapesVision, pixels: jax.Array, labels: dict[str, jax.Array]) -> jax.Array:
        return model.loss(pixels, labels, codes)[0]

    @jax.jit
    def is_right(state: Any, pixels: jax.Array, labels: dict[str, jax.Array]) -> jax.Array:
        model: ShapesVision = nnx.merge(graphdef, state)
        return model.loss(pixels, labels, codes)[1]

    def report(state: Any) -> None:
        for split in scenes.SPLITS[1:]:
            print(f"  {split} {evaluate(is_right, state, data[split])}", flush=True)

    return train_loop(model, loss, data["train"], options, report)


def evaluate(is_right: Any, state: Any, data: Split) -> str:
    """Share of a split's images whose words are all right, and of right words of each kind."""
    right = np.concatenate([is_right(state, *batch) for batch in chunks(data)])  # [images, 13]
    by_kind = [right[:, i:-1:4].mean() for i in range(4)]
    kinds = "size {:.1%}, color {:.1%}, shape {:.1%}, position {:.1%}".format(*by_kind)
    return f"{right.all(1).mean():.1%} entirely right ({kinds})"


def main() -> int:
    parser = argument_parser((__doc__ or "").splitlines()[0], steps=9000, images=96_000)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order")
    a = parser.parse_args()
    train(a.out, steps=a.steps, batch=a.batch, lr=a.lr, images=a.images, seed=a.seed)
    return 0


if __name__ == "__main__":
    run(main)
