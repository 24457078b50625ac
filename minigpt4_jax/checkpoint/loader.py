"""Reading a model directory to devices: each device gets its shard, tensor by tensor."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from minigpt4_jax.checkpoint.adapters import TensorsWithNewLora
from minigpt4_jax.checkpoint.finite_tensors import FiniteTensors
from minigpt4_jax.checkpoint.model_directory import ReadableTensors, Shape, Tensors, read_config
from minigpt4_jax.checkpoint.parameters import (
    ParameterPath,
    abstract_model,
    check_shapes,
    is_stacked,
    layer_names,
    parameter_shapes,
    part_of,
)
from minigpt4_jax.checkpoint.quantized_tensors import QuantizedTensors
from minigpt4_jax.checkpoint.read_ahead import HostArray, read_ahead
from minigpt4_jax.config import QUANTIZATIONS, LoraConfig, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.parallel.sharding import (
    Index,
    devices_have_own_memory,
    make_sharded_array,
    make_sharded_array_in_chunks,
    parameter_sharding,
    replicated,
    shards_to_read,
    single_device_mesh,
)
from minigpt4_jax.quantization.layout import is_grouped, outputs_first, to_memory_layout
from minigpt4_jax.quantization.schemes import FLOAT8, GGUF, holds_levels
from minigpt4_jax.utils.aligned import aligned_empty

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ShapeDtypeStruct: Any = jax.ShapeDtypeStruct  # JAX does not annotate its constructor


def load_model(
    model_dir: Path | str,
    dtype: str = "float32",
    *,
    stacked: bool = True,
    trainable_parts: Collection[str] = (),
    quantize: str | None = None,
    lora: LoraConfig | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    base: Path | str | None = None,
    allow_nonfinite: bool = False,
) -> tuple[MiniGpt, ModelConfig]:
    """Read a model directory into arrays on the devices of a mesh.

    dtype: "float32" or "bfloat16". stacked: the language model's layers as arrays [L, ...] (training),
    else as a list (generation). trainable_parts: parts that are float32 and replicated. quantize: "int8"
    or "int4" (in training also "float8"), for a directory that is not quantized already; each tensor is
    quantized as it is read.
    lora: replaces the directory's own configuration and must have its shapes; a directory without LoRA
    gets new adapters, initialized from the seed. mesh: the devices, with parameters split by the rules
    of parallel/sharding.py; by default the first device. base: the directory of the model's base, instead
    of the recorded one. allow_nonfinite: load NaN and infinity too.
    UserError: the directory is damaged or incomplete, is quantized in another scheme, a trainable part is
    quantized, or a value is NaN or infinite.
    """
    config = loaded_config(model_dir, dtype, quantize=quantize, lora=lora)
    check_trainable(model_dir, config, trainable_parts)
    tensors = open_tensors(model_dir, config, seed, base=base, allow_nonfinite=allow_nonfinite)
    shapes = model_shapes(
        config, DTYPES[dtype], mesh, stacked=stacked, trainable_parts=trainable_parts
    )
    graphdef, state = nnx.split(shapes)
    leaves = nnx.to_flat_state(state)
    arrays = _load_arrays(tensors, [(path, leaf.get_value()) for path, leaf in leaves])
    loaded = [(path, leaf.replace(a)) for (path, leaf), a in zip(leaves, arrays, strict=True)]
    return nnx.merge(graphdef, nnx.from_flat_state(loaded)), config


def loaded_config(
    model_dir: Path | str,
    dtype: str,
    *,
    quantize: str | None = None,
    lora: LoraConfig | None = None,
) -> ModelConfig:
    """The configuration of the model that `load_model` gives. UserError: as there."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    config = _with_quantization(read_config(model_dir), quantize, model_dir)
    return dataclasses.replace(config, lora=lora or config.lora)


def model_shapes(
    config: ModelConfig,
    dtype: Any,
    mesh: Mesh | None = None,
    *,
    stacked: bool = True,
    trainable_parts: Collection[str] = (),
) -> MiniGpt:
    """The model that `load_model` gives, with shapes, dtypes and shardings (jax.ShapeDtypeStruct) instead of
    arrays: enough to compile its programs."""
    mesh = mesh or single_device_mesh()
    graphdef, state = nnx.split(abstract_model(config, stacked=stacked))
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        trainable = part_of(name) in trainable_parts
        leaf_dtype = parameter_dtype(path, jnp.dtype(jnp.float32 if trainable else dtype))
        if holds_levels(leaf.dtype):
            leaf_dtype = leaf.dtype
        if trainable:
            sharding = replicated(mesh)
        else:
            sharding = parameter_sharding(name, leaf.shape, leaf.dtype, config, mesh)
        shape = ShapeDtypeStruct(leaf.shape, leaf_dtype, sharding=sharding)
        leaves.append((path, leaf.replace(shape)))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def open_tensors(
    model_dir: Path | str,
    config: ModelConfig,
    seed: int = 0,
    *,
    base: Path | str | None = None,
    allow_nonfinite: bool = False,
) -> ReadableTensors:
    """The tensors of a model directory as `config` needs them; only names and shapes are read so far.

    If `config` has LoRA and the directory does not, new adapters initialized from the seed are
    included. base: as for `model_chain`. UserError: files are damaged, or parameters are missing or have
    a wrong shape.
    """
    tensors: ReadableTensors = Tensors(model_dir, base)
    if not allow_nonfinite:
        tensors = FiniteTensors(tensors, model_dir)
    if config.quantize not in (None, GGUF):
        tensors = QuantizedTensors(tensors, config.quantize)
    expected = parameter_shapes(config)
    if config.lora is not None and read_config(model_dir).lora is None:
        adapters = {name: s for name, s in expected.items() if part_of(name) == "lora"}
        tensors = TensorsWithNewLora(tensors, adapters, seed)
    check_shapes({name: tensors.shape(name) for name in tensors}, expected, model_dir)
    return tensors


