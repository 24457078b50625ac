"""The model directory: model.json, tokenizer/, and one or more safetensors files a part.

A directory written by training holds the trained parts alone and names its `base`, from which the
rest is read. Names are dotted parameter paths, one tensor a layer: `llm.blocks.3.attn.q.weight`.
"""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches NumPy, and so safetensors, bfloat16)
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import save_file

from minigpt4_jax.checkpoint.adapters import WithNewLora
from minigpt4_jax.checkpoint.model_directory import FORMAT, Tensors, read_config
from minigpt4_jax.config import QUANTIZATIONS, LoraConfig, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.llm import unstack
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.parallel.sharding import (
    one_device,
    parameter_sharding,
    placed,
    placed_in_parts,
    replicated,
    takes_parts,
)
from minigpt4_jax.quantization.schemes import (
    GGUF,
    QuantizedView,
    as_held,
    as_stored,
    is_turned,
    stored_shape,
)
from minigpt4_jax.storage.atomic import AtomicDirectory, atomic_directory, write_error
from minigpt4_jax.storage.paths import is_remote, parse_path, relative_path, wrap_storage_errors

SHARD_BYTES = 1 << 30  # host memory while writing: one shard and one tensor
STACKED = (("vit", "blocks"), ("llm", "blocks"))  # parameters with a leading layer axis
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def part_of(name: str) -> str:
    """The part, and so the file, a parameter belongs to: vit, qformer, projection, lora or llm."""
    if ".lora_" in name:
        return "lora"
    head = name.split(".", 1)[0]
    return "vit" if head == "ln_vision" else head


def abstract_model(config: ModelConfig, *, stacked: bool = True) -> MiniGpt:
    """The model with shapes instead of arrays. stacked=False: the language model's layers in a list."""

    def make() -> MiniGpt:
        model = MiniGpt(config, nnx.Rngs(0))
        if not stacked:
            model.llm = unstack(model.llm)
        return model

    return nnx.eval_shape(make)


@functools.cache
def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a whole model directory holds."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(config))):
        for name, shape in _layer_names(path, leaf.shape):
            shapes[name] = stored_shape(name, shape)
    return shapes


def _is_stacked(path: tuple) -> bool:
    """Whether the parameter has a leading axis of layers."""
    return path[:2] in STACKED and not isinstance(path[2], int)


