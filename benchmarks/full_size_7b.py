"""MiniGPT-4 with Vicuna 7B at full size, random bfloat16 weights, answers a question about an image on a CPU.

    python benchmarks/full_size_7b.py --workdir=DIR [--tokens=16] [--tokenizer=DIR] [--keep]

Writes a model directory into WORKDIR (16 GB: EVA-ViT-g, Q-Former, projection, Vicuna 7B), loads it, and
prints the time of each phase, the peak resident memory after it, and a lower bound for a token on this
machine: the bytes of the language model, which every token reads, over the measured memory bandwidth. Phases
that compile are timed again without. Exit code 1 if the peak is above the limit. --tokenizer=DIR holds the
tokenizer.model of LLaMA; the default is the tests' small one, with prompts a few tokens longer. --layers and
--vision-layers: a shallower model, for a quick run. --keep: keep the model directory for the next run.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import sizes
from common import TEST_TOKENIZER, argument_parser, memory_bandwidth, peak_resident_bytes, seconds

import minigpt4_jax
from convert.language_model import find_tokenizer
from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.loader import parameter_dtype
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError, run

LIMIT_GIB = 24
QUESTION = "Describe this image in detail."


def peak_gib() -> float:
    return peak_resident_bytes() / (1 << 30)


def timed_phase(title: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """Do the work and print its time and the peak memory so far; returns (result, seconds)."""
    results: list[Any] = []
    elapsed = seconds(lambda: results.append(work()))
    print(f"{title:46}{elapsed:9.2f}{peak_gib():10.2f}", flush=True)
    return results[0], elapsed


def dtype_of(name: str) -> np.dtype[Any]:
    """Matrices in bfloat16; norms, biases and the projection in float32, as they are loaded."""
    path = tuple(name.split("."))
    return np.dtype(parameter_dtype(path, jnp.dtype(jnp.bfloat16)))


def make_config(layers: int, vision_layers: int) -> ModelConfig:
    config = sizes.SIZES["vicuna7b"]
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, depth=vision_layers),
        llm=dataclasses.replace(config.llm, layers=layers),
    ).check()


def weight_bytes(config: ModelConfig, prefix: str = "") -> int:
    shapes = parameter_shapes(config).items()
    return sum(math.prod(s) * dtype_of(n).itemsize for n, s in shapes if n.startswith(prefix))


def bytes_per_token(config: ModelConfig) -> int:
    """Bytes of weights that one token reads: those of the language model, but one embedding row."""
    embedding = 0 if config.llm.tie else weight_bytes(config, "llm.embed")
    return weight_bytes(config, "llm.") - embedding


def write_random(out: Path, config: ModelConfig, tokenizer: Path) -> None:
    """Write the model directory, unless it exists; one shard at a time is in memory."""
    if (out / "model.json").is_file() and model_directory.read_config(out) == config:
        return
    needed, free = weight_bytes(config), shutil.disk_usage(out.parent).free
    if free < 1.05 * needed:
        raise UserError(f"{out}: {free / 1e9:.0f} GB free, {1.05 * needed / 1e9:.0f} GB are needed")

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in parameter_shapes(config).items():
            yield name, sizes.tensor(name, shape).astype(dtype_of(name))

    write_model(out, config, tensors(), tokenizer=find_tokenizer(tokenizer))


def measure(folder: Path, num_tokens: int) -> float:
    """Load and answer; returns the seconds of a token after the first."""
    model, _ = timed_phase("load, bfloat16", lambda: minigpt4_jax.load(folder, "bfloat16"))
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)

    def answer(count: int) -> list[str]:
        # min_new_tokens: random weights may generate the stop symbol at any time
        limits = {"max_new_tokens": count, "min_new_tokens": count}
        answers: list[str] = model.generate([image], [QUESTION], template=True, **limits)
        return answers

    timed_phase("encode an image, compiling", lambda: model.encode_images([image]))
    _, encode = timed_phase("encode an image", lambda: model.encode_images([image]))
    timed_phase(f"first answer of {num_tokens} tokens, compiling", lambda: answer(num_tokens))
    answer(1)  # compiles if it needs another cache size
    _, first = timed_phase("image, prompt and first token", lambda: answer(1))
    _, all_tokens = timed_phase(
        f"image, prompt and {num_tokens} tokens", lambda: answer(num_tokens)
    )
    each = (all_tokens - first) / (num_tokens - 1)
    print(f"\nprompt and first token: {first - encode:.2f} s without the image")
    print(f"each token after it: {each:.3f} s, {1 / each:.2f} tokens/s")
    return each


def main() -> int:
    parser = argument_parser(__doc__)
    config = sizes.SIZES["vicuna7b"]
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer (default: 16)")
    parser.add_argument("--tokenizer", type=Path, default=TEST_TOKENIZER)
    parser.add_argument("--layers", type=int, default=config.llm.layers)
    parser.add_argument("--vision-layers", type=int, default=config.vision.depth)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    if args.tokens < 2 or args.layers < 1 or args.vision_layers < 1:
        raise UserError("--tokens must be at least 2, --layers and --vision-layers at least 1")
    config = make_config(args.layers, args.vision_layers)
    args.workdir.mkdir(parents=True, exist_ok=True)
    folder = args.workdir / f"random_{args.layers}_{args.vision_layers}"
    print(f"{len(os.sched_getaffinity(0))} cores, {weight_bytes(config) / 1e9:.2f} GB of weights")
    print(f"{'phase':46}{'seconds':>9}{'peak GiB':>10}")
    try:
        timed_phase(
            "write the model directory", lambda: write_random(folder, config, args.tokenizer)
        )
        each = measure(folder, args.tokens)
        peak = peak_gib()  # before memory_bandwidth, which allocates memory of its own
        bandwidth = memory_bandwidth()
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    read = bytes_per_token(config)
    bound = read / bandwidth
    print(f"lower bound: {read / 1e9:.2f} GB a token at {bandwidth / 1e9:.1f} GB/s, {bound:.3f} s")
    print(f"reached: {bound / each:.0%} of the memory bandwidth")
    print(f"peak resident memory: {peak:.2f} GiB (limit {LIMIT_GIB})")
    return 0 if peak < LIMIT_GIB else 1


if __name__ == "__main__":
    run(main)
