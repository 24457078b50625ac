"""python -m convert build: released checkpoints -> one model directory.

All names and shapes are checked first (build_plan.py); then tensors are read one at a time.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.blip2_plan import make_blip2_plan
from convert.build_plan import BuildPlan, BuildRequest, make_plan
from convert.downloads import download_inputs
from convert.formats.files import HashedFile
from convert.formats.gguf_blocks import repack
from convert.formats.tensors import DTYPES
from convert.initialize import initial_qformer
from convert.output import check_output, check_space
from convert.validate import FLOATS
from minigpt4_jax.checkpoint.adapters import initial_lora
from minigpt4_jax.checkpoint.finite_tensors import check_finite
from minigpt4_jax.checkpoint.parameters import part_of
from minigpt4_jax.checkpoint.quantized_tensors import quantize_tensors
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import BLIP2_VARIANTS, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.quantization.schemes import BlockFormat, matrix_scheme, quantized_shapes
from minigpt4_jax.storage.hub import source_record
from minigpt4_jax.storage.paths import parse_path
from minigpt4_jax.utils.finite import count_nonfinite

Shape = tuple[int, ...]


def build(request: BuildRequest) -> BuildPlan:
    """Write the model directory request.out atomically. UserError when that is impossible."""
    started = time.monotonic()
    request = replace(request, out=parse_path("--out", request.out))
    parent = check_output(request.out)
    make = make_blip2_plan if request.variant in BLIP2_VARIANTS else make_plan
    plan = make(download_inputs(request))
    dtypes = {name: _stored_dtype(plan, name, request.llm_dtype) for name in plan.shapes}
    size = sum(_stored_size(n, s, dtypes[n], plan.stored_config) for n, s in plan.shapes.items())
    check_space(parent, size)
    tensors = _tensors(plan, dtypes, request)
    config = plan.stored_config
    if config.quantize is not None:
        tensors = quantize_tensors(tensors, config.quantize, config.kept)
    write_model(
        request.out,
        config,
        tensors,
        tokenizer=plan.tokenizer.files,
        sources=lambda: _origins(plan),  # after the files were read, which hashes them
    )
    for note in plan.notes:
        print(f"note: {note}")
    count = sum(math.prod(shape) for shape in plan.shapes.values())
    print(
        f"wrote {request.out}: {plan.config.variant}, {count:,} parameters, {size / 1e9:.2f} GB "
        f"in {time.monotonic() - started:.0f} s"
    )
    return plan


def _stored_dtype(plan: BuildPlan, name: str, llm_dtype: str | None) -> np.dtype:
    """float32 for new parameters, resampled position embeddings and float64; else the source's."""
    if name in plan.new_parameters:
        return DTYPES["float32"]
    if llm_dtype and part_of(name) == "llm" and len(plan.shapes[name]) > 1:
        return DTYPES[llm_dtype]
    tensor = plan.sources[name].tensor
    resampled = name == "vit.pos" and tensor.shape[-2:] != plan.shapes[name]
    return tensor.dtype if tensor.dtype.name in FLOATS and not resampled else DTYPES["float32"]


def _stored_size(name: str, shape: Shape, dtype: np.dtype, config: ModelConfig) -> int:
    """Upper bound of a parameter's bytes in the directory, with its scale and offset."""
    scheme = matrix_scheme(name, config.quantize, shape[-1], config.kept)
    if scheme is None:
        return math.prod(shape) * dtype.itemsize
    if block_format := BlockFormat.parse(scheme):
        levels_size, *scale_sizes = (math.prod(s) for s in block_format.shapes(shape).values())
        return levels_size + 4 * sum(scale_sizes)
    levels, scale = quantized_shapes(shape, scheme)
    return math.prod(levels) + 2 * math.prod(scale)


def _tensors(
    plan: BuildPlan, dtypes: dict[str, np.dtype], request: BuildRequest
) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter, in the order of the files."""
    from tqdm import tqdm

    rng = np.random.default_rng(request.seed)
    for name in sorted(plan.new_parameters):
        scale = request.projection_scale if part_of(name) == "projection" else 1.0
        yield name, np.float32(scale) * _initialize(name, plan.shapes, rng)
    config = plan.stored_config
    sources = sorted(plan.sources.items(), key=lambda item: item[1].tensor.position)
    total = sum(source.tensor.nbytes for _, source in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        for name, source in sources:
            tensor, transform, shape = source.tensor, source.transform, plan.shapes[name]
            scheme = matrix_scheme(name, config.quantize, shape[-1], config.kept)
            block_format = BlockFormat.parse(scheme or "")
            if block_format and tensor.blocks:
                arrays = repack(tensor.blocks.load(), block_format)
                for suffix, array in arrays.items():
                    if not request.allow_nonfinite:  # of the scales and offsets
                        check_finite(array, source.label)
                    # a language model's transforms move whole rows, of scales and offsets as well
                    yield name + suffix, transform.apply(array, array.shape)
            else:
                stored = transform.apply(tensor.load(), shape)
                with np.errstate(over="ignore"):  # infinities are refused by name
                    array = stored.astype(dtypes[name], copy=False)
                if not request.allow_nonfinite:
                    _check_cast(array, stored, source.label)
                yield name, array
            bar.update(tensor.nbytes)


def _check_cast(array: np.ndarray, stored: np.ndarray, label: str) -> None:
    """UserError: values are NaN or infinite in the file, or too large for the dtype they are cast to."""
    if count := count_nonfinite(array):
        check_finite(stored, label)
        hint = "choose --llm-dtype=bfloat16" if array.dtype == np.float16 else "the file is damaged"
        raise UserError(
            f"{label}: {count:,} of {array.size:,} values are too large for {array.dtype}; {hint} "
            "(--allow-nonfinite makes them infinite)"
        )


def _initialize(name: str, shapes: dict[str, Shape], rng: np.random.Generator) -> np.ndarray:
    """Initial values: projection as torch.nn.Linear, LoRA as peft, norms as the identity, the
    Q-Former as BERT."""
    shape = shapes[name]
    if part_of(name) == "qformer":
        return initial_qformer(name, shapes, rng)
    if part_of(name) == "lora":
        return initial_lora(name, shape, rng)
    if name.startswith("ln_vision."):
        return np.full(shape, name.endswith("scale"), np.float32)
    n_in = shapes[name.rpartition(".")[0] + ".weight"][-1]
    return rng.uniform(-(n_in**-0.5), n_in**-0.5, shape).astype(np.float32)


def _origins(plan: BuildPlan) -> dict[str, Any]:
    """`sources` of model.json: the file and SHA-256 behind each option."""
    origins = {
        c.option.removeprefix("--"): c.reader.origin() | c.recorded for c in plan.checkpoints
    }
    for name, origin in plan.special_origins.items():
        origins[name] = origin() if callable(origin) else origin
    if any(part_of(name) == "lora" for name in plan.new_parameters):
        origins["lora"] = {"file": None, "note": "new, not trained"}
    digests = {
        name: HashedFile(content).sha256()
        for name, content in plan.tokenizer.files.items()
        if isinstance(content, Path)
    }
    origin = plan.tokenizer.origin
    origins["tokenizer"] = {"file": origin, "files": digests, **source_record([origin])}
    return origins