def _layer_names(path: tuple, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    if not _is_stacked(path):
        return [(".".join(map(str, path)), shape)]
    rest = ".".join(map(str, path[2:]))
    return [(f"{path[0]}.{path[1]}.{i}.{rest}", shape[1:]) for i in range(shape[0])]


def tensors_of(state: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(name, host array) of every parameter in an nnx state, stacked layers taken apart."""
    for path, leaf in nnx.to_flat_state(state):
        value = np.asarray(leaf.get_value())
        names = _layer_names(path, value.shape)
        stacked = len(names) > 1 or names[0][1] != value.shape
        for i, (name, _) in enumerate(names):
            yield name, np.ascontiguousarray(as_stored(name, value[i] if stacked else value))


# --- writing --------------------------------------------------------------------------------


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
    """Write a model directory, whole or not at all; `tensors` is consumed one at a time.

    tokenizer: file name -> path or content, copied to tokenizer/. sources: recorded in model.json; a
    function is called when all tensors have been written. base: directory that holds the
    parts not given here. UserError: `out` is taken, the disk is full or not writable, or (without
    a base) a parameter is missing or has a wrong shape; all such are named in one message.
    """
    out = parse_path("model directory", out)
    document = {"format": FORMAT, "config": config.to_dict(), "sources": {}}
    if base is not None:
        document["base"] = relative_path(base, out)
    try:
        with atomic_directory(out, "model.json") as directory, wrap_storage_errors(out):
            if not overwrite and out.exists() and not (out.is_dir() and not any(out.iterdir())):
                raise UserError(
                    f"{out} exists and is not empty: choose another --out or remove it first"
                )
            written = _write_shards(directory, tensors)
            _check_shapes(written, parameter_shapes(config), out, partial=base is not None)
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
) -> dict[str, tuple[int, ...]]:
    """Write tensors as they come, a file whenever a part has gathered SHARD_BYTES."""
    waiting: dict[str, dict[str, np.ndarray]] = {}
    counts: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def flush(part: str) -> None:
        counts[part] = counts.get(part, 0) + 1
        path = directory.path / f"{part}-{counts[part]:05d}.safetensors"
        save_file(waiting.pop(part), path)
        path.chmod(0o644)  # safetensors leaves files for the owner alone
        directory.finish_file(path)

    for name, array in tensors:
        part = part_of(name)
        shapes[name] = array.shape
        group = waiting.setdefault(part, {})
        group[name] = np.ascontiguousarray(array)
        if sum(a.nbytes for a in group.values()) >= SHARD_BYTES:
            flush(part)
    for part in list(waiting):
        flush(part)
    return shapes


def _check_shapes(
    have: Mapping[str, tuple[int, ...]],
    want: Mapping[str, tuple[int, ...]],
    where: Path | str,
    *,
    partial: bool,
) -> None:
    problems = [f"{n}: unknown parameter" for n in have if n not in want]
    problems += [
        f"{n}: shape {tuple(have[n])}, expected {tuple(want[n])}"
        for n in have
        if n in want and tuple(have[n]) != tuple(want[n])
    ]
    if not partial:
        problems += [f"{n}: missing" for n in want if n not in have]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"{where}: the parameters do not make this model: {'; '.join(problems[:8])}{more}"
        )


# --- reading --------------------------------------------------------------------------------


def check_tensors(model_dir: Path | str, config: ModelConfig, seed: int = 0) -> Any:
    """The tensors of a model directory, of which only names and shapes were read so far. Where
    `config` has LoRA and the directory's has none, new adapters that depend on the seed are among
    them. UserError for files that are damaged or cut, and for parameters that are missing or of a
    wrong shape."""
    tensors = _in_scheme(Tensors(model_dir), config)
    wanted = parameter_shapes(config)
    if config.lora is not None and read_config(model_dir).lora is None:
        adapters = {name: s for name, s in wanted.items() if part_of(name) == "lora"}
        tensors = WithNewLora(tensors, adapters, seed)
    shapes = {name: tensors.shape(name) for name in tensors}
    _check_shapes(shapes, wanted, model_dir, partial=False)
    return tensors


def check_masters(model_dir: Path | str, config: ModelConfig, masters: Collection[str]) -> None:
    """UserError when a part that is to be trained is quantized."""
    if config.quantize is not None and (rounded := sorted({"vit", "llm"} & set(masters))):
        raise UserError(
            f"{model_dir} is in {config.quantize}, so {rounded[0]} cannot be trained: leave it "
            "frozen, or start from a model directory that is not quantized"
        )


def parameter_dtype(path: tuple, dtype: jnp.dtype) -> jnp.dtype:
    """Matrices of frozen parts take `dtype`; norms, biases, projection and LoRA are float32."""
    # the scale of a quantized matrix says what it computes in
    name = str(path[-1]).removesuffix("_scale").removesuffix("_offset")
    matrix = name == "weight" or (*path[:-1], name) == ("llm", "embed")
    return dtype if matrix and path[0] != "projection" else jnp.dtype(jnp.float32)


def load_model(
    model_dir: Path | str,
    dtype: str = "float32",
    *,
    stacked: bool = True,
    masters: Collection[str] = (),
    quantize: str | None = None,
    lora: LoraConfig | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> tuple[MiniGpt, ModelConfig]:
    """Read a model directory into arrays, for each device what it is to hold, tensor by tensor.

    dtype: "float32" or "bfloat16". stacked: layers of the language model as one array [L, ...]
    (training), else as a list (generation). masters: parts that stay float32 because they are
    trained. quantize: "int8" or "int4", for a directory that is not quantized already; each tensor
    is rounded as it is read. lora: in place of the directory's own, which it must fit; a directory
    without LoRA gets new adapters, which depend on the seed. mesh: where the arrays go, each of
    them split as minigpt4_jax.parallel.sharding says and `masters` whole on every device; by default the
    first device. UserError for a damaged or incomplete directory, for another scheme than the
    directory is in, and for masters that are quantized.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    config = _with_scheme(read_config(model_dir), quantize, model_dir)
    config = dataclasses.replace(config, lora=lora or config.lora)
    check_masters(model_dir, config, masters)
    tensors = check_tensors(model_dir, config, seed)
    mesh = mesh or one_device()

    def sharding(name: str, leaf: Any, exact: bool) -> NamedSharding:
        if exact:
            return replicated(mesh)
        return parameter_sharding(name, leaf.shape, leaf.dtype, config, mesh)

    graphdef, state = nnx.split(abstract_model(config, stacked=stacked))
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        exact = part_of(".".join(map(str, path))) in masters
        kind = parameter_dtype(path, jnp.dtype(jnp.float32 if exact else DTYPES[dtype]))
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            kind = leaf.dtype
        where = sharding(".".join(map(str, path)), leaf, exact)
        read = partial(_read, tensors, path, leaf.shape, kind)
        if _is_stacked(path) and takes_parts():
            array = placed_in_parts(leaf.shape, kind, where, read)
        else:
            array = placed(leaf.shape, where, read)
        filled.append((path, leaf.replace(array)))
    return nnx.merge(graphdef, nnx.from_flat_state(filled)), config


def _with_scheme(config: ModelConfig, quantize: str | None, model_dir: Path | str) -> ModelConfig:
    """The configuration of the model as it is to be held."""
    if quantize is None or quantize == config.quantize:
        return config
    if quantize not in QUANTIZATIONS:
        raise UserError(f"quantize {quantize!r}: expected one of {', '.join(QUANTIZATIONS)}")
    if config.quantize is not None:
        raise UserError(
            f"quantize {quantize!r}: {model_dir} is stored in {config.quantize}; leave the option "
            "out, or convert the model again"
        )
    return dataclasses.replace(config, quantize=quantize)


def _in_scheme(tensors: Tensors, config: ModelConfig) -> Any:
    """The same tensors as a model of this configuration holds them."""
    if config.quantize in (None, GGUF):
        return tensors
    return QuantizedView(tensors, config.quantize)


def _read(
    tensors: Any, path: tuple, shape: tuple[int, ...], dtype: jnp.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of a parameter of this shape."""
    names = _layer_names(path, shape)
    if len(names) == 1 and names[0][1] == shape:
        return _part(tensors, names[0][0], shape, index).astype(dtype, copy=False)
    layers, rest = names[index[0]], index[1:]
    sizes = (len(range(n)[part]) for n, part in zip(shape[1:], rest, strict=True))
    out = _aligned((len(layers), *sizes), np.dtype(dtype))
    for i, (name, layer) in enumerate(layers):
        out[i] = _part(tensors, name, layer, rest)
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes as its own without a copy, as it begins at a multiple of 64."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _part(tensors: Any, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a parameter (of one layer) as it is held, in this shape."""
    if not is_turned(name, len(shape)):
        return tensors.part(name, index)
    groups, each = range(shape[0])[index[0]], math.prod(shape[1:-1])  # no group is taken apart
    columns = slice(groups.start * each, groups.stop * each)
    stored = tensors.part(name, (index[-1], columns))
    return as_held(name, stored, (len(groups), *shape[1:-1], len(stored)))
