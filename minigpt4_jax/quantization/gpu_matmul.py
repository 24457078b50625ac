"""Products with quantized weights on a GPU: nothing unpacked is written to memory while decoding.

One row is a sum over each row of the matrix, fused with unpacking, and XLA joins the sums that share an
input (queries, keys and values) into one kernel. More rows are products whose kernels unpack the weights as
they read them. Layouts: layout.py.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (x, weight [out, in], dtype of the result) -> the product
Product = Callable[[jax.Array, jax.Array, Any], jax.Array]


def quantized_product(
    x: jax.Array,
    levels: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None,
    out: Any,
    product: Product,
) -> jax.Array:
    """x [..., in] and a quantized weight in the GPU's memory layout -> [..., out] float32.

    levels [out, in] int8 with scale [out], or levels [out, groups, group] int8 or [out, groups, group / 2]
    packed, with scale and offset [out, groups]. out: dtype of the result that is wanted; sums of a product
    are rounded to the scale's dtype unless it is float32. product: of float weights.
    """
    x = x.astype(scale.dtype)
    is_one_row = math.prod(x.shape[:-1]) == 1
    sums = jnp.float32 if out == jnp.float32 else scale.dtype
    if scale.ndim == 1:
        if is_one_row:
            y = jnp.sum(levels.astype(jnp.float32) * x.reshape(-1).astype(jnp.float32), axis=1)
        else:
            y = product(x, levels.astype(scale.dtype), sums)
        y = y.astype(jnp.float32) * scale.astype(jnp.float32)
    elif is_one_row:
        y = _row_sums(x.reshape(-1).astype(jnp.float32), levels, scale, offset)
    else:
        weight = _dequantize(levels, scale, offset)
        y = product(_in_order_of(levels, x, scale), weight, sums).astype(jnp.float32)
    return y.reshape(*x.shape[:-1], -1)


def _row_sums(
    x: jax.Array, levels: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """x [in] float32 and a weight with groups -> [out] float32."""
    inputs = x.reshape(scale.shape[1], -1)  # [groups, group]
    if levels.dtype == jnp.uint8:
        low, high = jnp.split(inputs, 2, axis=1)
        terms = _low(levels).astype(jnp.float32) * low + _high(levels).astype(jnp.float32) * high
        shift = 8  # packed levels of formats with an offset are 0 to 15, held as level - 8
    else:
        terms, shift = levels.astype(jnp.float32) * inputs, 0
    y = jnp.sum(terms * scale.astype(jnp.float32)[:, :, None], axis=(1, 2))
    if offset is not None:
        constant = offset.astype(jnp.float32) + shift * scale.astype(jnp.float32)
        y += jnp.sum(constant * inputs.sum(1), axis=1)
    return y


def _low(packed: jax.Array) -> jax.Array:
    """Low nibbles, in two's complement, as int8."""
    return jax.lax.shift_right_arithmetic((packed << 4).astype(jnp.int8), jnp.int8(4))


def _high(packed: jax.Array) -> jax.Array:
    return jax.lax.shift_right_arithmetic(packed.astype(jnp.int8), jnp.int8(4))


def _dequantize(levels: jax.Array, scale: jax.Array, offset: jax.Array | None) -> jax.Array:
    """A weight with groups as [out, in] in the scale's dtype, its inputs as `_in_order_of` says. A kernel of
    XLA unpacks int4 while it reads, but not nibbles that are taken from bytes."""
    shift = 0.0
    if levels.dtype == jnp.uint8:
        levels = jax.lax.bitcast_convert_type(levels, jnp.int4)  # [out, groups, group / 2, 2]
        shift = 8.0
    levels = levels.reshape(*scale.shape, -1)
    weight = levels.astype(scale.dtype) * scale[:, :, None]
    if offset is not None:
        weight += (offset + jnp.asarray(shift, scale.dtype) * scale)[:, :, None]
    return weight.reshape(len(scale), -1)


def _in_order_of(levels: jax.Array, x: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., in] in the order of the inputs in `_dequantize`: low and high nibbles alternate."""
    if levels.dtype != jnp.uint8:
        return x
    pairs = x.reshape(*x.shape[:-1], scale.shape[1], 2, -1)
    return pairs.swapaxes(-2, -1).reshape(x.shape)
