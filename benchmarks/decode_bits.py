"""Speed of decoding with weights in float, int8 and int4, in turns.

    python benchmarks/decode_bits.py --model=DIR [--rounds=3] [--batch=1,8] [--schemes=float32,...]

DIR is a model directory in floats. Every scheme continues the same random prompts. Prints the time of a
decoding step (64 tokens without the first one), tokens/s, and the ratio to the first scheme.
"""

import statistics
from functools import partial
from pathlib import Path

import numpy as np
from common import Table, argument_parser, median_ratio, time_in_turns

from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.errors import run
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.utils.compilation_cache import enable_compilation_cache

PROMPT, NEW = 64, 64  # tokens
SCHEMES = "float32,bfloat16,int8,int4"


def load_engine(folder: Path, scheme: str, dtype: str) -> Engine:
    """dtype: of the products, scales and unquantized parameters if the scheme is quantized."""
    quantize = scheme if scheme.startswith("int") else None
    model, _ = load_model(folder, dtype if quantize else scheme, stacked=False, quantize=quantize)
    assert isinstance(model, MiniGpt)
    return Engine(model)


def generate(engine: Engine, rows: int, new_tokens: int) -> None:
    rng = np.random.default_rng(rows)
    prompts = rng.integers(5, engine.vocab, (rows, PROMPT)).tolist()
    engine.generate([Request(p, max_new_tokens=new_tokens) for p in prompts])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--dtype", default="bfloat16", help="of quantized models")
    args = parser.parse_args()
    enable_compilation_cache()
    engines = {s: load_engine(args.model, s, args.dtype) for s in args.schemes.split(",")}
    table = Table(
        {
            "scheme": (10, ""),
            "batch": (6, ""),
            "ms a step": (11, ".2f"),
            "tokens/s": (10, ".1f"),
            "of the first": (14, ".2f"),
        }
    )
    for rows in map(int, args.batch.split(",")):
        sides = {
            (scheme, new): partial(generate, engine, rows, new)
            for scheme, engine in engines.items()
            for new in (1, NEW)
        }
        times = time_in_turns(args.rounds, sides)
        steps = {
            scheme: [
                (all_tokens - first) / (NEW - 1)
                for first, all_tokens in zip(times[scheme, 1], times[scheme, NEW], strict=True)
            ]
            for scheme in engines
        }
        base = next(iter(steps.values()))
        for scheme, step_times in steps.items():
            step = statistics.median(step_times)
            table.row(scheme, rows, 1e3 * step, rows / step, median_ratio(step_times, base))


if __name__ == "__main__":
    run(main)
