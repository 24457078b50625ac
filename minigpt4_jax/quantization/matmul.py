"""Matrix products with weights in float32, bfloat16, float8, int8 and int4 (schemes.py).

Weights are [out, in], or [groups, size, out] with groups (layout.py). N: rows of the input.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from minigpt4_jax.quantization import gpu_matmul
from minigpt4_jax.quantization.float8 import float8_product
from minigpt4_jax.quantization.schemes import FLOAT8_DTYPE, dequantize, unpack_nibbles
from minigpt4_jax.utils.platform import backend

FEW_ROWS = 64  # products of at most this many rows (decoding) are bound by reading the weights
Residuals = tuple[jax.Array, jax.Array]  # x and weight, for the backward pass
BLOCK = 1 << 20  # quantized weights dequantized at a time on a CPU, to stay in its cache


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """HIGHEST for float32: GPUs and TPUs would otherwise round the factors to TF32 or bfloat16."""
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

    out: dtype of the result, by default the weight's; float32 keeps the accumulated sums.
    scale, offset: of a quantized weight, in memory layout; the product then has the scale's dtype.
    """
    if scale is not None:
        y = _quantized_product(x, weight, scale, offset, out)  # [..., out] float32
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
        # XLA on CPU reads the weights 2 to 4 times as fast if they are the first factor. The barrier
        # stops it from swapping the factors back. Its kernel multiplies four rows at a time: 5 rows, as of
        # five beams, take a fifth more time than 8.
        missing = -n % 4 if n > 4 else 0
        rows = jnp.pad(x.reshape(n, -1), ((0, missing), (0, 0)))
        y = jnp.einsum("oi,ni->on", weight, rows, precision=exact)
        result: jax.Array = jax.lax.optimization_barrier(y)
        return result.T[:n].reshape(*x.shape[:-1], -1)
    return jnp.einsum("...i,oi->...o", x, weight, precision=exact)


def _quantized_product(
    x: jax.Array, levels: jax.Array, scale: jax.Array, offset: jax.Array | None, out: Any
) -> jax.Array:
    """x [..., in] and a quantized weight in memory layout -> [..., out] float32. out: as in `linear`."""
    if levels.dtype == FLOAT8_DTYPE:
        sums = jnp.dtype(jnp.float32 if out == jnp.float32 else scale.dtype)
        return float8_product(x, levels, scale, sums).astype(jnp.float32)
    if backend() == "gpu" and (scale.ndim == 1 or levels.ndim == 3):
        return gpu_matmul.quantized_product(x, levels, scale, offset, out, _float_product)
    # Without the barrier, XLA would dequantize the constant weights of a decoding loop before the loop
    # and keep all of them as floats.
    x, levels = jax.lax.optimization_barrier((x, levels))
    if levels.ndim == 2 and levels.size > BLOCK and _is_few_rows_on_cpu(x):
        return _product_in_blocks(x, levels, scale, offset)
    if scale.ndim == 1:  # one scale per channel: applied to the sums
        return linear(x, levels.astype(scale.dtype), out=jnp.float32) * scale.astype(jnp.float32)
    if levels.ndim == 2:  # a tied embedding [out, in]
        return linear(x, dequantize(levels, scale, scale.dtype, offset=offset), out=jnp.float32)
    return _grouped_product(x, levels, scale, offset)


def _float_product(x: jax.Array, weight: jax.Array, out: Any) -> jax.Array:
    return linear(x, weight, out=out)


