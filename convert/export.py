"""python -m convert export: writes the trained weights as a .pth file of the original.

The file is what torch.save writes for {"model": {key: tensor}}: a zip with a pickle, written here
opcode by opcode, and the tensors' data. torch.load reads it, also with weights_only=True.
"""

import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from convert.blip2_keys import LAVIS_TABLES
from convert.formats.tensors import contiguous
from convert.key_mapping import FINE_TUNED, original_key
from convert.output import check_apart
from minigpt4_jax.checkpoint.finite_tensors import FiniteTensors
from minigpt4_jax.checkpoint.model_directory import (
    ReadableTensors,
    Tensors,
    model_chain,
    read_config,
)
from minigpt4_jax.checkpoint.parameters import part_of
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.atomic import atomic_file, write_error
from minigpt4_jax.storage.paths import parse_local_path, parse_path

Load = Callable[[], np.ndarray]
Shape = tuple[int, ...]


def export(
    model_dir: Path,
    out: Path,
    *,
    base: Path | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> list[str]:
    """Write projection, LoRA and whatever else was trained to `out`, atomically; returns the keys.

    base: the directory of the model's base, if that is no longer where model.json says.
    UserError: `model_dir` is not a model directory, values are NaN or infinite (unless allow_nonfinite),
    `out` exists (unless overwrite), is in a directory of the model, or cannot be written.
    """
    model_dir, out = parse_path("model directory", model_dir), parse_local_path("--out", out)
    if out.is_dir():
        raise UserError(
            f"--out: {out} is a directory; expected a file name such as checkpoint.pth "
            "(--format=huggingface writes a directory)"
        )
    chain = model_chain(model_dir, base)
    check_apart(out, chain)
    if out.exists() and not overwrite:
        raise UserError(
            f"--out: {out} exists: choose another name, or give --overwrite to replace it"
        )
    config = read_config(model_dir)
    tensors = Tensors(model_dir, base)
    table = LAVIS_TABLES.get(config.variant, FINE_TUNED)
    trained: dict[str, Load] = {}
    for name in sorted(_trained_names(chain[-1], tensors, config)):
        key = original_key(table, name)
        if key is None:
            raise UserError(
                f"{model_dir}: {name} was trained, but the original's format has no key for it"
            )
        shape = original_shape(name, tensors.shape(name), config)
        source = tensors if allow_nonfinite else FiniteTensors(tensors, model_dir)
        trained[key] = partial(_load, source, name, shape)
    write_torch(out, trained)
    print(f"wrote {out}: {len(trained)} tensors, {out.stat().st_size / 1e6:.1f} MB")
    return list(trained)


def _trained_names(base: Path, tensors: Tensors, config: ModelConfig) -> set[str]:
    """Projection, LoRA, and all tensors that training wrote into a directory of its own; of BLIP-2 also
    the Q-Former and ln_vision, which its training saves. base: the last directory of the chain."""
    parts = ("projection", "lora", "qformer") if config.image_first else ("projection", "lora")
    names = {n for n in tensors if part_of(n) in parts}
    if config.image_first:
        names |= {n for n in tensors if n.startswith("ln_vision.")}
    return names | {n for n in tensors if tensors.path(n).parent != base}


def _load(tensors: ReadableTensors, name: str, shape: Shape) -> np.ndarray:
    return tensors[name].reshape(shape)


def original_shape(name: str, shape: Shape, config: ModelConfig) -> Shape:
    """The shape in the original, where patch embeddings are a convolution and some tensors have
    leading axes of length 1."""
    if name == "vit.patch.weight":
        return (shape[0], 3, config.vision.patch_size, config.vision.patch_size)
    if name == "qformer.temperature":
        return ()
    leading = {"vit.cls": (1, 1), "vit.pos": (1,), "qformer.query": (1,)}
    return (*leading.get(name, ()), *shape)


# --- torch's file format --------------------------------------------------------------------------

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
_ALIGNMENT = 64


def write_torch(out: Path, tensors: Mapping[str, Load]) -> None:
    """Write {"model": {key: tensor}} to a .pth atomically, with one tensor in memory at a time."""
    try:
        with atomic_file(out) as temporary, temporary.open("wb") as file:
            _write_zip(file, out.stem, tensors)
    except OSError as e:
        raise write_error(out, e, "nothing was written") from e


def _write_zip(file: IO[bytes], stem: str, tensors: Mapping[str, Load]) -> None:
    entries = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes) -> None:
            """Add an uncompressed file whose data is aligned, so that torch can memory-map it."""
            # ZipInfo's default date is fixed, so that equal weights give equal files
            entry = zipfile.ZipInfo(f"{stem}/{name}")
            start = file.tell() + 30 + len(entry.filename.encode()) + 4
            padding = -start % _ALIGNMENT
            entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            archive.writestr(entry, data)

        for i, (key, load) in enumerate(tensors.items()):
            array = np.asarray(load(), order="C")
            if array.dtype.name not in _STORAGES:
                raise UserError(f"{key}: cannot export dtype {array.dtype.name}")
            add(f"data/{i}", array.tobytes())
            entries.append((key, array.dtype.name, array.shape))
        add("data.pkl", _pickle(entries))
        add("byteorder", b"little")
        add("version", b"3\n")


def _pickle(entries: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Protocol 2 of {"model": {key: _rebuild_tensor_v2(storage, 0, shape, stride, ...)}}."""
    out = [b"\x80\x02}", _text("model"), b"}"]
    for i, (key, dtype, shape) in enumerate(entries):
        count = int(np.prod(shape))
        storage = [
            b"(",
            _text("storage"),
            _global("torch", _STORAGES[dtype]),
            _text(str(i)),
            _text("cpu"),
        ]
        out += [_text(key), _global("torch._utils", "_rebuild_tensor_v2"), b"("]
        out += [*storage, _int(count), b"tQ"]  # TUPLE, BINPERSID
        out += [_int(0), _ints(shape), _ints(contiguous(shape)), b"\x89"]  # NEWFALSE: requires_grad
        out += [_global("collections", "OrderedDict"), b")R", b"tRs"]  # TUPLE, REDUCE, SETITEM
    return b"".join([*out, b"s."])  # SETITEM, STOP


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _int(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"
