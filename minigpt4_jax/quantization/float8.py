"""Products of frozen weights in float8, for training: e4m3 weights and activations, sums in float32.

A weight has a scale per output channel, made once when it is loaded, and its input one per row, made in
every step: the largest value of each becomes the largest of e4m3 (FP8 formats paper, Micikevicius et al.
2022, section 3). The gradient of the input is such a product too, of the output's gradient in e4m3, with
a scale per row; there is none of the weight, which is frozen. (With the gradient in e5m2 it is less exact, in
bfloat16 hardly more exact: benchmarks/RESULTS.md.)

On NVIDIA GPUs from Ada on (compute capability 8.9) XLA makes cuBLASLt's float8 products of them. Elsewhere
the same rounded factors are multiplied in the scale's dtype, which is exact up to the order of sums.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from minigpt4_jax.quantization.schemes import FLOAT8_DTYPE, FLOAT8_MAX
from minigpt4_jax.utils.platform import backend, compute_capability

SMALLEST = 1e-30  # of a row's largest value, so that a row of zeros can be divided by its scale
Residuals = tuple[jax.Array, jax.Array]  # weight and scale, for the backward pass


def has_float8_products() -> bool:
    """Whether the device that programs are traced for multiplies float8."""
    return backend() == "gpu" and compute_capability() >= (8, 9)


def _multiply(spec: str, x: jax.Array, weight: jax.Array, dtype: Any, out: Any) -> jax.Array:
    """The einsum of two matrices of e4m3, in `out`: bfloat16 or float32. dtype: of the factors where there
    are no float8 products."""
    if has_float8_products():
        float8: Any = jax.lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32
        return jnp.einsum(spec, x, weight, precision=float8, preferred_element_type=out)
    accumulate = jnp.float32 if backend() == "cpu" else out  # see matmul._einsum_bf16
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    x, weight = x.astype(dtype), weight.astype(dtype)
    y = jnp.einsum(spec, x, weight, precision=exact, preferred_element_type=accumulate)
    return y.astype(out)


def _round_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [N, K] -> (e4m3 [N, K], scale [N, 1] float32)."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    scale = jnp.maximum(largest, SMALLEST) / FLOAT8_MAX
    return (x / scale).astype(FLOAT8_DTYPE), scale


def _plain_product(x: jax.Array, weight: jax.Array, scale: jax.Array, out: Any) -> jax.Array:
    """x [..., in], weight [out, in] in e4m3, scale [out] -> [..., out] in `out`."""
    rows, row_scale = _round_rows(x.reshape(math.prod(x.shape[:-1]), -1))
    y = _multiply("ni,oi->no", rows, weight, scale.dtype, out)
    y = y.astype(jnp.float32) * row_scale * scale.astype(jnp.float32)
    return y.astype(out).reshape(*x.shape[:-1], -1)


float8_product = partial(jax.custom_vjp, nondiff_argnums=(3,))(_plain_product)


def _forward(
    x: jax.Array, weight: jax.Array, scale: jax.Array, out: Any
) -> tuple[jax.Array, tuple[Residuals, jax.Array]]:
    # Not float8_product: a checkpoint policy does not see the product inside a custom_vjp.
    return _plain_product(x, weight, scale, out), ((weight, scale), jnp.zeros((0,), x.dtype))


def _backward(
    out: Any, residuals: tuple[Residuals, jax.Array], dy: jax.Array
) -> tuple[jax.Array, None, None]:
    (weight, scale), like_x = residuals
    rows = dy.reshape(math.prod(dy.shape[:-1]), -1).astype(jnp.float32)
    rows, row_scale = _round_rows(rows * scale.astype(jnp.float32))
    dx = _multiply("no,oi->ni", rows, weight, scale.dtype, scale.dtype)
    dx = dx.astype(jnp.float32) * row_scale
    return dx.astype(like_x.dtype).reshape(*dy.shape[:-1], -1), None, None


float8_product.defvjp(_forward, _backward)
