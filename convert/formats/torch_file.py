"""Tensors of a .pth or .bin file in both of torch's formats, read without torch and without unpickling.

Since version 1.6 torch.save writes a zip: data.pkl describes the object, data/<key> hold the storages.
Before, it wrote several pickles, followed by the storages.
"""

import io
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from convert.formats.files import HashedFile
from convert.formats.pickles import StorageRef, TensorRef, read_pickle
from convert.formats.tensors import Tensor, dtype_named, span, strided
from minigpt4_jax.errors import UserError

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}  # fmt: skip
_ALIASES = {"half": "float16", "float": "float32", "double": "float64"}
# storage -> (its first byte in the file, its length in bytes)
LocateStorage = Callable[[StorageRef], tuple[int, int]]


def open_tensors(file: HashedFile, file_format: str) -> dict[str, Tensor]:
    """Name -> tensor of the state dict in a file. file_format: as `files.detect_format` returns it."""
    content, locate, swap = _open_zip(file) if file_format == "zip" else _open_legacy(file)
    state = _state_dict(content, str(file.path))
    return {name: _tensor(file, name, ref, locate, swap) for name, ref in state.items()}


def _state_dict(content: Any, where: str) -> dict[str, TensorRef]:
    """The dictionary of tensors in a saved object, which may be nested, for instance under "model"."""
    while isinstance(content, dict):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, TensorRef)}
        if tensors:
            return tensors
        inner = [content[k] for k in ("model", "state_dict", "module") if k in content]
        if not inner and len(content) == 1:
            inner = list(content.values())
        if not inner:
            break
        content = inner[0]
    found = f"a {type(content).__name__}" if not isinstance(content, dict) else "no tensors"
    raise UserError(
        f"{where} holds {found}; expected a dictionary of weights, or one under 'model'"
    )


def _tensor(
    file: HashedFile, name: str, ref: TensorRef, locate: LocateStorage, swap: bool
) -> Tensor:
    where = f"{file.path}: {name}"
    storage = ref.storage
    if storage.kind not in _STORAGES:
        raise UserError(f"{where}: storage {storage.kind} is not supported")
    storage_dtype = dtype_named(_STORAGES[storage.kind], where)
    name_of_dtype = _ALIASES.get(ref.dtype or "", ref.dtype)
    dtype = dtype_named(name_of_dtype, where) if name_of_dtype else storage_dtype
    start, length = locate(storage)
    count = span(ref.shape, ref.stride)
    if count == 0:
        return strided(file, start, dtype, ref.shape, ref.stride)
    offset = ref.offset * dtype.itemsize
    if storage.view is not None:
        offset += int(storage.view[1]) * storage_dtype.itemsize
    if offset + count * dtype.itemsize > length:
        raise UserError(f"{where}: the tensor reaches past its storage of {length} bytes")
    return strided(file, start + offset, dtype, ref.shape, ref.stride, swap)


# --- zip -------------------------------------------------------------------------------------


def _open_zip(file: HashedFile) -> tuple[Any, LocateStorage, bool]:
    try:
        archive = zipfile.ZipFile(file.path)
        entries = {e.filename: e for e in archive.infolist()}
        found = [n for n in entries if n == "data.pkl" or n.endswith("/data.pkl")]
        if len(found) != 1:
            raise UserError(
                f"{file.path} is a zip file without data.pkl, not a checkpoint of torch.save"
            )
        prefix = found[0][: -len("data.pkl")]
        index = archive.read(found[0])
        has_order = prefix + "byteorder" in entries
        byte_order = archive.read(prefix + "byteorder") if has_order else b"little"
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error) as e:
        raise UserError(f"{file.path} is truncated or damaged ({e}): download it again") from e
    except OSError as e:
        raise UserError(f"cannot read {file.path}: {e.strerror or e}") from e

    def locate(storage: StorageRef) -> tuple[int, int]:
        entry = entries.get(f"{prefix}data/{storage.key}")
        if entry is None:
            raise UserError(f"{file.path} is damaged: storage {storage.key!r} is missing")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{file.path} is a compressed zip; save it again with torch.save")
        name_length, extra_length = struct.unpack("<HH", file.peek(entry.header_offset + 26, 4))
        start = entry.header_offset + 30 + name_length + extra_length
        if start + entry.file_size > file.size:
            raise UserError(f"{file.path} is truncated: storage {storage.key!r} ends past its end")
        return start, entry.file_size

    content = read_pickle(io.BytesIO(index), str(file.path))
    return content, locate, byte_order.strip() == b"big"


# --- the format before torch 1.6 --------------------------------------------------------------


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def _open_legacy(file: HashedFile) -> tuple[Any, LocateStorage, bool]:
    where = str(file.path)
    with open(file.path, "rb") as stream:
        if read_pickle(stream, where) != _LEGACY_MAGIC:
            raise UserError(f"{where} is a plain pickle, not a checkpoint made by torch.save")
        read_pickle(stream, where)  # protocol version
        machine = read_pickle(stream, where)
        content = read_pickle(stream, where)
        keys = read_pickle(stream, where)
        at = stream.tell()
    swap = isinstance(machine, dict) and machine.get("little_endian") is False
    sizes = _storage_sizes(content)
    if not isinstance(keys, list) or any(str(k) not in sizes for k in keys):
        raise UserError(f"{where} is damaged: its list of storages does not match its tensors")
    located: dict[str, tuple[int, int]] = {}
    for key in map(str, keys):
        count = int(np.frombuffer(file.peek(at, 8), ">i8" if swap else "<i8")[0])
        length = count * sizes[key]
        if count < 0 or at + 8 + length > file.size:
            raise UserError(f"{where} is truncated: storage {key} ends past the end of the file")
        located[key] = (at + 8, length)
        at += 8 + length

    def locate(storage: StorageRef) -> tuple[int, int]:
        if storage.key not in located:
            raise UserError(f"{where} is damaged: storage {storage.key!r} is missing")
        return located[storage.key]

    return content, locate, swap


def _storage_sizes(content: Any) -> dict[str, int]:
    """Storage key -> bytes per element, from all tensors of the object."""
    sizes: dict[str, int] = {}
    stack, seen = [content], set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, TensorRef):
            kind = item.storage.kind
            sizes[item.storage.key] = dtype_named(_STORAGES.get(kind, kind), "storage").itemsize
        elif isinstance(item, dict):
            stack += list(item.values())
        elif isinstance(item, list | tuple):
            stack += list(item)
    return sizes
