"""The header of a safetensors file.

A file is 8 bytes with the header's length (little-endian), the header (JSON with the dtype, shape and
byte range of each tensor), and the data: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library


class TensorEntry(NamedTuple):
    """One tensor of a file. dtype: a key of DTYPES; start: its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(
    read: Callable[[int, int], bytes], file_size: int
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """(name -> entry, metadata) of a file of `file_size` bytes.

    read(start, stop): bytes start to stop of the file, fewer at its end.
    ValueError whose message begins with "truncated" or "damaged".
    """
    length = int.from_bytes(read(0, 8), "little")
    data_start = 8 + length
    if not 0 < length <= _MAX_HEADER or data_start > file_size:
        raise ValueError(f"truncated or damaged: a header of {length} bytes, a file of {file_size}")
    try:
        header = json.loads(read(8, data_start))
        metadata = header.pop("__metadata__", {})
        entries = {name: _parse_entry(entry, data_start) for name, entry in header.items()}
        data_size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f"damaged: its header cannot be read ({e})") from e
    expected = data_start + data_size
    if file_size != expected:
        cause = "truncated" if file_size < expected else "damaged"
        raise ValueError(f"{cause}: {file_size} bytes instead of {expected}")
    return entries, metadata


def _parse_entry(entry: dict[str, Any], data_start: int) -> TensorEntry:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"element type {entry['dtype']}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if min(begin, *shape, 0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} does not fit bytes {begin} to {end}")
    return TensorEntry(entry["dtype"], shape, data_start + begin)
