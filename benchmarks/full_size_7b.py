"""MiniGPT-4 with Vicuna 7B, full size and of random bfloat16 weights, answers one image on a CPU.

    python benchmarks/full_size_7b.py --workdir=DIR [--tokens=16] [--tokenizer=DIR] [--keep]

makes a model directory in WORKDIR (16 GB: EVA-ViT-g, Q-Former, projection, Vicuna 7B), loads it as
any other, and prints the time of each phase, the peak resident memory after it, and what a token
could take at best on this machine: every weight of the language model is read once a token, so the
floor is their bytes over the measured bandwidth of the memory. A phase that compiles is timed again
without. Exit code 1 when the peak is above the limit. --tokenizer=DIR holds LLaMA's tokenizer.model;
by default the tests' small one serves, whose prompts are a few tokens longer. --layers and
--vision-layers make the model shallower, for a quick look; --keep leaves the model directory, and
the next run takes it from there.
"""

import argparse
import dataclasses
import math
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import sizes
from helpers.paths import TOKENIZER

import minigpt4_jax
from convert.language_model import find_tokenizer
from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.loader import parameter_dtype
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import Parser, UserError, run

LIMIT_GIB = 24
QUESTION = "Describe this image in detail."


class Phases:
    """A table that grows: what was done, how long it took, the peak memory so far."""

    def __init__(self) -> None:
        print(f"{'phase':46}{'seconds':>9}{'peak GiB':>10}")

    def __call__(self, title: str, work: Callable[[], Any]) -> tuple[Any, float]:
        """Do the work; returns its result and its seconds."""
        begin = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - begin
        print(f"{title:46}{seconds:9.2f}{peak_gib():10.2f}", flush=True)
        return result, seconds


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def dtype_of(name: str) -> np.dtype:
    """Matrices in bfloat16; norms, biases and the projection in float32, as they are loaded."""
    path = tuple(name.split("."))
    return np.dtype(parameter_dtype(path, jnp.dtype(jnp.bfloat16)))


def full_size(layers: int, vision_layers: int) -> ModelConfig:
    config = sizes.SIZES["vicuna7b"]
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, depth=vision_layers),
        llm=dataclasses.replace(config.llm, layers=layers),
    ).check()


def total_bytes(config: ModelConfig, part: str = "") -> int:
    shapes = parameter_shapes(config).items()
    return sum(math.prod(s) * dtype_of(n).itemsize for n, s in shapes if n.startswith(part))


def token_bytes(config: ModelConfig) -> int:
    """Bytes of weights that one token reads: the language model's, of its embedding only a row."""
    embedding = 0 if config.llm.tie else total_bytes(config, "llm.embed")
    return total_bytes(config, "llm.") - embedding


def make(out: Path, config: ModelConfig, tokenizer: Path) -> None:
    """Write the model directory; one shard is in memory at a time."""
    if (out / "model.json").is_file() and model_directory.read_config(out) == config:
        return
    need, free = total_bytes(config), shutil.disk_usage(out.parent).free
    if free < 1.05 * need:
        raise UserError(f"{out}: {free / 1e9:.0f} GB free, {1.05 * need / 1e9:.0f} GB are needed")

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in parameter_shapes(config).items():
            yield name, sizes.tensor(name, shape).astype(dtype_of(name))

    write_model(out, config, tensors(), tokenizer=find_tokenizer(tokenizer))


def memory_bandwidth(size: int = 1 << 30, repeats: int = 5) -> float:
    """Bytes a second that all cores together read from memory, the best of some tries."""
    cores = len(os.sched_getaffinity(0))
    # largest of a part: the reduction that NumPy vectorizes best, and without the interpreter's lock
    parts = np.array_split(np.ones(size, np.int8), cores)
    best = math.inf
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats):
            begin = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - begin)
    return size / best


def measure(phase: Phases, folder: Path, tokens: int) -> tuple[float, ModelConfig]:
    """Load and answer; returns the seconds of a token after the first."""
    model, _ = phase("load, bfloat16", lambda: minigpt4_jax.load(folder, "bfloat16"))
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)

    def answer(count: int) -> list[str]:
        # no end before `count` tokens: random weights may choose the end symbol at any time
        limits = {"max_new_tokens": count, "min_new_tokens": count}
        return model.generate([image], [QUESTION], template=True, **limits)

    phase("encode an image, compiling", lambda: model.encode_images([image]))
    _, encode = phase("encode an image", lambda: model.encode_images([image]))
    phase(f"first answer of {tokens} tokens, compiling", lambda: answer(tokens))
    answer(1)  # compiles, where it falls into another size of cache
    _, first = phase("image, prompt and first token", lambda: answer(1))
    _, whole = phase(f"image, prompt and {tokens} tokens", lambda: answer(tokens))
    each = (whole - first) / (tokens - 1)
    print(f"\nprompt and first token: {first - encode:.2f} s without the image")
    print(f"each token after it: {each:.3f} s, {1 / each:.2f} tokens/s")
    return each, model.config


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    config = sizes.SIZES["vicuna7b"]
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer (default: 16)")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--layers", type=int, default=config.llm.layers)
    parser.add_argument("--vision-layers", type=int, default=config.vision.depth)
    parser.add_argument("--keep", action="store_true")
    a = parser.parse_args()
    if a.tokens < 2 or a.layers < 1 or a.vision_layers < 1:
        raise UserError("--tokens must be at least 2, --layers and --vision-layers at least 1")
    config = full_size(a.layers, a.vision_layers)
    a.workdir.mkdir(parents=True, exist_ok=True)
    made = a.workdir / f"random_{a.layers}_{a.vision_layers}"
    print(f"{len(os.sched_getaffinity(0))} cores, {total_bytes(config) / 1e9:.2f} GB of weights")
    phase = Phases()
    try:
        phase("make the model directory", lambda: make(made, config, a.tokenizer))
        each, _ = measure(phase, made, a.tokens)
        peak = peak_gib()  # before the measurement below, which takes memory of its own
        speed = memory_bandwidth()
    finally:
        if not a.keep:
            shutil.rmtree(made, ignore_errors=True)
    read = token_bytes(config)
    floor = read / speed
    print(f"floor of a token: {read / 1e9:.2f} GB at {speed / 1e9:.1f} GB/s, {floor:.3f} s")
    print(f"reached: {floor / each:.0%} of the memory's speed")
    print(f"peak resident memory: {peak:.2f} GiB (limit {LIMIT_GIB})")
    return 0 if peak < LIMIT_GIB else 1


if __name__ == "__main__":
    run(main)
