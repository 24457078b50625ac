"""Decoding on this machine with weights in floats and in 8 and 4 bits, taking turns.

    python benchmarks/decode_bits.py --model=DIR [--rounds=3] [--batch=1,8] [--schemes=float32,...]

DIR is a model directory in floats. Every scheme continues the same random prompts; the time is that of
64 tokens without the first one, beside the first scheme's.
"""

import statistics
import time
from pathlib import Path

import numpy as np

from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.errors import Parser, run
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.utils.compilation_cache import enable_compilation_cache

PROMPT, NEW = 64, 64  # tokens
SCHEMES = "float32,bfloat16,int8,int4"


def engine(folder: Path, scheme: str, dtype: str) -> Engine:
    """Scales and what is not rounded are in dtype, and so are the products."""
    rounded = scheme.startswith("int")
    model, _ = load_model(
        folder, dtype if rounded else scheme, stacked=False, quantize=scheme if rounded else None
    )
    return Engine(model)  # type: ignore[arg-type]


def seconds(engine: Engine, rows: int, new: int) -> float:
    rng = np.random.default_rng(rows)
    prompts = rng.integers(5, engine.vocab, (rows, PROMPT)).tolist()
    begin = time.perf_counter()
    engine.generate([Request(p, max_new_tokens=new) for p in prompts])
    return time.perf_counter() - begin


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--dtype", default="bfloat16", help="of rounded models")
    a = parser.parse_args()
    enable_compilation_cache()
    engines = {s: engine(a.model, s, a.dtype) for s in a.schemes.split(",")}
    print(f"{'scheme':10}{'batch':>6}{'ms a step':>11}{'tokens/s':>10}{'of the first':>14}")
    for rows in map(int, a.batch.split(",")):
        taken: dict[str, list[float]] = {scheme: [] for scheme in engines}
        for i in range(a.rounds + 1):  # the first compiles
            for scheme, one in engines.items():
                first, whole = seconds(one, rows, 1), seconds(one, rows, NEW)
                taken[scheme] += [(whole - first) / (NEW - 1)] if i else []
        base = next(iter(taken.values()))
        for scheme, times in taken.items():
            step = statistics.median(times)
            share = statistics.median(t / b for t, b in zip(times, base, strict=True))
            print(
                f"{scheme:10}{rows:6}{1e3 * step:11.2f}{rows / step:10.1f}{share:14.2f}", flush=True
            )


if __name__ == "__main__":
    run(main)