def check_trainable(model_dir: Path | str, config: ModelConfig, parts: Collection[str]) -> None:
    """UserError if one of the parts to be trained is quantized."""
    if config.quantize is not None and (quantized := sorted({"vit", "llm"} & set(parts))):
        raise UserError(
            f"{model_dir} is quantized to {config.quantize}, so {quantized[0]} cannot be trained: "
            "freeze it, or start from a model directory that is not quantized"
        )


def parameter_dtype(path: ParameterPath, dtype: jnp.dtype) -> jnp.dtype:
    """The matrices of frozen parts have `dtype`; norms, biases, the projection and LoRA are float32."""
    # The scale of a quantized matrix has the dtype that its products are computed in.
    name = str(path[-1]).removesuffix("_scale").removesuffix("_offset")
    is_matrix = name == "weight" or (*path[:-1], name) == ("llm", "embed")
    return dtype if is_matrix and path[0] != "projection" else jnp.dtype(jnp.float32)


def _with_quantization(
    config: ModelConfig, quantize: str | None, model_dir: Path | str
) -> ModelConfig:
    """The configuration of the model in memory."""
    if quantize is None or quantize == config.quantize:
        return config
    if quantize not in (*QUANTIZATIONS, FLOAT8):
        raise UserError(f"quantize {quantize!r}: expected one of {', '.join(QUANTIZATIONS)}")
    if config.quantize is not None:
        raise UserError(
            f"quantize {quantize!r}: {model_dir} is stored in {config.quantize}; omit the "
            "option, or convert the model again"
        )
    if config.is_stage1:
        raise UserError(f"quantize {quantize!r}: a {config.variant} model cannot be quantized")
    return dataclasses.replace(config, quantize=quantize)


def _load_arrays(
    tensors: ReadableTensors, parameters: Sequence[tuple[ParameterPath, Any]]
) -> Iterator[jax.Array]:
    """The parameters (path, shape with dtype and sharding) as arrays on their devices, in order.

    Threads read ahead what the devices get next. Only the calling thread uses JAX, because all hosts must
    run its programs in the same order.
    """
    shards = (
        _shard(tensors, path, p.shape, p.dtype, index)
        for path, p in parameters
        for index in shards_to_read(p.shape, p.dtype, p.sharding, in_chunks=_in_chunks(path))
    )
    with contextlib.closing(read_ahead(shards)) as read:
        previous: list[jax.Array] = []
        for path, p in parameters:
            if _in_chunks(path):
                array = make_sharded_array_in_chunks(
                    p.shape, p.dtype, p.sharding, lambda _: next(read)
                )
            else:
                array = make_sharded_array(p.shape, p.sharding, lambda _: next(read))
            # Copies that have begun hold their host arrays, too.
            jax.block_until_ready(previous)
            previous = [array]
            yield array


def _in_chunks(path: ParameterPath) -> bool:
    """Whether a parameter is copied to its devices some layers at a time."""
    return is_stacked(path) and devices_have_own_memory()


def _shard(
    tensors: ReadableTensors, path: ParameterPath, shape: Shape, dtype: jnp.dtype, index: Index
) -> HostArray:
    """The shard `index` of a parameter of this shape, to be read."""
    sizes = [len(range(n)[part]) for n, part in zip(shape, index, strict=True)]
    nbytes = math.prod(sizes) * jnp.dtype(dtype).itemsize
    names = layer_names(path, shape)

    def read_layer(name: str, layer_shape: Shape, part: Index) -> np.ndarray:
        return _read_layer(tensors, name, layer_shape, part).astype(dtype, copy=False)

    def begin() -> list[Callable[[], np.ndarray]]:
        if not is_stacked(path):
            return [partial(read_layer, *names[0], index)]
        out = aligned_empty(tuple(sizes), np.dtype(dtype))

        def fill(i: int, name: str, layer_shape: Shape) -> np.ndarray:
            out[i] = _read_layer(tensors, name, layer_shape, index[1:])
            return out

        return [partial(fill, i, *layer) for i, layer in enumerate(names[index[0]])]

    return HostArray(nbytes, begin)


def _read_layer(tensors: ReadableTensors, name: str, shape: Shape, index: Index) -> np.ndarray:
    """The shard `index` of a parameter of one layer; shape: in memory layout."""
    if not is_grouped(name, len(shape)):
        return tensors.part(name, index)
    first = outputs_first()  # [out, groups, group] or [out, groups], else [groups, group, out] ...
    group_axis, out_axis, group_shape = (1, 0, shape[2:]) if first else (0, -1, shape[1:-1])
    groups, per_group = range(shape[group_axis])[index[group_axis]], math.prod(group_shape)
    columns = slice(groups.start * per_group, groups.stop * per_group)  # whole groups
    stored = tensors.part(name, (index[out_axis], columns))
    if first:
        return to_memory_layout(name, stored, (len(stored), len(groups), *group_shape))
    return to_memory_layout(name, stored, (len(groups), *group_shape, len(stored)))
