"""Packed rows beside padded ones: share of padding, and time of a training step.

    python benchmarks/packing.py [--rows=32] [--width=256] [--layers=6] [--rounds=5]

Two kinds of batches, one image per example, with the width of SmolLM2 and the quickstart's vision encoder:
"captions" has the lengths of web captions (words log-normal around 10, 1.3 tokens a word); in "mixed" a
fifth of the answers are detailed descriptions of about 100 words. Padded and packed batches hold the same
examples and train the projection, in turns. Prints rows, tokens, the share of tokens that is not padding,
seconds a step (median), the loss, and the ratio of the times.
"""

import statistics
from functools import partial

import numpy as np
import sizes
from common import Table, argument_parser, median_ratio, time_in_turns
from train_step import Side, make_ours

from minigpt4_jax.config import IMAGE, ModelConfig
from minigpt4_jax.data.arrays import BatchArrays
from minigpt4_jax.data.batching import pad_sequences
from minigpt4_jax.data.packing import pack
from minigpt4_jax.errors import run
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing.sequences import TokenSequence

LONG_SHARES = {"captions": 0.0, "mixed": 0.2}  # share of long answers
TEMPLATE = 12  # tokens of the prompt template around an image


def padded_batch(config: ModelConfig, rows: int, long_share: float) -> BatchArrays:
    """A batch as the loader makes it, rows padded to the longest; lengths drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    image_tokens = config.visual_tokens
    sequences = []
    for i in range(rows):
        is_long = i < long_share * rows
        words = rng.lognormal(np.log(100), 0.3) if is_long else rng.lognormal(np.log(10), 0.4)
        answer = max(2, round(1.3 * words))
        text = rng.integers(3, config.llm.vocab, TEMPLATE + answer).tolist()
        tokens = [*text[: TEMPLATE // 2], *[IMAGE] * image_tokens, *text[TEMPLATE // 2 :]]
        start = TEMPLATE + image_tokens
        sequences.append(TokenSequence(tokens, list(range(start, start + answer)), False))
    edge = config.vision.image_size
    pixels = rng.standard_normal((rows, 1, edge, edge, 3), dtype=np.float32)
    return BatchArrays(pixels, *pad_sequences(sequences, 0))


def compare(
    table: Table, config: ModelConfig, kind: str, batches: dict[str, Batch], rounds: int
) -> None:
    sides = {name: make_ours(config, batch, "float32") for name, batch in batches.items()}
    losses = {name: side.wait(side.step()) for name, side in sides.items()}  # compiles

    def run_step(side: Side) -> float:
        return side.wait(side.step())

    times = time_in_turns(
        rounds,
        {name: partial(run_step, side) for name, side in sides.items()},
        warm_up=False,
    )
    for name, batch in batches.items():
        rows, width = batch.tokens.shape
        real = float(batch.lengths.sum()) / (rows * width)
        median = statistics.median(times[name])
        table.row(f"{kind}, {name}", rows, width, rows * width, real, median, losses[name])
    ratio = median_ratio(times["packed"], times["padded"])
    print(f"packed / padded, median of {rounds} rounds: {ratio:.2f}")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--width", type=int, default=256, help="tokens of a packed row")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = sizes.model_config("smollm2", args.layers)
    table = Table(
        {
            "batch": (20, ""),
            "rows": (6, ""),
            "T": (6, ""),
            "tokens": (8, ""),
            "not padding": (14, ".0%"),
            "seconds a step": (16, ".2f"),
            "loss": (10, ".5f"),
        }
    )
    for kind, long_share in LONG_SHARES.items():
        padded = padded_batch(config, args.rows, long_share)
        packed = pack(padded, args.width, config.visual_tokens, 0)
        batches = {"padded": Batch(*padded), "packed": Batch(*packed)}
        compare(table, config, kind, batches, args.rounds)


if __name__ == "__main__":
    run(main)
