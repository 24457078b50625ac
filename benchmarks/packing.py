"""Packed rows beside padded ones: how much of a batch is padding, and what a training step takes.

    python benchmarks/packing.py [--rows=32] [--width=256] [--layers=6] [--rounds=5]

Two kinds of batches with one image each, of SmolLM2's width and the demonstration's vision side:
"captions", whose lengths are those of web captions (words log-normal around 10, 1.3 tokens a word),
and "mixed", where a fifth of the answers are detailed descriptions of about 100 words. Both sides
train the projection on the same examples, in turns; their losses are printed.
"""

import argparse
import statistics
import time

import numpy as np
import sizes
from train_step import make_ours

from minigpt4_jax.config import IMAGE, ModelConfig
from minigpt4_jax.data.batching import BatchArrays, pad_sequences
from minigpt4_jax.data.packing import pack
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing.sequences import TokenSequence

KINDS = {"captions": 0.0, "mixed": 0.2}  # share of long answers
PROMPT = 12  # tokens of the template around an image


def padded(config: ModelConfig, rows: int, long: float) -> BatchArrays:
    """A batch as the loader makes it: rows padded to the longest, lengths drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(rows):
        words = (
            rng.lognormal(np.log(100), 0.3) if i < long * rows else rng.lognormal(np.log(10), 0.4)
        )
        told, slots = max(2, round(1.3 * words)), config.visual_tokens
        text = rng.integers(3, config.llm.vocab, PROMPT + told).tolist()
        tokens = [*text[: PROMPT // 2], *[IMAGE] * slots, *text[PROMPT // 2 :]]
        made.append(
            TokenSequence(tokens, list(range(PROMPT + slots, PROMPT + slots + told)), False)
        )
    edge = config.vision.image_size
    pixels = rng.standard_normal((rows, 1, edge, edge, 3), dtype=np.float32)
    return BatchArrays(pixels, *pad_sequences(made, 0))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rows", type=int, default=32)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    config = sizes.model_config("smollm2", args.layers)
    heads = ("batch", "rows", "T", "tokens", "of them real", "seconds a step", "loss")
    print("{:20}{:>6}{:>6}{:>8}{:>14}{:>16}{:>10}".format(*heads))
    for kind, long in KINDS.items():
        one = padded(config, args.rows, long)
        two = pack(one, args.width, config.visual_tokens, 0)
        compare(config, kind, {"padded": Batch(*one), "packed": Batch(*two)}, args.rounds)


def compare(config: ModelConfig, kind: str, batches: dict[str, Batch], rounds: int) -> None:
    sides = {name: make_ours(config, batch, "float32") for name, batch in batches.items()}
    losses = {name: side.wait(side.step()) for name, side in sides.items()}  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begun = time.perf_counter()
            side.wait(side.step())
            seconds[name].append(time.perf_counter() - begun)
    for name, batch in batches.items():
        rows, width = batch.tokens.shape
        real, middle = batch.lengths.sum() / (rows * width), statistics.median(seconds[name])
        print(
            f"{kind + ', ' + name:20}{rows:6}{width:6}{rows * width:8}{real:14.0%}{middle:16.2f}"
            f"{losses[name]:10.5f}"
        )
    each = zip(seconds["packed"], seconds["padded"], strict=True)
    print(
        f"packed / padded, median of {rounds} rounds: {statistics.median(a / b for a, b in each):.2f}"
    )


if __name__ == "__main__":
    main()
