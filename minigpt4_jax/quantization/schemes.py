"""Weight quantization: int8, int4, and the blocks of GGUF files.

int8: one scale per output channel, levels -127 to 127 (LLM.int8() paper, without its outliers).
int4: one scale per group of 64 (or 32) inputs of an output channel, levels -8 to 7, two per byte:
byte j of a group holds input j in its low nibble and input j + group / 2 in its high nibble, each as
level + 8. XLA on CPU uses a byte for each int4 element, hence the explicit packing.
gguf: the blocks of a GGUF file, kept bit-exact, see `BlockFormat`.
float8: e4m3 with one scale per output channel, only in memory while other parts are trained, see float8.py.

The scale of parameter `NAME` is `NAME_scale`, stored in bfloat16. Levels are computed with the rounded
scale, so rounding the scale adds no error. Activations are not quantized.

Axes: out and in, the outputs and inputs of a matrix; groups = in / group.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

Array = Any  # of NumPy or JAX
Shape = tuple[int, ...]
INT4_GROUPS = (64, 32)  # group sizes of int4: the first that divides the inputs is used
FLOAT8 = "float8"  # the scheme of frozen matrices in training
FLOAT8_DTYPE, FLOAT8_MAX = ml_dtypes.float8_e4m3fn, 448.0
GGUF = "gguf"  # the scheme of a model whose language model keeps the blocks of a GGUF file


class BlockFormat(NamedTuple):
    """The block format of a GGUF matrix: weight = level * scale, plus an offset in some formats.

    Each `group` of inputs has a scale [..., out, groups] (`NAME_scale`) and, with `offset`, an offset
    of the same shape (`NAME_offset`). 8-bit levels are int8. 4-bit levels are packed as in int4: -8 to
    7, or 0 to 15 with an offset. Scales and offsets are float32, which represents all of them exactly.
    """

    bits: int
    group: int
    offset: bool

    def __str__(self) -> str:
        return f"int{self.bits}/{self.group}{'+' if self.offset else ''}"

    @classmethod
    def parse(cls, text: str) -> "BlockFormat | None":
        """The inverse of str(); None for other schemes, such as "int8"."""
        m = re.fullmatch(r"int([48])/(\d+)(\+?)", text)
        return cls(int(m[1]), int(m[2]), bool(m[3])) if m else None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """Name suffix -> shape of the arrays that store a weight [..., out, in]."""
        groups = (*shape[:-1], shape[-1] // self.group)
        levels = shape if self.bits == 8 else (*shape[:-1], shape[-1] // 2)
        return {"": levels, "_scale": groups} | ({"_offset": groups} if self.offset else {})


def name_without_layer(name: str) -> str:
    """`llm.blocks.3.attn.q.weight` -> `llm.blocks.attn.q.weight`."""
    return re.sub(r"\.\d+\.", ".", name)


def matrix_scheme(
    name: str, scheme: str | None, n_in: int, block_formats: Iterable[str] = ()
) -> str | None:
    """The scheme of parameter `name` in a model of `scheme`; None if it is not quantized.

    The matrices of the language model and of the vision encoder's blocks use `scheme`, the embedding
    int8. A matrix whose inputs do not divide into groups uses int8. In "float8" they are the matrices of
    the blocks alone: the embedding and the output matrix stay floats.
    block_formats: for the scheme "gguf", "NAME FORMAT" of the language model's matrices
    (ModelConfig.kept); the vision encoder uses int8 there.
    """
    if scheme is None:
        return None
    if scheme == GGUF and name.startswith("llm."):
        formats = dict(line.split(maxsplit=1) for line in block_formats)
        return formats.get(name_without_layer(name))
    if scheme == FLOAT8 and name.startswith(("llm.embed", "llm.head")):
        return None
    if name == "llm.embed":
        return "int8"
    if not re.fullmatch(r"((llm|vit)\.blocks\..*|llm\.encoder_blocks\..*|llm\.head)\.weight", name):
        return None
    if scheme == FLOAT8:
        return FLOAT8
    return "int4" if scheme == "int4" and int4_group_size(n_in) else "int8"


def int4_group_size(n_in: int) -> int:
    """Inputs that share a scale in int4; 0 if no group size divides n_in."""
    return next((g for g in INT4_GROUPS if n_in % g == 0), 0)


def quantized_shapes(shape: Shape, scheme: str) -> tuple[Shape, Shape]:
    """Shapes of the levels and of the scale of a weight [..., out, in] in "int8", "int4" or "float8"."""
    if scheme in ("int8", FLOAT8):
        return shape, shape[:-1]
    n_in = shape[-1]
    return (*shape[:-1], n_in // 2), (*shape[:-1], n_in // int4_group_size(n_in))


def quantize(weight: Array, scheme: str, xp: Any = np) -> tuple[Array, Array]:
    """weight [..., out, in] of floats -> (levels, scale in bfloat16).

    "int8": levels int8 [..., out, in], scale [..., out]. "int4": levels uint8 [..., out, in / 2], scale
    [..., out, groups]. "float8": e4m3 [..., out, in], scale [..., out]. xp: numpy or jax.numpy, matching
    the weight.
    """
    weight = weight.astype(np.float32)
    if scheme == "int8":
        largest = xp.abs(weight).max(-1)
        scale = _nonzero(largest / 127, xp)
        levels = xp.rint(weight / scale.astype(np.float32)[..., None])
        return xp.clip(levels, -127, 127).astype(np.int8), scale
    if scheme == FLOAT8:
        scale = _nonzero(xp.abs(weight).max(-1) / FLOAT8_MAX, xp)
        levels = weight / scale.astype(np.float32)[..., None]
        return xp.clip(levels, -FLOAT8_MAX, FLOAT8_MAX).astype(FLOAT8_DTYPE), scale
    groups = weight.reshape(*weight.shape[:-1], -1, int4_group_size(weight.shape[-1]))
    # The largest value of a group becomes level -8, whatever its sign, so all 16 levels are used. (A
    # smaller scale with less squared error was tried: SmolLM2's perplexity got worse.)
    low, high = groups.min(-1), groups.max(-1)
    scale = _nonzero(xp.where(-low >= high, low, high) / -8, xp)
    levels = xp.rint(groups / scale.astype(np.float32)[..., None])
    levels = (xp.clip(levels, -8, 7) + 8).astype(np.uint8)
    return pack_nibbles(levels).reshape(*weight.shape[:-1], -1), scale


def holds_levels(dtype: Any) -> bool:
    """Whether a parameter of this dtype is a quantized matrix, whose dtype is never converted."""
    return jnp.issubdtype(dtype, jnp.integer) or dtype == FLOAT8_DTYPE


def _nonzero(scale: Array, xp: Any) -> Array:
    scale = scale.astype(ml_dtypes.bfloat16)
    return xp.where(scale == 0, xp.ones_like(scale), scale)


def pack_nibbles(levels: Array) -> Array:
    """uint8 levels 0 to 15 [..., group] -> bytes [..., group / 2]: first half low, second half high."""
    half = levels.shape[-1] // 2
    return levels[..., :half] | (levels[..., half:] << 4)


def unpack_nibbles(packed: Array) -> tuple[Array, Array]:
    """uint8 bytes [...] -> their low and their high nibbles, 0 to 15, [...] each."""
    return packed & 15, packed >> 4


def dequantize(
    levels: Array, scale: Array, dtype: Any, xp: Any = jnp, offset: Array | None = None
) -> Array:
    """Levels in storage layout, of `quantize` or of a `BlockFormat` -> weight [..., out, in] in dtype.

    levels [..., out, in] int8 or [..., out, in / 2] uint8; scale [..., out] or [..., out, groups];
    offset as scale with groups. xp: numpy or jax.numpy.
    """
    factor = scale.astype(np.float32)[..., None]
    if scale.ndim < levels.ndim:  # one scale per channel
        return (levels.astype(np.float32) * factor).astype(dtype)
    groups = levels.reshape(*scale.shape, -1)
    if levels.dtype == np.uint8:
        groups = xp.concatenate(unpack_nibbles(groups), axis=-1)
    groups = groups.astype(np.float32)
    if levels.dtype == np.uint8 and offset is None:
        groups = groups - 8
    groups = groups * factor
    if offset is not None:
        groups = groups + offset.astype(np.float32)[..., None]
    return groups.astype(dtype).reshape(*levels.shape[:-1], -1)