def _grouped_product(
    x: jax.Array, levels: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """x [..., in], levels [groups, group, out] int8 or [groups, group / 2, out] packed, scale and
    offset [groups, out] -> [..., out] float32."""
    groups, size, n_out = levels.shape
    rows = x.reshape(-1, groups, x.shape[-1] // groups)
    if _is_few_rows_on_cpu(x):
        return _scan_groups(rows, levels, scale, offset).reshape(*x.shape[:-1], n_out)
    if _is_few_rows_on_tpu(rows):
        # Otherwise XLA would convert the scales to float32 before a decoding loop and keep them all.
        rows, scale, offset = jax.lax.optimization_barrier((rows, scale, offset))
    parts = [(rows, levels)]
    if levels.dtype == jnp.uint8:
        zero = 8 if offset is None else 0
        low, high = (half.astype(jnp.int8) - zero for half in unpack_nibbles(levels))
        if len(rows) > FEW_ROWS:
            parts = [(rows, jnp.concatenate([low, high], axis=1))]
        else:  # each half with its own inputs: unpacked weights stay in registers
            parts = [(rows[:, :, :size], low), (rows[:, :, size:], high)]
    y = sum(_dequantize_and_multiply(inputs, part, scale, offset) for inputs, part in parts)
    return jnp.asarray(y).reshape(*x.shape[:-1], n_out)


# --- few rows on a CPU ----------------------------------------------------------------------------
# XLA on CPU writes dequantized weights to memory before the product: 13 times slower than bfloat16
# weights for a large matrix. Block by block they stay in the processor's cache.


def _is_few_rows_on_cpu(x: jax.Array) -> bool:
    """Whether x [..., in] has few rows on a CPU. Not on a mesh, where blocks would be gathered."""
    is_few = math.prod(x.shape[:-1]) <= FEW_ROWS
    return is_few and backend() == "cpu" and jax.sharding.get_abstract_mesh().empty


def _product_in_blocks(
    x: jax.Array, levels: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """x [..., in], levels [out, in] or packed [out, in / 2], scale [out] or [out, groups],
    offset like scale -> [..., out] float32."""
    rows = x.reshape(-1, x.shape[-1]).astype(scale.dtype).astype(jnp.float32)
    n_out = len(levels)
    size = next(b for b in range(max(1, min(n_out, BLOCK // x.shape[-1])), 0, -1) if n_out % b == 0)
    if size * x.shape[-1] < BLOCK // 16:  # no suitable divisor: all at once
        size = n_out

    def product(block: Any) -> jax.Array:  # [size, N]
        weight = dequantize(block[0], block[1], jnp.float32, offset=block[2])
        return jnp.einsum("oi,ni->on", weight, rows, precision=precision(jnp.float32))

    blocks = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), (levels, scale, offset))
    y = jax.lax.map(product, blocks) if size < n_out else product((levels, scale, offset))
    return y.reshape(n_out, -1).T.reshape(*x.shape[:-1], n_out)


def _scan_groups(
    x: jax.Array, levels: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """x [N, groups, size] and a weight as in _grouped_product -> [N, out] float32, group by group."""
    x = x.astype(scale.dtype).astype(jnp.float32).swapaxes(0, 1)

    def add(y: jax.Array, group: Any) -> tuple[jax.Array, None]:
        x, levels, scale, offset = group  # [N, size], [size or size / 2, out], [out], [out]
        if levels.dtype == jnp.uint8:
            zero = 8 if offset is None else 0
            inputs = jnp.split(x, 2, axis=1)
            nibbles = unpack_nibbles(levels)
            halves = [(h.astype(jnp.int8) - zero, p) for h, p in zip(nibbles, inputs, strict=True)]
        else:
            halves = [(levels, x)]
        exact = precision(jnp.float32)
        product = sum(jnp.matmul(p, h.astype(jnp.float32), precision=exact) for h, p in halves)
        y += product * scale.astype(jnp.float32)
        if offset is not None:
            y += x.sum(1, keepdims=True) * offset.astype(jnp.float32)
        return y, None

    zeros = jnp.zeros((x.shape[1], levels.shape[2]), jnp.float32)
    return jax.lax.scan(add, zeros, (x, levels, scale, offset))[0]


# --- products with groups ----------------------------------------------------------------------------


def _dequantize_and_multiply(
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
    """x [N, groups, size], weight [groups, size, out] of one dtype -> [N, out] float32. Gradients
    are products in that dtype too."""
    n = len(x)
    if n == 1 and weight.dtype == jnp.bfloat16 and backend() == "cpu":  # as in _product_bf16
        x = jnp.pad(x, ((0, 1), (0, 0), (0, 0)))
    if _is_few_rows_on_tpu(x):
        return _convolve_groups(x, weight)
    # Contract both axes at once: if they are merged first, XLA on TPU materializes the weights.
    return _einsum_groups("ngi,gio->no", x, weight)[:n]


def _is_few_rows_on_tpu(x: jax.Array) -> bool:
    """Whether x [N, groups, size] has 2 to 64 rows on one TPU chip. Not on a mesh of several, where
    XLA would have to split the convolution over its window."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 < len(x) <= FEW_ROWS and backend() == "tpu" and (mesh.empty or mesh.size == 1)


def _convolve_groups(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`_product_by_groups` as a convolution with one output position, whose window is all groups.

    XLA on TPU turns the product into a convolution too, but one with the groups among the channels. It
    needs the packed weights in another layout, and XLA keeps such a copy of every matrix beside a
    decoding loop.
    """
    y = jax.lax.conv_general_dilated(
        x, weight, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"),
        precision=precision(weight.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip
    return y[:, 0]


def _einsum_groups(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    exact = precision(b.dtype)
    return jnp.einsum(spec, a, b, precision=exact, preferred_element_type=jnp.float32)


def _product_by_groups_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, Residuals]:
    return _product_by_groups(x, weight), (x, weight)


def _product_by_groups_backward(residuals: Residuals, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = residuals
    dy = dy.astype(weight.dtype)
    dx = _einsum_groups("no,gio->ngi", dy, weight)
    return dx.astype(x.dtype), _einsum_groups("no,ngi->gio", dy, x).astype(weight.dtype)


_product_by_groups.defvjp(_product_by_groups_forward, _product_by_groups_backward)


def _einsum_bf16(spec: str, a: jax.Array, b: jax.Array, out: jnp.dtype) -> jax.Array:
    # XLA on CPU has bfloat16 kernels only for products accumulated and returned in float32; others
    # become float32 products of converted weights (7 times slower for 11008 x 4096).
    accumulate = jnp.float32 if backend() == "cpu" else out
    return jnp.einsum(spec, a, b, preferred_element_type=accumulate).astype(out)


def _plain_product_bf16(x: jax.Array, weight: jax.Array, out: jnp.dtype) -> jax.Array:
    """x [..., in], weight [out, in], both bfloat16 -> [..., out]."""
    rows = x.reshape(-1, x.shape[-1])  # with more axes, XLA on CPU transposes the weights
    n = rows.shape[0]
    if n == 1 and out == jnp.float32 and backend() == "gpu":
        # XLA would convert the whole matrix (the logits of a prompt's last token) to float32 in memory.
        y = jnp.sum(weight.astype(out) * rows.astype(out), axis=1)
        return y.reshape(*x.shape[:-1], -1)
    if n == 1 and backend() == "cpu":  # there is no bfloat16 kernel for a single row either
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    y = _einsum_bf16("ni,oi->no", rows, weight, out)
    return y[:n].reshape(*x.shape[:-1], -1)


# Gradients are bfloat16 products too; autodiff of a product that returns float32 would not give that.
_product_bf16 = partial(jax.custom_vjp, nondiff_argnums=(2,))(_plain_product_bf16)


def _product_bf16_forward(
    x: jax.Array, w: jax.Array, out: jnp.dtype
) -> tuple[jax.Array, Residuals]:
    # Not _product_bf16: a checkpoint policy does not see the product inside a custom_vjp.
    return _plain_product_bf16(x, w, out), (x, w)


def _product_bf16_backward(
    out: jnp.dtype, residuals: Residuals, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = residuals
    dy = dy.astype(weight.dtype)
    dx = _einsum_bf16("...o,oi->...i", dy, weight, x.dtype)
    return dx, _einsum_bf16("...o,...i->oi", dy, x, weight.dtype)


_product_bf16.defvjp(_product_bf16_forward, _product_bf16_backward)
