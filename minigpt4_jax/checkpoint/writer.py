"""Writing a model directory: model.json, tokenizer/, and one or more safetensors files per part."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, and so with safetensors)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from minigpt4_jax.checkpoint.model_directory import (
    FORMAT,
    Shape,
    base_reference,
    fingerprint,
)
from minigpt4_jax.checkpoint.parameters import check_shapes, parameter_shapes, part_of
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.atomic import AtomicDirectory, atomic_directory, write_error
from minigpt4_jax.storage.paths import is_remote, parse_path, wrap_storage_errors

SHARD_BYTES = 1 << 30  # size of a file; host memory is one file and one tensor


def write_model(
    out: Path | str,
    config: ModelConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    tokenizer: Mapping[str, Path | bytes] | None = None,
    sources: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    base: Path | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model directory atomically; `tensors` is consumed one at a time.

    tokenizer: file name -> path or content, copied to tokenizer/. sources: recorded in model.json; a
    function is called after all tensors have been written. base: the directory with the parts that are
    not given here. UserError: `out` exists, the disk is full or not writable, or parameters have a wrong
    shape or (without a base) are missing; one message names all of them.
    """
    out = parse_path("model directory", out)
    document = {"format": FORMAT, "config": config.to_dict(), "sources": {}}
    if base is not None:
        document |= {"base": base_reference(base, out), "base_fingerprint": fingerprint(base)}
    try:
        with atomic_directory(out, "model.json") as directory, wrap_storage_errors(out):
            if not overwrite and out.exists() and not (out.is_dir() and not any(out.iterdir())):
                raise UserError(f"{out} exists and is not empty: choose another --out")
            shapes = _write_shards(directory, tensors)
            check_shapes(shapes, parameter_shapes(config), out, partial=base is not None)
            _write_tokenizer(directory.path / "tokenizer", tokenizer or {})
            document["sources"] = dict((sources() if callable(sources) else sources) or {})
            (directory.path / "model.json").write_text(json.dumps(document, indent=1) + "\n")
    except (OSError, SafetensorError) as e:
        remote = is_remote(out)
        note = "it is no model without model.json" if remote else "nothing was written"
        raise write_error(out, e, note) from e
    return out


def _write_tokenizer(directory: Path, files: Mapping[str, Path | bytes]) -> None:
    if files:
        directory.mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            shutil.copyfile(content, directory / name)


def _write_shards(
    directory: AtomicDirectory, tensors: Iterable[tuple[str, np.ndarray]]
) -> dict[str, Shape]:
    """Write tensors in the order they come, a file per SHARD_BYTES of a part. Returns name -> shape."""
    pending: dict[str, dict[str, np.ndarray]] = {}  # part -> tensors of its next file
    counts: dict[str, int] = {}  # part -> files written
    shapes: dict[str, Shape] = {}

    def flush(part: str) -> None:
        counts[part] = counts.get(part, 0) + 1
        path = directory.path / f"{part}-{counts[part]:05d}.safetensors"
        save_file(pending.pop(part), path)
        path.chmod(0o644)  # safetensors makes files readable by the owner only
        directory.finish_file(path)

    for name, array in tensors:
        part = part_of(name)
        shapes[name] = array.shape
        group = pending.setdefault(part, {})
        group[name] = np.ascontiguousarray(array)
        if sum(a.nbytes for a in group.values()) >= SHARD_BYTES:
            flush(part)
    for part in list(pending):
        flush(part)
    return shapes
