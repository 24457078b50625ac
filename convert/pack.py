"""python -m convert pack: a model and the models it is based on as one directory that can be moved.

Training writes only what it trained, and the path of the model it started from. `pack` copies the tensors of
all of them, one at a time.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.formats.tensors import DTYPES
from convert.output import (
    Arrays,
    check_apart,
    check_output,
    check_space,
    refuse_quantized_merge,
    with_lora,
    write_complete_model,
)
from minigpt4_jax.checkpoint.finite_tensors import FiniteTensors, check_finite
from minigpt4_jax.checkpoint.loader import parameter_dtype
from minigpt4_jax.checkpoint.model_directory import (
    ReadableTensors,
    Tensors,
    model_chain,
    read_config,
)
from minigpt4_jax.checkpoint.parameters import check_shapes, parameter_shapes, part_of
from minigpt4_jax.config import LoraConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.paths import parse_path
from minigpt4_jax.storage.safetensors_header import DTYPES as STORED_DTYPES


def pack(
    model_dir: Path,
    out: Path,
    *,
    base: Path | None = None,
    merge: bool = False,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write `model_dir` with everything it is based on to `out`, atomically.

    base: the directory of its base, if that is no longer where model.json says. merge: add LoRA to the
    weights. dtype: of the frozen parts' matrices; by default they stay as they are, and merged ones
    are float32. UserError: a directory is missing or damaged, LoRA cannot be merged, `out` exists or is in
    one of the directories that are read, or values are NaN or infinite (unless allow_nonfinite).
    """
    out = parse_path("--out", out)
    config = read_config(model_dir)
    if merge and config.lora is None:
        raise UserError(f"--merge-lora: {model_dir} has no LoRA")
    if merge:
        refuse_quantized_merge(model_dir, config)
    if dtype is not None and config.quantize is not None:
        raise UserError(f"--dtype: {model_dir} is quantized to {config.quantize}; omit the option")
    check_apart(out, model_chain(model_dir, base))
    parent = check_output(out)
    stored = Tensors(model_dir, base)
    shapes = {name: stored.shape(name) for name in stored}
    check_shapes(shapes, parameter_shapes(config), model_dir)
    names = [name for name in sorted(stored) if not (merge and part_of(name) == "lora")]
    merged = merged_names(names, stored) if merge else frozenset()
    target = {name: _target_dtype(name, stored, name in merged, dtype) for name in names}
    size = sum(math.prod(shapes[n]) * target[n].itemsize for n in names)
    check_space(parent, size)
    tensors: ReadableTensors = stored if allow_nonfinite else FiniteTensors(stored, model_dir)
    arrays = _arrays(names, tensors, config.lora if merge else None, target, allow_nonfinite)
    records = {"packed": {"file": str(model_dir)}}
    if merge:
        records["merged"] = {"file": str(model_dir)}
    new_config = dataclasses.replace(config, lora=None) if merge else config
    write_complete_model(out, new_config, _with_progress(arrays, size), model_dir, records, base)
    lora = ""
    if config.lora is not None:
        lora = f", LoRA on {', '.join(config.lora.targets)} {'merged' if merge else 'kept'}"
    print(f"wrote {out}: {len(names):,} tensors, {size / 1e9:.2f} GB{lora}")


def merged_names(names: Iterable[str], tensors: ReadableTensors) -> frozenset[str]:
    """The names of the matrices that LoRA is added to."""
    return frozenset(n for n in names if f"{n.removesuffix('.weight')}.lora_a" in tensors)


def _target_dtype(name: str, stored: Tensors, is_merged: bool, dtype: str | None) -> np.dtype:
    """The dtype that a parameter is written in."""
    # The same parameters that load(dtype="bfloat16") rounds; the others stay float32 in memory.
    is_matrix = parameter_dtype(tuple(name.split(".")), jnp.dtype(jnp.bfloat16)) == jnp.bfloat16
    if dtype is not None and is_matrix:
        return DTYPES[dtype]
    return DTYPES["float32"] if is_merged else STORED_DTYPES[stored.dtype(name)]


def _arrays(
    names: list[str],
    tensors: ReadableTensors,
    lora: LoraConfig | None,
    target: dict[str, np.dtype],
    allow_nonfinite: bool,
) -> Arrays:
    """The tensors as they are written. lora: is added to the weights."""
    arrays: Arrays = ((name, tensors[name]) for name in names)
    if lora is not None:
        arrays = with_lora(names, tensors, tensors, lora, None)
    for name, array in arrays:
        if array.dtype != target[name]:
            with np.errstate(over="ignore"):  # an overflow is an infinity, which is refused by name
                array = array.astype(target[name])
            if not allow_nonfinite:
                check_finite(array, f"{name} in {target[name].name}")
        yield name, array


def _with_progress(arrays: Arrays, total: int) -> Arrays:
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="packing", disable=None) as bar:
        for name, array in arrays:
            yield name, array
            bar.update(array.nbytes)
