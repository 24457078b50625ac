"""What every network here is made of: linear maps, norms, attention, and the drivers of a block stack.

Axes: B batch, I images, P visual tokens per image, T sequence, S cache length, D width, F FFN,
N query heads, K key/value heads, H head dim, L layers, V vocabulary. Weights are [out, in].
A matrix product runs in the dtype of its weight; norms and softmax run in float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.quant import dequantize
from minigpt4_jax.sharding import ROWS, constrain
from minigpt4_jax.topology import backend

FEW_ROWS = 64  # a product of so many rows, as of a decoding batch, is bound by reading its weights


MANY_QUERIES = 1024  # causal attention to more than these is computed
QUERY_BLOCK = 256  # by blocks of these


def _precision(dtype: jnp.dtype) -> jax.lax.Precision:
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
    scale, offset: of a weight as `quant` holds it; the product is then in the scale's dtype.
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
    precision = _precision(weight.dtype)
    n = math.prod(x.shape[:-1])
    if 1 < n <= FEW_ROWS and backend() == "cpu":
        # XLA on CPU reads the weights 2 to 4 times as fast when they come first, and the barrier keeps
        # it from turning the product round again.
        y = jnp.einsum("oi,ni->on", weight, x.reshape(n, -1), precision=precision)
        y = jax.lax.optimization_barrier(y)
        return y.T.reshape(*x.shape[:-1], -1)
    return jnp.einsum("...i,oi->...o", x, weight, precision=precision)


def _quantized_product(
    x: jax.Array, levels: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """x [..., in] and a weight [out, in] as `quant` holds it -> [..., out] float32."""
    # Tied together: XLA would convert weights that a decoding loop does not change before the loop,
    # and keep them all as floats.
    x, levels = jax.lax.optimization_barrier((x, levels))
    if scale.ndim == 1:  # a channel's scale can wait until its sum is there
        return linear(x, levels.astype(scale.dtype), out=jnp.float32) * scale.astype(jnp.float32)
    return linear(x, dequantize(levels, scale, scale.dtype, offset=offset), out=jnp.float32)


def _einsum_bf16(spec: str, a: jax.Array, b: jax.Array, out: jnp.dtype) -> jax.Array:
    # XLA on CPU has bfloat16 kernels only for products that are summed and returned in float32;
    # others become float32 products of converted weights (7 times slower on 11008 x 4096).
    kept = jnp.float32 if backend() == "cpu" else out
    return jnp.einsum(spec, a, b, preferred_element_type=kept).astype(out)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_bf16(x: jax.Array, weight: jax.Array, out: jnp.dtype) -> jax.Array:
    """x [..., in], weight [out, in], both bfloat16. Its gradients are bfloat16 products too, which
    autodiff of a product that returns float32 would not make."""
    rows = x.reshape(-1, x.shape[-1])  # with more axes, XLA on CPU transposes the weights
    n = rows.shape[0]
    if n == 1 and backend() == "cpu":  # nor has it a kernel for a single row
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    y = _einsum_bf16("ni,oi->no", rows, weight, out)
    return y[:n].reshape(*x.shape[:-1], -1)


def _product_bf16_forward(x: jax.Array, w: jax.Array, out: jnp.dtype) -> tuple[jax.Array, tuple]:
    return _product_bf16(x, w, out), (x, w)


def _product_bf16_backward(
    out: jnp.dtype, kept: tuple, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    dy = dy.astype(weight.dtype)
    dx = _einsum_bf16("...o,oi->...i", dy, weight, x.dtype)
    return dx, _einsum_bf16("...o,...i->oi", dy, x, weight.dtype)


_product_bf16.defvjp(_product_bf16_forward, _product_bf16_backward)


class Linear(nnx.Module):
    """A linear map, initialized as torch.nn.Linear is: uniform within 1 / sqrt(in).

    Quantized (minigpt4_jax/quant.py), `weight` holds levels and `weight_scale` is there, and
    `weight_offset` where its blocks have one.
    """

    def __init__(self, n_in: int, n_out: int, *, bias: bool = True, rngs: nnx.Rngs):
        def uniform(*shape: int) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, minval=-(n_in**-0.5), maxval=n_in**-0.5)

        self.weight = nnx.Param(uniform(n_out, n_in))
        self.weight_scale: nnx.Param | None = nnx.data(None)
        self.weight_offset: nnx.Param | None = nnx.data(None)
        self.bias = nnx.Param(uniform(n_out)) if bias else None

    def __call__(self, x: jax.Array, bias: jax.Array | None = None, out: Any = None) -> jax.Array:
        """x [..., in] -> [..., out]. bias: in place of this map's own; out: as in `linear`."""
        if bias is None and self.bias is not None:
            bias = self.bias[...]
        scale = None if self.weight_scale is None else self.weight_scale[...]
        offset = None if self.weight_offset is None else self.weight_offset[...]
        return linear(x, self.weight[...], bias, out, scale, offset)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, in float32 whatever comes in. [..., D] -> [..., D] float32."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32. [..., D] -> [..., D] float32."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x * self.scale[...].astype(jnp.float32)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU, in float32, returned in x's dtype."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    causal: bool = False,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H]; softmax in float32.

    lengths [B]: keys at and after a row's length are not seen. mask [B, 1, T, S]: True is seen.
    segments [B, T = S], in place of both: a query sees the keys of its own segment.
    window: with causal, a query sees itself and the window - 1 keys before it.
    """
    if causal and segments is None and mask is None and q.shape[1] > MANY_QUERIES:
        return _attention_by_blocks(q, k, v, scale, lengths, window)
    if segments is not None:
        mask, lengths = segments[:, None, :, None] == segments[:, None, None, :], None
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=scale, is_causal=causal,
            key_value_seq_lengths=lengths,
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip


def _attention_by_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    lengths: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Causal `attention`, some queries after others: all scores [B, N, T, S] at once would be by far
    the largest array of a long prefill."""
    b, t, n, h = q.shape
    count = -(-t // QUERY_BLOCK)
    q = jnp.pad(q, ((0, 0), (0, count * QUERY_BLOCK - t), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(q.reshape(b, count, QUERY_BLOCK, n, h), 1, 0)
    keys = jnp.arange(k.shape[1])

    def one(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, first = block
        at = first + jnp.arange(QUERY_BLOCK)[:, None]
        seen = keys <= at
        if window is not None:
            seen &= keys > at - window
        return attention(q, k, v, scale=scale, lengths=lengths, mask=seen[None, None])

    y = jax.lax.map(one, (blocks, jnp.arange(count) * QUERY_BLOCK))
    return jnp.moveaxis(y, 0, 1).reshape(b, -1, n, h)[:, :t]


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    seen: jax.Array,
    *,
    scale: float,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
) -> jax.Array:
    """Attention to a cache: q [B, T, N, H], keys and values [B, K, S, H], seen [B, T, S] (True is
    seen) -> [B, T, N, H]. Head after head, as the cache lies in memory, so nothing is transposed.

    key_scale, value_scale [B, K, S]: factors that keys and values are yet to be multiplied by.
    """
    b, t, n, h = q.shape
    k, s = keys.shape[1:3]
    precision = _precision(keys.dtype)
    q = q.astype(keys.dtype).reshape(b, t, k, n // k, h).transpose(0, 2, 1, 3, 4)
    scores = jnp.einsum(
        "bkqh,bksh->bkqs", q.reshape(b, k, -1, h), keys, precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    if key_scale is not None:
        scores *= key_scale[:, :, None, :]
    scores = (scores * scale).reshape(b, k, t, n // k, s)
    scores = jnp.where(seen[:, None, :, None, :], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).reshape(b, k, -1, s)
    if value_scale is not None:
        probs *= value_scale[:, :, None, :]
    y = jnp.einsum(
        "bkqs,bksh->bkqh", probs.astype(values.dtype), values, precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return y.reshape(b, k, t, n // k, h).transpose(0, 2, 1, 3, 4).reshape(b, t, n, h)


def take_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of table [V, D] at index [...] -> [..., D]."""
    # Tied together, so that XLA on CPU, which gathers bfloat16 in float32, converts the rows it
    # takes; of a table that a loop does not change it would keep a float32 copy.
    table, index = jax.lax.optimization_barrier((table, index))
    return table[index]


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` layers as one module whose parameters carry a leading axis [L, ...], for `scan_layers`."""
    keys = jax.random.split(rngs.params(), depth)
    states = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(params=key)))[1])(keys)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))), states)


def run_layers(
    layers: Any,
    x: Any,
    step: Callable[[Any, Any], tuple[Any, Any]],
    *,
    remat: bool = False,
) -> tuple[Any, Any]:
    """Apply layers in order: `step(layer, x) -> (x, extra)`; x is an array or a tuple of them.

    Stacked layers (from `stack_layers`) run as one `lax.scan`, extras come back stacked [L, ...];
    an nnx.List runs unrolled, extras come back as a list. For the backward pass a stacked layer keeps
    the results of its weight products alone and computes norms, attention and activations again:
    half the memory, and faster than reading them back. remat: keep a layer's input only.
    On a mesh, the arrays [B, ...] of x are split by rows from layer to layer.
    """

    def rows(x: Any) -> Any:
        return jax.tree.map(lambda a: constrain(a, ROWS) if a.ndim else a, x)

    def split(layer: Any, x: Any) -> tuple[Any, Any]:
        x, extra = step(layer, rows(x))
        return rows(x), extra

    if isinstance(layers, nnx.List):
        body = jax.checkpoint(split) if remat else split
        extras = []
        for layer in layers:
            x, extra = body(layer, x)
            extras.append(extra)
        return x, extras
    graphdef, state = nnx.split(layers)

    def scanned(x: Any, layer_state: Any) -> tuple[Any, Any]:
        return split(nnx.merge(graphdef, layer_state), x)

    keep = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # A scan's body cannot be merged with its recomputation, so nothing needs to prevent that.
    return jax.lax.scan(jax.checkpoint(scanned, policy=keep, prevent_cse=False), x, state)
