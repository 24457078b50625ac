"""Writing the outputs of conversions: checks before, complete model directories from other ones."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.checkpoint.model_directory import (
    bucket_errors_as_user_errors,
    model_chain,
    read_model_json,
    tokenizer_dir,
)
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import LoraConfig, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.lora import merge_lora
from minigpt4_jax.storage.paths import absolute_path, is_remote

Arrays = Iterator[tuple[str, np.ndarray]]


def check_output(out: Path) -> Path | None:
    """The nearest existing directory above `out`; None in a bucket.

    UserError: `out` exists, or cannot be written.
    """
    with bucket_errors_as_user_errors(out):
        exists = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if exists:
        raise UserError(f"--out: {out} exists and is not empty: choose another")
    if is_remote(out):
        return None
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            return parent
    except OSError as e:
        raise UserError(f"--out: cannot write into {parent}: {e.strerror}") from e


def check_apart(out: Path, folders: Iterable[Path]) -> None:
    """Before `out` is written from these model directories. UserError: it is one of them, in one, or above
    one: the output would become part of its own source, or replace it."""
    target = absolute_path(out)
    for folder in folders:
        source = absolute_path(folder)
        if target == source:
            where = "exists: it is the directory of a model that is read"
        elif source in target.parents:
            where = f"is inside the directory of a model that is read, {folder}"
        elif target in source.parents:
            where = f"holds the directory of a model that is read, {folder}"
        else:
            continue
        raise UserError(f"--out: {out} {where}: choose a place outside of it")


def check_space(parent: Path | None, size: int) -> None:
    """UserError if the disk of `parent` has no room for `size` bytes."""
    if parent is not None and size > (free := shutil.disk_usage(parent).free):
        raise UserError(
            f"--out: the disk is full: {parent} has {free / 1e9:.1f} GB free, "
            f"the model needs {size / 1e9:.1f} GB"
        )


def combined_sources(chain: list[Path]) -> dict[str, Any]:
    """`sources` of a model's directories together; of equal keys, that nearest to the model."""
    sources: dict[str, Any] = {}
    for folder in reversed(chain):
        sources |= read_model_json(folder).get("sources") or {}
    return sources


def write_complete_model(
    out: Path,
    config: ModelConfig,
    arrays: Arrays,
    origin: Path,
    records: Mapping[str, Any],
    base: Path | None = None,
) -> None:
    """Write a model directory without base, with the tokenizer and sources of `origin`.

    records: added to the sources. base: as for `model_chain`.
    """
    sources = combined_sources(model_chain(origin, base)) | dict(records)
    files = {path.name: path for path in tokenizer_dir(origin, base).iterdir()}
    write_model(out, config, arrays, tokenizer=files, sources=sources)


def with_lora(
    names: list[str],
    tensors: Mapping[str, np.ndarray],
    adapters: Mapping[str, np.ndarray],
    lora: LoraConfig,
    dtype: np.dtype | None,
    *,
    subtract: bool = False,
) -> Arrays:
    """The named tensors, one at a time; W [out, in] + alpha / rank * B A for those with adapters.

    dtype: of the changed matrices, None for float32. subtract: -alpha instead.
    """
    factor = (-1.0 if subtract else 1.0) * lora.alpha / lora.rank
    for name in names:
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_a" not in adapters:
            yield name, tensors[name]
            continue
        a, b = (adapters[f"{stem}.lora_{ab}"] for ab in "ab")
        yield name, np.asarray(merge_lora(tensors[name], a, b, factor), dtype or np.float32)


def refuse_quantized_merge(model_dir: Path, config: ModelConfig) -> None:
    """UserError if the model is quantized, so that LoRA cannot be added to its weights."""
    if config.quantize is not None:
        raise UserError(
            f"{model_dir} is quantized to {config.quantize}, and LoRA cannot be merged into quantized "
            "weights: merge the model it was made from, then quantize with load(quantize=...)"
        )
