"""Memory and time of converting a full-size MiniGPT-4 (Vicuna 7B), with random weights.

    python benchmarks/convert_7b.py --tokenizer=DIR --workdir=DIR [--keep] [--layers=32]

Writes checkpoints with the sizes and layouts of the released files into WORKDIR (16 GB: eva_vit_g.pth,
blip2_pretrained_flant5xxl.pth, llama-7b/ in fp16 shards, minigpt4_7b.pth), runs `convert build` on them,
prints its time and peak resident memory, and removes everything (--keep keeps sources and model). Exit code
1 if the peak is above the limit. DIR holds LLaMA's tokenizer.model, or any tokenizer with close to 32,000
tokens. --layers: fewer layers of the language model, for a quick run.
"""

import dataclasses
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from common import argument_parser, peak_resident_bytes
from safetensors.numpy import save_file

from convert.export import original_shape, write_torch
from convert.key_mapping import BLIP2, EVA, FINE_TUNED, LLM, original_key
from convert.language_model import find_tokenizer
from minigpt4_jax.checkpoint.parameters import parameter_shapes, part_of
from minigpt4_jax.config import LlmConfig, ModelConfig, VisionConfig
from minigpt4_jax.errors import UserError, run

SHARD_BYTES = 2 << 30
LIMIT_GIB = 8
# The released files have one more ViT block than the model uses.
FULL = ModelConfig(vision=dataclasses.replace(VisionConfig(), depth=40))
TABLES = {"vit": EVA, "qformer": BLIP2, "projection": FINE_TUNED, "llm": LLM}


class RandomArrays:
    """Random arrays cut from one pool: drawing 7 billion numbers would take longer than converting."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._pool = (0.02 * rng.standard_normal(1 << 26, np.float32)).astype(np.float16)
        self._rng = rng

    def __call__(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        count = math.prod(shape)
        start = int(self._rng.integers(max(self._pool.size - count, 0) + 1))
        return np.resize(self._pool[start : start + count], count).reshape(shape).astype(dtype)


def original_shapes(model: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Part -> key in the released file -> shape."""
    keys: dict[str, dict[str, tuple[int, ...]]] = {part: {} for part in TABLES}
    for name, shape in parameter_shapes(model).items():
        part = "qformer" if name.startswith("ln_vision") else part_of(name)
        key = original_key(TABLES[part], name)
        if key is None:
            raise UserError(f"no original key for {name}")
        keys[part][key] = original_shape(name, shape, model)
    return keys


def write_sources(out: Path, tokenizer: Path, layers: int) -> None:
    """Write the released files, with random weights."""
    llm = dataclasses.replace(FULL.llm, layers=layers)
    random_arrays, shapes = RandomArrays(), original_shapes(dataclasses.replace(FULL, llm=llm))
    files = {
        "vit": "eva_vit_g",
        "qformer": "blip2_pretrained_flant5xxl",
        "projection": "minigpt4_7b",
    }
    for part, stem in files.items():
        dtype = np.float16 if part == "vit" else np.float32
        loads = {key: partial(random_arrays, shape, dtype) for key, shape in shapes[part].items()}
        write_torch(out / f"{stem}.pth", loads)
    write_llama(out / "llama-7b", llm, shapes["llm"], random_arrays, tokenizer)


def write_llama(
    out: Path,
    m: LlmConfig,
    shapes: dict[str, tuple[int, ...]],
    random_arrays: RandomArrays,
    tokenizer: Path,
) -> None:
    """Write a Hugging Face checkpoint in safetensors shards."""
    out.mkdir()
    shards = list(_shards(shapes))
    weight_map = {}
    for n, shard in enumerate(shards, start=1):
        name = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: random_arrays(shapes[key], np.float16) for key in shard}, out / name)
        weight_map |= dict.fromkeys(shard, name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "llama",
        "vocab_size": m.vocab,
        "hidden_size": m.width,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "intermediate_size": m.ffn,
        "rms_norm_eps": m.eps,
        "max_position_embeddings": m.max_length,
    }
    (out / "config.json").write_text(json.dumps(config))
    for name, path in find_tokenizer(tokenizer).items():
        shutil.copyfile(path, out / name)


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Keys of each shard."""
    shard, size = [], 0
    for key, shape in shapes.items():
        shard.append(key)
        size += 2 * math.prod(shape)
        if size > SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def convert(workdir: Path) -> float:
    """Run `convert build` in a subprocess; returns its peak resident memory in GiB."""
    command = [
        sys.executable, "-m", "convert", "build", "--variant=minigpt4-vicuna",
        f"--vision={workdir / 'eva_vit_g.pth'}",
        f"--qformer={workdir / 'blip2_pretrained_flant5xxl.pth'}",
        f"--llm={workdir / 'llama-7b'}", f"--checkpoint={workdir / 'minigpt4_7b.pth'}",
        f"--out={workdir / 'model'}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return peak_resident_bytes(resource.RUSAGE_CHILDREN) / (1 << 30)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=FULL.llm.layers)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.workdir).free
    if free < 40e9:
        raise UserError(f"{args.workdir}: {free / 1e9:.0f} GB free, 40 GB are needed")
    folder = args.workdir / "full_size"
    folder.mkdir()
    try:
        start = time.perf_counter()
        write_sources(folder, args.tokenizer, args.layers)
        written = time.perf_counter()
        print(f"sources written in {written - start:.0f} s")
        peak = convert(folder)
        elapsed = time.perf_counter() - written
        print(f"convert build: {elapsed:.0f} s, peak memory {peak:.2f} GiB (limit {LIMIT_GIB})")
        return 0 if peak < LIMIT_GIB else 1
    finally:
        if not args.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    run(main)
