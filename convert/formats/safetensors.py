"""Tensors of a .safetensors file, read piecewise (the format: 8-byte length, JSON header, data)."""

import json
import math
from typing import Any

from convert.formats.files import HashedFile
from convert.formats.tensors import DTYPES, Tensor, contiguous, strided
from minigpt4_jax.errors import UserError

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_MAX_HEADER = 100_000_000


def open_tensors(file: HashedFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> tensor, metadata). UserError when the file is truncated or its header damaged."""
    length = int.from_bytes(file.peek(0, 8), "little")
    if length > min(file.size - 8, _MAX_HEADER):
        raise UserError(
            f"{file.path} is truncated or damaged: its header claims {length} bytes of {file.size}"
        )
    try:
        header: dict[str, Any] = json.loads(file.peek(8, length))
        metadata = header.pop("__metadata__", {})
        start = 8 + length
        tensors = {name: _tensor(file, start, entry) for name, entry in header.items()}
        end = start + max((e["data_offsets"][1] for e in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f"{file.path} is damaged: its header cannot be read ({e})") from e
    if file.size != end:
        raise UserError(
            f"{file.path} is truncated: {file.size} bytes, its header promises {end}; "
            "download it again"
            if file.size < end
            else f"{file.path} is damaged: {file.size} bytes, its header promises {end}"
        )
    return tensors, metadata


def _tensor(file: HashedFile, start: int, entry: dict[str, Any]) -> Tensor:
    if entry["dtype"] not in _NAMES:
        raise ValueError(f"element type {entry['dtype']}")
    dtype = DTYPES[_NAMES[entry["dtype"]]]
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if min(begin, *shape, 0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} does not fit bytes {begin}..{end}")
    return strided(file, start + begin, dtype, shape, contiguous(shape))
