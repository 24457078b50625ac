"""python -m convert merge | unmerge: adds LoRA to the weights it adapts, and subtracts it again.

Merging replaces W by W + alpha / rank * B A; the result is a model without LoRA. Sums are computed
and, by default, stored in float32, because rounding to a 16-bit type can lose a small adapter.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.tensors import DTYPES
from minigpt4_jax.checkpoint.loader import open_tensors
from minigpt4_jax.checkpoint.model_directory import (
    Tensors,
    model_chain,
    read_config,
    read_model_json,
    tokenizer_dir,
)
from minigpt4_jax.checkpoint.parameters import part_of
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import LoraConfig, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.lora import merge_lora

Arrays = Iterator[tuple[str, np.ndarray]]


def merge(model_dir: Path, out: Path, dtype: str = "float32") -> None:
    """Write model_dir with its adapters added to the weights, as a model without LoRA.

    dtype: of the changed matrices. UserError: no LoRA, quantized, damaged, or `out` exists.
    """
    config = read_config(model_dir)
    if config.lora is None:
        raise UserError(f"{model_dir} has no LoRA to merge")
    _refuse_quantized(model_dir, config)
    tensors = open_tensors(model_dir, config)
    names = [name for name in tensors if part_of(name) != "lora"]
    merged = _with_deltas(names, tensors, tensors, config.lora, 1.0, DTYPES[dtype])
    _write(out, dataclasses.replace(config, lora=None), merged, model_dir, "merged")
    print(f"wrote {out}: LoRA on {', '.join(config.lora.targets)} merged, in {dtype}")


def unmerge(model_dir: Path, lora_dir: Path, out: Path, dtype: str = "float32") -> None:
    """Write model_dir, into which the adapters of lora_dir were merged, as base weights and adapters.

    UserError: model_dir has LoRA, lora_dir has none or is for another language model; else as `merge`.
    """
    config, lora = read_config(model_dir), read_config(lora_dir).lora
    if lora is None:
        raise UserError(f"--lora: {lora_dir} has no LoRA")
    if config.lora is not None:
        raise UserError(f"{model_dir} has LoRA of its own, so none is merged into it")
    _refuse_quantized(model_dir, config)
    if config.llm != read_config(lora_dir).llm:
        raise UserError(f"--lora: {lora_dir} is for another language model than {model_dir}")
    tensors, adapters = open_tensors(model_dir, config), Tensors(lora_dir)

    def arrays() -> Arrays:
        yield from ((n, adapters[n]) for n in sorted(adapters) if part_of(n) == "lora")
        yield from _with_deltas(list(tensors), tensors, adapters, lora, -1.0, DTYPES[dtype])

    _write(out, dataclasses.replace(config, lora=lora), arrays(), model_dir, "unmerged")
    print(f"wrote {out}: LoRA on {', '.join(lora.targets)} unmerged, in {dtype}")


def _refuse_quantized(model_dir: Path, config: ModelConfig) -> None:
    if config.quantize is not None:
        raise UserError(
            f"{model_dir} is quantized to {config.quantize}, and LoRA cannot be merged into quantized "
            "weights: merge the model it was made from, then quantize with load(quantize=...)"
        )


def _with_deltas(
    names: list[str],
    tensors: Mapping[str, np.ndarray],
    adapters: Mapping[str, np.ndarray],
    lora: LoraConfig,
    sign: float,
    dtype: np.dtype,
) -> Arrays:
    """The named tensors, one at a time; W [out, in] + sign * alpha / rank * B A for adapted ones."""
    factor = sign * lora.alpha / lora.rank
    for name in names:
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_a" not in adapters:
            yield name, tensors[name]
            continue
        a, b = (adapters[f"{stem}.lora_{ab}"] for ab in "ab")
        yield name, np.asarray(merge_lora(tensors[name], a, b, factor), dtype)


def _write(out: Path, config: ModelConfig, arrays: Arrays, origin: Path, operation: str) -> None:
    """Write a model directory with the tokenizer and sources of `origin`."""
    sources: dict[str, Any] = {}
    for folder in reversed(model_chain(origin)):
        sources |= read_model_json(folder).get("sources") or {}
    sources |= {operation: {"file": str(origin)}}
    files = {path.name: path for path in tokenizer_dir(origin).iterdir()}
    write_model(out, config, arrays, tokenizer=files, sources=sources)
