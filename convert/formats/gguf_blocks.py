"""GGUF's quantized blocks, repacked without loss: levels, scales and offsets of a matrix.

Every weight is level * scale + offset, with one scale (and for some types one offset) for each 16 or
32 inputs. The block layouts are those of the gguf package's quants.py. That package also unpacks the
levels here: dequantizing a block with its scale set to one and its offset to zero gives the levels.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from minigpt4_jax.quantization.schemes import BlockFormat, name_without_layer, pack_nibbles

BLOCK_FORMATS = {  # GGUF type -> the format that stores it
    "Q4_0": BlockFormat(4, 32, False), "Q4_1": BlockFormat(4, 32, True), "Q4_K": BlockFormat(4, 32, True),
    "Q5_0": BlockFormat(8, 32, False), "Q5_1": BlockFormat(8, 32, True), "Q5_K": BlockFormat(8, 32, True),
    "Q6_K": BlockFormat(8, 16, False), "Q8_0": BlockFormat(8, 32, False),
}  # fmt: skip
_ONE = np.frombuffer(np.float16(1).tobytes(), np.uint8)
_K_ONES = np.array([1] * 4 + [0] * 4 + [1] * 4, np.uint8)  # Q4_K's packing of scales 1, minima 0


class UnpackedBlocks(NamedTuple):
    """Levels [out, in] as float32 integers; scale and offset [out, groups] float32."""

    levels: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None


def common_format(formats: Iterable[BlockFormat]) -> BlockFormat:
    """The smallest format that stores matrices of all these formats without loss."""
    formats = list(formats)
    return BlockFormat(
        max(f.bits for f in formats), min(f.group for f in formats), any(f.offset for f in formats)
    )


def kept_formats(gguf_types: Mapping[str, str | None]) -> tuple[str, ...]:
    """The lines of ModelConfig.kept, from parameter -> GGUF type (None: not in BLOCK_FORMATS).

    A matrix has one format in all layers, because decoding can run over stacked layers: layers of
    several types share a format that stores them all, and int8 if one type is not in BLOCK_FORMATS.
    """
    types_by_matrix: dict[str, list[str | None]] = defaultdict(list)
    for name, gguf_type in gguf_types.items():
        types_by_matrix[name_without_layer(name)].append(gguf_type)
    lines = []
    for name, types in sorted(types_by_matrix.items()):
        formats = [BLOCK_FORMATS[t] for t in types if t]
        lines.append(f"{name} {common_format(formats) if len(formats) == len(types) else 'int8'}")
    return tuple(lines)


def unpack(raw: np.ndarray, gguf_type: str, shape: tuple[int, ...]) -> UnpackedBlocks:
    """Bytes of a matrix of a type in BLOCK_FORMATS -> its levels, scales and offsets."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    type_id = GGMLQuantizationType[gguf_type]
    blocks = raw.reshape(-1, GGML_QUANT_SIZES[type_id][1])
    unit_blocks = blocks.copy()
    scale, offset = _take_scales(blocks, unit_blocks, gguf_type)
    levels = dequantize(unit_blocks.reshape(shape[0], -1), type_id).reshape(shape)
    if offset is not None:
        offset = offset.reshape(shape[0], -1)
    return UnpackedBlocks(levels, scale.reshape(shape[0], -1), offset)


def _take_scales(
    blocks: np.ndarray, unit_blocks: np.ndarray, gguf_type: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """(scales, offsets) of blocks [n, bytes]; sets those of `unit_blocks`, a copy, to one and zero."""
    from gguf.quants import Q4_K

    if gguf_type == "Q6_K":
        scale = _float16(blocks[:, -2:]) * blocks[:, -18:-2].view(np.int8).astype(np.float32)
        unit_blocks[:, -18:-2], unit_blocks[:, -2:] = 1, _ONE
        return scale, None
    scale = _float16(blocks[:, :2])
    unit_blocks[:, :2] = _ONE
    if not BLOCK_FORMATS[gguf_type].offset:
        return scale, None
    offset = _float16(blocks[:, 2:4])
    unit_blocks[:, 2:4] = 0
    if not gguf_type.endswith("_K"):
        return scale, offset
    scales, minima = Q4_K.get_scale_min(blocks[:, 4:16])
    unit_blocks[:, 4:16] = _K_ONES
    return scale * scales.astype(np.float32), -(offset * minima.astype(np.float32))


def _float16(raw: np.ndarray) -> np.ndarray:
    """Bytes [n, 2] of float16 numbers -> float32 [n, 1]."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def repack(blocks: UnpackedBlocks, target: BlockFormat) -> dict[str, np.ndarray]:
    """The arrays of the same weights in format `target`: suffix of the parameter's name -> array."""
    levels, scale, offset = blocks
    repeats = levels.shape[-1] // target.group // scale.shape[-1]  # the target's groups are smaller
    scale = scale.repeat(repeats, -1)
    if offset is not None:
        offset = offset.repeat(repeats, -1)
    elif target.offset and target.bits == 4:  # unsigned levels
        levels, offset = levels + 8, -8 * scale
    elif target.offset:
        offset = np.zeros_like(scale)
    packed = _pack_levels(levels, target, signed=offset is None)
    arrays = {"": packed, "_scale": _smallest_float(scale)}
    return arrays if offset is None else arrays | {"_offset": _smallest_float(offset)}


def _pack_levels(levels: np.ndarray, target: BlockFormat, *, signed: bool) -> np.ndarray:
    if target.bits == 8:
        return levels.astype(np.int8)
    groups = (levels + 8 if signed else levels).astype(np.uint8)
    groups = groups.reshape(len(levels), -1, target.group)
    return np.asarray(pack_nibbles(groups)).reshape(len(levels), -1)


def _smallest_float(values: np.ndarray) -> np.ndarray:
    """As float16 if that is exact (for all types but those ending in _K), else float32."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), values) else values
