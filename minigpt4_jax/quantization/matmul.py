"""Matrix products with weights in float32, bfloat16, 8 bits and 4 bits (schemes.py).

Weights are [out, in], those with groups [groups, size, out]; N: rows that are multiplied.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from minigpt4_jax.quantization.schemes import dequantize
from minigpt4_jax.utils.platform import backend

FEW_ROWS = 64  # a product of so many rows, as of a decoding batch, is bound by reading its weights
BLOCK = 1 << 20  # rounded weights that become floats at a time on a CPU: they stay in its cache


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    # float32 means float32: GPUs and TPUs would otherwise round the factors (TF32, bfloat16).
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def linear(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    out: Any = None,
    scale: jax.Array | None = None,
    offset: jax.Array | None = None,
) -> jax.Array:
    """x [..., in], weight [out, in], bias [out] -> [..., out], computed in the weight's dtype.

    out: dtype of the result, by default the weight's; float32 keeps the sums as accumulated.
    scale, offset: of a weight as `quant` holds it, [groups, group, out] if it has groups; the product is
    then in the scale's dtype.
    """
    if scale is not None:
        y = _quantized_product(x, weight, scale, offset)  # [..., out] float32
        y = y if bias is None else y + bias.astype(y.dtype)
        return y.astype(out or scale.dtype)
    dtype = weight.dtype
    x = x.astype(dtype)
    if dtype == jnp.bfloat16:
        y = _product_bf16(x, weight, jnp.dtype(out or dtype))
    else:
        y = _product(x, weight)
    y = y if bias is None else y + bias.astype(y.dtype)
    return y if out is None else y.astype(out)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in], weight [out, in] of one dtype -> [..., out]."""
    exact = precision(weight.dtype)
    n = math.prod(x.shape[:-1])
    if 1 < n <= FEW_ROWS and backend() == "cpu":
        # XLA on CPU reads the weights 2 to 4 times as fast when they come first, and the barrier keeps
        # it from turning the product round again.
        y = jnp.einsum("oi,ni->on", weight, x.reshape(n, -1), precision=exact)
        y = jax.lax.optimization_barrier(y)
        return y.T.reshape(*x.shape[:-1], -1)
    return jnp.einsum("...i,oi->...o", x, weight, precision=exact)


