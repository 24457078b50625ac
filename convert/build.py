"""python -m convert build: released checkpoints -> one model directory.

Everything is checked by names and shapes first (plan.py); then tensors are read, one at a time.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.build_plan import BuildPlan, Request, make_plan
from convert.formats.files import HashedFile
from convert.formats.gguf_blocks import packed
from convert.formats.tensors import DTYPES
from convert.validate import FLOATS
from minigpt4_jax.checkpoint.adapters import first_values
from minigpt4_jax.checkpoint.model_directory import looking
from minigpt4_jax.checkpoint.weights import part_of, write_model
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.quantization.schemes import BlockFormat, quantized, quantized_shapes, scheme_of
from minigpt4_jax.storage.paths import is_remote, parse_path

Shape = tuple[int, ...]


def build(request: Request) -> BuildPlan:
    """Make the model directory request.out, whole or not at all. UserError when it cannot be."""
    started = time.monotonic()
    request = replace(request, out=parse_path("--out", request.out))
    parent = _check_output(request.out)
    plan = make_plan(request)
    types = {name: _stored_type(plan, name, request.llm_dtype) for name in plan.wanted}
    size = sum(_stored_size(n, s, types[n], plan.held) for n, s in plan.wanted.items())
    if parent is not None and size > (free := shutil.disk_usage(parent).free):
        raise UserError(
            f"--out: the disk is full: {parent} has {free / 1e9:.1f} GB free, "
            f"the model needs {size / 1e9:.1f} GB"
        )
    record: dict[str, Any] = {}
    tensors = _tensors(plan, types, request, record)
    if plan.held.quantize is not None:
        tensors = quantized(tensors, plan.held.quantize, plan.held.kept)
    files = plan.language.tokenizer
    write_model(request.out, plan.held, tensors, tokenizer=files, sources=record)
    for note in plan.notes:
        print(f"note: {note}")
    count = sum(math.prod(shape) for shape in plan.wanted.values())
    print(
        f"wrote {request.out}: {plan.config.variant}, {count:,} parameters, {size / 1e9:.2f} GB "
        f"in {time.monotonic() - started:.0f} s"
    )
    return plan


def _check_output(out: Path) -> Path | None:
    """The directory that exists above `out`; None in a bucket. UserError when `out` cannot become a
    new one."""
    with looking(out):
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if taken:
        raise UserError(f"--out: {out} exists and is not empty: choose another or remove it first")
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


def _stored_type(plan: BuildPlan, name: str, llm_dtype: str | None) -> np.dtype:
    """Tensors keep their type; new ones, interpolated positions and float64 are float32."""
    if name in plan.fresh:
        return DTYPES["float32"]
    source, m = plan.origin[name]
    if llm_dtype and part_of(name) == "llm" and len(plan.wanted[name]) > 1:
        return DTYPES[llm_dtype]
    tensor = source.reader.tensors[m.key]
    resampled = name == "vit.pos" and tensor.shape[-2:] != plan.wanted[name]
    return tensor.dtype if tensor.dtype.name in FLOATS and not resampled else DTYPES["float32"]


def _stored_size(name: str, shape: Shape, dtype: np.dtype, held: ModelConfig) -> int:
    """Bytes of a parameter in the directory, its scale and offset included, at most."""
    kind = scheme_of(name, held.quantize, shape[-1], held.kept)
    if kind is None:
        return math.prod(shape) * dtype.itemsize
    if kept := BlockFormat.parse(kind):
        sizes = [math.prod(s) for s in kept.shapes(shape).values()]
        return sizes[0] + 4 * sum(sizes[1:])
    levels, scale = quantized_shapes(shape, kind)
    return math.prod(levels) + 2 * math.prod(scale)


def _tensors(
    plan: BuildPlan, types: dict[str, np.dtype], request: Request, record: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter, in the order of the files; in the end `record` says where they came from."""
    from tqdm import tqdm

    rng = np.random.default_rng(request.seed)
    for name in sorted(plan.fresh):
        scale = request.projection_scale if part_of(name) == "projection" else 1.0
        yield name, np.float32(scale) * _fresh(name, plan.wanted, rng)
    todo = [
        (name, source, m, source.reader.tensors[m.key]) for name, (source, m) in plan.origin.items()
    ]
    todo.sort(key=lambda item: item[3].order)
    total = sum(tensor.nbytes for *_, tensor in todo)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        for name, _, m, tensor in todo:
            kind = scheme_of(name, plan.held.quantize, plan.wanted[name][-1], plan.held.kept)
            kept = BlockFormat.parse(kind or "")
            if kept and tensor.blocks:
                for suffix, part in packed(tensor.blocks[1](), kept).items():
                    # the transforms of a language model move whole rows, which is as true of these
                    yield name + suffix, m.transform.apply(part, part.shape)
            else:
                array = m.transform.apply(tensor.load(), plan.wanted[name])
                yield name, array.astype(types[name], copy=False)
            bar.update(tensor.nbytes)
    record |= _record(plan)


def _fresh(name: str, wanted: dict[str, Shape], rng: np.random.Generator) -> np.ndarray:
    """The projection as torch.nn.Linear begins, LoRA as peft does, ln_vision as the identity."""
    shape = wanted[name]
    if part_of(name) == "lora":
        return first_values(name, shape, rng)
    if name.startswith("ln_vision."):
        return np.full(shape, name.endswith("scale"), np.float32)
    n_in = wanted["projection.weight" if name == "projection.bias" else name][-1]
    return rng.uniform(-(n_in**-0.5), n_in**-0.5, shape).astype(np.float32)


def _record(plan: BuildPlan) -> dict[str, Any]:
    """What each option gave (file and SHA-256), for model.json."""
    record = {s.option.removeprefix("--"): s.reader.origin() for s in plan.sources.all()}
    if plan.sources.qformer is plan.sources.vision:
        record["qformer"] = record["vision"]
    if plan.sources.checkpoint is None:
        record["checkpoint"] = {"file": None, "note": "new projection, not trained"}
    if any(part_of(name) == "lora" for name in plan.fresh):
        record["lora"] = {"file": None, "note": "new, not trained"}
    files = {
        n: HashedFile(c).sha256() for n, c in plan.language.tokenizer.items() if isinstance(c, Path)
    }
    record["tokenizer"] = {"file": plan.language.tokenizer_origin, "files": files}
    return record
