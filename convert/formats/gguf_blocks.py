"""GGUF's quantized blocks taken apart without a change: levels, scales and offsets of a matrix.

Every value is level * scale + offset, with a scale (and in some types an offset) for 16 or 32
inputs. The formats are those of the gguf package's quants.py, which also reads the packed levels:
of a block whose scale is set to one and whose offset to zero it gives the levels themselves.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from minigpt4_jax.quantization.schemes import BlockFormat, kept_name

KINDS = {
    "Q4_0": BlockFormat(4, 32, False), "Q4_1": BlockFormat(4, 32, True), "Q4_K": BlockFormat(4, 32, True),
    "Q5_0": BlockFormat(8, 32, False), "Q5_1": BlockFormat(8, 32, True), "Q5_K": BlockFormat(8, 32, True),
    "Q6_K": BlockFormat(8, 16, False), "Q8_0": BlockFormat(8, 32, False),
}  # fmt: skip
_ONE = np.frombuffer(np.float16(1).tobytes(), np.uint8)
_K_ONES = np.array([1] * 4 + [0] * 4 + [1] * 4, np.uint8)  # scales 1, minima 0, in Q4_K's packing


class Blocks(NamedTuple):
    """Levels [out, in] as float32 integers; scale and offset [out, groups] float32."""

    levels: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None


def joined(kinds: Iterable[BlockFormat]) -> BlockFormat:
    """The kind that holds matrices of all these kinds without a change."""
    kinds = list(kinds)
    return BlockFormat(
        max(k.bits for k in kinds), min(k.group for k in kinds), any(k.offset for k in kinds)
    )


def kinds_of(types: Mapping[str, str | None]) -> tuple[str, ...]:
    """Parameter -> its type among KINDS, or None -> the lines of ModelConfig.kept.

    A matrix is held alike in all layers, as decoding over stacked layers wants it: layers of several
    types take a kind that holds them all, and one type that is not among KINDS makes all int8.
    """
    found: dict[str, list[str | None]] = defaultdict(list)
    for name, kind in types.items():
        found[kept_name(name)].append(kind)
    return tuple(
        f"{name} {'int8' if None in kinds else joined(KINDS[k] for k in kinds if k)}"
        for name, kinds in sorted(found.items())
    )


def take_apart(raw: np.ndarray, name: str, shape: tuple[int, ...]) -> Blocks:
    """The bytes of a matrix of type `name` (one of KINDS) -> its levels, scales and offsets."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[name]
    blocks = raw.reshape(-1, GGML_QUANT_SIZES[kind][1])
    unit = blocks.copy()
    scale, offset = _scales(blocks, unit, name)
    levels = dequantize(unit.reshape(shape[0], -1), kind).reshape(shape)
    if offset is not None:
        offset = offset.reshape(shape[0], -1)
    return Blocks(levels, scale.reshape(shape[0], -1), offset)


def _scales(
    blocks: np.ndarray, unit: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """(scales, offsets) of blocks [n, bytes]; in `unit`, a copy, they become one and zero."""
    from gguf.quants import Q4_K

    if name == "Q6_K":
        scale = _halves(blocks[:, -2:]) * blocks[:, -18:-2].view(np.int8).astype(np.float32)
        unit[:, -18:-2], unit[:, -2:] = 1, _ONE
        return scale, None
    first = _halves(blocks[:, :2])
    unit[:, :2] = _ONE
    if not KINDS[name].offset:
        return first, None
    second = _halves(blocks[:, 2:4])
    unit[:, 2:4] = 0
    if not name.endswith("_K"):
        return first, second
    scales, minima = Q4_K.get_scale_min(blocks[:, 4:16])
    unit[:, 4:16] = _K_ONES
    return first * scales.astype(np.float32), -(second * minima.astype(np.float32))


def _halves(two: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(two).view(np.float16).astype(np.float32)


def packed(blocks: Blocks, kind: BlockFormat) -> dict[str, np.ndarray]:
    """The arrays that stand for the same values in `kind`, by what is put behind the name."""
    levels, scale, offset = blocks
    again = levels.shape[-1] // kind.group // scale.shape[-1]  # groups of half the inputs
    scale = scale.repeat(again, -1)
    if offset is not None:
        offset = offset.repeat(again, -1)
    elif kind.offset and kind.bits == 4:  # levels from 0 on
        levels, offset = levels + 8, -8 * scale
    elif kind.offset:
        offset = np.zeros_like(scale)
    arrays = {"": _levels(levels, kind, signed=offset is None), "_scale": _exact(scale)}
    return arrays if offset is None else arrays | {"_offset": _exact(offset)}


def _levels(levels: np.ndarray, kind: BlockFormat, *, signed: bool) -> np.ndarray:
    if kind.bits == 8:
        return levels.astype(np.int8)
    groups = (levels + 8 if signed else levels).astype(np.uint8)
    first, second = np.split(groups.reshape(len(levels), -1, kind.group), 2, -1)
    return (first | (second << 4)).reshape(len(levels), -1)


def _exact(values: np.ndarray) -> np.ndarray:
    """In float16 where that changes nothing (all types but those ending in _K)."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), values) else values