def _quantized_product(
    x: jax.Array, levels: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """x [..., in] and a weight as `quant` holds it -> [..., out] float32."""
    # Tied together: XLA would convert weights that a decoding loop does not change before the loop,
    # and keep them all as floats.
    x, levels = jax.lax.optimization_barrier((x, levels))
    if levels.ndim == 2 and levels.size > BLOCK and _few_on_cpu(x):
        return _product_in_blocks(x, levels, scale, offset)
    if scale.ndim == 1:  # a channel's scale can wait until its sum is there
        return linear(x, levels.astype(scale.dtype), out=jnp.float32) * scale.astype(jnp.float32)
    if levels.ndim == 2:  # a table [out, in] that is an output matrix as well
        return linear(x, dequantize(levels, scale, scale.dtype, offset=offset), out=jnp.float32)
    return _grouped_product(x, levels, scale, offset)


def _grouped_product(
    x: jax.Array, levels: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """x [..., in], levels [groups, group, out] int8 or [groups, group / 2, out] packed, scale and
    offset [groups, out] -> [..., out] float32."""
    groups, size, n_out = levels.shape
    rows = x.reshape(-1, groups, x.shape[-1] // groups)
    if _few_on_cpu(x):
        return _group_after_group(rows, levels, scale, offset).reshape(*x.shape[:-1], n_out)
    parts = [(rows, levels)]
    if levels.dtype == jnp.uint8:
        zero = 8 if offset is None else 0
        low, high = ((half.astype(jnp.int8) - zero) for half in (levels & 15, levels >> 4))
        if len(rows) > FEW_ROWS:
            parts = [(rows, jnp.concatenate([low, high], axis=1))]
        else:  # each half by its own inputs: unpacked weights are nowhere but in registers
            parts = [(rows[:, :, :size], low), (rows[:, :, size:], high)]
    y = sum(_sum_of_groups(some, half, scale, offset) for some, half in parts)
    return jnp.asarray(y).reshape(*x.shape[:-1], n_out)


# --- few rows on a CPU ----------------------------------------------------------------------------
# XLA on CPU writes converted weights to memory before it multiplies them: 13 times slower than
# bfloat16 weights where a matrix is large. A part at a time they stay in the processor's cache.


def _few_on_cpu(x: jax.Array) -> bool:
    """Whether x [..., in] is of few rows on a CPU. Not on a mesh, where parts would be gathered."""
    few = math.prod(x.shape[:-1]) <= FEW_ROWS
    return few and backend() == "cpu" and jax.sharding.get_abstract_mesh().empty


def _product_in_blocks(
    x: jax.Array, levels: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """x [..., in], levels [out, in] or packed [out, in / 2], scale [out] or [out, groups], offset as
    that -> [..., out] float32."""
    rows = x.reshape(-1, x.shape[-1]).astype(scale.dtype).astype(jnp.float32)
    n_out = len(levels)
    size = next(b for b in range(max(1, min(n_out, BLOCK // x.shape[-1])), 0, -1) if n_out % b == 0)
    if size * x.shape[-1] < BLOCK // 16:  # a prime number of outputs: all at once
        size = n_out

    def product(block: Any) -> jax.Array:  # [size, N]
        weight = dequantize(block[0], block[1], jnp.float32, offset=block[2])
        return jnp.einsum("oi,ni->on", weight, rows, precision=precision(jnp.float32))

    blocks = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), (levels, scale, offset))
    y = jax.lax.map(product, blocks) if size < n_out else product((levels, scale, offset))
    return y.reshape(n_out, -1).T.reshape(*x.shape[:-1], n_out)


def _group_after_group(
    x: jax.Array, levels: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """x [N, groups, size] and a weight as of _grouped_product -> [N, out] float32."""
    x = x.astype(scale.dtype).astype(jnp.float32).swapaxes(0, 1)

    def add(y: jax.Array, group: Any) -> tuple[jax.Array, None]:
        x, levels, scale, offset = group  # [N, size], [size or size / 2, out], [out], [out]
        if levels.dtype == jnp.uint8:
            zero = 8 if offset is None else 0
            halves = [((h.astype(jnp.int8) - zero), p) for h, p in _halves(levels, x)]
        else:
            halves = [(levels, x)]
        exact = precision(jnp.float32)
        some = sum(jnp.matmul(p, h.astype(jnp.float32), precision=exact) for h, p in halves)
        y += some * scale.astype(jnp.float32)
        if offset is not None:
            y += x.sum(1, keepdims=True) * offset.astype(jnp.float32)
        return y, None

    zeros = jnp.zeros((x.shape[1], levels.shape[2]), jnp.float32)
    return jax.lax.scan(add, zeros, (x, levels, scale, offset))[0]


def _halves(levels: jax.Array, x: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """The low and the high halves of bytes [size / 2, out], with the inputs [N, size / 2] of each."""
    low, high = jnp.split(x, 2, axis=1)
    return [(levels & 15, low), (levels >> 4, high)]


# --- groups, otherwise ----------------------------------------------------------------------------


def _sum_of_groups(
    x: jax.Array, levels: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """x [N, groups, size], levels [groups, size, out], scale and offset [groups, out] -> [N, out]
    float32."""
    weight = levels.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
    if offset is not None:
        weight += offset.astype(jnp.float32)[:, None]
    return _product_by_groups(x.astype(scale.dtype), weight.astype(scale.dtype))


@jax.custom_vjp
def _product_by_groups(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [N, groups, size], weight [groups, size, out] of one dtype -> [N, out] float32. Gradients are
    products in that dtype, too."""
    n = len(x)
    if n == 1 and weight.dtype == jnp.bfloat16 and backend() == "cpu":  # as in _product_bf16
        x = jnp.pad(x, ((0, 1), (0, 0), (0, 0)))
    # Over both axes at once: where they are made one before, XLA on a TPU keeps unpacked weights.
    return _einsum_groups("ngi,gio->no", x, weight)[:n]


def _einsum_groups(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    exact = precision(b.dtype)
    return jnp.einsum(spec, a, b, precision=exact, preferred_element_type=jnp.float32)


def _product_by_groups_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple]:
    return _product_by_groups(x, weight), (x, weight)


def _product_by_groups_backward(kept: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    dy = dy.astype(weight.dtype)
    dx = _einsum_groups("no,gio->ngi", dy, weight)
    return dx.astype(x.dtype), _einsum_groups("no,ngi->gio", dy, x).astype(weight.dtype)


_product_by_groups.defvjp(_product_by_groups_forward, _product_by_groups_backward)


def _einsum_bf16(spec: str, a: jax.Array, b: jax.Array, out: jnp.dtype) -> jax.Array:
    # XLA on CPU has bfloat16 kernels only for products that are summed and returned in float32;
    # others become float32 products of converted weights (7 times slower on 11008 x 4096).
    kept = jnp.float32 if backend() == "cpu" else out
    return jnp.einsum(spec, a, b, preferred_element_type=kept).astype(out)


def _plain_product_bf16(x: jax.Array, weight: jax.Array, out: jnp.dtype) -> jax.Array:
    """x [..., in], weight [out, in], both bfloat16 -> [..., out]."""
    rows = x.reshape(-1, x.shape[-1])  # with more axes, XLA on CPU transposes the weights
    n = rows.shape[0]
    if n == 1 and backend() == "cpu":  # nor has it a kernel for a single row
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    y = _einsum_bf16("ni,oi->no", rows, weight, out)
    return y[:n].reshape(*x.shape[:-1], -1)


# With gradients that are bfloat16 products too, which autodiff of one that returns float32 would not make.
_product_bf16 = partial(jax.custom_vjp, nondiff_argnums=(2,))(_plain_product_bf16)


def _product_bf16_forward(x: jax.Array, w: jax.Array, out: jnp.dtype) -> tuple[jax.Array, tuple]:
    # Not by _product_bf16: a rule of what to keep for the backward pass does not look into that.
    return _plain_product_bf16(x, w, out), (x, w)


def _product_bf16_backward(
    out: jnp.dtype, kept: tuple, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    dy = dy.astype(weight.dtype)
    dx = _einsum_bf16("...o,oi->...i", dy, weight, x.dtype)
    return dx, _einsum_bf16("...o,...i->oi", dy, x, weight.dtype)


_product_bf16.defvjp(_product_bf16_forward, _product_bf16_backward)
